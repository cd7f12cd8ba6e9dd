"""The ATen operator table: every row in a module of many operators that is cut through all of them, equal to the masked
original."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from modules import prune_module
from torch import Tensor, nn
from torch.nn import functional as F

import liar_opt
from liar_opt.frontend.fx_module import analyse, lower, trace
from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.rules.table import ATEN
from liar_opt.passes.find_groups import find_groups
from liar_opt.passes.groups import kept_positions

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten
Line = Callable[[Tensor, Any], Tensor]
"""Makes something of channels h, in (0, 1), and of what :class:`Between` has: x, and vectors and tables by channel."""


class Between(nn.Module):
    """[b, 6, 6, 4] -> channels h -> the sum of what each line makes of them -> 7 channels.

    Lines that are ``leaving`` contract the channels themselves and make the 7.
    """

    def __init__(
        self,
        lines: Mapping[str, Line],
        width: int = 11,
        behind: int = 11,
        leaving: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.lines, self.leaving, self.norm = lines, leaving, norm
        self.enter, self.leave, self.gate = nn.Conv2d(6, width, 1), nn.Conv2d(behind, 7, 1), nn.Identity()
        self.c, self.slope = nn.Parameter(0.2 + torch.rand(width, 1, 1)), nn.Parameter(torch.rand(width))
        self.w = nn.Parameter(torch.randn(width, 7))
        for n in (1, 2, 3):
            setattr(self, f"kernel{n}", nn.Parameter(torch.randn(7, width, *[1] * n)))
            setattr(self, f"transposed{n}", nn.Parameter(torch.randn(width, 7, *[1] * n)))
        self.w2, self.bias = nn.Parameter(torch.randn(7, width)), nn.Parameter(torch.randn(7))
        self.table = nn.Parameter(torch.randn(5, width))
        self.alone = nn.Parameter(torch.randn(width, 1, 1, 1))
        self.register_buffer("rows", torch.tensor([3, 1]))
        self.register_buffer("mean", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        p = SimpleNamespace(x=x, **dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False)))
        h = torch.sigmoid(self.enter(x))
        h = h if self.norm is None else self.norm(h)
        h = self.gate(h) if self.leaving else h
        made = [line(h, p) for line in self.lines.values()]
        total = sum(map(flat, made[1:]), flat(made[0])) if len(made) > 1 else made[0]
        result: Tensor = total if self.leaving else self.leave(self.gate(total))
        return result


def flat(made: Tensor) -> Tensor:
    """Returns a result [.., c, ..] as one number for each channel where it has not 6 x 4 of them."""
    if tuple(made.shape[2:]) != (6, 4):
        made = made.sum(list(range(2, made.ndim)))[:, :, None, None]
    return made.to(torch.float32)


def called(names: str, *more: Any) -> dict[str, Line]:
    """Returns a line for each operator, called with h and ``more``; "c" is a number for each channel."""

    def line(name: str) -> Line:
        return lambda h, p: getattr(aten, name)(h, *(p.c if m == "c" else m for m in more))

    return {name: line(name) for name in names.split()}


def bits(h: Tensor) -> Tensor:
    return (10 * h).to(torch.int64)


def places(h: Tensor) -> Tensor:
    return torch.zeros_like(h[:, :, :1], dtype=torch.int64)


def grid(h: Tensor, *sizes: int) -> Tensor:
    return torch.full((h.shape[0], *sizes, len(sizes)), 0.1)


def last(h: Tensor) -> Tensor:
    return h.permute(0, 2, 3, 1)


def native(h: Tensor) -> Tensor:
    result: Tensor = aten.native_group_norm(h, None, None, h.shape[0], 15, h.shape[2] * h.shape[3], 5, 1e-5)[0]
    return result


ELEMENTS: dict[str, Line] = {
    **called(
        "abs absolute acos alias asin asinh atan atanh ceil celu clone cos cosh deg2rad detach digamma elu erf erfc "
        "erfinv exp exp2 expm1 floor frac gelu hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lgamma "
        "log log10 log1p log2 log_sigmoid logit mish nan_to_num neg negative rad2deg reciprocal relu relu6 round "
        "rsqrt selu sgn sigmoid sign signbit silu sin sinc sinh softplus sqrt square tan tanh trunc zero zeros_like "
        "ones_like"
    ),
    **called(
        "add atan2 copy copysign div divide eq float_power floor_divide fmax fmin fmod ge greater greater_equal gt "
        "heaviside hypot le less less_equal logaddexp logaddexp2 logical_and logical_or logical_xor lt max maximum "
        "min minimum mul multiply ne not_equal pow remainder rsub sub subtract true_divide xlogy",
        "c",
    ),
    **called("clamp clip", 0.3, 0.8),
    **called("clamp_max clamp_min fill full_like", 0.4),
    **called("threshold", 0.4, 0.2),
    **called("lerp", "c", 0.3),
    **called("addcmul addcdiv", "c", "c"),
    "type_as": lambda h, p: aten.type_as(h, p.x),
    "acosh": lambda h, p: aten.acosh(h + 1),
    "native_dropout": lambda h, p: aten.native_dropout(h, 0.5, False)[0],
    "_to_copy": lambda h, p: h.to(torch.float64),
    "logical_not": lambda h, p: torch.logical_not(h > 0.5),
    "__and__ __or__ __xor__": lambda h, p: aten.__or__(aten.__and__(h > 0.5, h < p.c), aten.__xor__(h > 0.2, h < p.c)),
    "__lshift__ __rshift__": lambda h, p: (bits(h) << 2) >> 1,
    "bitwise_and bitwise_or bitwise_xor": lambda h, p: aten.bitwise_xor(
        aten.bitwise_and(bits(h), 6), aten.bitwise_or(bits(h), 1)
    ),
    "bitwise_not bitwise_left_shift bitwise_right_shift": lambda h, p: (
        ~aten.bitwise_left_shift(aten.bitwise_right_shift(bits(h), 1), 2)
    ),
    "where masked_fill": lambda h, p: torch.where(h > 0.4, h, p.c).masked_fill(h > 0.6, 0.3),
    "polar view_as_real": lambda h, p: torch.view_as_real(torch.polar(h, p.c.expand_as(h))).sum(-1),
    "view_as_complex": lambda h, p: torch.view_as_complex(torch.stack([h, h * h], -1)).abs(),
    "prelu": lambda h, p: aten.prelu(h - 0.5, p.slope),
    "_prelu_kernel": lambda h, p: aten._prelu_kernel(h - 0.5, p.c),
}
ALONG: dict[str, Line] = {
    "any all": lambda h, p: aten.any(h > 0.5, 2).float() + aten.all(h > 0.1, 2).float(),
    **called("argmax argmin", 2),
    **called("amax amin count_nonzero logsumexp mean nanmean nansum sum", [2]),
    **called("prod", 2),
    "norm linalg_vector_norm": lambda h, p: aten.norm(h, 2, [2]) + aten.linalg_vector_norm(h, 2, [2]),
    "var std var_mean std_mean": lambda h, p: h.var(2) + h.std(2) + torch.var_mean(h, 2)[1] + torch.std_mean(h, 2)[0],
    "aminmax median kthvalue": lambda h, p: torch.aminmax(h, dim=2)[0] + h.median(2)[0] + h.kthvalue(2, 2)[1],
    **called("cumprod cumsum logcumsumexp", 2),
    "softmax log_softmax": lambda h, p: h.softmax(2) + h.log_softmax(3),
    **called("_safe_softmax", 2),
    **called("_softmax _log_softmax", 2, False),
    "cummax cummin": lambda h, p: h.cummax(2)[0] + h.cummin(3)[1],
    "sort topk": lambda h, p: h.sort(2)[0] + h.topk(1, 2)[0],
    "diff": lambda h, p: h.diff(dim=2),
    **called("tril triu"),
    "mv": lambda h, p: aten.mv(h.mean((0, 3)), p.x[0, 0, :, 0])[:, None, None] * h,
    "dot": lambda h, p: aten.dot(p.x[0, 0, 0], p.x[0, 0, 1]) * h,
    "linalg_det": lambda h, p: torch.linalg.det(h[:, :, :4])[:, :, None],
    "flip roll": lambda h, p: h.flip(2) + 2 * h.roll(1, 2),
    "diagonal": lambda h, p: torch.diagonal(h, 1, 2, 3),
    "unfold": lambda h, p: h.unfold(2, 2, 2).cumsum(-1),
    "layer_norm native_layer_norm": lambda h, p: (
        F.layer_norm(h, (4,)) + aten.native_layer_norm(h, [4], None, None, 1e-5)[0]
    ),
    "rms_norm": lambda h, p: F.rms_norm(h, (4,)),
}
LAYOUT: dict[str, Line] = {
    "cat slice": lambda h, p: torch.cat([h[:, :, 1:], h[:, :, :1]], 2),
    "concat concatenate": lambda h, p: aten.concat([h, aten.concatenate([h, h], 3)], 3),
    "hstack": lambda h, p: aten.hstack([last(h)[:, :, 0], last(h)[:, :, 1]]).mT,
    "stack unbind": lambda h, p: torch.stack(h.unbind(2), 3),
    "select": lambda h, p: h[:, :, 1],
    "expand repeat": lambda h, p: p.c.expand(-1, 6, 4) * h.repeat(1, 1, 2, 1)[:, :, :6],
    "tile": lambda h, p: aten.tile(h, [1, 1, 1, 2]),
    "repeat_interleave": lambda h, p: h.repeat_interleave(2, 2),
    "split": lambda h, p: torch.split(h, 2, 2)[1],
    "split_with_sizes": lambda h, p: torch.split(h, [2, 4], 2)[1],
    "split_with_sizes_copy": lambda h, p: aten.split_with_sizes_copy(h, [2, 4], 2)[1],
    "unsafe_split": lambda h, p: aten.unsafe_split(h, 3, 2)[0],
    "squeeze unsqueeze": lambda h, p: h[:, :, :1].squeeze(2).unsqueeze(2),
    "permute transpose": lambda h, p: h.permute(0, 1, 3, 2).transpose(2, 3),
    "t": lambda h, p: aten.t(aten.t(h.mean((2, 3)))).unsqueeze(2),
    "view _unsafe_view": lambda h, p: aten._unsafe_view(h.reshape(h.shape[0], 11, 24), [h.shape[0], 11, 4, 6]),
    "view_copy": lambda h, p: aten.view_copy(h, [h.shape[0], 11, 24]),
    "slice_scatter": lambda h, p: aten.slice_scatter(h, p.c.expand_as(h)[:, :, 2:4], 2, 2, 4),
    "select_scatter": lambda h, p: aten.select_scatter(h, 2 * h[:, :, 1], 2, 3),
    "index": lambda h, p: h[:, :, p.rows],
    "index_select": lambda h, p: h.index_select(2, p.rows),
    "index_put": lambda h, p: aten.index_put(h, [None, None, p.rows], p.c),
    "index_add": lambda h, p: h.index_add(2, p.rows, 2 * h[:, :, 2:4]),
    "index_copy": lambda h, p: h.index_copy(2, p.rows, 2 * h[:, :, 2:4]),
    "index_fill": lambda h, p: h.index_fill(2, p.rows, 0.25),
    "gather": lambda h, p: h.gather(2, places(h)),
    "scatter": lambda h, p: h.scatter(2, places(h), 0.2),
    "scatter_add": lambda h, p: h.scatter_add(2, places(h), 2 * h),
    "scatter_reduce": lambda h, p: h.scatter_reduce(2, places(h), 2 * h, "amax"),
    "embedding": lambda h, p: F.embedding((p.x[:, 0, 0, 0] > 0).to(torch.int64), p.table)[:, :, None, None] * h,
    "ones zeros": lambda h, p: (torch.ones(11, 6, 4) - torch.zeros(11, 1, 1)) * h,
    "full new_full": lambda h, p: torch.full((11, 6, 4), 0.5) * h * h.new_full([11, 1, 1], 2.0),
    "new_ones new_zeros": lambda h, p: (h.new_ones([11, 6, 4]) - h.new_zeros([11, 1, 1])) * h,
    "arange linspace": lambda h, p: torch.arange(4.0) * torch.linspace(0, 1, 4) * h,
    "eye scalar_tensor": lambda h, p: torch.eye(6, 4) * aten.scalar_tensor(2.0) * h,
}
SLID: dict[str, Line] = {
    **called("max_pool2d avg_pool2d", [2, 2]),
    "max_pool2d_with_indices": lambda h, p: torch.add(*F.max_pool2d(h, 2, return_indices=True)),
    "max_pool1d avg_pool1d": lambda h, p: F.max_pool1d(h[:, :, 0], 2) + F.avg_pool1d(h[:, :, 1], 2),
    "max_pool1d_with_indices": lambda h, p: aten.max_pool1d_with_indices(h[:, :, 0], [2])[0],
    "max_pool3d avg_pool3d": lambda h, p: F.max_pool3d(h[:, :, None], (1, 2, 2)) + F.avg_pool3d(h[:, :, None], (1, 2, 2)),
    "max_pool3d_with_indices": lambda h, p: aten.max_pool3d_with_indices(h[:, :, None], [1, 2, 2])[0],
    **called("_adaptive_avg_pool2d adaptive_avg_pool2d", [2, 1]),
    "_adaptive_avg_pool3d": lambda h, p: aten._adaptive_avg_pool3d(h[:, :, None], [1, 2, 1]),
    "adaptive_avg_pool1d adaptive_max_pool1d": lambda h, p: (
        F.adaptive_avg_pool1d(h[:, :, 0], 2) + F.adaptive_max_pool1d(h[:, :, 1], 2)
    ),
    "adaptive_max_pool2d": lambda h, p: F.adaptive_max_pool2d(h, 2),
    "adaptive_avg_pool3d adaptive_max_pool3d": lambda h, p: (
        F.adaptive_avg_pool3d(h[:, :, None], 1) + F.adaptive_max_pool3d(h[:, :, None], 1)
    ),
    "upsample_nearest1d": lambda h, p: F.interpolate(h[:, :, 0], 7),
    "_upsample_nearest_exact1d": lambda h, p: F.interpolate(h[:, :, 0], 7, mode="nearest-exact"),
    "upsample_linear1d": lambda h, p: F.interpolate(h[:, :, 0], 7, mode="linear"),
    "upsample_nearest2d": lambda h, p: F.interpolate(h, (7, 5)),
    "_upsample_nearest_exact2d": lambda h, p: F.interpolate(h, (7, 5), mode="nearest-exact"),
    "upsample_bilinear2d": lambda h, p: F.interpolate(h, (7, 5), mode="bilinear"),
    "upsample_bicubic2d": lambda h, p: F.interpolate(h, (7, 5), mode="bicubic"),
    "_upsample_bilinear2d_aa": lambda h, p: F.interpolate(h, (3, 2), mode="bilinear", antialias=True),
    "_upsample_bicubic2d_aa": lambda h, p: F.interpolate(h, (3, 2), mode="bicubic", antialias=True),
    "upsample_nearest3d": lambda h, p: F.interpolate(h[:, :, None], (2, 7, 5)),
    "_upsample_nearest_exact3d": lambda h, p: F.interpolate(h[:, :, None], (2, 7, 5), mode="nearest-exact"),
    "upsample_trilinear3d": lambda h, p: F.interpolate(h[:, :, None], (2, 7, 5), mode="trilinear"),
    "constant_pad_nd": lambda h, p: aten.constant_pad_nd(h, [1, 2], 0.3),
    "pad": lambda h, p: F.pad(h, (1, 2, 0, 1), mode="circular"),
    **called("reflection_pad2d replication_pad2d", [1, 2, 0, 1]),
    "reflection_pad1d": lambda h, p: aten.reflection_pad1d(h[:, :, 0], [1, 2]),
    "replication_pad1d": lambda h, p: aten.replication_pad1d(h[:, :, 0], [1, 2]),
    "reflection_pad3d": lambda h, p: aten.reflection_pad3d(torch.stack([h, 2 * h], 2), [1, 1, 1, 1, 1, 1]),
    "replication_pad3d": lambda h, p: aten.replication_pad3d(h[:, :, None], [1, 1, 1, 1, 1, 1]),
    "im2col col2im": lambda h, p: F.fold(F.unfold(h, 2, stride=2), (6, 4), 2, stride=2),
    "grid_sampler": lambda h, p: F.grid_sample(h, grid(h, 4, 4), align_corners=False),
    "grid_sampler_2d": lambda h, p: aten.grid_sampler_2d(h, grid(h, 4, 4), 0, 0, False),
    "grid_sampler_3d": lambda h, p: aten.grid_sampler_3d(h[:, :, None], grid(h, 1, 4, 4), 0, 0, False),
    "_native_batch_norm_legit_no_training": lambda h, p: aten._native_batch_norm_legit_no_training(
        h, p.slope, p.mean, p.mean, p.slope, 0.1, 1e-5
    )[0],
    "instance_norm": lambda h, p: F.instance_norm(h),
}
PRODUCTS: dict[str, Line] = {
    "linear": lambda h, p: F.linear(last(h), p.w2).permute(0, 3, 1, 2),
    "matmul": lambda h, p: (last(h) @ p.w).permute(0, 3, 1, 2),
    "mm": lambda h, p: torch.mm(h.mean((2, 3)), p.w)[:, :, None],
    "addmm": lambda h, p: torch.addmm(p.bias, h.mean((2, 3)), p.w, alpha=0.5, beta=2.0)[:, :, None],
    "einsum": lambda h, p: torch.einsum("bchw,cm->bhwm", h, p.w).permute(0, 3, 1, 2),
    "conv1d": lambda h, p: F.conv1d(h[:, :, 0], p.kernel1),
    "conv2d": lambda h, p: F.conv2d(F.conv2d(h, p.alone, groups=11), p.kernel2),
    "conv3d": lambda h, p: F.conv3d(h[:, :, None], p.kernel3),
    "convolution": lambda h, p: aten.convolution(h, p.kernel2, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "conv_transpose1d": lambda h, p: F.conv_transpose1d(h[:, :, 0], p.transposed1),
    "conv_transpose2d": lambda h, p: F.conv_transpose2d(h, p.transposed2),
    "conv_transpose3d": lambda h, p: F.conv_transpose3d(h[:, :, None], p.transposed3),
}


class Attending(nn.Module):
    """[b, 7, 12] -> 3 heads of 4, attended in three ways -> 12; in the second two query heads share a key."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.q2, self.k2, self.v2, self.o2 = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(24, 12)
        self.q3, self.k3, self.v3, self.o3 = (nn.Linear(12, 12) for _ in range(4))
        self.gate, self.gate2, self.gate3 = nn.Identity(), nn.Identity(), nn.Identity()
        self.register_buffer("mask", torch.randn(1, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, q2, k2, v2, q3, k3, v3 = (
            getattr(self, name)(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for name in ("q", "k", "v", "q2", "k2", "v2", "q3", "k3", "v3")
        )
        one = F.scaled_dot_product_attention(q, k, v, self.mask[None])
        two = F.scaled_dot_product_attention(q2, k2, v2, is_causal=True, enable_gqa=True)
        scores = torch.baddbmm(self.mask, q3.flatten(0, 1), k3.flatten(0, 1).mT, alpha=0.5)
        three = torch.bmm(scores.softmax(-1), v3.flatten(0, 1)).reshape(-1, 3, 7, 4)
        y, y2, y3 = (t.transpose(1, 2).flatten(2) for t in (one, two, three))
        result: Tensor = self.o(self.gate(y)) + self.o2(self.gate2(y2)) + self.o3(self.gate3(y3))
        return result


class Case(NamedTuple):
    """A module from ``width`` channels to those ``behind`` the lines, and its one group: ``blocks`` of so many."""

    lines: dict[str, Line]
    width: int = 11
    behind: int = 11
    blocks: int = 11
    block: int = 1
    leaving: bool = False
    norm: Callable[[], nn.Module | None] = lambda: None

    def module(self) -> Between:
        return Between(self.lines, self.width, self.behind, self.leaving, self.norm())


CASES = {
    "element by element": Case(ELEMENTS),
    "along an axis": Case(ALONG),
    "layout": Case(LAYOUT),
    "slid": Case(SLID),
    "products": Case(PRODUCTS, leaving=True),
    "normalised by groups": Case(
        {"group_norm native_group_norm": lambda h, p: native(h)}, 15, 15, 5, 3, norm=lambda: nn.GroupNorm(5, 15)
    ),
    "pixel_shuffle": Case({"pixel_shuffle": lambda h, p: F.pixel_shuffle(h, 2)}, 20, 5, 5),
    "pixel_unshuffle": Case({"pixel_unshuffle": lambda h, p: F.pixel_unshuffle(h, 2)}, 5, 20, 5, 4),
    "channel_shuffle": Case({"channel_shuffle": lambda h, p: F.channel_shuffle(h, 3)}, 15, 15, 5, 3),
    "native_channel_shuffle": Case(
        {"native_channel_shuffle": lambda h, p: aten.native_channel_shuffle(h, 3)}, 15, 15, 5, 3
    ),
    "glu": Case({"glu": lambda h, p: F.glu(h, 1)}, 22),
}
CALLED = {"view": "reshape", "split": "split_with_sizes"}
"""What the cut graph calls instead: what is cut may lie otherwise in memory, and parts of one size may become unequal."""
RECURRENT = "gru lstm rnn_relu rnn_tanh"
"""They are compared with ONNX Runtime's in `test_both_engines`."""
ATTENTION = "scaled_dot_product_attention baddbmm bmm"


def cut(module: nn.Module, shape: tuple[int, ...], names: str, **ratios: float) -> Any:
    """Prunes without repair; the result equals the module with the removed channels masked, and has all operators."""
    data = [{"x": torch.randn(shape)} for _ in range(4)]
    result = prune_module(module.eval(), data, repair="none", multiple_of=1, latency=False, **ratios)
    x, hooks = data[0]["x"], []
    kept = {c.where: c.details["kept"] for c in result.changes}
    gates = [m for m in module.children() if isinstance(m, nn.Identity)]
    for group, gate in zip(result.groups, gates, strict=True):
        keep = torch.zeros(group.consumers[0].width)
        keep[kept_positions(group.consumers[0].owners, kept[group.name])] = 1
        assert len(kept[group.name]) < group.size
        mask = keep if len(shape) == 3 else keep[:, None, None]
        hooks.append(gate.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
    with torch.no_grad():
        masked = module(x)
        for hook in hooks:
            hook.remove()
        large = masked.abs().max()
        assert (module(x) - masked).abs().max() > 1e-3 * large
        for form in (result.module, result.graph_module):
            assert (form(x=x) - masked).abs().max() < 1e-5 * large, "large"
    written = {str(n.target._schema.name) for n in result.graph_module.graph.nodes if hasattr(n.target, "_schema")}
    assert {f"aten::{CALLED.get(name, name)}" for name in names.split()} <= written
    return result


@pytest.mark.parametrize("name", CASES)
def test_cut_equals_the_masked_original(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    result = cut(case.module(), (3, 6, 6, 4), " ".join(case.lines), ffn=0.4)
    (group,) = result.report["groups"]
    assert (group["kind"], group["before"], group["block_width"]) == ("ffn", case.blocks, case.block)


def test_attention() -> None:
    torch.manual_seed(0)
    result = cut(Attending(), (3, 7, 12), ATTENTION, heads=0.4)
    assert [(g["kind"], g["before"], g["block_width"]) for g in result.report["groups"]] == [
        ("heads", 3, 4),
        ("heads", 3, 8),
        ("heads", 3, 4),
    ]


def test_the_oracle_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(f"{__name__}.kept_positions", lambda owners, kept: [(k + 1) % len(owners) for k in kept])
    with pytest.raises(AssertionError, match="large"):
        cut(CASES["glu"].module(), (3, 6, 6, 4), "glu", ffn=0.4)


def test_every_row_is_in_a_test_or_says_why_not() -> None:
    listed = (names for case in CASES.values() for names in case.lines)
    tested = {name for names in (ATTENTION, RECURRENT, *listed) for name in names.split()}
    for (domain, name), rows in OPERATORS.items():
        if domain == ATEN:
            assert (name in tested) != bool(rows[-1].untested), name


def groups_of(module: nn.Module) -> list[tuple[str, int]]:
    state = analyse(lower(trace(module.eval(), {"x": torch.randn(3, 6, 6, 4)}), module))
    return [(g.kind, g.size) for g in find_groups(state).groups]


NEAR_MISS: dict[str, tuple[Line, int]] = {
    "one group": (lambda h, p: F.group_norm(h, 1), 11),
    "channels are padded": (lambda h, p: F.pad(h, (0, 0, 0, 0, 1, 0))[:, 1:], 11),
    "neighbours": (lambda h, p: F.local_response_norm(h, 3), 11),
    "written at channels": (lambda h, p: aten.index_put(h, [None, p.rows], p.c[0]), 11),
    "means of all groups": (lambda h, p: h * aten.native_group_norm(h, None, None, 3, 15, 24, 5, 1e-5)[1].mean(), 15),
}


@pytest.mark.parametrize("name", NEAR_MISS)
def test_near_miss(name: str) -> None:
    line, width = NEAR_MISS[name]
    assert groups_of(Between({"": line}, width, width)) == []


def test_the_groups_of_a_normalisation_are_set_in_its_module() -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(3, 6, 6, 4)} for _ in range(4)]
    module = Between({"": lambda h, p: F.silu(h)}, 15, 15, norm=nn.GroupNorm(5, 15))
    result: Any = liar_opt.prune(module.eval(), data, ffn=0.4, multiple_of=1, latency=False)
    kept = result.report["groups"][0]["after"]
    norm = result.module.norm
    assert (norm.num_groups, norm.num_channels, norm.weight.shape[0]) == (kept, 3 * kept, 3 * kept)
