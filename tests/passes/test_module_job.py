"""What the job does with modules as with ONNX graphs: it goes on, starts again, stays within the memory, takes passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import prune_module
from torch import nn

from liar_opt.frontend.fx_module import Executor, lower, tensor_bytes, trace
from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.rules.table import Op
from liar_opt.passes import open_module, plan_memory, sweep
from liar_opt.passes.module_backend import TorchBackend
from liar_opt.passes.prove_groups import ProveGroupsPass
from liar_opt.runtime import memory
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import OptionError

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN = (14, 22, 19)
GIVEN: dict[str, Any] = {"custom_ops": "lib.so"}


class Chain(nn.Module):
    """Feed-forward blocks behind each other; before the last one the units change places."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(9, n) for n in HIDDEN)
        self.down = nn.ModuleList(nn.Linear(n, 9) for n in HIDDEN)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(tokens, 9).to(next(self.parameters()).dtype)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            h = torch.tanh(up(x))
            x = x + down(torch.roll(h, 3, -1) if i == 2 else h)
        return x


def chain(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Chain().eval().to(dtype)


def data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"tokens": torch.randint(0, 9, (4, 7), generator=generator)} for _ in range(12)]


def pruned(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    common: dict[str, Any] = {"latency": False, "fresh": True, "batch_size": 4}
    if "passes" not in options:
        common |= {"ffn": 0.5, "multiple_of": 1}
    return prune_module(chain(dtype), data(), **{**common, **options})


def same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Stop(KeyboardInterrupt):
    """The interruption."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_resumed_comes_out_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done > 12:  # in the second segment
            raise Stop

    whole = pruned(dtype)
    with pytest.raises(Stop):
        pruned(dtype, resume=tmp_path / "run", progress=stop)
    assert (tmp_path / "run" / "segment-1").is_dir()
    with pytest.raises(OptionError, match="'seed' was 0, now it is 1"):
        pruned(dtype, resume=tmp_path / "run", seed=1)
    resumed = pruned(dtype, resume=tmp_path / "run")
    assert resumed.report["resumed"] == 1 and not (tmp_path / "run").exists()
    assert resumed.report["groups"] == whole.report["groups"]
    same(resumed, whole)


def test_passes_do_what_the_options_do() -> None:
    by_text = pruned(passes="allocate-widths{ffn=0.5,multiple-of=1},prune-groups{repair=bias},verify-model{batches=1}")
    same(by_text, pruned(repair="bias"))


def test_little_memory_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if what is measured were larger than the memory: moments and what is alive wait on disk."""
    free = pruned()
    monkeypatch.setattr(sweep, "anonymous", lambda: 0)
    monkeypatch.setattr(plan_memory, "SPARE", 0)
    monkeypatch.setattr(sweep, "SPARE", 0)
    with pytest.raises(OptionError, match=r"memory 10KB is too small for the moments of group '.*' \(width 22\)"):
        pruned(memory=10_000)
    monkeypatch.setattr(memory, "LARGE_STREAM", 1 << 40)
    put, stored = ArrayStore.put, []

    def everything(self: ArrayStore, array: np.ndarray, least: int = 0) -> np.ndarray:
        stored.append(array.shape)
        return put(self, array, 0)

    monkeypatch.setattr(ArrayStore, "put", everything)
    limited = pruned(memory=200_000)
    assert stored.count((4, 7, 9)) == 12 and limited.report["memory"]["limit"] == 200_000
    assert 0 < limited.report["memory"]["estimated_peak"] <= 200_000
    same(limited, free, 1e-5)


def test_bytes_of_tensors_are_those_of_a_run() -> None:
    module, feeds = chain(), {"tokens": np.zeros((5, 3), np.int64)}
    model = lower(trace(module, {"tokens": torch.zeros(3, 7, dtype=torch.int64)}), module)
    names = [t.name for node in model.graph.nodes for t in node.outputs]
    values = Executor(model).run(feeds, wanted=names)
    assert tensor_bytes(model, feeds) == {name: v.numel() * v.element_size() for name, v in values.items()}


def test_a_run_starts_again_without_what_failed_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is proved, and a wrong rule says that every unit keeps its place."""
    monkeypatch.setitem(OPERATORS, ("aten", "roll"), [Op("roll", lambda w, node: w.output(node, w.input_axes(node, 0)))])
    monkeypatch.setattr(ProveGroupsPass, "plan", lambda self, state: {})
    result = pruned()
    assert [(g["before"], g["after"]) for g in result.report["groups"]] == [(14, 7), (22, 11)]
    (refusal,) = [r for r in result.refusals if "cutting it would be wrong" in r.reason]
    assert "differs by" in refusal.reason and result.module.get_submodule("down.2").weight.shape == (9, 19)
    assert result.report["verification"]["exact_difference"] < 1e-5


@pytest.mark.parametrize("option", TorchBackend.cannot)
def test_what_cannot_be_done_is_said_before_any_work(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_module, "trace", None)
    with pytest.raises(OptionError) as caught:
        prune_module(chain(), data(), **{option: GIVEN[option]})
    assert str(caught.value) == TorchBackend.cannot[option]


def test_a_limit_is_kept_by_a_score_that_needs_gradients() -> None:
    result = prune_module(chain(), data(), max_drop=0.2, score="knowledge", multiple_of=1, latency=False)
    assert any(g["after"] < g["before"] for g in result.report["groups"])
    assert result.report["target"]["found"] <= 0.2
