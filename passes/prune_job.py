"""The whole job behind one function: :func:`prune` takes a model and calibration data and gives a smaller model.

:func:`inspect` stops after the analysis. Both return plain data (`passes.report`) beside the model, so that a report never
needs the code that made it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from liar_opt.passes.auto_blocks import prune_auto
from liar_opt.passes.backend import Backend
from liar_opt.passes.base import Change, Observer, Progress, WholeModel, no_progress
from liar_opt.passes.choices import require_choice
from liar_opt.passes.cut_experts import require_experts_possible
from liar_opt.passes.cut_vocabulary import words_alone
from liar_opt.passes.gradient_scores import Labelled, Loss
from liar_opt.passes.limit_drop import Metric
from liar_opt.passes.model_job import ModelJob, inspect_model
from liar_opt.passes.onnx_backend import OnnxBackend
from liar_opt.passes.open_model import is_module_source
from liar_opt.passes.options import PruneOptions, documentation
from liar_opt.passes.parts_job import finish_parts, parts_alone, require_blocks_possible, without_parts
from liar_opt.passes.pattern_job import pattern_alone, prune_pattern, require_pattern_possible
from liar_opt.passes.repairs import RepairFunction
from liar_opt.passes.result import Inspection, PruneResult
from liar_opt.passes.scores import ScoreFunction
from liar_opt.passes.try_choices import prune_chosen
from liar_opt.passes.verify_model import dense_session, require_runs
from liar_opt.runtime.arrays import arrays_for, solving_on
from liar_opt.runtime.calibration_data import require_readable
from liar_opt.runtime.errors import LiarOptError, OptionError
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.ranks import current
from liar_opt.runtime.self_calibration import is_own_text
from liar_opt.runtime.sessions import custom_operators


def inspect(
    model: Any,
    *,
    example: Any = None,
    allow_pickle: bool = False,
    custom_ops: str | Path | Sequence[str | Path] | None = None,
) -> Inspection:
    """Finds the channel groups of a model; changes and measures nothing.

    Args:
        model: as for :func:`prune`.
        example: a batch to trace a torch module with, if nothing else says what it takes.
        allow_pickle: whether the weights of a checkpoint may be read from pickle files.
        custom_ops: as for :func:`prune`.

    Raises:
        ModelError: the model cannot be read.
        OptionError: a library of operators cannot be loaded.
    """
    options = PruneOptions(provider="cpu", example=example, allow_pickle=allow_pickle)
    with custom_operators(_libraries(custom_ops)):
        return inspect_model(_backend(model).open(model, None, options))


def _backend(model: Any) -> type[Backend]:
    """Returns what works on a model."""
    if is_module_source(model):
        from liar_opt.passes.module_backend import TorchBackend

        return TorchBackend
    return OnnxBackend


def prune(
    model: Any,
    calibration: Any = None,
    *,
    sparsity: float | None = None,
    ffn: float | None = None,
    heads: float | None = None,
    values: float | None = None,
    value_cut: str = "rotate",
    query_key: float | Literal["auto"] | None = None,
    recurrent: float | None = None,
    multiple_of: int = 8,
    uniform: bool | None = None,
    new_bias: bool | None = None,
    target: str | None = None,
    max_drop: float | str | None = None,
    metric: Metric | None = None,
    allocate: str | None = None,
    whole_layers: str = "off",
    search: float | None = None,
    experts: float | None = None,
    vocabulary: Any = None,
    vocabulary_coverage: float | None = None,
    small_tokenizer: bool = False,
    blocks: int | Literal["auto"] | None = None,
    block_repair: str = "auto",
    runtime: str | None = None,
    tensor_parallel: int | None = None,
    quantize: str | None = None,
    pattern: str | None = None,
    pattern_solver: str = "sparsegpt",
    sparse_storage: bool = False,
    tune: float | None = None,
    tune_what: str = "biases",
    refit: bool = False,
    choose: str | None = None,
    choose_tries: int = 6,
    choose_minutes: float | None = None,
    passes: str | None = None,
    score: str | ScoreFunction = "greedy",
    repair: str | RepairFunction = "liar",
    ridge: float | None = None,
    weighting: str = "stream",
    tokenizer: str | Path | None = None,
    text_column: str | None = None,
    samples: int = 512,
    batch_size: int = 32,
    sequence_length: int | None = None,
    mask_input: str | None = None,
    packing: str = "auto",
    provider: str = "auto",
    solver: str = "auto",
    memory: int | str | None = None,
    resume: str | Path | None = None,
    fresh: bool = False,
    seed: int = 0,
    example: Any = None,
    checkpoint: bool | Literal["deci"] | None = None,
    allow_pickle: bool = False,
    backend: str = "torch",
    loss: Loss | None = None,
    labelled: Labelled | None = None,
    custom_ops: str | Path | Sequence[str | Path] | None = None,
    dry_run: bool = False,
    latency: bool = True,
    progress: Progress = no_progress,
    observer: Observer | None = None,
) -> PruneResult:
    """Makes a trained transformer smaller: removes channels and heads, repairs the rest by least squares.

    ``model`` is the path of an ONNX file, a model in memory, a torch module, the folder of a transformers checkpoint or its
    hub name; it is not changed. Without a ratio, a target or a limit 30 % of the prunable parameters go. What the options
    are is said in `passes.options`, where each is once.

    Returns:
        The pruned model with its report.

    Raises:
        ModelError: the model cannot be read or has nothing to prune.
        OptionError: an option or the calibration data does not fit.
        CheckError: the result failed a check.
    """
    options = PruneOptions(
        sparsity=sparsity,
        ffn=ffn,
        heads=heads,
        values=values,
        value_cut=value_cut,
        query_key=query_key,
        recurrent=recurrent,
        multiple_of=multiple_of,
        uniform=uniform,
        new_bias=new_bias,
        target=target,
        max_drop=max_drop,
        metric=metric,
        allocate=allocate,
        whole_layers=whole_layers,
        search=search,
        experts=experts,
        vocabulary=vocabulary,
        vocabulary_coverage=vocabulary_coverage,
        small_tokenizer=small_tokenizer,
        blocks=blocks,
        block_repair=block_repair,
        runtime=runtime,
        tensor_parallel=tensor_parallel,
        quantize=quantize,
        pattern=pattern,
        pattern_solver=pattern_solver,
        sparse_storage=sparse_storage,
        tune=tune,
        tune_what=tune_what,
        refit=refit,
        choose=choose,
        choose_tries=choose_tries,
        choose_minutes=choose_minutes,
        passes=passes,
        score=score,
        repair=repair,
        ridge=ridge,
        weighting=weighting,
        tokenizer=tokenizer,
        text_column=text_column,
        samples=samples,
        batch_size=batch_size,
        sequence_length=sequence_length,
        mask_input=mask_input,
        packing=packing,
        provider=provider,
        solver=solver,
        memory=memory,
        resume=resume,
        fresh=fresh,
        seed=seed,
        example=example,
        checkpoint=checkpoint,
        allow_pickle=allow_pickle,
        backend=backend,
        loss=loss,
        labelled=labelled,
        custom_ops=custom_ops,
        dry_run=dry_run,
        latency=latency,
        progress=progress if progress is no_progress else _passed_on(progress),
        observer=None if observer is None else _passed_on(observer),
    )
    arrays = arrays_for("host" if (solver, provider) == ("auto", "cpu") else solver)
    watch, opening = MemoryWatch(), _backend(model)
    current().waited = 0.0  # of this run: what passed until all had started is in no time of it
    opening.require_possible(calibration, options)
    require_experts_possible(options)
    require_pattern_possible(options)
    require_blocks_possible(options)
    require_choice(options, calibration)
    require_readable(None if is_own_text(calibration) else calibration, tokenizer)
    if current().size > 1 and (blocks is not None or experts is not None):
        raise OptionError("blocks and experts go in one process; run it without torchrun, then the widths of the result")
    try:
        with custom_operators(_libraries(custom_ops)), solving_on(arrays):
            return _blamed(opening.open(model, calibration, options), watch)
    except _Raised as raised:
        raise raised.error from None


class _Raised(BaseException):
    """What a function of the caller raised: no pass and no proof may take it for a fault of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _passed_on(function: Any) -> Any:
    """Returns a function of the caller whose exceptions end the run as they are."""
    if not callable(function):  # the options say so
        return function

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as err:
            raise _Raised(err) from err

    return call


