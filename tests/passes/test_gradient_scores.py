"""Gradient scores against autograd on explicit masks; what is needed for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from liar_opt import prune
from liar_opt.passes.gradient_scores import LABELLED_SCORES, gradient_values, knowledge
from liar_opt.runtime.errors import OptionError

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, HIDDEN, CLASSES = 6, 20, 3


class Net(torch.nn.Module):
    """Two residual feed-forward blocks and a classifier; a mask can be put on each hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.ModuleList(torch.nn.Linear(WIDTH, HIDDEN) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, WIDTH) for _ in range(2))
        self.head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor, masks: Any = None) -> torch.Tensor:
        for index, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            hidden = torch.relu(up(x))
            if masks is not None:
                hidden = hidden * masks[index]
            x = x + down(hidden)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


def batch(seed: int, size: int = 7) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, WIDTH, generator=generator)
    return {"x": x}, torch.randint(0, CLASSES, (size,), generator=generator)


LABELLED = [batch(i) for i in range(4)]
FEEDS = [{"x": batch(100 + i)[0]["x"].numpy()} for i in range(6)]


def cross_entropy(outputs: Any, labels: Any) -> torch.Tensor:
    (logits,) = outputs.values()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def by_masks(net: Net) -> list[Any]:
    """dL/dm of each sample, by autograd."""
    rows: list[list[Any]] = [[], []]
    for feeds, labels in LABELLED:
        for x, label in zip(feeds["x"], labels, strict=True):
            masks = [torch.ones(HIDDEN, requires_grad=True) for _ in range(2)]
            cross_entropy({"y": net(x[None], masks)}, label[None]).backward()  # type: ignore[no-untyped-call]
            for own, mask in zip(rows, masks, strict=True):
                assert mask.grad is not None
                own.append(mask.grad.double().numpy())
    return [np.stack(r) for r in rows]


@pytest.mark.parametrize("score", LABELLED_SCORES)
def test_the_kept_blocks_are_those_of_explicit_masks(score: str) -> None:
    net = Net()
    result = prune(
        net, FEEDS, ffn=0.5, multiple_of=1, score=score, loss=cross_entropy, labelled=LABELLED, repair="none", latency=False
    )
    for change, gradients in zip(result.changes, by_masks(net), strict=True):
        values = gradient_values(score, gradients)
        assert change.details["kept"] == sorted(np.argsort(-values, kind="stable")[: HIDDEN // 2].tolist())
        assert np.ptp(values) > 0


def test_knowledge_needs_no_labels_and_is_what_the_outputs_lose() -> None:
    """Against its definition: t^2 KL by finite masks, and the sub-layer's own output, on the calibration data."""
    net, step = Net(), 1e-2
    options: dict[str, Any] = {"ffn": 0.5, "multiple_of": 1, "repair": "none", "latency": False}
    result = prune(net, FEEDS * 30, score="knowledge", samples=1300, **options)
    again = prune(net, FEEDS * 30, score="knowledge", samples=1300, **options)
    assert [c.details["kept"] for c in result.changes] == [c.details["kept"] for c in again.changes]
    x = torch.cat([torch.from_numpy(f["x"]) for f in FEEDS])
    with torch.no_grad():
        dense = torch.log_softmax(net(x).double() / 2, -1)
        for index, change in enumerate(result.changes):
            lost = []
            for unit in range(HIDDEN):
                masks = [torch.ones(HIDDEN) for _ in range(2)]
                masks[index][unit] -= step
                masked = torch.log_softmax(net(x, masks).double() / 2, -1)
                lost.append(float((dense.exp() * (dense - masked)).sum(-1).mean()) * 4 / step**2)
            ups, downs = list(net.up), list(net.down)
            stream = x if not index else x + downs[0](torch.relu(ups[0](x)))
            hidden = torch.relu(ups[index](stream)).double()
            own = (
                hidden.square().mean((0, 1)) * net.get_parameter(f"down.{index}.weight").double().square().sum(0)
            ).numpy()
            values = np.asarray(lost) / np.mean(lost) + own / own.mean()
            best = set(np.argsort(-values)[: HIDDEN // 2].tolist())
            assert len(best & set(change.details["kept"])) >= HIDDEN // 2 - 1  # labels are drawn, and few


def test_formulas() -> None:
    gradients = np.asarray([[1.0, -2.0, 0.0], [-1.0, -1.0, 3.0]])
    np.testing.assert_allclose(gradient_values("fisher", gradients), [2, 5, 9])
    np.testing.assert_allclose(gradient_values("taylor", gradients), [1, 1.5, 1.5])
    np.testing.assert_allclose(gradient_values("snip", gradients), [0, 3, 3])
    np.testing.assert_allclose(knowledge(gradients, np.asarray([1.0, 2.0, 3.0])), [0.375 + 0.5, 0.9375 + 1, 1.6875 + 1.5])


def detached(outputs: Any, labels: Any) -> Any:
    return cross_entropy(outputs, labels).detach()


def vector(outputs: Any, labels: Any) -> Any:
    return next(iter(outputs.values())).sum(1)


def infinite(outputs: Any, labels: Any) -> Any:
    return cross_entropy(outputs, labels) * float("nan")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"score": "fisher"}, "'fisher' needs labels: give labelled="),
        ({"score": "fisher", "loss": cross_entropy}, "needs labels"),
        ({"score": "greedy", "loss": cross_entropy, "labelled": LABELLED}, "are for the scores fisher, taylor, snip"),
        ({"score": "knowledge", "loss": cross_entropy, "labelled": LABELLED}, "are for the scores fisher, taylor, snip"),
        ({"score": "knowledge", "backend": "onnxruntime"}, "'knowledge' needs gradients; backend 'onnxruntime' has none"),
        ({"score": "taylor", "loss": detached, "labelled": LABELLED}, "'detached' did not return a scalar"),
        ({"score": "taylor", "loss": vector, "labelled": LABELLED}, "'vector' did not return a scalar"),
        ({"score": "taylor", "loss": infinite, "labelled": LABELLED}, "'infinite' gives a gradient of NaN"),
        ({"score": "snip", "loss": cross_entropy, "labelled": [({"y": torch.ones(1)}, 0)]}, "does not run .*found y"),
    ],
)
def test_what_is_needed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        prune(Net(), FEEDS, ffn=0.5, multiple_of=1, latency=False, **options)


def test_a_file_has_no_gradients() -> None:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:]))
    with pytest.raises(OptionError, match="'fisher' needs gradients: give the torch module"):
        prune(model, FEEDS, score="fisher", loss=cross_entropy, labelled=LABELLED)
    with pytest.raises(OptionError, match="'knowledge' needs gradients: give the torch module"):
        prune(model, FEEDS, score="knowledge")
