"""Writes docs/operators.md from the operator table: both front-ends side by side, what is in no test, what has no rule.

python tools/dev/operators_page.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch

from liar_opt.frontend.rules import (
    aten,
    meaning,
    onnx_attention,
    onnx_convolutions,
    onnx_fused,
    onnx_generators,
    onnx_layout,
    onnx_lookups,
    onnx_normalisation,
    onnx_places,
    onnx_pointwise,
    onnx_products,
    onnx_recurrent,
    onnx_reductions,
)
from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.rules.table import ATEN, MICROSOFT, Op, Rule

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"
WIDTH = 100
MEANINGS: dict[str, tuple[Rule, ...]] = {
    "element by element": (*(meaning.pointwise, meaning.like_first, onnx_pointwise.equal, aten.prelu),),
    "the larger or smaller, of two or along an axis": (aten.extremum,),
    "gates": (onnx_fused.bias_split_gelu, aten.glu),
    "matrix product": (
        *(onnx_products.matmul, onnx_products.fused_matmul, onnx_products.gemm, aten.matmul, aten.addmm, aten.linear),
    ),
    "Einstein's sum": (meaning.einsum,),
    "mixture of experts": (onnx_fused.mixture_of_experts,),
    "convolution": (
        *(onnx_convolutions.conv, onnx_convolutions.conv_transpose, onnx_convolutions.channels_last_conv),
        *(onnx_places.deformable, onnx_recurrent.causal_convolution, aten.convolution),
    ),
    "pool, resample": (onnx_convolutions.pool, onnx_convolutions.global_pool, onnx_places.resize, aten.pool),
    "recurrence": (onnx_recurrent.recurrent, aten.recurrent),
    "attention": (
        *(onnx_attention.standard_attention, onnx_attention.contrib_attention, onnx_attention.multi_head_attention),
        *(onnx_attention.group_query_attention, onnx_attention.linear_attention, onnx_attention.attention_left_alone),
        *(onnx_attention.gated_relative_position_bias, aten.attention),
    ),
    "rotary embedding": (
        *(onnx_attention.rotary_embedding, onnx_attention.contrib_rotary_embedding, onnx_attention.gemma_rotary_embedding),
    ),
    "reshape": (onnx_layout.reshape, onnx_layout.flatten, aten.view),
    "permute": (onnx_layout.transpose, aten.permute, aten.transpose),
    "axes of one": (onnx_layout.squeeze, onnx_layout.unsqueeze, aten.squeeze, aten.unsqueeze),
    "concatenate": (onnx_layout.concat, aten.cat, aten.stack),
    "split": (onnx_layout.parted, aten.split, aten.taken_apart),
    "slice": (onnx_layout.sliced, aten.sliced),
    "write a slice": (
        onnx_places.tensor_scatter,
        aten.slice_scatter,
        aten.select_scatter,
        aten.index_put,
        aten.index_along,
    ),
    "expand": (onnx_layout.expand, aten.expand),
    "repeat": (onnx_layout.tile, aten.repeat, aten.repeat_interleave),
    "pad": (onnx_layout.pad, onnx_places.center_crop_pad, aten.pad),
    "move along an axis": (onnx_places.reverse_sequence, aten.moved_along),
    "windows along an axis": (aten.unfold,),
    "look up": (onnx_lookups.gather, onnx_lookups.gather_nd, aten.looked_up, aten.index),
    "gather along an axis": (onnx_lookups.gather_elements, aten.gather),
    "scatter": (onnx_lookups.scatter_nd, onnx_lookups.scatter_elements, aten.scatter),
    "places that data says": (onnx_lookups.non_zero, onnx_lookups.compress, onnx_places.unique, onnx_places.suppression),
    "one-hot": (onnx_lookups.one_hot,),
    "filled or counted": (
        *(onnx_generators.constant_of_shape, onnx_generators.counted, onnx_generators.eye_like, aten.filled, aten.counted),
    ),
    "random numbers": (onnx_generators.drawn_like, onnx_places.drawn_by, onnx_places.drawn_from),
    "triangle, diagonal, determinant": (meaning.triangle, meaning.determinant, aten.diagonal),
    "softmax and others that run along an axis": (
        onnx_reductions.softmax,
        onnx_reductions.softmax_of_rows,
        onnx_reductions.cumulated,
        onnx_normalisation.bias_softmax,
        aten.along_axis,
    ),
    "a part of an axis that data says": (onnx_reductions.top_k, aten.shorter_axis),
    "reduce": (onnx_reductions.reduce, onnx_reductions.place_of_best, aten.reduce),
    "normalise over axes": (
        *(onnx_normalisation.layer_normalization, onnx_normalisation.skip_layer_normalization),
        *(onnx_normalisation.embed_layer_normalization, onnx_normalisation.mean_variance, onnx_fused.gated_rms_norm),
        *(aten.layer_norm,),
    ),
    "normalise channels": (onnx_normalisation.channel_normalization, onnx_normalisation.local_response, aten.channel_norm),
    "normalise groups": (onnx_normalisation.group_normalization, onnx_normalisation.contrib_group_norm, aten.group_norm),
    "channels and places": (
        *(onnx_places.depth_to_space, onnx_places.space_to_depth, onnx_places.columns_to_image),
        *(aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.image_to_columns, aten.columns_to_image),
    ),
    "sample": (
        meaning.sample,
        onnx_places.affine_grid,
        onnx_places.regions,
        onnx_places.max_unpool,
    ),
    "complex numbers": (aten.as_complex, aten.as_real),
}
"""The rules that say one thing, of both front-ends."""
RELEASE, CORE = "Of the standard operators of onnx", "Of the core operators of torch"
STRUCTURAL = {"Constant", "If", "Shape", "Size"}
"""Operators that have no rule: the walk and the normal form read them."""


def page() -> str:
    """Returns the page."""
    lines = [
        "# Operators",
        "",
        "`python tools/dev/operators_page.py` writes this page from `frontend/rules/operators.py`; a test compares.",
        "An operator without a rule pins every axis that it touches: what is beside it is still pruned.",
        "",
        "## What has a rule",
        "",
        "| meaning | ONNX | ONNX Runtime's own | ATen |",
        "|---|---|---|---|",
    ]
    for title, rules in MEANINGS.items():
        cells = [_names(op.name for op in _rows(domain) if op.rule in rules) for domain in ("", MICROSOFT, ATEN)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "## What is in no test", "", "| operator | why |", "|---|---|"]
    for domain in ("", MICROSOFT, ATEN):
        lines += [f"| `{_full(domain, op.name)}` | {op.untested} |" for op in _rows(domain) if op.untested]
    lines += ["", "## What has no rule", "", f"{RELEASE} {onnx.__version__}:", "", missing()]
    lines += ["", f"{CORE} {torch.__version__.partition('+')[0]}, those of gradients left out:", "", missing_of_core()]
    return "\n".join(lines) + "\n"


def missing() -> str:
    """Returns the standard operators without a rule that are not deprecated and belong to no training or preview set."""
    known = {name for (domain, name), rows in OPERATORS.items() if domain == "" and rows[-1].rule}
    found = {s.name for s in onnx.defs.get_all_schemas() if s.domain == "" and not s.deprecated}
    return _names(found - known - STRUCTURAL)


def missing_of_core() -> str:
    """Returns the core ATen operators without a rule that compute tensors of tensors, going forward."""
    known = {name for (domain, name) in OPERATORS if domain == ATEN}
    # What `dir(torch.ops.aten)` lists depends on what was used before.
    named = (
        name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if "aten::" in name
    )
    found = {name for name in named if not name.startswith("sym_") and not name.endswith("_backward")}
    return _names(name for name in found - known if _is_core(getattr(torch.ops.aten, name)))


def _is_core(packet: Any) -> bool:
    names: list[str] = getattr(packet, "overloads", list)()
    return any(torch.Tag.core in getattr(packet, name).tags for name in names)


def _rows(domain: str) -> list[Op]:
    return [rows[-1] for (own, _), rows in sorted(OPERATORS.items()) if own == domain]


def _full(domain: str, name: str) -> str:
    return f"{domain}::{name}" if domain else name


def _names(names: Iterable[str]) -> str:
    return " ".join(f"`{n}`" for n in sorted(names)) or "none"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