def _blamed(opened: Backend, watch: MemoryWatch) -> PruneResult:
    """Does what the options of an opened model ask for; what the model itself fails on is no fault of ours."""
    try:
        return _pruned(opened, watch)
    except (LiarOptError, OSError, MemoryError):
        raise
    except Exception:
        if opened.state.calibration is not None:
            require_runs(opened.state, dense_session(opened.state), every=True)
        raise


def _pruned(opened: Backend, watch: MemoryWatch) -> PruneResult:
    """Does what the options of an opened model ask for."""
    options = opened.options
    if options.choose is not None:
        return prune_chosen(opened, watch)
    went: tuple[Change, ...] = ()
    if pattern_alone(options):
        return prune_pattern(opened, watch)
    if options.blocks is not None:
        opened.block_repair()  # raises before the work where there can be none
    if options.experts is not None or options.blocks is not None:
        if options.blocks == "auto":
            return prune_auto(opened, watch)
        opened = without_parts(opened, options.blocks or 0)
        if parts_alone(opened.options):
            return finish_parts(opened, watch)
        went = opened.state.found(WholeModel).changes
        opened = replace(opened, state=opened.anew(opened.state, opened.state.model.notes))
    if words_alone(opened.options):
        return current().kept(lambda: opened.cut_words_alone(watch))
    result = ModelJob(opened, watch).run()
    result.changes = (*went, *result.changes)
    return result


if prune.__doc__ is not None:  # it is where Python runs with -OO
    prune.__doc__ = prune.__doc__.replace(
        "    Returns:",
        f"""    Args:
        model: see above.
        calibration: a path (.txt, .jsonl, .csv, .npz, folder of .npy, saved dataset), a dataset name, texts, feeds, "self"
            (a decoder writes its own text), or None for synthetic inputs. For a module dicts have the names of its
            arguments; also a tensor of samples, or tensors in the order of the arguments: a tuple is one batch, a list, a
            DataLoader or a Dataset holds batches. One item more than ``forward`` takes is a label, and left out.
{documentation()}

    Returns:""",
    )


def _libraries(custom_ops: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path]:
    if custom_ops is None:
        return ()
    return [custom_ops] if isinstance(custom_ops, (str, Path)) else custom_ops
