"""Checkpoints of transformers: a folder in, a module; a pruned module, a folder that stock ``transformers`` loads."""

from __future__ import annotations

import collections
import contextlib
import copy
import fnmatch
import hashlib
import itertools
import json
import math
import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from liar_opt.frontend.weight_files import within
from liar_opt.runtime.compare import TOLERANCES, relative_difference
from liar_opt.runtime.errors import CheckError, LiarOptWarning, ModelError, OptionError
from liar_opt.runtime.extras import require
from liar_opt.runtime.places import Places
from liar_opt.runtime.whole_file import system_errors, whole_folder

if TYPE_CHECKING:
    import torch

EXAMPLE_TOKENS = 61
EXAMPLE_SAMPLES, EXAMPLE_FRAMES = 16_000, 128
EXAMPLE_PIXELS = 224
FEATURES = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel")
"""Fields that say how many features a frame of sound has."""
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
"""Fields that say how many heads have keys and values of their own; code may divide by them where no weight shows it."""
MOST_CHOICES = 8
"""Values of known fields that are tried together before the fields are searched."""
MOST_TOGETHER = 3
"""Fields changed together where the fewer do not bring the shapes nearer."""
HEAD_WIDTH = re.compile(r"(^|_)(head_dim|head_size|head_width|head_channels|d_head|dim_head|d_kv|kv_channels)$")
"""Names of fields that say how wide one head is. Cuts leave that alone: they are not changed, whatever number they hold."""
RATIO = re.compile(r"ratio|expan|mult")
"""Names of fields that say a width as a multiple of another one."""
LONGEST_LIST = 64
"""Entries of a list in a configuration that are looked at one by one."""
BESIDE = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*/config.json")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken")
"""Files of a tokenizer."""
DECILM = "DeciLMForCausalLM"
"""The architecture of models with widths of each layer, whose code liar-opt has (`frontend/modeling_decilm.py`)."""
WRITTEN = "liar_opt.json"
"""The file of a checkpoint in which liar-opt says what it wrote: path within the folder -> SHA-256."""
PACKAGES = ("torch", "transformers", "safetensors")
"""What loads a checkpoint."""
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


def expert_alignment(module: torch.nn.Module) -> int:
    """Returns of how many bytes the rows of stacked experts must be a multiple; 1 where any do.

    torch's grouped product, by which transformers runs experts, refuses rows that are not of 16 bytes.
    """
    found: list[Any] = [getattr(m, "config", None) for m in module.modules()]
    return 16 if any(getattr(c, "_experts_implementation", None) == "grouped_mm" for c in found) else 1


def checkpoint_folder(path: str | Path, allow_pickle: bool) -> Path:
    """Returns the folder of a checkpoint; a hub name is downloaded into the hub's cache.

    Raises:
        ModelError: there is no configuration, or no weights, or weights in pickle files alone; a link leads out of it;
            or it is an adapter, is quantised, or needs code of its own.
        OptionError: torch, transformers or safetensors is not installed.
    """
    folder = Path(path)
    if not folder.is_dir():
        require(f"'{path}' is neither a file nor a folder, and a checkpoint of the hub", *PACKAGES)
        _require_plain(_download(str(path), ["*.json"]), path)
        folder = _download(str(path), [*BESIDE_WEIGHTS, "*.safetensors", *(PICKLES if allow_pickle else ())])
    _check_links(folder)
    _require_plain(folder, path)
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


def _require_plain(folder: Path, path: str | Path) -> None:
    """Checks what the files of a checkpoint say it is, before anything of it is loaded.

    Args:
        folder: where its files are.
        path: what the user called it.

    Raises:
        ModelError: it has no configuration that can be read, is an adapter, is quantised, or needs code of its own.
        OptionError: a package that loads it is not installed.
    """
    if (folder / "adapter_config.json").is_file():
        base = _fields_of(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"'{path}' holds an adapter (adapter_config.json), no model of its own; merge it into its base model"
            f"{f' {base!r}' if base else ''} (peft: merge_and_unload), save that with save_pretrained, and give its folder"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"folder '{path}' has no config.json; give the folder of a transformers checkpoint, or an ONNX file"
        )
    require(f"checkpoint '{path}'", *PACKAGES)
    config = _fields_of(folder / "config.json")
    method = _quantised(folder, config)
    if method is not None:
        raise ModelError(f"'{path}' is quantised ({method}); prune the float checkpoint and quantise the result")
    if config.get("auto_map") and _stock_class(config) is None:
        raise ModelError(
            f"'{path}' needs code of its own (auto_map in config.json), which liar-opt does not run; load it yourself and "
            "give the module to liar_opt.prune, or export it to ONNX and give that file"
        )


