"""Checkpoints of transformers: a folder in, a module; a pruned module, a folder that stock ``transformers`` loads."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from liar_opt.frontend.weight_files import within
from liar_opt.runtime.compare import TOLERANCES, relative_difference
from liar_opt.runtime.errors import CheckError, ModelError, OptionError
from liar_opt.runtime.places import Places
from liar_opt.runtime.whole_file import whole_folder

if TYPE_CHECKING:
    import torch

EXAMPLE_TOKENS = 61
EXAMPLE_SAMPLES, EXAMPLE_FRAMES = 16_000, 128
EXAMPLE_PIXELS = 224
FEATURES = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
"""Fields that say how many features a frame of sound has."""
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
"""Fields that say how many heads have keys and values of their own; code may divide by them where no weight shows it."""
MOST_TOGETHER = 3
"""Fields changed together where the fewer do not bring the shapes nearer."""
BESIDE = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
WRITTEN = "liar_opt.json"
"""The file of a checkpoint in which liar-opt says what it wrote: path within the folder -> SHA-256."""
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def is_stock(module: torch.nn.Module) -> bool:
    """Returns whether a module is a model of transformers, with a configuration."""
    return hasattr(module, "config") and hasattr(module, "save_pretrained") and hasattr(module.config, "to_dict")


@contextlib.contextmanager
def without_cache(module: torch.nn.Module) -> Iterator[None]:
    """Switches off the cache of past keys, which is no tensor, in all configurations that a module and its parts hold."""
    found: list[Any] = [getattr(m, "config", None) for m in module.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextlib.contextmanager
def experts_by_lookup(module: torch.nn.Module) -> Iterator[None]:
    """Has experts look their weights up, row by row: of transformers' ways the one whose rows a trace can follow."""
    found: list[Any] = [getattr(m, "config", None) for m in module.modules()]
    configs = {id(c): c for c in found if getattr(c, "_experts_implementation", None) is not None}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def checkpoint_folder(path: str | Path, allow_pickle: bool) -> Path:
    """Returns the folder of a checkpoint; a hub name is downloaded into the hub's cache.

    Raises:
        ModelError: there is no configuration, or no weights, or weights in pickle files alone, or a link leads out of it.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = _download(str(path), allow_pickle)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"folder '{path}' has no config.json; give the folder of a transformers checkpoint, or an ONNX file"
        )
    _check_links(folder)
    if any(folder.glob("*.safetensors")):
        return folder
    if any(True for p in PICKLES for _ in folder.glob(p)):
        if not allow_pickle:
            raise ModelError(
                f"the weights in '{path}' are pickle files, which can run code when they are read; convert them to "
                "safetensors, or give --allow-pickle if you trust them"
            )
        return folder
    raise ModelError(f"folder '{path}' has no weights (*.safetensors); download them, or give another folder")


def _download(name: str, allow_pickle: bool) -> Path:
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json", *(PICKLES if allow_pickle else ())]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as err:  # no network, no such name, no permission: the hub has many classes for it
        reason = " ".join(str(err).split())[:200]
        raise ModelError(f"'{name}' is neither a file nor a folder, and cannot be fetched from the hub ({reason})") from err


def load_module(folder: Path, allow_pickle: bool) -> torch.nn.Module:
    """Loads a checkpoint as the class that its configuration names.

    Raises:
        ModelError: transformers cannot load it.
    """
    import transformers

    name = (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [None])[0]
    model_class = getattr(transformers, name, None) if name else None
    model_class = model_class or transformers.AutoModel
    try:
        with quiet_loading():
            model: Any = model_class.from_pretrained(folder, use_safetensors=None if allow_pickle else True, dtype="auto")
    except Exception as err:
        raise ModelError(f"transformers cannot load '{folder}': {' '.join(str(err).split())[:300]}") from err
    module: torch.nn.Module = model.eval()
    return module


def example_inputs(module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Returns inputs of a transformers model, made from its configuration; None where that does not say them.

    Text, images, videos, or sound: samples, or features by time in the first layout that the model takes.
    """
    feeds = _example(module) if is_stock(module) else None
    return feeds if feeds is not None and feeds.keys() >= set(required_arguments(module)) else None


