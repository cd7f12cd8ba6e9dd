"""Opens torch modules: from memory, from the folder of a checkpoint, or from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from liar_opt.frontend.decilm import as_deci
from liar_opt.frontend.fx_engine import FAILURES
from liar_opt.frontend.fx_module import BATCH, Executor, FxModel, example_from, lower, to_numpy, token_lengths, trace
from liar_opt.frontend.hf_checkpoint import (
    checkpoint_folder,
    example_inputs,
    experts_by_lookup,
    is_stock,
    load_module,
    required_arguments,
    runs,
    without_cache,
)
from liar_opt.frontend.module_inputs import LABELS, named_batch, named_source, required_tensors
from liar_opt.frontend.own_text import require_generate
from liar_opt.frontend.plain_module import evaluating, plain_module, require_weights
from liar_opt.passes.base import DenseModel, Finding, Opened, OutputNames, Probes, State
from liar_opt.passes.open_model import model_sizes
from liar_opt.passes.options import DECI, PruneOptions
from liar_opt.runtime.calibration_data import first_rows, require_own_tokenizer
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.memory import Memory
from liar_opt.runtime.self_calibration import is_own_text
from liar_opt.runtime.sessions import PROVIDERS
from liar_opt.runtime.signatures import one_line

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


@dataclass(frozen=True, eq=False)
class OpenedModule(Finding):
    """A torch module as it was opened.

    Attributes:
        example: the batch that it was traced with, by argument.
        folder: that of its checkpoint; None for a module in memory.
        stock: whether it is a model of transformers.
    """

    by: ClassVar[str] = "load_module_state"
    example: dict[str, Any]
    folder: Path | None
    stock: bool


def traced_model(state: State) -> FxModel:
    """Returns the traced module of a state."""
    assert isinstance(state.model, FxModel)
    return state.model


def module_of(state: State) -> torch.nn.Module:
    """Returns the module itself."""
    module = traced_model(state).module
    assert module is not None
    return module


def load_module_state(model: torch.nn.Module | str | Path, calibration: Any, options: PruneOptions) -> tuple[State, Any]:
    """Takes a module from memory or from a checkpoint, traces it and lowers it; names the calibration data.

    Raises:
        ModelError: it cannot be loaded or traced.
        OptionError: nothing says what its inputs are, or it is to write its calibration text and cannot.
    """
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    if isinstance(model, (str, Path)):
        folder = checkpoint_folder(model, options.allow_pickle)
        if options.tokenizer is None:
            require_own_tokenizer(calibration, folder)
        module, notes = load_module(folder, options.allow_pickle)
        module = module.to(_device(options.provider))
    else:
        module, notes = plain_module(model)
        if options.provider == "cuda" and not any(p.is_cuda for p in module.parameters()):
            _device(options.provider)
            raise OptionError("provider 'cuda': the module's weights are on the CPU; move it with .to('cuda') before")
    require_weights(module)
    if is_own_text(calibration):
        require_generate(module)
    calibration = named_source(module, calibration, options.batch_size)
    example = None if options.example is None else named_batch(module, options.example, "example")
    if options.checkpoint == DECI:
        with evaluating(module):
            module = as_deci(module, _example(module, calibration, example))
    with evaluating(module), without_cache(module):
        feeds, program = _traced(module, calibration, example)
        lowered = lower(program, module, folder)
        names = _output_names(module, feeds, lowered)
    lowered.notes += notes
    state = State(lowered, memory=Memory.of(options.memory))
    state.add(
        DenseModel(lowered.original),
        Opened(model_sizes(lowered)),
        OpenedModule(feeds, folder, is_stock(module)),
        OutputNames(names),
        _probes(lowered, feeds),
    )
    return state, calibration


def opened_again(state: State, module: torch.nn.Module) -> State:
    """Returns the state of a module that was made of the one that was opened, traced with the same example.

    Raises:
        ModelError: it cannot be traced.
    """
    opened = state.found(OpenedModule)
    with evaluating(module), without_cache(module):
        feeds, program = _traced(module, None, opened.example)
        lowered = lower(program, module, opened.folder)
        names = _output_names(module, feeds, lowered)
    result = State(lowered, None, state.device, state.progress, memory=state.memory, fresh=state.fresh)
    result.add(
        DenseModel(lowered.original),
        state.found(Opened),
        OpenedModule(feeds, opened.folder, is_stock(module)),
        OutputNames(names),
        _probes(lowered, feeds),
    )
    return result


def _probes(model: FxModel, example: Mapping[str, torch.Tensor]) -> Probes:
    """Returns the example, and where the trace has left sizes open a part of it that is one shorter along each of them.

    A smaller one that the module does not take says nothing, and is left out.
    """
    arrays = {name: to_numpy(value) for name, value in example.items()}
    smaller = dict(arrays)
    for spec in model.signature:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and spec.name in smaller and arrays[spec.name].shape[axis] > 1:
                smaller[spec.name] = smaller[spec.name].take(range(arrays[spec.name].shape[axis] - 1), axis)
    if all(smaller[name].shape == value.shape for name, value in arrays.items()):
        return Probes((arrays,))
    try:
        Executor(model, model.device).run(smaller)
    except FAILURES:
        return Probes((arrays,))
    return Probes((arrays, smaller))


def _traced(
    module: torch.nn.Module, calibration: Any, example: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], ExportedProgram]:
    """Returns a batch and the module traced with it: token lengths free, or else as they are given.

    They may have to fit what else the module reads: the patches of an image, the samples of sound.

    Raises:
        ModelError: ``torch.export`` refuses it both ways; this is what it said first.
    """
    refused = None
    with experts_by_lookup(module):
        feeds = _example(module, calibration, example)
        if runs(module, feeds):
            try:
                return feeds, trace(module, feeds)
            except ModelError as err:
                refused = err
        feeds = _example(module, calibration, example, free=False)
        if refused is not None and not token_lengths(feeds):
            raise refused
        try:
            return feeds, trace(module, feeds, free=False)
        except ModelError as err:
            _outputs(module, feeds)  # what the module fails on cannot be traced
            raise (refused or err) from (refused or err).__cause__


def _example(
    module: torch.nn.Module, calibration: Any, example: Mapping[str, Any] | None, free: bool = True
) -> dict[str, torch.Tensor]:
    """Returns a batch to trace: what the user gave, the first batch of the calibration data, or what a config says.

    With ``free`` its token axes are cut to short lengths that no weight has.

    Raises:
        OptionError: nothing says what the module's inputs are.
    """
    device = next((p.device for p in module.parameters()), "cpu")
    taken = {int(s) for p in module.parameters() for s in p.shape}
    batch = example
    if batch is None and isinstance(calibration, Mapping):
        batch = calibration
    if batch is None and isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes, Path, Iterator)):
        first = next(iter(calibration), None)
        batch = first if isinstance(first, Mapping) else None
    if batch is None:
        batch = first_rows(calibration, BATCH)
    if batch is None:
        batch = example_inputs(module)
    if batch is None:
        raise OptionError(
            f"nothing says what the inputs of {type(module).__name__} are; give calibration data with an array for each of "
            f"{_arguments(module)} (tensors or a DataLoader, an .npz file, a folder of .npy files), or an example"
        )
    where = "the example" if example is not None else "the calibration data"
    if not batch:
        raise OptionError(f"{where} is an empty dict; give a tensor for each of {_arguments(module)}")
    accepted = signature(module.forward).parameters
    named = {k: v for k, v in batch.items() if k in accepted and k not in LABELS}
    if not named and any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        named = {k: v for k, v in batch.items() if k not in LABELS}
    if not named:
        raise OptionError(
            f"none of {', '.join(map(repr, batch))} is an argument of {type(module).__name__}.forward, which takes "
            f"{', '.join(accepted)}"
        )
    required_tensors(module, named, where)
    return example_from(named, taken, device, free)


def _arguments(module: torch.nn.Module) -> str:
    """Returns what the forward of a module needs, or, where all has defaults, takes: for a message."""
    needed = required_arguments(module)
    known = signature(module.forward).parameters.values()
    taken = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in LABELS]
    return ", ".join(needed or taken[:6]) or "its arguments"


def _output_names(module: torch.nn.Module, arguments: Mapping[str, Any], model: FxModel) -> dict[str, str]:
    """Maps tensors of the traced graph to the names of the module's outputs.

    Raises:
        ModelError: the module fails on its arguments.
    """
    import torch

    leaves, _ = torch.utils._pytree.tree_flatten_with_path(_outputs(module, arguments))
    names = [
        ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path) or "output"
        for path, value in leaves
        if isinstance(value, torch.Tensor)
    ]
    return dict(zip(model.results, names, strict=False))


def _outputs(module: torch.nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Runs a module.

    Raises:
        ModelError: it fails: a size, or a type that a trace does not look at, is not what it was made for.
    """
    import torch

    try:
        with torch.no_grad():
            return module(**arguments)
    except Exception as err:  # in any way that the module's code likes
        fed = ", ".join(f"'{k}' {str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for k, v in arguments.items())
        raise ModelError(f"{type(module).__name__} fails on the inputs that are given ({fed}): {one_line(err)}") from err


def _device(provider: str) -> str:
    """Returns the torch device that a provider means here.

    Raises:
        OptionError: unknown, or "cuda" where torch has no device.
    """
    import torch

    if provider not in PROVIDERS:
        raise OptionError(f"provider '{provider}' is unknown; choose one of {', '.join(PROVIDERS)}")
    if provider == "cuda" and not torch.cuda.is_available():
        raise OptionError("provider 'cuda' needs a CUDA device and a torch that was built for it; use provider 'cpu'")
    return "cuda" if provider != "cpu" and torch.cuda.is_available() else "cpu"
