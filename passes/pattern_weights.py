"""Zeros in a pattern inside the weights of linear layers, which keep their shape, solved layer by layer.

The sweep is the one that widths are cut in: a layer is solved on the inputs that it will see, with the layers before it as
they are by then. Solvers that correct what these have changed get the output of the model as it was, too
(`passes.dense_target`). A weight that several nodes read has one pattern, by the moments of all that it reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import Narrow
from liar_opt.frontend.onnx_segments import Place, place_of
from liar_opt.frontend.pattern_places import LeftDense, PatternPlace, find_places
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import Change, DenseModel, Finding, Pass, PassResult, State
from liar_opt.passes.dense_target import DenseTargets
from liar_opt.passes.groups import PATTERN, UNCUT, ChannelGroup, Consumer, Refusal
from liar_opt.passes.registry import lookup
from liar_opt.passes.sweep import Sweep, Visitor
from liar_opt.runtime.errors import CheckError, InternalError, ModelError, OptionError
from liar_opt.runtime.moments import FoldName, Moments
from liar_opt.runtime.patterns import CORRECTED, RIDGE, SOLVERS, Layer, Pattern

DEFAULT_SOLVER = "sparsegpt"
FASTER = 0.03
"""What the time has to change by, beside twice its standard error, for the zeros to be the reason."""


@dataclass(frozen=True)
class PatternedWeight:
    """One weight, as the report has it.

    Attributes:
        weight: its name.
        nodes: that read it.
        shape: which it keeps.
        zeros: share of it.
        by: the solver; of one that keeps the better of several, which that was.
        error: E|y - x V|^2 relative to E|y|^2, on the inputs x that it sees; y is what the weight gives there, or, where
            the solver corrects the layers before, what it gave on the inputs that it had.
    """

    weight: str
    nodes: list[str]
    shape: list[int]
    zeros: float
    by: str
    error: float


@dataclass(frozen=True)
class Patterned(Finding):
    """What was done, as the report has it.

    Attributes:
        pattern: as it was asked for.
        solver: likewise.
        zeros: share of all weights that have the pattern.
        share: of all parameters of the model, what is zero in them.
        weights: in the graph's order.
        speedup: how many times as fast the zeros alone make it where it was timed; None where that was not measured.
        speed: a sentence on that.
    """

    by: ClassVar[str] = "pattern-weights"
    pattern: str
    solver: str
    zeros: float
    share: float
    weights: list[PatternedWeight]
    speedup: float | None = None
    speed: str | None = None


@dataclass(frozen=True)
class PatternWeightsPass(Pass[tuple[PatternPlace, ...]]):
    """Put zeros into weights, in a pattern, and solve for those that stay.

    Attributes:
        pattern: zeros in weights that keep their shape: N:M keeps N of each M inputs of an output (2:4), blocks=RxC:RATIO
            clears blocks of R outputs and C inputs, RATIO a share of each weight. Behind widths, where these are cut, too.
        pattern_solver: which weights become zero, and what the others become (docs/patterns.md).
        ridge: relative ridge; None takes 0.01.
        weighting: of the calibration rows; see ``prune-groups``.
        seed: for all that is drawn.
    """

    name: ClassVar[str] = "pattern-weights"
    pattern: str = ""
    pattern_solver: str = DEFAULT_SOLVER
    ridge: float | None = None
    weighting: str = "stream"
    seed: int = 0

    def requires(self, state: State) -> None:
        """Checks the options and that weights fit the pattern.

        Raises:
            ModelError: no weight can have one.
            OptionError: it is not understood, there is no such solver, or a weight does not fit.
        """
        pattern = Pattern.parse(self.pattern)
        lookup("pattern-solver", SOLVERS, self.pattern_solver)
        require_ridge(self.ridge)
        require_fitting(state.analysed(), pattern)

    def plan(self, state: State) -> tuple[PatternPlace, ...]:
        """Returns the weights."""
        return find_places(state.analysed())[0]

    def apply(self, state: State, plan: tuple[PatternPlace, ...]) -> PassResult:
        """Measures and solves segment by segment; adds a ``Patterned``.

        Raises:
            CheckError: a weight has numbers outside its pattern, or another one was changed.
        """
        walk, engine = state.analysed(), state.engine()
        state.model.settle()
        others = _others(state, plan)
        sweep = Sweep(state, "pattern", self.weighting, self.seed)
        targets = DenseTargets(sweep, "dense") if self.pattern_solver in CORRECTED else None
        visitor = MakePatterns(sweep, self, targets)
        sweep.over(visitor, input_groups(walk, plan))
        now = _others(state, plan)
        if others.keys() != now.keys() or not all(_same(now[name], value) for name, value in others.items()):
            raise CheckError("a weight that has no pattern was changed; please report it as a bug")
        engine.require_form(state.found(DenseModel).original, state.model, walk.spared)
        for place in plan:
            _require_pattern(place, visitor.pattern)
        done = sorted(visitor.done, key=lambda entry: [p.name for p in plan].index(entry.weight))
        sizes = [int(np.prod(entry.shape)) for entry in done]
        zeros = sum(size * entry.zeros for size, entry in zip(sizes, done, strict=True))
        share = zeros / (state.model.parameters() or 1)
        state.add(Patterned(self.pattern, self.pattern_solver, zeros / (sum(sizes) or 1), share, done))
        changes = [
            Change("zeros", e.weight, n, n - round(n * e.zeros), {"by": e.by}) for n, e in zip(sizes, done, strict=True)
        ]
        return PassResult(state, tuple(changes), left_dense(walk))


def require_ridge(ridge: float | None) -> None:
    """Checks the relative ridge.

    Raises:
        OptionError: it is negative or no number.
    """
    if ridge is not None and not ridge >= 0:
        raise OptionError(f"ridge {ridge:g} is negative; give 0 or more, or leave it out for {RIDGE}")


def require_fitting(walk: GraphWalk, pattern: Pattern, groups: Sequence[ChannelGroup] = ()) -> None:
    """Checks that there are weights for a pattern, and that it divides them and clears some of their numbers.

    Args:
        walk: the analysed model.
        pattern: what is asked for.
        groups: whose widths will be cut first: the axes that have them are looked at when they are.

    Raises:
        ModelError: there are none.
        OptionError: one does not fit, or all keep all their numbers.
    """
    places, left = find_places(walk)
    if not places:
        why = f": {left[0].reason} ('{left[0].name}')" if left else ""
        raise ModelError(f"no weight of the model can have a pattern{why}; leave pattern out")
    some = False
    for place in places:
        narrower = _narrower(place, groups)
        inputs, outputs = pattern.inputs if narrower[0] else place.inputs, pattern.rows if narrower[1] else place.outputs
        misfit = pattern.misfit(inputs, outputs)
        cleared = pattern.ratio if misfit is not None or any(narrower) else pattern.cleared(inputs, outputs)
        some |= cleared > 0.0
        if cleared == 1.0:
            misfit = f"of {inputs} x {outputs} numbers it would leave none"
        if misfit is not None:
            raise OptionError(
                f"pattern {pattern.text} does not fit weight '{place.name}' (node '{place.uses[0].node.name}'): {misfit}; "
                f"give another pattern, or a {'smaller ' if cleared == 1.0 else ''}RATIO, which fits all"
            )
    if not some:
        raise OptionError(f"pattern {pattern.text} is less than one number or block of every weight; give a larger ratio")


def _narrower(place: PatternPlace, groups: Sequence[ChannelGroup]) -> tuple[bool, bool]:
    """Returns whether a weight's inputs, and its outputs, are of groups whose widths will be cut."""
    use = place.uses[0]
    weight = use.holder.inputs[use.weight_position]
    inputs = outputs = False
    for group in groups:
        read = any(u.holder.inputs[u.weight_position] is weight for c in group.consumers for u in c.uses)
        inputs |= read
        outputs |= id(weight) in group.constants and not read
    return inputs, outputs