def _fields_of(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelError: it holds none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ModelError(
            f"'{path}' cannot be read ({' '.join(str(err).split())[:200]}); repair it or fetch it again"
        ) from err
    if not isinstance(result, dict):
        raise ModelError(f"'{path}' holds no JSON object; repair it or fetch it again")
    return result


def _quantised(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Returns how the weights of a checkpoint are quantised, if they are."""
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    for part in parts:
        for name in ("quantization_config", "compression_config"):
            said = part.get(name)
            if isinstance(said, dict) and said:
                return str(said.get("quant_method") or ("bitsandbytes" if _bits_and_bytes(said) else name))
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):  # of GPTQ, AWQ, ModelOpt
        if (folder / name).is_file():
            return name
    for path in sorted(folder.glob("*.safetensors")):
        kinds = {str(v.get("dtype")) for v in _header(path).values() if isinstance(v, dict)}
        narrow = sorted(k for k in kinds if k.startswith(("F8", "F4", "F6")))
        if narrow:
            return f"weights of type {', '.join(narrow)}"
    return None


def _bits_and_bytes(said: Mapping[str, Any]) -> bool:
    return any(name.startswith(("load_in_", "bnb_")) for name in said)


def _header(path: Path) -> dict[str, Any]:
    """Returns what a safetensors file says of its tensors; nothing where it is damaged, which loading it will say."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size <= path.stat().st_size else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _stock_class(config: Mapping[str, Any]) -> Any:
    """Returns the class of transformers that a configuration names, or ours of DeciLM; None where it names no such."""
    import transformers

    name = next(iter(_architectures(config)), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return _deci_class(config) if found is None else found


def _architectures(config: Mapping[str, Any]) -> list[Any]:
    """Returns what a configuration calls its classes; one that is no list names none."""
    said = config.get("architectures")
    return said if isinstance(said, list) else []


def _deci_class(config: Mapping[str, Any]) -> Any:
    """Returns the class that loads a checkpoint of DeciLM; None where a configuration says another or more."""
    blocks = config.get("block_configs")
    if DECILM not in _architectures(config) or not isinstance(blocks, list):
        return None
    from liar_opt.frontend.modeling_decilm import BlockConfig, DeciLMForCausalLM

    try:
        [BlockConfig(**block) for block in blocks]
    except TypeError:
        return None
    return DeciLMForCausalLM


def _download(name: str, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as err:  # no network, no such name, no permission: the hub has many classes for it
        reason = " ".join(str(err).split())[:200]
        raise ModelError(f"'{name}' is neither a file nor a folder, and cannot be fetched from the hub ({reason})") from err


def load_module(folder: Path, allow_pickle: bool) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Loads a checkpoint as the class that its configuration names.

    Returns:
        The module, and what there is to say of weights that are missing or left over.

    Raises:
        ModelError: transformers cannot load it, or most of its weights are not there.
    """
    import transformers

    model_class = _stock_class(_fields_of(folder / "config.json")) or transformers.AutoModel
    safe = None if allow_pickle else True
    try:
        with quiet_loading():  # without code of the folder's own, and so without a question about it
            settings = {"use_safetensors": safe, "dtype": "auto", "trust_remote_code": False, "output_loading_info": True}
            model, info = model_class.from_pretrained(folder, **settings)
    except Exception as err:
        raise ModelError(f"transformers cannot load '{folder}': {' '.join(str(err).split())[:300]}") from err
    module: torch.nn.Module = model.eval()
    return module, _unlike(module, folder, info)


def _unlike(module: torch.nn.Module, folder: Path, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns sentences on weights that a class has and its checkpoint lacks, and on those that it does not take.

    The first are warned of as well: what is made of such a model is worth little, and a run takes long.

    Raises:
        ModelError: most are missing: it is another model's configuration, or files are.
    """
    kind = type(module).__name__
    sizes = {name: t.numel() for name, t in (*module.named_parameters(), *module.named_buffers())}
    missing, left = (sorted(map(str, info.get(f"{what}_keys") or ())) for what in ("missing", "unexpected"))
    missing = [name for name in missing if name in sizes]  # others are tied to these
    held = 1 - sum(sizes[name] for name in missing) / max(sum(sizes.values()), 1)
    if held < 0.5:
        raise ModelError(
            f"'{folder}' holds {100 * held:.0f} % of the weights of {kind}, '{missing[0]}' is missing: config.json says "
            "another model, or files are missing; fetch the checkpoint again"
        )
    more = {True: "", False: " and others"}
    drawn, others = (
        (f"weights {text}: '{names[0]}'{more[len(names) == 1]}",) if names else ()
        for names, text in (
            (missing, f"that {kind} has are not in '{folder}', transformers has drawn them at random"),
            (left, f"in '{folder}' are not of {kind}, and will not be in the result"),
        )
    )
    for sentence in drawn:
        warnings.warn(LiarOptWarning(sentence), stacklevel=2)
    return (*drawn, *others)


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


def configs_of(config: Any) -> list[Any]:
    """Returns a configuration and those of a model's parts that it holds."""
    return [config, *(v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type"))]


def _images(module: torch.nn.Module) -> torch.Tensor:
    """Returns images, or videos, of the size that the configuration, or that of a part, says."""
    import torch

    config: Any = next((c for c in configs_of(module.config) if hasattr(c, "image_size")), module.config)
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
    said = [getattr(c, n, None) for c in configs_of(config) for n in names]
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
    """One field of a configuration: ``path`` leads from the outermost to the one that has it; ``index`` is into a list.

    A number in the path is the place of an entry of a list.
    """

    path: tuple[str, ...]
    name: str
    before: Any
    after: Any
    index: int | None = None

    @property
    def place(self) -> FieldPlace:
        """What is changed."""
        return self.path, self.name, self.index

    def apply(self, config: Any) -> None:
        """Sets the field."""
        for part in self.path:
            config = config[int(part)] if part.isdigit() else getattr(config, part)
        old, value = getattr(config, self.name, None), self.after
        if self.index is not None and old is not None:
            value = (*old[: self.index], self.after, *old[self.index + 1 :])
        setattr(config, self.name, list(value) if isinstance(old, list) else value)

    def __str__(self) -> str:
        within = "" if self.index is None else f"[{self.index}]"
        return f"{'.'.join((*self.path, self.name))}{within} {self.before} -> {self.after}"


FieldPlace = tuple[tuple[str, ...], str, int | None]
Shapes = dict[str, tuple[int, ...]]


def express(
    module: torch.nn.Module,
    wanted: Shapes,
    sizes: Iterable[tuple[int, int]],
    head_widths: Iterable[int],
    *,
    ratios: Iterable[tuple[int, int]] = (),
    places: Collection[FieldPlace] | None = None,
    valid: bool = True,
) -> tuple[FieldChange, ...] | None:
    """Finds the fields of a configuration with which the model's class makes tensors of the wanted shapes.

    Candidates are the integers in the configuration that equal a size that changes, ratios, fields that are None, and
    ``head_dim``, which is derived from the others where it is not said. They are tried by making the model without memory
    (on the meta device); fields are added while they bring more tensors to their shape.

    Args:
        module: the model, as it was.
        wanted: the shapes of all its tensors, as they will be.
        sizes: (before, after) of every dimension that changes.
        head_widths: widths of heads, which do not change.
        ratios: those of ``sizes`` that may be said as a multiple of another width.
        places: the fields that may be changed; all if None.
        valid: the configuration must be one that can be written and read again, as transformers checks it.

    Returns:
        The changes, or None where no set of fields says these widths.
    """
    candidates = _candidates_of(module, sizes, head_widths, ratios, places)
    # A list as a whole is no step where it changes what stays: its entries are candidates as well.
    before = _shapes(module, (), False) or {}
    kept = {n for n, shape in before.items() if wanted.get(n) == shape}
    candidates = [c for c in candidates if not isinstance(c.before, tuple) or kept.isdisjoint(reshaped(module, [c]))]
    if places is not None:
        # Together first: a part of them may be no valid configuration.
        by_place = [[c for c in candidates if c.place == p] for p in dict.fromkeys(c.place for c in candidates)]
        for together in itertools.islice(itertools.product(*by_place), MOST_CHOICES):
            if _missing(module, together, wanted, valid) == 0:
                return _needed(module, together, wanted, valid)
    chosen: tuple[FieldChange, ...] = ()
    missing = _missing(module, chosen, wanted, valid)
    tried = candidates
    if len(candidates) > MOST_TOGETHER:
        tried = _within_reach(module, _touching(module, candidates, wanted), wanted)
    while missing:
        better = None
        for count in range(1, MOST_TOGETHER + 1):
            for subset in itertools.combinations(tried, count):
                changed = [c.place for c in (*chosen, *subset)]
                if len(set(changed)) < len(changed):
                    continue
                left = _missing(module, (*chosen, *subset), wanted, valid)
                if left < missing and (better is None or left < better[0]):
                    better = (left, (*chosen, *subset))
                if left == 0:
                    break
            if better is not None:
                break
        if better is None:
            return None
        missing, chosen = better
    return (*chosen, *_divisors(module, chosen, candidates, wanted, valid))


def _needed(
    module: torch.nn.Module, changes: Sequence[FieldChange], wanted: Shapes, valid: bool
) -> tuple[FieldChange, ...]:
    """Returns changes without those of fields that are not said and need not be."""
    needed = list(changes)
    for change in changes:
        fewer = [c for c in needed if c is not change]
        if change.before is None and _missing(module, fewer, wanted, valid) == 0:
            needed = fewer
    return tuple(needed)


def _touching(module: torch.nn.Module, candidates: Sequence[FieldChange], wanted: Shapes) -> list[FieldChange]:
    """Returns the candidates that can have a part in saying the shapes.

    Those that alone change tensors, but none of those that are to change, have none.
    """
    before = _shapes(module, (), False)
    if before is None:
        return list(candidates)
    result = []
    for change in candidates:
        alone = _shapes(module, (change,), False)
        moved = None if alone is None else {n for n in before if alone.get(n) != before[n]}
        if not moved or any(wanted.get(n) != before[n] for n in moved):
            result.append(change)
    return result


def completed(
    module: torch.nn.Module,
    changes: Sequence[FieldChange],
    wanted: Shapes,
    sizes: Iterable[tuple[int, int]],
    head_widths: Iterable[int],
) -> tuple[FieldChange, ...] | None:
    """Returns changes that make a valid configuration, with one more field if its class asks for it; else None."""
    if refused(module.config, changes) is None:
        return tuple(changes)
    said = {c.place for c in changes}
    for more in _candidates_of(module, sizes, head_widths, sizes, None):
        if more.place not in said and refused(module.config, [*changes, more]) is None:
            if _missing(module, [*changes, more], wanted, True) == 0:
                return (*changes, more)
    return None


def restate(
    module: torch.nn.Module,
    places: Collection[FieldPlace],
    sizes: Iterable[tuple[int, int]],
    head_widths: Iterable[int],
    ratios: Iterable[tuple[int, int]] = (),
) -> tuple[FieldChange, ...] | None:
    """Returns what fields that said some widths say for others; None where there is a choice."""
    candidates = _candidates_of(module, sizes, head_widths, ratios, places)
    found = {c.place for c in candidates}
    return tuple(candidates) if len(found) == len(candidates) and found == set(places) else None


def _candidates_of(
    module: torch.nn.Module,
    sizes: Iterable[tuple[int, int]],
    head_widths: Iterable[int],
    ratios: Iterable[tuple[int, int]],
    places: Collection[FieldPlace] | None,
) -> list[FieldChange]:
    found = _candidates(module.config, sorted(set(sizes)), sorted(set(head_widths)), sorted(set(ratios)))
    return [c for c in dict.fromkeys(found) if (places is None or c.place in places) and _settable(module.config, c)]


def _settable(config: Any, change: FieldChange) -> bool:
    """Returns whether a field takes a value: those of transformers 5 have types."""
    try:
        changed_config(config, [change])
    except Exception:  # a configuration may refuse values in any way
        return False
    return True


Axis = tuple[str, int | None]
"""An axis of a tensor, by the tensor's name; None for the tensor itself, where there is none or one of another rank."""


def _within_reach(module: torch.nn.Module, candidates: Sequence[FieldChange], wanted: Shapes) -> list[FieldChange]:
    """Returns the candidates that can be among fields that say all shapes; none where no such fields can be.

    What one changes that is to stay must be put right by another that has to do with the same axis, and every axis that is
    to change must have to do with one of them. Which axes a field has to do with is seen at other values of it as well: the
    one that it is to take may make no model alone (heads that do not divide a width), or the same one (what is derived if
    not said). A field that makes a model at no value, or one with other tensors, may have to do with everything.
    """
    before = _shapes(module, (), False)
    if before is None:
        return list(candidates)
    asked = _moved(before, wanted)
    parts = {c: [e for entries in by_entry([c]).values() for e in entries] for c in candidates}
    reach: dict[FieldPlace, set[Axis] | None] = {}
    for part in dict.fromkeys(p for entries in parts.values() for p in entries):
        made = [s for c in (part, *_elsewhere(part)) if (s := _shapes(module, (c,), False)) is not None]
        moved = set[Axis]().union(reach.get(part.place) or (), *(_moved(before, s) for s in made))
        everything = not made or any(axis is None for _, axis in moved) or reach.get(part.place, moved) is None
        reach[part.place] = None if everything else moved
    spoilt = {}
    for change in candidates:
        alone, own = _shapes(module, (change,), False), [reach[p.place] for p in parts[change]]
        moved = set[Axis]().union(*(r or () for r in own if None not in own)) if alone is None else _moved(before, alone)
        spoilt[change] = {(name, axis) for name, axis in moved - asked if name in before}
    left = list(candidates)
    while True:
        places = {p.place for c in left for p in parts[c]}
        anything = sum(reach[p] is None for p in places)
        counts = collections.Counter(axis for p in places for axis in reach[p] or ())
        kept = [c for c in left if all(counts[axis] + anything > 1 for axis in spoilt[c])]
        if len(kept) == len(left):
            return left if anything or all(counts[axis] for axis in asked) else []
        left = kept


def _elsewhere(change: FieldChange) -> list[FieldChange]:
    """Returns changes of the same field to twice and half of what it is, or of what it is to be if it is not said."""
    value = change.after if change.before is None else change.before
    others = [2 * value, value // 2 if type(value) is int else value / 2]
    return [replace(change, after=v) for v in others if v >= 1 or type(value) is float]


def _moved(before: Shapes, after: Shapes) -> set[Axis]:
    """Returns the axes that differ between two sets of tensors."""
    result: set[Axis] = {(name, None) for name in before.keys() ^ after.keys()}
    for name in before.keys() & after.keys():
        if len(before[name]) != len(after[name]):
            result.add((name, None))
        else:
            result |= {(name, axis) for axis, (a, b) in enumerate(zip(before[name], after[name], strict=True)) if a != b}
    return result


def _divisors(
    module: torch.nn.Module,
    chosen: Sequence[FieldChange],
    candidates: Iterable[FieldChange],
    wanted: Shapes,
    valid: bool,
) -> list[FieldChange]:
    """Returns the changes of `KEY_VALUE_HEADS` that were as many as the heads and stay so (latent attention: DeepSeek)."""
    said = {c.place for c in chosen}
    alike = {(c.path, c.before, c.after) for c in chosen}
    found = [
        c for c in candidates if c.name in KEY_VALUE_HEADS and c.place not in said and (c.path, c.before, c.after) in alike
    ]
    return [c for c in found if _missing(module, (*chosen, c), wanted, valid) == 0]


def _candidates(
    config: Any,
    pairs: Sequence[tuple[int, int]],
    head_widths: Sequence[int],
    ratios: Sequence[tuple[int, int]],
    path: tuple[str, ...] = (),
) -> Iterator[FieldChange]:
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    for name, value in fields.items():
        if HEAD_WIDTH.search(name):
            continue
        if isinstance(value, (list, tuple)) and 0 < len(value) <= LONGEST_LIST:
            yield from _whole_lists(path, name, value, pairs, ratios)
            entries: list[tuple[int | None, Any]] = list(enumerate(value))
        else:
            entries = [(None, value)]
        for index, entry in entries:
            yield from (FieldChange(path, name, entry, new, index) for new in _numbers(name, entry, pairs, ratios))
    if fields.get("head_dim") is None:
        yield from (FieldChange(path, "head_dim", None, width) for width in head_widths)
    for name, value in fields.items():
        if value is None and name in type(config).__init__.__code__.co_names + tuple(_own_fields(type(config))):
            if name.endswith(("_id", "_ids", "_type", "_dtype")) or HEAD_WIDTH.search(name):
                continue
            yield from (FieldChange(path, name, None, after) for _, after in pairs)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _candidates(value, pairs, head_widths, ratios, (*path, name))


def _numbers(
    name: str, value: Any, pairs: Iterable[tuple[int, int]], ratios: Iterable[tuple[int, int]]
) -> Iterator[int | float]:
    """Yields what a number may become: the new size where it is the old one, a ratio times what the size is."""
    if type(value) is int:
        yield from (after for before, after in pairs if value == before)
    if type(value) not in (int, float) or value <= 0 or not RATIO.search(name):
        return
    for before, after in ratios:
        exact = Fraction(value) * after / before
        if type(value) is int and exact.denominator == 1:
            yield int(exact)
            continue
        # Models take the integer part of a product: what lies just below one loses it.
        yield from (float(exact), math.nextafter(float(exact), math.inf))


def _whole_lists(
    path: tuple[str, ...],
    name: str,
    values: Sequence[Any],
    pairs: Sequence[tuple[int, int]],
    ratios: Sequence[tuple[int, int]],
) -> Iterator[FieldChange]:
    """Yields lists in which all entries become what a size becomes."""
    if len(values) < 2 or any(type(v) not in (int, float) for v in values):
        return
    for pair in pairs:
        options = [next(_numbers(name, v, [pair], [pair] if pair in ratios else []), None) for v in values]
        if sum(o is not None for o in options) > 1:
            new = [v if o is None else o for v, o in zip(values, options, strict=True)]
            yield FieldChange(path, name, tuple(values), tuple(new))


def by_entry(changes: Iterable[FieldChange]) -> dict[int | None, list[FieldChange]]:
    """Returns changes by the index of the entry of a list that each is of; those of no list by None."""
    result: dict[int | None, list[FieldChange]] = {}
    for c in changes:
        whole = c.index is None and isinstance(c.before, tuple)
        pairs = enumerate(zip(c.before, c.after, strict=True)) if whole else [(c.index, (c.before, c.after))]
        for index, (before, after) in pairs:
            if before != after:
                result.setdefault(index, []).append(FieldChange(c.path, c.name, before, after, index))
    return result


def of_list(config: Any, place: FieldPlace) -> bool:
    """Returns whether a field, or what it is an entry of, is a list."""
    for part in place[0]:
        config = getattr(config, part)
    return isinstance(getattr(config, place[1], None), (list, tuple))


def reshaped(module: torch.nn.Module, changes: Sequence[FieldChange]) -> set[str]:
    """Returns the names of the tensors that have another shape in the model that a changed configuration makes, if any."""
    shapes, before = _shapes(module, changes, False), _shapes(module, (), False)
    return set() if shapes is None or before is None else {n for n in before if shapes.get(n) != before[n]}


def says(module: torch.nn.Module, changes: Sequence[FieldChange], wanted: Shapes) -> bool:
    """Returns whether a changed configuration is valid and makes tensors of the wanted shapes."""
    return _missing(module, changes, wanted, True) == 0


def ratio_widths(config: Any, size: int) -> list[int]:
    """Returns the widths below ``size`` that whole numbers can say where a field says a multiple, ascending."""
    found: set[int] = set()
    for part in configs_of(config):
        for name, value in vars(part).items():
            if name.startswith("_") or not RATIO.search(name):
                continue
            for number in value if isinstance(value, (list, tuple)) else (value,):
                if type(number) in (int, float) and number == int(number) > 1:
                    found |= {size * n // int(number) for n in range(1, int(number)) if size * n % int(number) == 0}
    return sorted(found)


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


def _missing(module: torch.nn.Module, changes: Sequence[FieldChange], wanted: Shapes, valid: bool) -> int:
    """Returns how many tensors of the model that a changed configuration makes have other shapes than are wanted."""
    shapes = _shapes(module, changes, valid)
    if shapes is None:
        return len(wanted) + 1
    return len(shapes.keys() ^ wanted.keys()) + sum(shapes[k] != s for k, s in wanted.items() if k in shapes)


_made: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, frozenset[str], bool], Shapes | None]]
_made = weakref.WeakKeyDictionary()
"""The shapes that `_shapes` has found for a module: a search asks for most of them more than once."""


def _shapes(module: torch.nn.Module, changes: Sequence[FieldChange], valid: bool) -> Shapes | None:
    """Returns the shapes of the model that a changed configuration makes; None where it makes none."""
    known = _made.setdefault(module, {})
    config: Any = module.config
    key = (config.to_json_string(use_diff=False), frozenset(f"{c.place} {c.after!r}" for c in changes), valid)
    if key not in known:
        known[key] = _shapes_made(type(module), config, changes, valid)
    return known[key]


def _shapes_made(module_class: Any, config: Any, changes: Sequence[FieldChange], valid: bool) -> Shapes | None:
    import torch

    try:
        config = changed_config(config, changes)
        config = read_back(config) if valid else config
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = module_class(config)
    except Exception:  # a configuration may refuse values in any way
        return None
    return {k: tuple(v.shape) for k, v in made.state_dict().items()}


def read_back(config: Any) -> Any:
    """Returns a configuration as it is after writing and reading; raises what its class raises where it is not valid."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        config.to_json_file(path)
        return type(config).from_json_file(path)


def refused(config: Any, changes: Sequence[FieldChange]) -> str | None:
    """Returns why a configuration with some fields changed is not valid, in the words of its class; None where it is."""
    try:
        read_back(changed_config(config, changes))
    except Exception as err:  # a configuration may refuse values in any way
        return str(err).strip().splitlines()[-1].strip().partition("Error: ")[2].rstrip(".") or type(err).__name__
    return None


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
    tokenizer: Callable[[Path], None] | None = None,
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
        tokenizer: writes another tokenizer than that of the original.

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
            with quiet_loading(), system_errors(path):
                writer.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer(temporary)
            if source is not None:
                _copy_beside(source, temporary, () if tokenizer is None else TOKENIZER)
            _check_loads(module, temporary, example)
            _note_written(temporary)
    except OSError as err:
        raise OptionError(f"'{path}' cannot be written ({err.strerror or err}); nothing was written") from err
    return path


def inexpressible(
    module: torch.nn.Module, kinds: Collection[str] = (), rest: bool = True, because: str | None = None
) -> str:
    """Returns the sentence for widths of kinds of groups (of all, if none is named) that a configuration cannot say.

    Args:
        module: the model.
        kinds: the kinds.
        rest: whether other kinds can be said.
        because: what the class of the configuration says against it.
    """
    config: Any = module.config
    names = ("head_dim", "num_attention_heads", "num_heads", "n_head", "intermediate_size", "mlp_ratio", "mlp_ratios")
    fields = ", ".join(k for k in names if any(hasattr(c, k) for c in configs_of(config))) or "none"
    fields += f": {because}" if because else ""
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


def _copy_beside(source: Path, target: Path, out: Collection[str] = ()) -> None:
    """Copies what belongs to a model beside its weights: tokenizer, generation config, modules of sentence-transformers.

    What has a name as those ``out`` stays where it is.
    """
    for file in _beside(source):
        place = target / file.relative_to(source)
        if not place.exists() and not any(fnmatch.fnmatch(file.name, pattern) for pattern in out):
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
    try:
        with quiet_loading():
            loaded, info = model_class.from_pretrained(
                folder, output_loading_info=True, dtype="auto", trust_remote_code=False
            )
    except Exception as err:  # of many classes
        raise CheckError(
            f"the checkpoint does not load as it was saved ({' '.join(str(err).split())[:200]}); nothing was written"
        ) from err
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
