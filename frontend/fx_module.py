"""Torch modules in: a module is traced with ``torch.export`` and lowered to the graph that the passes work on.

:func:`trace` gives an ``ExportedProgram`` in ATen operators, its batch and token axes symbolic where the module allows.
:func:`lower` writes it down with the graph classes of the ONNX frontend: parameters and buffers are constants (views of
the module's own memory, under their qualified names), every ATen call is a node of domain "aten" whose inputs are the
tensors and whose attributes are all other arguments, by their names in the schema. So one analysis, one rewriter and one
search for groups serve both frontends; only the operator table (``rules.aten``) is a second one.

Integers that the program computes from the sizes of its inputs become :class:`Sym`: numbers with the value that they have
under the traced sizes and the expression behind them. :class:`Executor` runs the lowered graph, cut or not, in torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import is_constant, present
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.records import StandIn
from liar_opt.frontend.rules.table import ATEN
from liar_opt.frontend.ties import Taken, freed_reads, tied_reads
from liar_opt.frontend.walk import GraphWalk
from liar_opt.frontend.weight_files import as_bytes
from liar_opt.runtime.errors import InternalError, ModelError
from liar_opt.runtime.signatures import InputSpec

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


BATCH = 3
"""Samples of the example that is traced; its token axes get prime lengths of their own."""


class Sym(int):
    """An integer that depends on the sizes of the program's inputs; as an int it is what the traced sizes give.

    Attributes:
        expression: what it is, in the symbols of the program (sympy).
        node: the name of the FX node that computes it; empty for the size of an input.
    """

    expression: Any
    node: str

    @classmethod
    def of(cls, value: int, expression: Any, node: str) -> Sym:
        """Returns ``value`` with what is behind it."""
        result = cls(value)
        result.expression, result.node = expression, node
        return result

    def __deepcopy__(self, memo: object) -> Sym:
        return self


@dataclass(frozen=True, eq=False)
class Call:
    """How a node of the lowered graph is called.

    Attributes:
        target: the ATen overload (or another callable).
        arguments: (name, kind, keyword only): kind "attribute" is read from the node's attributes, "input" takes the
            next of its inputs, an int takes that many of them as a list.
        path: qualified name of the module in whose forward the call was written.
        attributes: what the attributes were when traced.
        inputs: names of the tensors that were read when traced.
    """

    target: Any
    arguments: tuple[tuple[str, str | int, bool], ...]
    path: str
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]


@dataclass(eq=False)
class FxModel(Model):
    """A traced module, lowered.

    Attributes:
        program: what was traced.
        module: the module itself; its parameters are the graph's constants.
        calls: by node name.
        signature: the inputs with symbolic axes by name.
        symbols: for each symbol of the program an (input, axis) that has its size.
        shapes: of all tensors, as traced.
        trained: names of the module's parameters.
        untouched: elements of the parameters that the trace does not reach.
        results: the tensors among the module's outputs, in order.
        originals: the constants as they were, by name.
        adopted: names of constants that stand in for tensors.
        picked: the tables of several layers of which one takes its own heads (`ties`).
    """

    traced: ClassVar[bool] = True
    program: ExportedProgram | None = None
    module: torch.nn.Module | None = None
    calls: dict[str, Call] = field(default_factory=dict)
    signature: list[InputSpec] = field(default_factory=list)
    symbols: dict[Any, tuple[str, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    untouched: int = 0
    results: list[str] = field(default_factory=list)
    originals: dict[str, np.ndarray] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)
    picked: list[str] = field(default_factory=list)

    @property
    def opset(self) -> int:
        """The traced graph has none; operator rules of ONNX read it."""
        return 0

    def inputs(self) -> list[InputSpec]:
        """Returns the module's tensor inputs, with symbolic axes as strings."""
        return list(self.signature)

    @property
    def device(self) -> Any:
        """The device of the module's parameters."""
        assert self.module is not None
        return next((p.device for p in self.module.parameters()), "cpu")

    def file_bytes(self) -> int:
        """Returns the bytes of all weights."""
        return self.weight_bytes()

    def normalise(self) -> int:
        """Changes nothing: a traced graph is in normal form."""
        return 0

    def loadable(self) -> FxModel:
        """Returns itself."""
        return self

    def pick(self, table: gs.Tensor, taken: Taken, names: Iterator[str]) -> list[gs.Node]:
        """As of :class:`OnnxModel`, in calls of torch."""
        import torch

        def made() -> gs.Variable:
            return gs.Variable(next(names), table.dtype)

        aten, axis, indices = torch.ops.aten, taken.axis, gs.Constant(next(names), taken.kept)
        self.picked.append(table.name)
        if not taken.apart:
            return [self._called(aten.index_select.default, [table, indices], made(), {"dim": axis})]
        parted = self._called(aten.unflatten.int, [table], made(), {"dim": axis, "sizes": [-1, taken.size]})
        picked = self._called(aten.index_select.default, [parted.outputs[0], indices], made(), {"dim": axis + 1})
        ends = {"start_dim": axis, "end_dim": axis + 1}
        return [parted, picked, self._called(aten.flatten.using_ints, [picked.outputs[0]], made(), ends)]

    def _called(
        self, target: Any, inputs: Sequence[gs.Tensor], made: gs.Variable, numbers: Mapping[str, Any] | None = None
    ) -> gs.Node:
        """Returns a call that the trace has not, its tensors and numbers in the order of its schema.

        It has the name of what it makes.
        """
        given = dict(numbers or {})
        schema = [(a.name, "attribute" if a.name in given else "input", False) for a in target._schema.arguments]
        self.calls[made.name] = Call(target, tuple(schema), "", given, ())
        op = str(target._schema.name).partition("::")[2]
        return gs.Node(op, made.name, dict(given), list(inputs), [made], domain=ATEN)

    @property
    def original(self) -> FxOriginal:
        """The module as it was traced."""
        assert self.program is not None and self.module is not None
        return FxOriginal(self.program, self.module, self.source, self.tied)

    def listing(self) -> str:
        """Returns the graph as text, a line for each call."""
        lines = []
        for node in self.graph.nodes:
            read = ", ".join(t.name or "None" for t in node.inputs)
            numbers = ", ".join(f"{k}={v}" for k, v in node.attrs.items() if v not in (None, False))
            made = ", ".join(f"{t.name}{list(t.shape or ())}" for t in node.outputs)
            lines.append(f"{made} = {node.domain}::{node.op}({read}{'; ' if numbers else ''}{numbers})")
        return "\n".join(lines)

    def structure(self) -> bytes:
        """Returns what is known of the module without the data of its weights, and the torch that runs it."""
        import torch

        constants = (f"{c.name} {c.dtype} {c.shape}" for c in self.constants())
        heads = ["heads are tied"] if self.tied else []
        return "\n".join([torch.__version__, str(self.device), self.listing(), *constants, *heads]).encode()

    def adopt(self, constant: gs.Constant) -> None:
        """Counts a new constant among the parameters; it stands in for what the module's own code computes."""
        self.trained |= {constant.name}
        self.adopted.append(constant.name)

    def mapped(
        self, name: str, source: gs.Tensor, weight: np.ndarray, bias: np.ndarray, made: gs.Variable
    ) -> list[gs.Node]:
        """Returns a linear layer in the place of the node that made ``made``."""
        import torch

        parts = gs.Constant(f"{name}_map", np.ascontiguousarray(weight.T)), gs.Constant(f"{name}_bias", bias)
        for part in parts:
            self.adopt(part)
        return [self._called(torch.ops.aten.linear.default, [source, *parts], made)]

    def spread(self, name: str, source: gs.Tensor, bias: gs.Constant, made: gs.Variable) -> list[gs.Node]:
        """Returns the expansion of a constant in the place of the node that made ``made``."""
        import torch

        return [self._called(torch.ops.aten.expand_as.default, [bias, source], made)]

    def parameters(self) -> int:
        """Returns the number of elements of the module's parameters, those that the trace does not reach included."""
        traced = sum(int(np.prod(c.shape, dtype=np.int64)) for c in self.constants() if c.name in self.trained)
        return traced + self.untouched


