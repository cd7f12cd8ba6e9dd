"""What users of torch do: batches without names, wrappers, folded weights, and traced results used like any module."""

import copy
import io
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import liar_opt
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.errors import ModelError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pruned(module: nn.Module, data: Any, **options: Any) -> ModuleResult:
    result = liar_opt.prune(module, data, **{"multiple_of": 1, "latency": False, **options})
    assert isinstance(result, ModuleResult)
    return result


class Feed(nn.Module):
    """A feed-forward block whose second layer has no bias."""

    def __init__(self, width: int = 9, hidden: int = 22) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Passing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_batches_and_examples_without_names() -> None:
    x = torch.randn(48, 9)
    pairs = TensorDataset(x, torch.arange(48))
    sizes = set()
    for data, example in ((x, None), (DataLoader(pairs, batch_size=16), None), (pairs, x), (None, x), (None, (x,))):
        result = pruned(Feed().eval(), data, example=example, ffn=0.5)
        assert result.report["calibration"]["synthetic"] is (data is None)
        assert data is None or result.report["calibration"]["samples"] == 48
        sizes.add(result.report["after"]["parameters"])
    assert sizes == {11 * 9 + 11 + 9 * 11 + 9}, "what the repair adds is counted"
    assert {g["kind"] for g in liar_opt.inspect(Feed().eval(), example=x).report["groups"]} == {"ffn"}


def test_wrapped_modules() -> None:
    x = torch.randn(48, 9)
    module = Feed().eval()
    kept = {k: v.clone() for k, v in module.state_dict().items()}
    for wrapped in (nn.DataParallel(module), torch.compile(module)):
        result = pruned(wrapped, x, ffn=0.5)  # type: ignore[arg-type]
        assert type(result.module) is Feed
        assert result.report["model"]["notes"] == [f"the result is the module inside {type(wrapped).__name__}"]
    result = pruned(Passing(module), {"x": x}, ffn=0.5)
    assert isinstance(result.module, Passing) and result.module(x).shape == (48, 9)
    assert result.program.module()(x=x[:3]).shape == (3, 9) and len(result.model.graph.input) == 1
    with pytest.raises(liar_opt.OptionError, match=r"Passing\.forward names no arguments"):
        pruned(Passing(module), x, ffn=0.5)
    assert all(torch.equal(v, kept[k]) for k, v in module.state_dict().items())


def test_normalised_weights_are_cut() -> None:
    module = Feed()
    module.up, module.down = weight_norm(module.up), weight_norm(module.down)
    result = pruned(module.eval(), torch.randn(48, 9), ffn=0.5)
    assert {n: tuple(p.shape) for n, p in result.module.named_parameters()} == {
        "up.weight": (11, 9),
        "up.bias": (11,),
        "down.weight": (9, 11),
        "down.bias": (9,),
    }
    assert "parametrizations" in dir(module.up)


class Both(NamedTuple):
    mixed: torch.Tensor
    parts: dict[str, Any]


class Mixing(nn.Module):
    """Reads the width of its heads from its input, so that the result is the traced graph; `late` is never traced first."""

    def __init__(self, width: int = 20, heads: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor, early: torch.Tensor | None = None, late: torch.Tensor | None = None) -> Both:
        b, s, width = x.shape
        packed = self.qkv(x).reshape(b, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*packed.unbind(0)).transpose(1, 2).reshape(b, s, width)
        y = self.drop(self.out(mixed)) * self.scale
        return Both(y if late is None else y + late, {"first": [x + y, None]})


