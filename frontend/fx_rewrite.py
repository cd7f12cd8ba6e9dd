"""A cut graph back into torch, in two forms.

:func:`cut_program` gives the traced graph: the exported program with smaller parameters and other sizes, traced again so
that it saves, loads, compiles and exports. :func:`cut_module` gives the module as it was written: its parameters are
replaced where they are, and the attributes that its forward code reads are set right.

Which attributes those are is not known by name. The trace says which numbers of which operators had to change, and in
whose forward they were written; an integer attribute of that module, of one around it, or of a configuration that they
hold, with the value that such a number had, may be its source. The smallest set of such attributes is searched with which
the module computes what the cut graph computes.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import warnings
from collections import defaultdict, namedtuple
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.fx_module import Call, Executor, FxModel, FxWalk, Sym, arguments_of, to_torch
from liar_opt.frontend.graph_tensors import is_constant, present
from liar_opt.frontend.hf_checkpoint import FieldChange, changed_config, quiet_loading, without_cache
from liar_opt.frontend.plain_module import copied_module, evaluating
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.runtime.compare import relative_difference
from liar_opt.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

LAYER_SIZES: dict[str, dict[str, tuple[str, ...]]] = {
    "Linear": {"weight": ("out_features", "in_features")},
    "Conv1D": {"weight": ("nx", "nf")},
    "Conv1d": {"weight": ("out_channels", "in_channels")},
    "Conv2d": {"weight": ("out_channels", "in_channels")},
    "Embedding": {"weight": ("num_embeddings", "embedding_dim")},
    "_NormBase": {"weight": ("num_features",)},
    "GroupNorm": {"weight": ("num_channels",)},
    "RNNBase": {"weight_ih_l0": ("", "input_size"), "weight_hh_l0": ("", "hidden_size")},
}
"""Attributes of layers that repeat the sizes of a parameter's axes: torch's own and transformers' Conv1D."""
MOST_TOGETHER = 3
"""Attributes changed together where the larger sets do not do."""
LEFT_OUT, MOST_NEAR = 2, 10
"""Attributes left out of the larger sets, where these are not larger."""


@dataclass(frozen=True)
class AttributeChange:
    """An attribute that was set: ``where`` is the qualified name of the module, with the path to a configuration."""

    where: str
    name: str
    before: Any
    after: Any


@dataclass(frozen=True, eq=False)
class _Setting:
    owner: Any
    where: str
    name: str
    before: int
    after: int

    def apply(self) -> None:
        setattr(self.owner, self.name, self.after)

    def undo(self) -> None:
        setattr(self.owner, self.name, self.before)


@dataclass(frozen=True, eq=False)
class _Move:
    """Settings that belong together: one attribute of all modules of a class, or of one configuration.

    ``distance`` is how far from the code that reads it the attribute is: 0 its own module, then those around it, then
    configurations.
    """

    settings: tuple[_Setting, ...]
    distance: int

    def apply(self) -> None:
        for setting in self.settings:
            setting.apply()

    def undo(self) -> None:
        for setting in self.settings:
            setting.undo()


def changed_parameters(model: FxModel) -> dict[str, np.ndarray]:
    """Returns the constants that were cut, repaired or added, by name; a new bias has the name that torch would give it.

    Raises:
        ModelError: uses of one parameter were cut apart, which a module cannot hold.
    """
    original = model.originals
    result: dict[str, np.ndarray] = {}
    for node in model.graph.nodes:
        call = model.calls.get(node.name)
        for position, tensor in enumerate(node.inputs):
            if not is_constant(tensor):
                continue
            name = tensor.name
            before = call.inputs[position] if call is not None and position < len(call.inputs) else ""
            if name not in original and before in original:
                raise ModelError(
                    f"parameter '{before}' is shared by operators that were cut apart (node '{node.name}'); a module "
                    "cannot hold both parts, use --format onnx"
                )
            if name in original and tensor.values is original[name]:
                continue
            known = result.setdefault(bias_name(name), tensor.values)
            if known is not tensor.values and not np.array_equal(known, tensor.values):
                raise ModelError(f"parameter '{name}' was cut in two ways; a module cannot hold both, use --format onnx")
    # The same parameter may be read elsewhere as it was.
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if is_constant(tensor) and tensor.name in result and tensor.values is not result[tensor.name]:
                if not np.array_equal(tensor.values, result[tensor.name]):
                    raise ModelError(
                        f"parameter '{tensor.name}' is read as a whole by node '{node.name}' and cut elsewhere; a module "
                        "cannot hold both, use --format onnx"
                    )
    return result