def required_arguments(module: torch.nn.Module) -> list[str]:
    """Returns the names of what the forward of a module has no default for."""
    import inspect

    accepted = inspect.signature(module.forward).parameters.values()
    return [p.name for p in accepted if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def _example(module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    import inspect

    import torch

    config: Any = module.config
    accepted = inspect.signature(module.forward).parameters
    ids = torch.ones(2, _tokens(config), dtype=torch.int64)
    text = {k: ids for k in ("input_ids", "attention_mask", "decoder_input_ids") if k in accepted}
    images = {"pixel_values": _images(module)} if "pixel_values" in accepted else {}
    if "input_ids" in accepted and images:
        # Both, as CLIP wants it; text alone where images take places in the text.
        return next((feeds for feeds in ({**text, **images}, text, images) if runs(module, feeds)), None)
    if "input_ids" in accepted:
        return text
    if images:
        return images
    name = next((n for n in ("input_values", "input_features") if n in accepted), None)
    return None if name is None else _sound(module, name, "decoder_input_ids" in accepted)


def runs(module: torch.nn.Module, feeds: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether a module takes some inputs."""
    import torch

    try:
        with torch.no_grad():
            module(**feeds)
    except Exception:  # wrong shapes fail in any way that the module's code likes
        return False
    return True


def _configs(config: Any) -> list[Any]:
    """Returns a configuration and those of a model's parts that it holds."""
    return [config, *(v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type"))]


def _images(module: torch.nn.Module) -> torch.Tensor:
    """Returns images, or videos, of the size that the configuration, or that of a part, says."""
    import torch

    config: Any = next((c for c in _configs(module.config) if hasattr(c, "image_size")), module.config)
    size = getattr(config, "image_size", None)
    size = size if isinstance(size, (int, list, tuple)) else EXAMPLE_PIXELS
    height, width = (size, size) if isinstance(size, int) else size
    frames = getattr(config, "num_frames", None)  # of a video
    video = (frames,) if isinstance(frames, int) else ()
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return torch.zeros(2, *video, getattr(config, "num_channels", 3), height, width, dtype=dtype)


def _tokens(config: Any) -> int:
    return min([EXAMPLE_TOKENS, *_positions(config)])


def _positions(config: Any) -> list[int]:
    names = ("max_position_embeddings", "max_target_positions", "n_positions")
    said = [getattr(c, n, None) for c in _configs(config) for n in names]
    return [n for n in said if isinstance(n, int) and n > 0]


def positions(module: torch.nn.Module) -> int | None:
    """Returns for how many tokens a transformers model has positions, by its configuration; None where that says nothing.

    A table of positions with a row for padding has no positions up to that row (RoBERTa's begin behind it).
    """
    import torch

    said = _positions(module.config) if is_stock(module) else []
    tables = [m for m in module.modules() if isinstance(m, torch.nn.Embedding) and m.padding_idx is not None]
    rows = [t.num_embeddings - int(t.padding_idx) - 1 for t in tables if t.num_embeddings in said]  # type: ignore[arg-type]
    return min([*said, *(n for n in rows if n > 0)], default=None)


def _sound(module: torch.nn.Module, name: str, pairs: bool) -> dict[str, torch.Tensor] | None:
    """Returns sound as samples, or as features by time, of the first shape that the model takes."""
    import torch

    config: Any = module.config
    width = next((v for n in FEATURES if isinstance(v := getattr(config, n, None), int)), None)
    shapes: list[tuple[int, ...]] = [] if name == "input_features" else [(2, EXAMPLE_SAMPLES)]
    if width is not None:
        positions = getattr(config, "max_source_positions", None)
        if isinstance(positions, int):
            shapes += [(2, width, 2 * positions), (2, width, positions)]
        lengths = [n for n in (getattr(config, "max_length", None), EXAMPLE_FRAMES) if isinstance(n, int)]
        shapes += [(2, n, width) for n in lengths]
    place = next((p for p in module.parameters() if p.is_floating_point()), None)
    for shape in shapes:
        feeds = {name: torch.zeros(shape) if place is None else torch.zeros(shape, dtype=place.dtype, device=place.device)}
        if pairs:
            feeds["decoder_input_ids"] = torch.ones(2, _tokens(config), dtype=torch.int64, device=feeds[name].device)
        if runs(module, feeds):
            return feeds
    return None


# -- what a configuration says ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldChange:
    """One field of a configuration: ``path`` leads from the outermost to the one that has it."""

    path: tuple[str, ...]
    name: str
    before: Any
    after: Any

    def apply(self, config: Any) -> None:
        """Sets the field."""
        for part in self.path:
            config = getattr(config, part)
        setattr(config, self.name, self.after)

    def __str__(self) -> str:
        return f"{'.'.join((*self.path, self.name))} {self.before} -> {self.after}"


Shapes = dict[str, tuple[int, ...]]


def express(
    module: torch.nn.Module, wanted: Shapes, sizes: Iterable[tuple[int, int]], head_widths: Iterable[int]
) -> tuple[FieldChange, ...] | None:
    """Finds the fields of a configuration with which the model's class makes tensors of the wanted shapes.

    Candidates are the integers in the configuration that equal a size that changes, fields that are None, and ``head_dim``,
    which is derived from the others where it is not said. They are tried by making the model without memory (on the meta
    device); fields are added while they bring more tensors to their shape.

    Args:
        module: the model, as it was.
        wanted: the shapes of all its tensors, as they will be.
        sizes: (before, after) of every dimension that changes.
        head_widths: widths of heads, which do not change.

    Returns:
        The changes, or None where no set of fields says these widths.
    """
    pairs = sorted(set(sizes))
    candidates = list(_candidates(module.config, pairs, sorted(set(head_widths))))
    chosen: tuple[FieldChange, ...] = ()
    missing = _missing(module, chosen, wanted)
    while missing:
        better = None
        for count in range(1, MOST_TOGETHER + 1):
            for subset in itertools.combinations(candidates, count):
                places = [(c.path, c.name) for c in (*chosen, *subset)]
                if len(set(places)) < len(places):
                    continue
                left = _missing(module, (*chosen, *subset), wanted)
                if left < missing and (better is None or left < better[0]):
                    better = (left, (*chosen, *subset))
                if left == 0:
                    break
            if better is not None:
                break
        if better is None:
            return None
        missing, chosen = better
    return (*chosen, *_divisors(module, chosen, candidates, wanted))


def _divisors(
    module: torch.nn.Module, chosen: Sequence[FieldChange], candidates: Iterable[FieldChange], wanted: Shapes
) -> list[FieldChange]:
    """Returns the changes of `KEY_VALUE_HEADS` that were as many as the heads and stay so (latent attention: DeepSeek)."""
    said = {(c.path, c.name) for c in chosen}
    alike = {(c.path, c.before, c.after) for c in chosen}
    found = [
        c
        for c in candidates
        if c.name in KEY_VALUE_HEADS and (c.path, c.name) not in said and (c.path, c.before, c.after) in alike
    ]
    return [c for c in found if _missing(module, (*chosen, c), wanted) == 0]


def _candidates(
    config: Any, pairs: Sequence[tuple[int, int]], head_widths: Sequence[int], path: tuple[str, ...] = ()
) -> Iterator[FieldChange]:
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    numbers = {k: v for k, v in fields.items() if type(v) is int}
    for name, value in numbers.items():
        yield from (FieldChange(path, name, value, after) for before, after in pairs if value == before)
    if fields.get("head_dim") is None:
        yield from (FieldChange(path, "head_dim", None, width) for width in head_widths)
    for name, value in fields.items():
        if value is None and name in type(config).__init__.__code__.co_names + tuple(_own_fields(type(config))):
            if name.endswith(("_id", "_ids", "_type", "_dtype")) or name == "head_dim":
                continue
            yield from (FieldChange(path, name, None, after) for _, after in pairs)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _candidates(value, pairs, head_widths, (*path, name))


def _own_fields(config_class: type) -> list[str]:
    """Returns the fields that an architecture's own configuration class declares, those of all models left out."""
    from transformers import PretrainedConfig

    inherited = set(getattr(PretrainedConfig, "__annotations__", {}))
    names: list[str] = []
    for base in config_class.__mro__:
        if base is PretrainedConfig:
            break
        names += [n for n in getattr(base, "__annotations__", {}) if n not in inherited]
    return names


def _missing(module: torch.nn.Module, changes: Sequence[FieldChange], wanted: Shapes) -> int:
    """Returns how many tensors of the model that a changed configuration makes have other shapes than are wanted."""
    import torch

    module_class: Any = type(module)
    try:
        config = changed_config(module.config, changes)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = module_class(config)
    except Exception:  # a configuration may refuse values in any way
        return len(wanted) + 1
    shapes = {k: tuple(v.shape) for k, v in made.state_dict().items()}
    return len(shapes.keys() ^ wanted.keys()) + sum(shapes[k] != s for k, s in wanted.items() if k in shapes)


def changed_config(config: Any, changes: Sequence[FieldChange]) -> Any:
    """Returns a copy of a configuration with some fields changed."""
    result = copy.deepcopy(config)
    for change in changes:
        change.apply(result)
    return result


# -- writing ----------------------------------------------------------------------------------------------------------


def check_folder(path: Path, source: Path | None, force: bool) -> None:
    """Checks that a checkpoint may be written to a folder.

    Of a folder that exists everything must be what liar-opt wrote there (:data:`WRITTEN` says it, with digests): what
    anybody else has put into it or has changed would be lost.

    Raises:
        OptionError: it is the input, a file, a link, not what liar-opt wrote, exists without ``force``, or its own folder
            does not exist.
    """
    if source is not None and path.exists() and path.samefile(source):
        raise OptionError(f"output '{path}' is the input; choose another path, inputs are never written to")
    Places().folder(path, "output")
    filled = path.is_dir() and any(path.iterdir())
    if filled and not (path / "config.json").is_file():
        raise OptionError(f"folder '{path}' is no checkpoint and is not replaced; choose another path")
    if filled and not force:
        raise OptionError(f"output folder '{path}' exists; give --force to replace it or choose another path")
    foreign = foreign_file(path) if filled else None
    if foreign is not None:
        raise OptionError(
            f"output folder '{path}' holds '{foreign}', which liar-opt did not write, or not so, and which would be lost; "
            "remove the folder or choose another path"
        )


def foreign_file(folder: Path) -> str | None:
    """Returns the first entry of a folder that is not as liar-opt wrote it, as a path within it; None: there is none."""
    try:
        written = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        written = {}
    folders = {parent for name in written for parent in PurePosixPath(name).parents}
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        if name == WRITTEN and written:
            continue
        if entry.is_symlink() or (entry.is_dir() and PurePosixPath(name) not in folders):
            return name
        if not entry.is_dir() and (not entry.is_file() or written.get(name) != _digest(entry)):
            return name
    return None


def _note_written(folder: Path) -> None:
    files = {f.relative_to(folder).as_posix(): _digest(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    (folder / WRITTEN).write_text(json.dumps({"schema": 1, "files": files}, indent=1) + "\n", encoding="utf-8")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_checkpoint(
    module: torch.nn.Module,
    path: Path,
    source: Path | None,
    changes: Sequence[FieldChange] | None,
    example: Mapping[str, torch.Tensor],
    *,
    force: bool = False,
) -> Path:
    """Writes a checkpoint folder, whole or not at all, after loading it as anybody would.

    Beside it :data:`WRITTEN` says what was written: that alone is removed when it is written again.

    Args:
        module: the pruned model.
        path: the folder.
        source: the folder of the original; its tokenizer and what else belongs to the model is copied.
        changes: what its configuration must say.
        example: inputs on which the loaded checkpoint must give what the module gives.
        force: replace a folder that exists.

    Raises:
        OptionError: the folder exists, holds what liar-opt did not write, or cannot be written, or the configuration cannot
            say the widths.
        CheckError: what was loaded again is not what was saved.
    """
    if not is_stock(module):
        raise OptionError(
            f"{type(module).__name__} is no model of transformers and has no checkpoint folder; give a path that ends in "
            ".pt2 (exported program) or .onnx"
        )
    if changes is None:
        raise OptionError(inexpressible(module))
    check_folder(path, source, force)
    writer: Any = module
    try:
        with whole_folder(path) as temporary:
            with quiet_loading():
                writer.save_pretrained(temporary)
            if source is not None:
                _copy_beside(source, temporary)
            _check_loads(module, temporary, example)
            _note_written(temporary)
    except OSError as err:
        raise OptionError(f"'{path}' cannot be written ({err.strerror or err}); nothing was left") from err
    return path


def inexpressible(module: torch.nn.Module, kinds: Collection[str] = (), rest: bool = True) -> str:
    """Returns the sentence for widths of kinds of groups (of all, if none is named) that a configuration cannot say."""
    config: Any = module.config
    names = ("head_dim", "num_attention_heads", "num_heads", "n_head", "intermediate_size")
    fields = ", ".join(k for k in names if any(hasattr(c, k) for c in _configs(config))) or "none"
    named = ["another number of heads" if k == "heads" else "another feed-forward width" for k in sorted(kinds)]
    what = " or ".join(named) or "these widths"
    lacks = " has no field 'head_dim' and" if "heads" in kinds and "head_dim" not in fields else ""
    other = (
        "" if len(kinds) != 1 or not rest else f", or prune what it can say ({'--ffn' if 'heads' in kinds else '--heads'})"
    )
    return (
        f"the configuration of {type(module).__name__} ({config.model_type}){lacks} cannot say {what} (fields {fields}); "
        f"write ONNX with --format onnx (in Python: checkpoint=False){other}"
    )


def _copy_beside(source: Path, target: Path) -> None:
    """Copies what belongs to a model beside its weights: tokenizer, generation config, modules of sentence-transformers."""
    for file in _beside(source):
        place = target / file.relative_to(source)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)


def _beside(source: Path) -> Iterator[Path]:
    """Yields the files of a checkpoint that belong to a model beside its weights."""
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and re.match(r"\d+_", entry.name):
            yield from (file for file in sorted(entry.rglob("*")) if file.is_file())
        elif entry.is_file() and entry.suffix in BESIDE and not entry.name.endswith(".index.json"):
            if entry.name != WRITTEN:
                yield entry


def _check_links(folder: Path) -> None:
    """Checks that what is copied beside the weights lies in the folder, or among the blobs of the hub's cache.

    A checkpoint from somebody else could name any file of its reader, which would be in the result.

    Raises:
        ModelError: a link leads out of it.
    """
    hub = [folder.resolve().parents[1] / "blobs"] if folder.resolve().parent.name == "snapshots" else []
    for file in _beside(folder):
        if not within(file, folder, *hub):
            raise ModelError(
                f"'{file}' is a link that leads out of the checkpoint's folder, to '{file.resolve()}'; put the file itself "
                "there, or remove it"
            )


def _check_loads(module: torch.nn.Module, folder: Path, example: Mapping[str, torch.Tensor]) -> None:
    import torch

    model_class: Any = type(module)
    device = next((p.device for p in module.parameters()), "cpu")
    with quiet_loading():
        loaded, info = model_class.from_pretrained(folder, output_loading_info=True, dtype="auto")
    loaded = loaded.eval().to(device)
    wrong = {k: v for k, v in info.items() if v}
    if wrong:
        raise CheckError(f"the checkpoint does not load as it was saved ({str(wrong)[:200]}); nothing was written")
    was = module.training
    module.eval()
    try:
        with torch.no_grad(), without_cache(module), without_cache(loaded):
            pairs = [torch.utils._pytree.tree_leaves(m(**example)) for m in (loaded, module)]
    finally:
        module.train(was)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()}
    allowed = max((TOLERANCES[d] for d in dtypes if d in TOLERANCES), default=TOLERANCES["float32"])
    for a, b in zip(*pairs, strict=True):
        if not isinstance(a, torch.Tensor):
            continue
        worst = relative_difference(a.float().cpu().numpy(), b.float().cpu().numpy())
        if not worst <= allowed:
            raise OptionError(f"{inexpressible(module)}: the loaded checkpoint differs by {worst:.1e}")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps the progress bars and the chatter of transformers off the terminal."""
    from transformers.utils import logging as loading

    verbosity, bars = loading.get_verbosity(), loading.is_progress_bar_enabled()
    loading.set_verbosity_error()
    loading.disable_progress_bar()
    try:
        yield
    finally:
        loading.set_verbosity(verbosity)
        if bars:
            loading.enable_progress_bar()