def left_dense(walk: GraphWalk) -> tuple[Refusal, ...]:
    """Returns which weights have no pattern, and why; embeddings, which no product reads, are not listed."""
    found: dict[str, list[LeftDense]] = {}
    for left in find_places(walk)[1]:
        found.setdefault(left.reason, []).append(left)
    return tuple(
        Refusal(f"no pattern: {reason}", tuple(n for left in some for n in left.nodes), sum(left.size for left in some))
        for reason, some in found.items()
    )


def input_groups(walk: GraphWalk, places: Sequence[PatternPlace]) -> tuple[ChannelGroup, ...]:
    """Returns what is measured together: weights that read one tensor, or are read beside one that does."""
    order = {id(n): i for i, n in enumerate(walk.model.graph.nodes)}
    joined: list[tuple[set[str], list[PatternPlace]]] = []
    for place in places:
        read, members = {str(u.activation.name) for u in place.uses}, [place]
        apart = []
        for tensors, some in joined:
            if tensors.isdisjoint(read):
                apart.append((tensors, some))
            else:
                read, members = read | tensors, some + members
        joined = [*apart, (read, members)]
    groups = []
    for _, members in joined:
        nodes = sorted(order[id(u.node)] for place in members for u in place.uses)
        consumers = []
        for place in members:
            # The two branches of a merged decoder read the same tokens, and one of them with nothing in its cache.
            first = [] if walk.of_first is None else [u for u in place.uses if id(u.node) in walk.of_first]
            consumers.append(Consumer(place.uses, np.zeros(place.inputs, np.int64), measured_uses=tuple(first)))
        size = sum(place.inputs * place.outputs for place in members)
        name = members[0].uses[0].node.name
        groups.append(ChannelGroup(name, PATTERN, UNCUT, 1, tuple(consumers), size, nodes[0], nodes[-1]))
    return tuple(sorted(groups, key=lambda group: group.start))