def bias_name(name: str) -> str:
    """Returns ``layer.bias`` for ``layer.weight_bias``, as the rewriter calls a new bias; other names as they are."""
    return f"{name.removesuffix('.weight_bias')}.bias" if name.endswith(".weight_bias") else name


def planned_shapes(walk: FxWalk, keep: Mapping[int, int]) -> tuple[dict[str, tuple[int, ...]], set[tuple[int, int]]]:
    """Returns what a cut will give, before anything is cut.

    Args:
        walk: the analysis.
        keep: how many indices of a leaf factor stay.

    Returns:
        The shapes of the constants by name, and (before, after) for every dimension that changes.
    """
    assert isinstance(walk.model, FxModel)
    rewriter = Rewriter(walk)
    rewriter.kept = {walk.algebra.find(f): np.arange(walk.algebra.size(f)) < n for f, n in keep.items()}
    shapes = {u.constant.name: tuple(rewriter.size(f) for f in u.axes) for u in walk.constant_uses}
    factors = {f for axes in walk.axes.values() for f in axes or ()} | {f for u in walk.constant_uses for f in u.axes}
    sizes = {(walk.algebra.size(f), rewriter.size(f)) for f in factors}
    return shapes, {(a, b) for a, b in sizes if a != b}


def planned_state(walk: FxWalk, keep: Mapping[int, int]) -> tuple[dict[str, tuple[int, ...]], set[tuple[int, int]]]:
    """As :func:`planned_shapes`, of all tensors in the module's state; a parameter with two names has two shapes."""
    assert isinstance(walk.model, FxModel) and walk.model.module is not None
    planned, sizes = planned_shapes(walk, keep)
    module = walk.model.module
    stored = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    by_tensor = {id(t): planned[n] for n, t in stored if n in planned}
    shapes = {n: by_tensor.get(id(t), tuple(t.shape)) for n, t in stored}
    return {n: shapes[n] for n in module.state_dict() if n in shapes}, sizes


def changed_numbers(model: FxModel) -> Iterator[tuple[Call, int, int]]:
    """Yields (call, number as traced, number now) for every number that was changed."""
    for node in model.graph.nodes:
        call = model.calls.get(node.name)
        if call is None:
            continue
        for name, before in call.attributes.items():
            yield from ((call, a, b) for a, b in _pairs(before, node.attrs[name]) if a != b)


def _pairs(before: Any, after: Any) -> Iterator[tuple[int, int]]:
    if isinstance(before, list):
        for a, b in zip(before, after, strict=True):
            yield from _pairs(a, b)
    elif isinstance(before, int) and not isinstance(before, bool):
        yield int(before), int(after)


# -- the traced graph -------------------------------------------------------------------------------------------------


