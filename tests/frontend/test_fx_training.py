"""What stands for parameters while they are trained, and what is written: nothing else changes, zeros stay zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from liar_opt.frontend.fx_module import Executor, FxModel, analyse, lower, trace
from liar_opt.frontend.fx_training import RANK, SCALE, Batch, Distillation, Subset

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS, WIDTH = 31, 20


class _Model(torch.nn.Module):
    """Four layers of unequal widths on a table that the head shares; one matrix has a pattern of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(WORDS, WIDTH)
        widths = (24, 36, 28, 44)
        self.up = torch.nn.ModuleList(torch.nn.Linear(WIDTH, w) for w in widths)
        self.down = torch.nn.ModuleList(torch.nn.Linear(w, WIDTH, bias=False) for w in widths)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in widths)
        self.register_buffer("shift", torch.ones(WIDTH))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids) + self.shift
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return torch.as_tensor(x @ self.table.weight.T)


def lowered() -> FxModel:
    torch.manual_seed(0)
    module = _Model().eval()
    with torch.no_grad():
        dict(module.named_parameters())["up.1.weight"].mul_(torch.rand(36, WIDTH) < 0.5)
    return lower(trace(module, {"input_ids": torch.randint(0, WORDS, (3, 7))}), module)


@pytest.mark.parametrize("matrices", [False, True])
def test_what_is_written_is_what_was_trained(matrices: bool) -> None:
    model = lowered()
    assert model.module is not None
    subset = Subset(analyse(model), matrices, WORDS, 0)
    vectors = {n for n, p in model.module.named_parameters() if p.ndim == 1}
    linear = {n for n, p in model.module.named_parameters() if p.ndim == 2 and "table" not in n}
    assert set(subset.names) == vectors | (linear if matrices else set())
    before = {c.name: c.values.copy() for c in model.constants()}
    ids = np.random.default_rng(1).integers(0, WORDS, (2, 5))
    executor, output = Executor(model), model.results[0]
    first = executor.run({"input_ids": ids})[output]
    subset.bind(executor)
    torch.testing.assert_close(executor.run({"input_ids": ids})[output], first)  # at the start it is the model
    with torch.no_grad():
        for leaf in subset.leaves:
            leaf.add_(0.1 * torch.randn(leaf.shape))
    subset.bind(executor)
    wanted = executor.run({"input_ids": ids})[output]
    assert not torch.allclose(wanted, first)
    for constant in model.constants():
        np.testing.assert_array_equal(constant.values, before[constant.name])
    kept = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    subset.write()
    torch.testing.assert_close(Executor(model).run({"input_ids": ids})[output], wanted)
    assert all(torch.equal(p, kept[n]) for n, p in model.module.named_parameters())  # the dense module has its own
    after = {c.name: c.values for c in model.constants()}
    assert {n for n in before if not np.array_equal(before[n], after[n])} == set(subset.names)
    if matrices:
        np.testing.assert_array_equal(after["up.1.weight"] == 0, before["up.1.weight"] == 0)
        assert (before["up.1.weight"] == 0).any()
        left, right = next(p.leaves for p in subset.parts if p.constants[0].name == "up.0.weight")
        np.testing.assert_allclose(
            after["up.0.weight"] - before["up.0.weight"], (SCALE * left @ right).detach().numpy(), atol=1e-6
        )
        assert left.shape == (24, RANK) and right.shape == (RANK, WIDTH)


@pytest.mark.parametrize("logits", [False, True])
def test_the_distance_is_that_of_rows_that_count(logits: bool) -> None:
    dense, model = lowered(), lowered()
    subset = Subset(analyse(model), False, WORDS, 0)
    with torch.no_grad():
        for leaf in subset.leaves:
            leaf.mul_(1.5)
    output, rng = model.results[0], np.random.default_rng(2)
    mask = rng.random((4, 6)) < 0.7
    ids = rng.integers(0, WORDS, (4, 6))
    feeds = {"input_ids": ids}
    found = Distillation(dense, model, subset, {output: output}, logits, room=10**9)
    batch = Batch(feeds, feeds, mask)
    loss = found.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in subset.leaves)
    executor = Executor(model)
    subset.bind(executor)
    ours, theirs = (e.run(feeds)[output].detach()[torch.from_numpy(mask)] for e in (executor, Executor(dense)))
    if logits:
        p, q = torch.log_softmax(theirs, -1), torch.log_softmax(ours, -1)
        wanted = (p.exp() * (p - q)).sum(-1).mean()
    else:
        wanted = (ours - theirs).square().sum() / theirs.square().sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2 if logits else 1e-4)
    assert found.distance([batch, batch]) == pytest.approx(loss.item(), rel=1e-5)