@dataclass(frozen=True, eq=False)
class FxOriginal(Original):
    """A traced module.

    Attributes:
        program: what was traced.
        module: the module, whose parameters the graphs read.
        source: the folder that it came from.
        tied: whether layers that share a table by heads must keep the same ones: a configuration can say no others.
    """

    program: ExportedProgram
    module: torch.nn.Module
    source: Path | None = None
    tied: bool = False

    def model(self) -> FxModel:
        """Returns the module as a graph."""
        model = lower(self.program, self.module, self.source)
        model.tied = self.tied
        return model

    def as_given(self) -> torch.nn.Module:
        """Returns the module."""
        return self.module

    def digest(self) -> str:
        """Returns the SHA-256 of the graph with all its weights, and of the torch that runs them."""
        model = self.model()
        digest = hashlib.sha256(model.structure())
        for constant in model.constants():
            digest.update(as_bytes(constant.values))
        return digest.hexdigest()


@dataclass
class FxWalk(GraphWalk):
    """The walk over a lowered module: what a rule does not know of shapes the trace does, and every rule is checked."""

    @functools.cached_property
    def inferred(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, as traced."""
        assert isinstance(self.model, FxModel)
        return self.model.shapes

    def consumer(
        self, node: gs.Node, activation: int, activation_axis: int, weight: int, weight_axis: int, **more: Any
    ) -> None:
        """Records a linear contraction; one of a tensor that no input reaches is none: it is the same for all data."""
        if node.inputs[activation].name not in self._driven:
            axes = self.input_axes(node, weight)
            self.pin(axes and axes[weight_axis : weight_axis + 1 or None], f"computed from weights (node '{node.name}')")
            return
        super().consumer(node, activation, activation_axis, weight, weight_axis, **more)

    def is_open(self, size: int) -> bool:
        """Returns whether a traced size is that of a symbol."""
        assert isinstance(self.model, FxModel)
        return any(size == self.model.shapes[name][axis] for name, axis in self.model.symbols.values())

    @functools.cached_property
    def _driven(self) -> set[str]:
        """Names of the tensors that depend on the module's inputs."""
        names = {t.name for t in self.model.graph.inputs}
        for node in self.model.graph.nodes:
            if any(t.name in names for t in node.inputs):
                names.update(t.name for t in node.outputs)
        return names

    def _visit(self, node: gs.Node) -> None:
        super()._visit(node)
        for tensor in node.outputs:
            axes, traced = self.axes.get(tensor.name), self.inferred.get(tensor.name)
            if traced is not None and (axes is None or tuple(self.shape(axes)) != traced):
                self.give_up(node, f"{node.op} gave a shape that was not expected")
                return


def analyse(model: FxModel) -> FxWalk:
    """Runs the axis algebra over a lowered module."""
    state = FxWalk(model)
    state.run()
    tied = {} if model.tied else tied_reads(state)
    while len(tied) != len(state.tied):
        state = FxWalk(model, tied=tied)
        state.run()
        tied = freed_reads(state)
    return state


# -- tracing ----------------------------------------------------------------------------------------------------------


def trace(module: torch.nn.Module, feeds: Mapping[str, torch.Tensor], free: bool = True) -> ExportedProgram:
    """Exports a module in evaluation mode, the leading axis of every input and that of tokens symbolic.

    Args:
        module: the module; it is not changed.
        feeds: example inputs by argument name.
        free: whether the lengths of token inputs, and the second axes that are as long, are symbolic.

    Returns:
        The program, in functional ATen operators.

    Raises:
        ModelError: ``torch.export`` refuses the module.
    """
    import torch

    lengths = token_lengths(feeds) if free else set()
    shapes: dict[str, Any] = {}
    for name, value in feeds.items():
        token = value.ndim >= 2 and value.shape[1] in lengths
        shapes[name] = {axis: torch.export.Dim.AUTO for axis in range(min(value.ndim, 2 if token else 1))}
    try:
        with torch.no_grad(), _quiet(), named_arguments(module, feeds):
            program = torch.export.export(module, (), dict(feeds), dynamic_shapes=shapes, strict=False)
            result: ExportedProgram = program.run_decompositions({})
            return result
    except Exception as err:
        raise ModelError(
            f"torch.export refuses {type(module).__name__}: {_reason(err)}; rewrite what cannot be traced, or export the "
            "module to ONNX by other means and give that file"
        ) from err


@contextlib.contextmanager
def named_arguments(module: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Lets a forward that takes ``**kwargs`` say the names that it is given, which ``torch.export`` reads from there."""
    forward, names = module.forward, list(names)
    if all(name in inspect.signature(forward).parameters for name in names):
        yield
        return

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = vars(module).get("forward")
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    vars(named)["__signature__"] = inspect.Signature(parameters)
    vars(module)["forward"] = named
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from warning of its own habits, and from printing whole graphs where it gives up."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(disabled)


def _reason(err: Exception) -> str:
    """Returns what was said, and where: in the last code that is neither torch's nor ours."""
    import torch

    text = " ".join(str(err).split())
    where = ""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    trace_back = err.__traceback__
    while trace_back is not None:
        code = trace_back.tb_frame.f_code
        if not code.co_filename.startswith(own):
            where = f" (at {code.co_filename}:{trace_back.tb_lineno}, in {code.co_qualname})"
        trace_back = trace_back.tb_next
    return f"{text[:300]}{where}"


def token_lengths(feeds: Mapping[str, torch.Tensor]) -> set[int]:
    """Returns how long the token inputs are: integers, [b, s]."""
    return {v.shape[1] for v in feeds.values() if v.ndim == 2 and not v.is_floating_point()}


def example_from(batch: Mapping[str, Any], taken: Iterable[int], device: Any, free: bool = True) -> dict[str, torch.Tensor]:
    """Makes an example to trace: a batch with few samples, its token axes of a prime length that no weight has.

    What is as long as the tokens along its second axis (boxes, patches that a mask belongs to) is cut with them.

    Args:
        batch: feeds by argument name, arrays or tensors.
        taken: sizes to stay away from.
        device: where the module is.
        free: whether token axes may be cut; else they stay as long as they are.
    """
    import torch

    from liar_opt.frontend.symbols import primes

    given = {name: torch.as_tensor(value) for name, value in batch.items()}
    sizes = set(taken)
    lengths: dict[int, int] = {}
    for length in dict.fromkeys(v.shape[1] for v in given.values() if v.ndim == 2 and not v.is_floating_point()):
        fits = [p for p in _up_to(primes(), length) if p not in sizes] if free else []
        lengths[length] = fits[-1] if fits else length
        sizes.add(lengths[length])
    result = {}
    for name, tensor in given.items():
        rows = torch.arange(BATCH) % max(1, tensor.shape[0]) if tensor.ndim else None
        tensor = tensor if rows is None else tensor[rows]
        if tensor.ndim >= 2 and tensor.shape[1] in lengths:
            tensor = tensor[:, : lengths[tensor.shape[1]]]
        result[name] = tensor.to(device).contiguous()
    return result


def _up_to(numbers: Iterator[int], limit: int) -> list[int]:
    result: list[int] = []
    for number in numbers:
        if number > min(limit, 64):
            return result
        result.append(number)
    return result


# -- lowering ---------------------------------------------------------------------------------------------------------


def lower(program: ExportedProgram, module: torch.nn.Module, source: Path | None = None) -> FxModel:
    """Writes a traced program down as a graph whose constants are the module's own parameters and buffers."""
    return _Lowering(program, module, source).model


class _Lowering:
    def __init__(self, program: ExportedProgram, module: torch.nn.Module, source: Path | None) -> None:
        self.program = program
        self.module = module
        self.tensors: dict[str, gs.Tensor | list[gs.Tensor]] = {}
        self.transposed: dict[str, gs.Constant] = {}
        self.lengths: dict[Any, str] = {}
        self.model = FxModel(gs.Graph(opset=1), source, program=program, module=module)
        signature = program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        stored |= signature.inputs_to_lifted_tensor_constants
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, stored.get(node.name))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._outputs(node)
        graph = self.model.graph
        trained = dict(module.named_parameters(remove_duplicate=False))
        self.model.trained = frozenset(trained)
        reached = {id(trained[c.name]) for c in self.model.constants() if c.name in trained}
        rest = {id(p): p for p in trained.values() if id(p) not in reached}
        self.model.untouched = sum(p.numel() for p in rest.values())
        graph.cleanup(remove_unused_node_outputs=False)

    def _placeholder(self, node: Any, stored: str | None) -> None:
        import torch

        value = node.meta.get("val")
        if stored is not None:
            tensor = self.program.state_dict.get(stored, self.program.constants.get(stored))
            if tensor is None:
                raise InternalError(f"'{stored}' of the traced program has no value")
            constant = gs.Constant(stored, to_numpy(tensor))
            self.model.originals[stored] = constant.values
            self.tensors[node.name] = constant
            return
        if not isinstance(value, torch.Tensor):
            return
        shape = [_size(s) for s in value.shape]
        variable = gs.Variable(node.name, np.dtype(_numpy_dtype(value.dtype)), [int(s) for s in shape])
        self.tensors[node.name] = variable
        self.model.graph.inputs.append(variable)
        names: list[int | str | None] = []
        for axis, size in enumerate(shape):
            if isinstance(size, Sym):
                self.model.symbols.setdefault(size.expression, (node.name, axis))
                called = f"{'sequence' if value.ndim == 2 else node.name}_{int(size)}"
                names.append("batch" if axis == 0 else self.lengths.setdefault(size.expression, called))
            else:
                names.append(int(size))
        self.model.signature.append(InputSpec(node.name, variable.dtype, tuple(names)))
        self.model.shapes[node.name] = tuple(int(s) for s in shape)

    def _call(self, node: Any) -> None:
        import operator

        import torch

        value = node.meta.get("val")
        if node.target is operator.getitem:
            source = self.tensors.get(node.args[0].name)
            if isinstance(source, list):
                self.tensors[node.name] = source[node.args[1]]
            return
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        if not any(isinstance(v, torch.Tensor) for v in values):
            return  # arithmetic on sizes, or a check
        target = self._called(node, values)
        inputs, attributes, arguments = self._arguments(node, target)
        if "split_sizes" in attributes:
            dim = int(attributes["dim"])
            attributes["split_sizes"] = [_size(item.shape[dim]) for item in values]
        elif target is not node.target:
            inputs[1] = self.transposed[node.args[1].name]
        elif _swaps_two_axes(node) and isinstance(inputs[0], gs.Constant) and len(inputs[0].shape) == 2:
            self.transposed[node.name] = inputs[0]
        outputs: list[gs.Tensor] = []
        for index, item in enumerate(values):
            if not isinstance(item, torch.Tensor):
                outputs.append(gs.Variable.empty())
                continue
            name = node.name if len(values) == 1 else f"{node.name}.{index}"
            shape = tuple(int(_size(s)) for s in item.shape)
            outputs.append(gs.Variable(name, np.dtype(_numpy_dtype(item.dtype)), list(shape)))
            self.model.shapes[name] = shape
        multiple = isinstance(value, (tuple, list))
        self.tensors[node.name] = outputs if multiple else outputs[0]
        schema = getattr(target, "_schema", None)
        domain, _, op = str(schema.name).partition("::") if schema is not None else ("", "", str(node.target))
        settings = dict(attributes)
        if op == "scaled_dot_product_attention" and settings["scale"] is None:  # of this width, also when it is cut
            settings["scale"] = 1.0 / math.sqrt(inputs[0].shape[-1])
        self.model.graph.nodes.append(gs.Node(op, node.name, settings, inputs, outputs, domain=domain or str(node.target)))
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack else ""
        read = tuple(t.name for t in inputs)
        if target is torch.ops.aten.view.default:  # what is cut may lie in memory in another order
            target = torch.ops.aten.reshape.default
        self.model.calls[node.name] = Call(target, tuple(arguments), path, attributes, read)

    def _called(self, node: Any, values: Sequence[Any]) -> Any:
        """Returns what a node calls: a product with the transpose of a weight is a linear layer.

        A split into parts of one size is one by a list of sizes, which may be cut differently.
        """
        import torch

        product = node.target in (torch.ops.aten.matmul.default, torch.ops.aten.mm.default)
        if product and getattr(node.args[1], "name", "") in self.transposed:
            return torch.ops.aten.linear.default
        if node.target is torch.ops.aten.split.Tensor:
            dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
            if not any(isinstance(_size(item.shape[dim]), Sym) for item in values):
                return torch.ops.aten.split_with_sizes.default
        return node.target

    def _arguments(
        self, node: Any, target: Any
    ) -> tuple[list[gs.Tensor], dict[str, Any], list[tuple[str, str | int, bool]]]:
        inputs: list[gs.Tensor] = []
        attributes: dict[str, Any] = {}
        arguments: list[tuple[str, str | int, bool]] = []
        schema = getattr(target, "_schema", None)
        declared = schema.arguments if schema is not None else ()
        optional = {a.name for a in declared if str(a.type) == "Optional[Tensor]"}
        for name, value, keyword in _named_arguments(node, target):
            found = [gs.Variable.empty()] if value is None and name in optional else self._tensors_of(value)
            if found is not None:
                arguments.append((name, len(found) if isinstance(value, (list, tuple)) else "input", keyword))
                inputs += found
                continue
            arguments.append((name, "attribute", keyword))
            attributes[name] = _plain(value)
        return inputs, attributes, arguments

    def _tensors_of(self, value: Any) -> list[gs.Tensor] | None:
        """Returns the tensors of an argument (None in a list of tensors is an omitted one), or None if it has none."""
        import torch

        if isinstance(value, torch.fx.Node):
            tensor = self.tensors.get(value.name)
            return [tensor] if isinstance(tensor, gs.Tensor) else None
        if isinstance(value, (list, tuple)) and any(self._tensors_of(v) is not None for v in value):
            found = [(self._tensors_of(v) or [gs.Variable.empty()])[0] for v in value]
            return found
        return None

    def _outputs(self, node: Any) -> None:
        import torch

        mutated = len(self.program.graph_signature.buffers_to_mutate)
        for value in node.args[0][mutated:]:
            tensor = self.tensors.get(getattr(value, "name", ""))
            if isinstance(tensor, gs.Variable) and not any(tensor is t for t in self.model.graph.outputs):
                self.model.graph.outputs.append(tensor)
            if isinstance(getattr(value, "meta", {}).get("val"), torch.Tensor):
                self.model.results.append(tensor.name if isinstance(tensor, gs.Tensor) else "")


def _swaps_two_axes(node: Any) -> bool:
    import torch

    ops = torch.ops.aten
    named = _named_arguments(node, node.target) if node.target in (ops.permute.default, ops.transpose.int) else ()
    values = {name: value for name, value, _ in named}
    if "dims" in values:
        return [d % 2 for d in values["dims"]] == [1, 0]
    return node.target in (ops.t.default, ops.numpy_T.default) or {values.get("dim0"), values.get("dim1")} in (
        {0, 1},
        {-1, -2},
    )


def _named_arguments(node: Any, target: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yields (name, value, keyword only) of a call; arguments left at their default are there too."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        for index, value in enumerate(node.args):
            yield f"argument{index}", value, False
        for name, value in node.kwargs.items():
            yield name, value, True
        return
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            value = node.args[index]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        else:
            value = argument.default_value
        yield argument.name, value, argument.kwarg_only


def _size(value: Any) -> int:
    """Returns an int, or a Sym for a symbolic size."""
    import torch

    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        if expression.is_number:
            return int(expression)
        if value.node.hint is None:
            raise ModelError(
                f"a size ({expression}) depends on the data and not on shapes alone; such a module cannot be analysed, "
                "export it to ONNX with fixed sizes and give that file"
            )
        return Sym.of(int(value.node.hint), expression, "")
    return int(value)


def _plain(value: Any) -> Any:
    """Returns an argument with FX nodes replaced by the numbers that they stand for."""
    import torch

    if isinstance(value, torch.fx.Node):
        number = value.meta.get("val")
        if isinstance(number, torch.SymInt):
            size = _size(number)
            return Sym.of(int(size), size.expression, value.name) if isinstance(size, Sym) else size
        return number
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


# -- numpy and torch --------------------------------------------------------------------------------------------------


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns an array on the memory of a tensor on the CPU (a copy of one elsewhere); bfloat16 too."""
    import torch

    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(plain.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(plain.numpy())


def to_torch(array: np.ndarray, device: Any = "cpu") -> torch.Tensor:
    """Returns a tensor on the memory of an array (on ``device``); bfloat16 too."""
    import torch

    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array).to(device)


def _numpy_dtype(dtype: Any) -> Any:
    import torch

    if dtype == torch.bfloat16:
        import ml_dtypes

        return ml_dtypes.bfloat16
    return torch.empty(0, dtype=dtype).numpy().dtype


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Patched:
    """What a run changes of a graph that stays as it is.

    Attributes:
        constants: by (id of the node, input position).
        shifts: what is added to the first output of a node, by its id.
        stand_ins: what stands in for a tensor, by its name; the node that makes it does not run.
    """

    constants: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)
    shifts: Mapping[int, np.ndarray] = field(default_factory=dict)
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)


class Executor:
    """Runs nodes of a lowered graph in torch, as they are now: constants may have been cut, numbers changed.

    Args:
        model: the lowered module.
        device: where it runs.
        patched: what is other than in the graph.
    """

    def __init__(self, model: FxModel, device: Any = "cpu", patched: Patched | None = None) -> None:
        self.model = model
        self.device = device
        self.patched = patched or Patched()
        self._tensors = {place: to_torch(value, device) for place, value in self.patched.constants.items()}
        self._shifts = {node: to_torch(value, device) for node, value in self.patched.shifts.items()}
        self._stand_ins = {
            name: (s.source, None if s.matrix is None else to_torch(s.matrix, device), to_torch(s.bias, device))
            for name, s in self.patched.stand_ins.items()
        }
        self._constants: dict[int, tuple[Any, torch.Tensor]] = {}

    def run(
        self, feeds: Mapping[str, Any], nodes: Sequence[gs.Node] | None = None, wanted: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Runs nodes in order.

        Args:
            feeds: inputs of the module, and tensors that earlier nodes made.
            nodes: in execution order; all of them if None.
            wanted: tensors to return; the module's outputs if None. What is read no more is freed.
        """
        import torch

        nodes = self.model.graph.nodes if nodes is None else nodes
        names = [t.name for t in self.model.graph.outputs] if wanted is None else list(wanted)
        with torch.no_grad():
            return self._run(feeds, nodes, names, frozenset())

    def run_watched(
        self, feeds: Mapping[str, Any], watched: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Runs the module with gradients from the watched tensors on; returns its outputs and those tensors.

        Args:
            feeds: inputs of the module.
            watched: tensors that keep their ``grad`` when a loss of the outputs is differentiated.
        """
        import torch

        outputs = [t.name for t in self.model.graph.outputs]
        with torch.enable_grad():
            values = self._run(feeds, self.model.graph.nodes, [*outputs, *watched], frozenset(watched))
        return {n: values[n] for n in outputs if n in values}, {n: values[n] for n in watched}

    def run_trained(self, feeds: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        """Runs the module with gradients to the tensors that constants are bound to; arguments as `run`."""
        import torch

        with torch.enable_grad():
            return self._run(feeds, self.model.graph.nodes, wanted, frozenset())

    def bind(self, constant: gs.Constant, tensor: torch.Tensor) -> None:
        """Has a tensor stand for a constant, as long as that has the values that it has now."""
        self._constants[id(constant)] = (constant.values, tensor)

    def _run(
        self, feeds: Mapping[str, Any], nodes: Sequence[gs.Node], names: Sequence[str], watched: frozenset[str]
    ) -> dict[str, torch.Tensor]:
        values = {k: self._fed(v) for k, v in feeds.items() if v is not None}
        symbols = {s: values[name].shape[axis] for s, (name, axis) in self.model.symbols.items() if name in values}
        last: dict[str, int] = {}
        for index, node in enumerate(nodes):
            made = next((t.name for t in node.outputs if t.name in self._stand_ins), None)
            for name in (t.name for t in node.inputs) if made is None else (self._stand_ins[made][0],):
                last[name] = index
        dead: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in names:
                dead.setdefault(index, []).append(name)
        for index, node in enumerate(nodes):
            self._step(node, values, symbols)
            for name in watched.intersection(t.name for t in node.outputs):
                # The first of them are leaves; what is behind those has a gradient function.
                values[name].retain_grad() if values[name].requires_grad else values[name].requires_grad_(True)
            for name in dead.get(index, ()):
                values.pop(name, None)
        return {n: values[n] for n in names if n in values}

    def _fed(self, value: Any) -> torch.Tensor:
        return to_torch(value, self.device) if isinstance(value, np.ndarray) else value

    def _step(self, node: gs.Node, values: dict[str, Any], symbols: Mapping[Any, int]) -> None:
        name = next((t.name for t in node.outputs if t.name in self._stand_ins), None)
        if name is not None:
            source, matrix, bias = self._stand_ins[name]
            x = values[source]
            values[name] = bias.expand_as(x) if matrix is None else x @ matrix + bias
            return
        given = ((self._tensors.get((id(node), i)), t) for i, t in enumerate(node.inputs))
        inputs = [self._value(t, values) if own is None else own for own, t in given]
        if node.domain != ATEN and node.name not in self.model.calls:
            if node.op != "Add":
                raise InternalError(f"node '{node.name}' ({node.op}) cannot be run in torch")
            values[node.outputs[0].name] = inputs[0] + inputs[1]
            return
        call = self.model.calls[node.name]
        positional, keywords = arguments_of(call, inputs, node.attrs, lambda old, new: _number(old, new, symbols))
        result = call.target(*positional, **keywords)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if id(node) in self._shifts:
            results[0] = results[0] + self._shifts[id(node)]
        for tensor, value in zip(node.outputs, results, strict=False):
            if present(tensor):
                values[tensor.name] = value

    def _value(self, tensor: gs.Tensor, values: Mapping[str, Any]) -> Any:
        if is_constant(tensor):
            known = self._constants.get(id(tensor))
            if known is None or known[0] is not tensor.values:
                known = (tensor.values, to_torch(tensor.values, self.device))
                self._constants[id(tensor)] = known
            return known[1]
        if not present(tensor):
            return None
        return values[tensor.name]

    def forget(self) -> None:
        """Drops what is kept of constants."""
        self._constants.clear()


def tensor_bytes(model: FxModel, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the bytes of every tensor that is no constant, for inputs of the shapes of ``feeds``.

    The graph runs without data. Empty where it cannot: sizes depend on what is computed.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    names = [t.name for node in model.graph.nodes for t in node.outputs if present(t)]
    own = {t.name: feeds[t.name] for t in model.graph.inputs if t.name in feeds}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = Executor(model, model.device).run(own, wanted=names)
    except Exception:  # of torch: a class for each way in which it can fail
        return {}
    return {name: value.numel() * value.element_size() for name, value in found.items() if isinstance(value, torch.Tensor)}


def arguments_of(
    call: Call, inputs: Sequence[Any], attributes: Mapping[str, Any], number: Any
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional and the keyword arguments of a call.

    Args:
        call: how it is called.
        inputs: what stands for the node's inputs.
        attributes: the node's attributes as they are now.
        number: called with an int as it was traced and as it is now; gives what to pass.
    """
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    source = iter(inputs)
    for name, kind, keyword in call.arguments:
        if kind == "attribute":
            value = _numbers(call.attributes[name], attributes[name], number)
        elif kind == "input":
            value = next(source)
        else:
            value = [next(source) for _ in range(int(kind))]
        if keyword:
            keywords[name] = value
        else:
            positional.append(value)
    return positional, keywords


def _numbers(old: Any, new: Any, number: Any) -> Any:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [_numbers(a, b, number) for a, b in zip(old, new, strict=True)]
    return number(old, new) if isinstance(old, int) and not isinstance(old, bool) else new


def _number(old: Any, new: Any, symbols: Mapping[Any, int]) -> int:
    """Returns the value of an int for the sizes of this run; one that was cut is scaled as the cut scaled it."""
    if not isinstance(old, Sym) or not int(old):
        return int(new)
    found = old.expression.free_symbols
    if any(s not in symbols for s in found):
        raise InternalError(f"size {old.expression} of the traced program has no value")
    actual = _evaluated(old.expression, frozenset((s, int(symbols[s])) for s in found))
    ratio = Fraction(int(new), int(old))
    return actual * ratio.numerator // ratio.denominator


@functools.lru_cache(4096)
def _evaluated(expression: Any, sizes: frozenset[tuple[Any, int]]) -> int:
    """Returns what an expression gives: a graph has few of them, and reads them at every node of every run."""
    return int(expression.subs(dict(sizes)))