def cut_graph_module(model: FxModel, gaps: bool = True) -> torch.fx.GraphModule:
    """Returns the traced graph with what was cut: a GraphModule that is called like the module.

    Its arguments are those that were traced, under their names and in the order of the module's signature. It is in
    evaluation mode for good: what the trace has left out, such as dropout, does not come back with ``train()``.

    Args:
        model: the cut model.
        gaps: whether arguments between them that were not traced keep their places.
    """
    assert model.program is not None
    module = model.program.module(check_guards=False)
    graph = module.graph
    nodes = {n.name: n for n in graph.nodes}
    stored: dict[str, Any] = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    for name, value in changed_parameters(model).items():
        set_tensor(module, name, to_torch(np.array(value)))
    for node in model.graph.nodes:
        call = model.calls.get(node.name)
        if call is None:
            _insert_addition(graph, node, nodes, stored)
            continue
        if node.name not in nodes:
            _insert_pick(graph, model, node, nodes, stored)
            continue
        target = nodes[node.name]
        same = target.target is call.target and node.attrs == dict(call.attributes)
        if same and tuple(t.name for t in node.inputs) == call.inputs:
            continue
        with graph.inserting_before(target):
            inputs = [_fx_value(graph, t, nodes, stored) for t in node.inputs]
            positional, keywords = arguments_of(call, inputs, node.attrs, lambda a, b: _fx_number(graph, a, b, nodes))
        target.target, target.args, target.kwargs = call.target, tuple(positional), keywords
    alive = {node.name for node in model.graph.nodes}
    _drop_dead(graph, {nodes[name] for name in model.calls.keys() - alive if name in nodes}, model.calls.keys())
    return _called_like(model, module, gaps)


