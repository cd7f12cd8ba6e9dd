"""What a pass is: options as fields, and four methods that the base class calls in order.

``requires`` raises where the pass is not applicable at all; ``plan`` is pure and says what will be done and what will
not, and why; ``apply`` is the only mutation; ``ensures`` checks what the pass promises. A pass states what it adds to
the :class:`State`; it never prints. Long work is told through ``State.progress``.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from liar_opt.frontend.either_model import engine_of
from liar_opt.frontend.engine import Engine
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.groups import Refusal
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import GroupFault, InternalError, LiarOptError, OptionError
from liar_opt.runtime.memory import Memory

Progress = Callable[[str, int, int], None]
"""Called with a stage, the steps done and the steps in all."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignores progress."""


@dataclass(frozen=True)
class Change:
    """One thing that a pass did: ``where`` (a node or a group), ``what``, the size before and after, and details."""

    what: str
    where: str
    before: int = 0
    after: int = 0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What one pass finds and others read: a subclass for each thing, asked for by its type (:meth:`State.found`)."""

    by: ClassVar[str] = ""
    """What adds it, for the error where it is missing: the name of a pass, or of a function."""


FindingT = TypeVar("FindingT", bound=Finding)


@dataclass(frozen=True)
class Opened(Finding):
    """The model as it was opened.

    Attributes:
        sizes: its parameters, bytes of weights and nodes.
        digest: the SHA-256 of its file; None where it came from memory or from a folder.
    """

    by: ClassVar[str] = "load_state"
    sizes: dict[str, int]
    digest: Future[str] | None = None


@dataclass(frozen=True, eq=False)
class DenseModel(Finding):
    """The model as it came."""

    by: ClassVar[str] = "load_state"
    original: Original

    @property
    def stored(self) -> OnnxOriginal:
        """The file, of an ONNX model."""
        assert isinstance(self.original, OnnxOriginal)
        return self.original


@dataclass(frozen=True, eq=False)
class WholeModel(Finding):
    """The model before experts or blocks of it went, which a result is compared with; ``DenseModel`` is what is left of it.

    Attributes:
        original: the model.
        data: its calibration data, as it was read.
        prunable: parameters of all its widths that may be cut.
        names: what it calls the outputs of what is left; empty where they are the same.
        went: what went, in words: "experts", "blocks".
        changes: the same, as a result lists it.
        refusals: what of the kind did not qualify.
        added: parameters of what stands where something went.
    """

    by: ClassVar[str] = "without_parts"
    original: Original
    data: CalibrationData
    prunable: int
    names: Mapping[str, str] = field(default_factory=dict)
    went: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    added: int = 0


@dataclass(frozen=True)
class OutputNames(Finding):
    """What a module calls its outputs, by the tensor of its graph."""

    by: ClassVar[str] = "load_module_state"
    by_tensor: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Probes(Finding):
    """Inputs on which cuts are rehearsed, of a model for which none can be made up."""

    by: ClassVar[str] = "load_module_state"
    feeds: tuple[dict[str, Any], ...]


@dataclass
class State:
    """What flows through the pipeline: the model, and what each pass has added.

    A pass adds what only some others read as a :class:`Finding`.
    """

    model: Model
    calibration: CalibrationData | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    progress: Progress = no_progress
    walk: GraphWalk | None = None
    groups: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()
    queries: tuple[Any, ...] = ()
    keep: dict[str, int] = field(default_factory=dict)
    repairs: list[Any] = field(default_factory=list)
    _findings: dict[type[Finding], Finding] = field(default_factory=dict, init=False, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: Memory = field(default_factory=lambda: Memory.of(None))
    checkpoint: Any = None
    fresh: bool = False

    def engine(self) -> Engine:
        """Returns what runs the model."""
        return engine_of(self.model, self.device, self.memory.low)

    def as_it_came(self) -> Original:
        """Returns the model as its user gave it, with the blocks and experts that went before the rest of the work."""
        return (self.get(WholeModel) or self.found(DenseModel)).original

    def analysed(self) -> GraphWalk:
        """Returns the analysis, which a pass before must have made."""
        if self.walk is None:
            raise InternalError("the graph was not analysed; run find-groups first")
        return self.walk

    def add(self, *findings: Finding) -> None:
        """Notes what was found, in place of what is there of its type."""
        self._findings |= {type(finding): finding for finding in findings}

    def get(self, kind: type[FindingT]) -> FindingT | None:
        """Returns what was found of a type; None where nothing was."""
        finding = self._findings.get(kind)
        return finding if isinstance(finding, kind) else None

    def found(self, kind: type[FindingT]) -> FindingT:
        """Returns what was found of a type.

        Raises:
            InternalError: nothing was; the message says what must run before.
        """
        finding = self.get(kind)
        if finding is None:
            raise InternalError(f"there is no {kind.__name__}; run {kind.by} first")
        return finding

    def inherit(self, other: "State", *kinds: type[Finding]) -> None:
        """Takes over what ``other`` has found of some types."""
        self._findings |= {kind: finding for kind, finding in other._findings.items() if kind in kinds}


@dataclass(frozen=True)
class PassResult:
    """The state, what was done and what was not."""

    state: State
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()


Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Pass(ABC, Generic[Plan]):
    """A step of the pipeline; subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str] = ""

    def requires(self, state: State) -> None:
        """Raises where the pass is not applicable at all."""

    @abstractmethod
    def plan(self, state: State) -> Plan:
        """Returns what will be done; pure."""

    @abstractmethod
    def apply(self, state: State, plan: Plan) -> PassResult:
        """Does it."""

    def ensures(self, state: State) -> None:
        """Raises where the pass did not keep its promise."""

    def __call__(self, state: State) -> PassResult:
        """Runs the four methods in order."""
        self.requires(state)
        result = self.apply(state, self.plan(state))
        self.ensures(result.state)
        return result


Observer = Callable[[Pass[Any], PassResult], None]


@dataclass(frozen=True)
class Analysis(Finding):
    """How a copy of the model is analysed: the passes, and what they read of the first state."""

    by: ClassVar[str] = "prune"
    passes: tuple[Pass[Any], ...]
    reads: tuple[type[Finding], ...] = ()


@dataclass(frozen=True)
class Pipeline(Pass[None]):
    """Passes in sequence; itself a pass. An observer is called after each."""

    name: ClassVar[str] = "pipeline"
    passes: Sequence[Pass[Any]] = ()
    observer: Observer | None = None

    def plan(self, state: State) -> None:
        """Plans nothing: each pass plans when its turn comes."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Runs the passes; a bug in one is reported with its name and those before it.

        Raises:
            OptionError: the memory did not do.
            InternalError: what a pass raises that is not meant for the user.
        """
        changes: list[Change] = []
        refusals: list[Refusal] = []
        done: list[str] = []
        for step in self.passes:
            start = time.perf_counter()
            try:
                result = step(state)
            except (LiarOptError, GroupFault, KeyboardInterrupt, OSError):
                raise
            except MemoryError as err:
                raise OptionError(
                    f"pass {step.name} ran out of memory ({err or 'there is no more'}); give smaller batches (batch-size) "
                    "or fewer samples"
                ) from err
            except Exception as err:
                before = f" after {', '.join(done)}" if done else ""
                raise InternalError(f"pass {step.name} failed{before}: {err}") from err
            state = result.state
            state.seconds[step.name] = state.seconds.get(step.name, 0.0) + time.perf_counter() - start
            changes += result.changes
            refusals += result.refusals
            done.append(step.name)
            if self.observer is not None:
                self.observer(step, result)
        return PassResult(state, tuple(changes), tuple(refusals))