def test_traced_graphs_are_used_like_modules() -> None:
    x, late = torch.randn(8, 7, 20), torch.randn(8, 7, 20)
    module = Mixing().eval()
    result = pruned(module, [{"x": x, "late": late}], heads=0.4, repair="none")
    small = result.module
    assert isinstance(small, torch.fx.GraphModule)
    (group,) = result.report["groups"]
    masked = copy.deepcopy(module)
    with torch.no_grad():
        masked.out.weight.view(20, 5, 4)[:, [h for h in range(5) if h not in group["kept"]]] = 0
        expected, found = masked(x, late=late), small(x=x, late=late)
    assert isinstance(found, Both) and found.parts["first"][1] is None
    torch.testing.assert_close(found.mixed, expected.mixed)
    torch.testing.assert_close(found.parts["first"][0], expected.parts["first"][0])

    stored = io.BytesIO()
    torch.save(small, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert small.state_dict().keys() == {*module.state_dict(), "scale"} == loaded.state_dict().keys()
    fresh = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(small.state_dict())
    for form in (small, loaded, fresh, small.train(), small.to(torch.float64).to(torch.float32)):
        for other in (form(x, None, late), form(x, late=late)):  # no dropout comes back with train()
            torch.testing.assert_close(other[0], found.mixed)
    small(x, late=late)[0].sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert torch.export.export(small, (x, None, late)).module()(x, None, late)[0].shape == (8, 7, 20)
    torch.testing.assert_close(result.program.module()(x=x, late=late)[0], found.mixed)  # nothing in the gap
    with pytest.raises(AssertionError, match="argument 'early' was not traced; leave it out"):
        small(x, late, late)
    with pytest.raises(AssertionError, match="argument 'late' is missing"):
        small(x)
    with pytest.raises(AssertionError, match="axis 2 of 'x' must be 20, as it was traced"):
        small(torch.randn(8, 7, 24), None, late)


class Attending(nn.Module):
    """nn.MultiheadAttention in one of its forms."""

    def __init__(self, first: bool, weights: bool, mask: str, bias: bool = True, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(15, 5, batch_first=first, bias=bias, **sizes)
        self.weights, self.mask = weights, mask

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        given: dict[str, Any] = {}
        if self.mask == "causal":
            given["attn_mask"] = torch.triu(torch.full((7, 7), float("-inf")), 1)
        if self.mask == "padding":
            given["key_padding_mask"] = torch.arange(7).expand(x.shape[0], 7) > 4
        other = x if memory is None else memory
        result: torch.Tensor = self.attention(x, other, other, need_weights=self.weights, **given)[0]
        return x + result


@pytest.mark.parametrize(
    ("module", "feeds"),
    [
        (Attending(True, False, "none"), {"x": (6, 7, 15)}),
        (Attending(False, True, "none", bias=False), {"x": (7, 6, 15)}),
        (Attending(True, True, "padding"), {"x": (6, 7, 15)}),
        (Attending(True, False, "causal"), {"x": (6, 7, 15)}),
        (Attending(True, False, "none", kdim=13, vdim=13), {"x": (6, 7, 15), "memory": (6, 4, 13)}),
    ],
)
def test_heads_of_multihead_attention(module: Attending, feeds: dict[str, Any]) -> None:
    """With repair off it is the original whose removed heads' rows of the output projection are zero."""
    nn.init.normal_(module.attention.out_proj.weight)
    data = {name: torch.randn(shape) for name, shape in feeds.items()}
    result = pruned(module.eval(), [data], heads=0.4, repair="none")
    (group,) = result.report["groups"]
    assert (group["kind"], group["before"], group["after"]) == ("heads", 5, 3)
    masked = copy.deepcopy(module)
    with torch.no_grad():
        masked.attention.out_proj.weight.view(15, 5, 3)[:, [h for h in range(5) if h not in group["kept"]]] = 0
        torch.testing.assert_close(result.module(**data), masked(**data))
        torch.testing.assert_close(result.program.module()(**data), masked(**data))
        assert not torch.allclose(module(**data), masked(**data), rtol=1e-2)


@pytest.mark.parametrize("first", [False, True])
def test_encoder_layers_of_torch(first: bool) -> None:
    layer = nn.TransformerEncoderLayer(15, 5, 22, batch_first=first)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(6, 7, 15) if first else torch.randn(7, 6, 15)
    result = pruned(module, [{"src": x}], heads=0.4, ffn=0.5)
    assert [(g["kind"], g["after"]) for g in result.report["groups"]] == [("heads", 3), ("ffn", 11)] * 2
    assert result.report["verification"]["exact_difference"] < 1e-5 and result.module(x).shape == x.shape
    assert result.report["after"]["parameters"] == sum(p.numel() for p in result.module.parameters())
    assert type(pruned(module, [{"src": x}], ffn=0.5).module) is nn.TransformerEncoder, (
        "where no head goes, its own code fits"
    )


class Words(nn.Module):
    """A table of words that is the head as well, and nothing that would pin the stream between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 9)
        self.inside = Feed()
        self.head = nn.Linear(9, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(self.inside(self.table(ids)))


def test_a_weight_that_is_read_elsewhere_too_is_left_alone() -> None:
    """The repair would change the head and not the table; a module holds one tensor for both."""
    result = pruned(Words().eval(), torch.randint(0, 50, (64, 5)), ffn=0.5)
    assert [g["before"] for g in result.report["groups"]] == [22]
    assert any("its weight is read elsewhere too" in r["reason"] for r in result.report["refusals"])
    held = dict(result.module.named_parameters(remove_duplicate=False))
    assert held["head.weight"] is held["table.weight"]


@pytest.mark.parametrize(
    "data, sentence",
    [
        (torch.zeros(0, 5, 9), "input 'x' of the calibration data has no samples"),
        ({}, "the calibration data is an empty dict; give a tensor for each of x"),
        (torch.zeros(8, 5, 9).to_sparse(), "input 'x' of the calibration data is sparse"),
        (torch.zeros(8, 5, 9, device="meta"), "'x' of the calibration data is on the meta device"),
        (torch.zeros(8, 5, 9, dtype=torch.int64), r"Feed fails on the inputs that are given \('x' int64 \[3, 5, 9\]\)"),
        (torch.zeros(8, 5, 8), r"Feed fails on the inputs that are given \('x' float32 \[3, 5, 8\]\): mat1"),
    ],
)
def test_data_that_a_module_does_not_take(data: Any, sentence: str) -> None:
    with pytest.raises((OptionError, ModelError), match=sentence):
        liar_opt.prune(Feed().eval(), calibration=data, ffn=0.5)


def test_weights_that_hold_no_numbers() -> None:
    data = torch.zeros(8, 5, 9)
    with pytest.raises(ModelError, match=r"'\S+' of Feed is on the meta device, without numbers"):
        liar_opt.prune(Feed().to("meta"), calibration=data)
    with pytest.raises(ModelError, match=r"'0\.weight' of Sequential is of a lazy module that has not run"):
        liar_opt.prune(nn.Sequential(nn.LazyLinear(8)), calibration=data)
    mixed = nn.Sequential(Feed(), Feed().half())
    with pytest.raises(ModelError, match="Sequential fails on the inputs that are given"):
        liar_opt.prune(mixed, calibration={"input": data})


@pytest.mark.parametrize("name", ["progress", "observer"])
def test_what_a_function_of_the_caller_raises_ends_the_run(name: str) -> None:
    """A window that was closed is no fault of a group, and no bug of liar-opt."""

    class Closed(Exception):
        pass

    def closed(*_: Any) -> None:
        raise Closed

    with pytest.raises(Closed):
        pruned(Feed().eval(), torch.randn(16, 5, 9), ffn=0.5, **{name: closed})


@pytest.mark.parametrize("latency", [True, False])
def test_modules_in_training_mode(latency: bool) -> None:
    """As they are when they were made: nothing is dropped while the cut is checked, and timing moves no running mean."""
    parts: list[nn.Module] = [nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 5)]
    module, x = nn.Sequential(*parts).train(), torch.randn(48, 12)
    module(x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = pruned(module, x, ffn=0.4, latency=latency)
    assert isinstance(result.module, nn.Sequential)
    assert result.module.training and module.training
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    (norm,) = (m for m in result.module.modules() if isinstance(m, nn.BatchNorm1d))
    assert norm.state_dict()["num_batches_tracked"] == 1
    assert latency == ("latency" in result.report and result.report["latency"] is not None)


def test_what_tells_why_nothing_can_go() -> None:
    """The command reads no module of Python's."""
    module = nn.Sequential(nn.Linear(12, 20), nn.Softmax(-1), nn.Linear(20, 5)).eval()
    with pytest.raises(ModelError, match=r"no prunable group; liar_opt\.inspect\(model\) says why"):
        pruned(module, torch.randn(48, 12), ffn=0.4)
    assert liar_opt.inspect(module, example=torch.randn(4, 12)).refusals
