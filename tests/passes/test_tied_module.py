"""Modules whose layers share a table by heads: the traced graph lets each layer choose, a configuration does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
import torch
import transformers
from torch import nn

import liar_opt
from liar_opt.passes.base import DenseModel
from liar_opt.passes.blank_cut import blank_cut
from liar_opt.passes.groups import kept_positions
from liar_opt.passes.module_backend import TorchBackend
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.result import ModuleResult

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, DEPTH, WORDS, BUCKETS = 4, 5, 4, 67, 6
WIDTH = HEADS * DEPTH


class Layer(nn.Module):
    """Attention with what is added to the scores, and a feed-forward layer; every second one is narrower."""

    def __init__(self, number: int, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 30 - number % 2 * 7), nn.Linear(30 - number % 2 * 7, WIDTH)
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y, (b, s, _) = self.before(x), x.shape
        q, k, v = (p(y).view(b, s, HEADS, DEPTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.flat:
            q, k, v = (t.reshape(b * HEADS, s, DEPTH) for t in (q, k, v))
            scores = torch.baddbmm(bias, q, k.transpose(1, 2))
        else:
            scores = q @ k.transpose(2, 3) + bias
        found = (scores.softmax(-1) @ v).view(b, HEADS, s, DEPTH)
        x = x + self.o(found.transpose(1, 2).reshape(b, s, -1))
        result: torch.Tensor = x + self.down(torch.relu(self.up(self.between(x))))
        return result


class Tied(nn.Module):
    """A bias by distance for all layers, or slopes laid out as batch x heads."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.words = nn.Embedding(WORDS, WIDTH)
        self.table = nn.Embedding(BUCKETS, HEADS)
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.layers = nn.ModuleList(Layer(i, flat) for i in range(LAYERS))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        b, s = input_ids.shape
        places = torch.arange(s)
        if self.flat:
            bias = (self.slopes[:, None, None] * places).expand(b, HEADS, 1, s).reshape(b * HEADS, 1, s)
        else:
            far = (places[:, None] - places).abs().clamp(max=BUCKETS - 1)
            bias = self.table(far).permute(2, 0, 1)[None]
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, bias)
        found: torch.Tensor = x
        return found


def made(flat: bool) -> Tied:
    torch.manual_seed(0)
    module = Tied(flat).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module


def ids(batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, WORDS, (batch, tokens), generator=torch.Generator().manual_seed(seed))}


def masked(module: nn.Module, result: ModuleResult, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    """Runs the original with zeros in what went."""
    kept = {c.where: c.details["kept"] for c in result.changes if "kept" in c.details}
    hooks = []
    for group in (g for g in result.groups if g.name in kept):
        for consumer in group.consumers:
            keep = torch.zeros(consumer.width)
            keep[kept_positions(consumer.owners, kept[group.name])] = 1
            owner = module.get_submodule(consumer.uses[0].weight.name.rpartition(".")[0])
            hooks.append(owner.register_forward_pre_hook(lambda _, inputs, keep=keep: (inputs[0] * keep, *inputs[1:])))
    with torch.no_grad():
        found: torch.Tensor = module(**feeds)
    for hook in hooks:
        hook.remove()
    return found


def head_sets(result: Any) -> list[tuple[int, ...]]:
    names = {g["name"] for g in result.report["groups"] if g["kind"] == "heads"}
    return [tuple(c.details["kept"]) for c in result.changes if c.where in names]


@pytest.mark.parametrize("flat", [False, True], ids=["bias", "slopes"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("onnxruntime", marks=pytest.mark.rest)])
def test_each_layer_takes_heads_of_its_own(flat: bool, backend: str, tmp_path: Path) -> None:
    module = made(flat)
    feeds = [{k: v.numpy() for k, v in ids(4, 13, seed).items()} for seed in range(6)]
    result = liar_opt.prune(module, feeds, heads=0.4, repair="none", backend=backend, latency=False, multiple_of=1)
    assert isinstance(result, ModuleResult)
    sets = head_sets(result)
    assert len(sets) == LAYERS and len(set(sets)) > 1
    assert any("gives to all as it is" in note for note in result.report["model"]["notes"])
    for batch, tokens in ((4, 13), (1, 9), (3, 21)):
        given = ids(batch, tokens, 9)
        wanted = masked(module, result, given)
        with torch.no_grad():
            found = result.module(**given)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(module(**given), wanted, atol=1e-2)
    proto = onnx.load(result.save(tmp_path / "out.onnx"))
    given = ids(2, 11, 5)
    outputs = oracle.run(proto, {k: v.numpy() for k, v in given.items()})
    np.testing.assert_allclose(outputs[0], masked(module, result, given).numpy(), rtol=1e-3, atol=1e-4)
    result.save(tmp_path / "out.pt2")


def test_layers_are_pruned_by_themselves_when_nothing_is_said() -> None:
    module = made(False)
    result = liar_opt.prune(module, [ids(4, 13, seed) for seed in range(6)], latency=False)
    assert isinstance(result, ModuleResult)
    sets = head_sets(result)
    assert len(set(sets)) > 1
    assert result.report["verification"]["exact_difference"] < 1e-4
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_checkpoint_keeps_one_set_for_all(checkpoint: bool) -> None:
    """Its configuration has one number of heads, and its code one table."""
    config = transformers.MPNetConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=33,
        max_position_embeddings=41,
    )
    module = transformers.MPNetModel(config, add_pooling_layer=False).eval()
    data = [{k: v.numpy() for k, v in ids(4, 13).items()}]
    backend = TorchBackend.open(module, data, PruneOptions(checkpoint=checkpoint))
    backend.analyse(backend.state)
    again = blank_cut(backend.state.found(DenseModel).original, {})[0]
    assert again.tied == checkpoint
    heads = [g for g in backend.state.groups if g.kind == "heads"]
    assert [len(g.consumers) for g in heads] == ([LAYERS] if checkpoint else [1] * LAYERS)