class MakePatterns(Visitor):
    """Solves for each weight of a group and writes it.

    Args:
        sweep: the graph and its data.
        options: pattern and solver.
        targets: outputs of the model as it was; None where the solver does not ask for them.
    """

    cuts = True

    def __init__(self, sweep: Sweep, options: PatternWeightsPass, targets: DenseTargets | None) -> None:
        self.sweep, self.options, self.targets = sweep, options, targets
        self.pattern, self.solve = Pattern.parse(options.pattern), SOLVERS[options.pattern_solver]
        self.ridge = RIDGE if options.ridge is None else options.ridge
        self.done: list[PatternedWeight] = []

    def before(self, groups: Sequence[ChannelGroup], stop: int, first: Any) -> None:
        """Measures the dense targets, where there are any."""
        if self.targets is not None:
            self.targets.measure(groups, stop, first)

    def group(self, group: ChannelGroup, moments: Mapping[Place, Moments]) -> None:
        """Solves for the weights that read one tensor."""
        for consumer in group.consumers:
            use = consumer.uses[0]
            old = np.asarray(use.node.inputs[use.weight_position].values)
            layer = self.layer(consumer, use.matrix(old).astype(np.float64), moments)
            try:
                solved = self.solve(layer, self.pattern, self.ridge)
            except np.linalg.LinAlgError as err:
                raise OptionError(
                    f"the calibration data does not say what weight '{use.weight.name}' should be at ridge {self.ridge:g}; "
                    f"give a larger ridge (leave it out for {RIDGE}) or more samples"
                ) from err
            weight = use.laid_out(solved.weight, old.shape).astype(old.dtype)
            if not np.isfinite(weight).all():
                raise ModelError(f"weight '{use.weight.name}' overflows {old.dtype} behind the pattern; use float32")
            places = [(u.node, u.weight_position) for u in consumer.uses]
            written = self.sweep.rewriter.set_constant(places, weight)
            nodes = list(dict.fromkeys(u.node.name for u in consumer.uses))
            zeros, error = float(np.mean(weight == 0)), layer.error(solved.weight)
            self.done.append(PatternedWeight(written.name, nodes, list(old.shape), zeros, solved.by, error))

    def layer(self, consumer: Consumer, weight: NDArray[np.float64], moments: Mapping[Place, Moments]) -> Layer:
        """Returns a weight with the moments of all that it reads, and with the dense target where there is one."""
        found = None if self.targets is None else self.targets.of(consumer)
        aimed = found is not None
        for use in () if found is not None else consumer.measured:
            own = moments[place_of(use)]
            found = own if found is None else found.merge(own)
        assert found is not None
        pooled = found

        def of(fold: FoldName) -> Layer:
            rows = pooled.statistics(fold)
            if not aimed:
                return Layer(weight, rows.uncentred)
            cross = pooled.cross_statistics(fold)
            about = cross.covariance + np.outer(rows.mean, cross.target_mean)
            return Layer(weight, rows.uncentred, about, cross.target_variance + float(np.square(cross.target_mean).sum()))

        if min(pooled.rows("training"), pooled.rows("held_back")) < 2:
            return of("all")
        return replace(of("all"), folds=(of("training"), of("held_back")))


def _others(state: State, plan: Sequence[PatternPlace]) -> dict[str, Any]:
    """Returns the numbers of all constants, by name, but of the weights that are to have a pattern."""
    own = {id(place.constant) for place in plan}
    return {c.name: c._values for c in state.model.constants() if id(c) not in own}


def _same(now: Any, before: Any) -> bool:
    """Returns whether two forms of a constant's numbers, which may lie in a file yet, are equal."""
    if now is before:
        return True
    left, right = (value if isinstance(value, np.ndarray) else value.load() for value in (now, before))
    return bool(np.array_equal(left, right))


def _require_pattern(place: PatternPlace, pattern: Pattern) -> None:
    """Checks a weight as it is and as it will be written.

    Raises:
        CheckError: it has numbers where there should be zeros.
    """
    constant = place.constant
    stored = constant.stored if isinstance(constant, Narrow) else None
    for value in (constant.values, constant.values if stored is None else stored):
        if not pattern.holds(place.uses[0].matrix(np.asarray(value))):
            raise CheckError(f"weight '{place.name}' has numbers outside pattern {pattern.text}; please report it as a bug")


def planned_pattern(walk: GraphWalk, pattern: Pattern) -> str:
    """Returns a sentence on the weights that would have a pattern."""
    places, _ = find_places(walk)
    if not places:
        raise InternalError("no weight can have a pattern")
    elements = sum(place.inputs * place.outputs for place in places)
    return f"{len(places)} weights, {elements:,} numbers, would have the pattern {pattern.text}"


def timed_alone(done: Patterned, speed: tuple[float, float] | None, device: str) -> Patterned:
    """Returns what was done with what was measured of its speed, (times as fast, its relative standard error)."""
    if speed is None:
        return done
    faster, error = speed
    if abs(faster - 1.0) <= FASTER + 2.0 * error:
        why = "its kernels multiply them like other numbers"
        said = f"the zeros make nothing faster on {device} ({faster:.2f} x as fast): {why}"
    else:
        said = f"with the zeros it is {faster:.2f} x as fast on {device}"
    return replace(done, speedup=faster, speed=said)