def _drop_dead(graph: torch.fx.Graph, dead: set[Any], tensors: Collection[str]) -> None:
    """Takes out nodes that are not in the cut graph any more, and the checks of their types and sizes.

    Args:
        graph: as it was traced.
        dead: those nodes.
        tensors: names of the nodes that make tensors.
    """
    checked = set(dead)
    for node in graph.nodes:
        if node.op == "call_function" and node.name not in tensors and any(i in checked for i in node.all_input_nodes):
            checked.add(node)
    for node in reversed(list(graph.nodes)):
        if node in checked and not node.users and node.is_impure():
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _called_like(model: FxModel, module: torch.fx.GraphModule, gaps: bool) -> torch.fx.GraphModule:
    """Returns a traced graph as a plain GraphModule, which can be copied, pickled, trained and called by position.

    What ``torch.export`` makes refuses all of that; it checks sizes that the trace has fixed, and so does this.
    """
    import torch

    assert model.module is not None and model.program is not None
    graph = module.graph
    given = {n.target: n for n in graph.nodes if n.op == "placeholder"}
    leaves = next(n for n in graph.nodes if n.op == "output")
    out_spec = model.program.call_spec.out_spec
    if not _is_plain(out_spec):
        graph.lint()
        module.recompile()
        return module
    # Anew, so that the arguments come in the order of the signature.
    plain = torch.fx.Graph()
    made: dict[Any, Any] = {}
    checks: list[tuple[Callable[[Any, Any], bool], Any, Any, str]] = []
    names = [p.name for p in inspect.signature(model.module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    last = max((i for i, name in enumerate(names) if name in given), default=-1)
    gap = False
    for name in [*names[: last + 1], *(n for n in given if n not in names)]:
        if name in given:
            made[given[name]] = value = plain.placeholder(name, default_value=None) if gap else plain.placeholder(name)
            checks += [(operator.ne, value, None, f"argument '{name}' is missing")] if gap else []
        elif gaps:
            gap = True
            value = plain.placeholder(name, default_value=None)
            checks.append((operator.eq, value, None, f"argument '{name}' was not traced; leave it out"))
    for spec in model.signature:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, int):
                length = (made[given[spec.name]], axis)
                checks.append((operator.eq, length, size, f"axis {axis} of '{spec.name}' must be {size}, as it was traced"))
    for compare, value, expected, message in checks:
        if isinstance(value, tuple):
            value = plain.call_function(torch.ops.aten.sym_size.int, value)
        plain.call_function(torch._assert, (plain.call_function(compare, (value, expected)), message))
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            made[node] = plain.node_copy(node, made.__getitem__)
    values = [made.get(v, v) for v in leaves.args[0]]
    plain.output(_structured(plain, out_spec, iter(values)))
    plain.lint()
    # All buffers are in its state: copies of a GraphModule know no others.
    result = torch.fx.GraphModule(module, plain, type(model.module).__name__)
    # Parts that were never put into a mode are in training mode; nothing in the graph reads it.
    return result.eval()


def _is_plain(spec: Any) -> bool:
    """Returns whether what a module returns can be written down: containers of Python and classes with named fields."""
    known = spec.is_leaf() or spec.type in (tuple, list, dict, type(None), namedtuple)
    named = isinstance(spec.context, list) and all(isinstance(n, str) for n in spec.context)
    return (known or named) and all(map(_is_plain, spec.children()))


def _structured(graph: torch.fx.Graph, spec: Any, leaves: Iterator[Any]) -> Any:
    """Returns what the module returns, of the leaves of a pytree: tuples, lists, dicts, or a call of another class."""
    if spec.is_leaf():
        return next(leaves)
    parts = [_structured(graph, child, leaves) for child in spec.children()]
    if spec.type in (tuple, list):
        return spec.type(parts)
    if spec.type is dict:
        return dict(zip(spec.context, parts, strict=True))
    if spec.type is type(None):
        return None
    if spec.type is namedtuple:
        return graph.call_function(spec.context, tuple(parts))
    return graph.call_function(spec.type, (), dict(zip(spec.context, parts, strict=True)))


def cut_program(model: FxModel, feeds: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """Returns the traced graph with what was cut, as an exported program with the same symbolic axes."""
    import torch

    shapes: dict[str, Any] = {}
    for spec in model.signature:
        shapes[spec.name] = {i: torch.export.Dim.AUTO for i, d in enumerate(spec.shape) if isinstance(d, str)}
    arguments = {k: feeds[k] for k in (s.name for s in model.signature)}
    module = cut_graph_module(model, gaps=False)  # torch exports named arguments by their places
    with torch.no_grad():
        return torch.export.export(module, (), arguments, dynamic_shapes=shapes, strict=False)


def _fx_value(graph: Any, tensor: gs.Tensor, nodes: dict[str, Any], stored: dict[str, Any]) -> Any:
    if is_constant(tensor):
        name = bias_name(tensor.name)
        if name not in stored:
            stored[name] = graph.get_attr(name)
            return stored[name]
        # Attributes are read at their first use in the graph; a second one may stand before it.
        return graph.get_attr(name)
    if not present(tensor):
        return None
    name, _, index = tensor.name.partition(".")
    if index:
        return graph.call_function(operator.getitem, (nodes[name], int(index)))
    return nodes[name]


def _fx_number(graph: Any, before: int, after: int, nodes: Mapping[str, Any]) -> Any:
    """Returns what an int becomes: a number, the node that computed it, or that node scaled as the cut scaled it."""
    if not isinstance(before, Sym):
        return int(after)
    node = nodes[before.node]
    ratio = Fraction(int(after), int(before))
    if ratio == 1:
        return node
    scaled = graph.call_function(operator.mul, (node, ratio.numerator))
    return graph.call_function(operator.floordiv, (scaled, ratio.denominator))


def _insert_addition(graph: Any, node: gs.Node, nodes: dict[str, Any], stored: dict[str, Any]) -> None:
    """Adds a new bias behind a product: gs "Add" (product, bias) whose output has the product's old name."""
    import torch

    product = nodes[node.outputs[0].name]
    with graph.inserting_after(product):
        bias = graph.get_attr(bias_name(node.inputs[1].name))
    with graph.inserting_after(bias):
        addition = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
    product.replace_all_uses_with(addition, delete_user_cb=lambda user: user is not addition)
    nodes[node.outputs[0].name] = addition


def _insert_pick(graph: Any, model: FxModel, node: gs.Node, nodes: dict[str, Any], stored: dict[str, Any]) -> None:
    """Adds what takes a layer's own heads of a table, before the node that reads it."""
    reader = node
    while reader.name not in nodes:
        reader = reader.outputs[0].outputs[0]
    with graph.inserting_before(nodes[reader.name]):
        inputs = [_fx_value(graph, t, nodes, stored) for t in node.inputs]
        positional, _ = arguments_of(model.calls[node.name], inputs, node.attrs, lambda _, number: number)
        nodes[node.name] = graph.call_function(model.calls[node.name].target, tuple(positional))


# -- the module -------------------------------------------------------------------------------------------------------


def cut_module(
    model: FxModel, feeds: Mapping[str, torch.Tensor], tolerance: float, fields: Sequence[FieldChange] = ()
) -> tuple[torch.nn.Module, tuple[AttributeChange, ...]]:
    """Returns a copy of the module with its parameters cut and the attributes that its code reads set right.

    Args:
        model: the cut graph.
        feeds: inputs on which the copy must compute what the graph computes.
        tolerance: largest difference, relative to the largest magnitude of each output.
        fields: what the module's configuration must say for a checkpoint; the rest is searched after it.

    Returns:
        The module and the attributes that were changed, those of layers that hold a parameter left out.

    Raises:
        ModelError: no set of attributes makes it compute the same.
    """
    assert model.module is not None
    if model.picked:
        raise ModelError(
            f"each layer takes its own heads of '{model.picked[0]}', which the code of {type(model.module).__name__} gives "
            "to all as it is; write ONNX with --format onnx, or take the traced graph with checkpoint=False"
        )
    changes = {name: value for name, value in changed_parameters(model).items() if name not in model.adopted}
    module = copy_without(model.module, set(changes))
    for name, value in changes.items():
        set_tensor(module, name, to_torch(np.array(value), _device(model.module)))
    set_layer_sizes(model.module, module, changes)
    outputs = Executor(model, _device(model.module)).run(feeds)
    expected = [outputs.get(name) for name in model.results]
    arguments = {s.name: feeds[s.name] for s in model.signature}

    def works() -> bool:
        return _difference(module, arguments, expected) <= tolerance

    stated = [AttributeChange("config" + "".join(f".{p}" for p in c.path), c.name, c.before, c.after) for c in fields]
    for change in fields:
        change.apply(module.config)
    if model.adopted:  # its code runs what went, unless its configuration says that it is not there
        made = _made_anew(model.module, module, fields) if fields else None
        if made is not None and _difference(made, arguments, expected) <= tolerance:
            return made, tuple(stated)
        raise ModelError(
            f"whole layers went, and the code of {type(model.module).__name__} runs them still; write ONNX with --format "
            "onnx, or take the traced graph with checkpoint=False"
        )
    moves = _moves(module, changed_numbers(model))
    found = () if works() else _together(moves, works, [0])
    made = None
    if found is None and fields:
        made = _made_anew(model.module, module, fields)
        if made is not None and _difference(made, arguments, expected) <= tolerance:
            return made, tuple(stated)
    if found is None:
        found = _together(moves, works, range(1, LEFT_OUT + 1))
    if found is None:
        found = _few(moves, works)
    if found is None:
        numbers = sorted({(c.path, a, b) for c, a, b in changed_numbers(model)})
        shown = "; ".join(f"{a} is {b} now in '{path}'" for path, a, b in numbers[:3])
        shown += "" if made is None else _failure(made, arguments)
        raise ModelError(
            f"no attributes of {type(module).__name__} were found that make its code fit the cut weights ({shown}); write "
            "ONNX with --format onnx, or take the traced graph with checkpoint=False"
        )
    done = [AttributeChange(s.where, s.name, s.before, s.after) for move in found for s in move.settings]
    return module, (*stated, *done)


def _made_anew(original: torch.nn.Module, cut: torch.nn.Module, fields: Sequence[FieldChange]) -> torch.nn.Module | None:
    """Returns a module of the same class, made from the configuration that says the widths, with the cut tensors.

    Its code needs no attributes set right; None where the class, its configuration or its tensors are not like that.
    """
    module_class: Any = type(original)
    source: Any = original
    try:
        with quiet_loading(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = module_class(changed_config(source.config, fields))
            known = cut.state_dict()
            made.load_state_dict({name: known[name] for name in made.state_dict()}, assign=True)
            made.tie_weights()
    except Exception:  # a class may refuse in any way
        return None
    if hasattr(source, "generation_config"):
        made.generation_config = source.generation_config
    before = dict(cut.named_parameters())
    for name, new in made.named_parameters():
        new.requires_grad_(before[name].requires_grad)
    result: torch.nn.Module = made.to(_device(original)).train(original.training)
    return result


def _device(module: torch.nn.Module) -> Any:
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return "cpu" if tensor is None else tensor.device


def copy_without(module: torch.nn.Module, names: set[str]) -> torch.nn.Module:
    """Returns a deep copy; the data of the parameters ``names`` is not copied (it will be replaced)."""
    memo = {id(p): p for n, p in module.named_parameters(remove_duplicate=False) if n in names}
    return copied_module(module, memo)


def set_tensor(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a parameter or buffer under all its names; a new one is registered."""
    import torch

    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, attribute, None)
    new: Any = value
    if attribute in vars(owner):  # a constant that tracing has lifted out of the code
        setattr(owner, attribute, new)
        return
    if old is None and not value.is_floating_point():  # indices that the traced graph reads
        owner.register_buffer(attribute, new)
    elif attribute not in owner._buffers:
        grad = old.requires_grad if isinstance(old, torch.Tensor) else value.is_floating_point()
        new = torch.nn.Parameter(value, requires_grad=bool(grad))
    places = [(owner, attribute)]
    if isinstance(old, torch.Tensor):
        places += [
            (m, k) for m in module.modules() for store in (m._parameters, m._buffers) for k, v in store.items() if v is old
        ]
    for place, key in places:
        if key in place._buffers:
            place._buffers[key] = new
        else:
            place._parameters.pop(key, None)
            place.register_parameter(key, new)
        if isinstance(place, torch.nn.RNNBase):
            place._init_flat_weights()  # it has a list of them


def set_layer_sizes(old: torch.nn.Module, new: torch.nn.Module, changes: Mapping[str, np.ndarray]) -> None:
    """Sets the attributes in which torch's own layers repeat the sizes of parameters that changed, by whatever name."""
    named = dict(old.named_parameters(remove_duplicate=False))
    changed = {id(named[name]): value for name, value in changes.items() if name in named}
    tied = {name: changed[id(p)] for name, p in named.items() if id(p) in changed}
    for name, value in {**tied, **changes}.items():
        path, _, attribute = name.rpartition(".")
        owner = new.get_submodule(path)
        known = (LAYER_SIZES[c.__name__] for c in type(owner).__mro__ if c.__name__ in LAYER_SIZES)
        names = next(known, {}).get(attribute, ())
        for axis, size in enumerate(names):
            if size:
                setattr(owner, size, int(value.shape[axis]))
        if names and getattr(owner, "groups", 1) > 1:  # depthwise: every channel is a group
            owner.groups = owner.in_channels = owner.out_channels


def _difference(module: torch.nn.Module, arguments: Mapping[str, Any], expected: Sequence[torch.Tensor | None]) -> float:
    """Returns how far the module's outputs are from what is expected; infinity where it fails or gives other shapes.

    As it was traced: without dropout, whatever mode it is in, and no running mean moves.
    """
    import torch

    try:
        with torch.no_grad(), evaluating(module), without_cache(module):
            result = module(**arguments)
    except Exception:  # wrong sizes fail in any way that the module's code likes
        return float("inf")
    actual = [v for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
    if len(actual) != len(expected):
        return float("inf")
    return max(
        (relative_difference(_array(a), _array(e)) for a, e in zip(actual, expected, strict=True) if e is not None),
        default=float("inf"),
    )


def _failure(module: torch.nn.Module, arguments: Mapping[str, Any]) -> str:
    """Returns what a module says that fails, for a message; nothing where it runs."""
    import torch

    try:
        with torch.no_grad(), evaluating(module), without_cache(module):
            module(**arguments)
    except Exception as err:  # in any way that the module's code likes
        return f"; it fails: {' '.join(str(err).split())[:200]}"
    return ""


def _array(tensor: torch.Tensor) -> np.ndarray:
    import torch

    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy())


# -- attributes -------------------------------------------------------------------------------------------------------


def _moves(module: torch.nn.Module, numbers: Iterable[tuple[Call, int, int]]) -> list[_Move]:
    """Returns what may be set: attributes whose value is a number that changed, by class and name; the nearest first."""
    known = dict(module.named_modules())
    wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for call, before, after in numbers:
        if call.path in known:
            wanted[call.path].add((before, after))
    found: dict[tuple[object, ...], dict[tuple[int, str], _Setting]] = defaultdict(dict)
    distances: dict[tuple[object, ...], int] = {}
    for path, pairs in wanted.items():
        around = [path.rsplit(".", k)[0] if k else path for k in range(path.count(".") + 1)]
        around += [""] if path else []
        for step, outer in enumerate(around):
            for distance, owner, where in _owners(known[outer], outer, step):
                for before, after in pairs:
                    for name, value in list(vars(owner).items()):
                        if type(value) is not int or value != before or name.startswith("_"):
                            continue
                        alone = distance >= 1000
                        key = (id(owner) if alone else type(owner), name, before, after)
                        setting = _Setting(owner, where, name, before, after)
                        found[key][id(owner), name] = setting
                        distances[key] = min(distance, distances.get(key, distance))
    moves = [_Move(tuple(settings.values()), distances[key]) for key, settings in found.items()]
    return sorted(moves, key=lambda m: m.distance)


def _owners(module: torch.nn.Module, path: str, step: int) -> Iterator[tuple[int, Any, str]]:
    """Yields the module itself and the configurations that it holds: plain objects with integers in them."""
    import torch

    yield step, module, path
    for name, value in vars(module).items():
        plain = not isinstance(value, (torch.nn.Module, torch.Tensor, type)) and hasattr(value, "__dict__")
        if plain and not name.startswith("_") and not callable(value):
            yield 1000 + step, value, f"{path}.{name}" if path else name


def _together(moves: Sequence[_Move], works: Callable[[], bool], left_out: Iterable[int]) -> tuple[_Move, ...] | None:
    """Returns the moves up to some distance, but for some, that work all together, applied and thinned, or None.

    An attribute may have the value of a number that changed by chance: so many of them are left out, each in turn.
    """
    for count in left_out:
        for distance in sorted({m.distance for m in moves}):
            near = _compatible([m for m in moves if m.distance <= distance])
            if count and len(near) > MOST_NEAR:
                continue
            for out in itertools.combinations(near, count):
                chosen = [m for m in near if m not in out]
                if _applied(chosen, works):
                    return _thinned(chosen, works)
    return None


def _few(moves: Sequence[_Move], works: Callable[[], bool]) -> tuple[_Move, ...] | None:
    """Returns a smallest set of moves that works, applied; None (nothing applied) where none of few does."""
    for count in range(1, MOST_TOGETHER + 1):
        for subset in itertools.combinations(moves, count):
            if _applied(subset, works):
                return subset
    return None


def _applied(moves: Sequence[_Move], works: Callable[[], bool]) -> bool:
    """Applies moves, and takes them back where they do not work together."""
    for move in moves:
        move.apply()
    if works():
        return True
    for move in reversed(moves):
        move.undo()
    return False


def _compatible(moves: Sequence[_Move]) -> list[_Move]:
    """Returns the moves, without those that would set an attribute that an earlier one sets to something else."""
    taken: set[tuple[int, str]] = set()
    result = []
    for move in moves:
        places = {(id(s.owner), s.name) for s in move.settings}
        if taken.isdisjoint(places):
            taken |= places
            result.append(move)
    return result


def _thinned(moves: Sequence[_Move], works: Callable[[], bool]) -> tuple[_Move, ...]:
    """Takes back every move without which it still works, the farthest first."""
    needed = list(moves)
    for move in reversed(moves):
        move.undo()
        if works():
            needed.remove(move)
        else:
            move.apply()
    return tuple(needed)
