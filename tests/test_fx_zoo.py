"""The oracle of the FX frontend: pruned with repair off, both forms of a module compute what the masked original does.

The reference is made without any of the code that prunes: the original module, its consumers' inputs multiplied by 0 or 1
in a forward hook.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo_fx
from modules import prune_module

import liar_opt
from liar_opt.frontend.hf_checkpoint import without_cache
from liar_opt.passes.groups import kept_positions
from liar_opt.passes.result import ModuleResult

pytestmark = pytest.mark.usefixtures("one_thread")

RTOL = 1e-4
RATIOS = {"ffn": 0.5, "heads": 0.4}


def run(module: Callable[..., Any], arrays: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors among the outputs, the cache of past keys switched off."""
    held = without_cache(module) if isinstance(module, torch.nn.Module) else contextlib.nullcontext()
    with torch.no_grad(), held:
        output = module(**zoo_fx.tensors(arrays))
    return [v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


def difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Returns the largest difference, relative to the largest magnitude of each output."""
    assert len(actual) == len(expected)
    return max(float((a - e).abs().max() / e.abs().max().clamp_min(1e-9)) for a, e in zip(actual, expected, strict=True))


def forwards(module: torch.nn.Module, arrays: dict[str, Any]) -> set[torch.nn.Module]:
    """Returns the parts of a module whose forward is called."""
    called: set[torch.nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in module.modules()]
    run(module, arrays)
    for hook in hooks:
        hook.remove()
    return called


def masked(module: torch.nn.Module, result: ModuleResult, arrays: dict[str, Any]) -> list[torch.Tensor]:
    """Runs the original with the removed channels of every consumer's input multiplied by zero."""
    kept = {c.where: c.details["kept"] for c in result.changes}
    called = forwards(module, arrays)
    hooks, zeroed = [], []
    for group in (g for g in result.groups if g.name in kept):
        for consumer in group.consumers:
            keep = torch.zeros(consumer.width)
            keep[kept_positions(consumer.owners, kept[group.name])] = 1
            (name,) = {u.weight.name for u in consumer.uses}
            if consumer.expert is not None:  # no module has the activation of an expert as its input
                weight = module.get_parameter(name).data
                zeroed.append((weight, weight.clone()))
                weight[consumer.expert].movedim(consumer.uses[0].weight_axis - 1, -1).mul_(keep)
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            if owner not in called:  # its weight is read by another module's code
                (axis,) = {u.weight_axis for u in consumer.uses}
                weight = module.get_parameter(name).data
                zeroed.append((weight, weight.clone()))
                weight.movedim(axis, -1).mul_(keep)
                continue

            def mask(_: Any, inputs: tuple[torch.Tensor, ...], keep: torch.Tensor = keep) -> tuple[torch.Tensor, ...]:
                return (inputs[0] * keep, *inputs[1:])

            hooks.append(owner.register_forward_pre_hook(mask))
    try:
        return run(module, arrays)
    finally:
        for hook in hooks:
            hook.remove()
        for weight, before in reversed(zeroed):
            weight.copy_(before)


@pytest.mark.parametrize("name", zoo_fx.of_each_kind(zoo_fx.MODELS))
def test_both_forms_equal_the_masked_original(name: str, record_property: Callable[[str, object], None]) -> None:
    module, arrays = zoo_fx.build(name), zoo_fx.feeds(name)
    expected = zoo_fx.MODELS[name].groups
    asked: dict[str, Any] = {kind: RATIOS[kind] for kind in expected}
    before = run(module, arrays)
    result = prune_module(
        module,
        [arrays],
        **asked,
        repair="none",
        score="random",
        multiple_of=1,
        checkpoint=False,
        latency=False,
    )
    found: dict[str, int] = {}
    for group in result.groups:
        found[group.kind] = found.get(group.kind, 0) + 1
    attributes = sorted({a["name"] for a in result.report["verification"]["attributes"]})
    reference = masked(module, result, arrays)
    graph = difference(run(result.graph_module, arrays), reference)
    same = difference(run(result.module, arrays), reference)
    record_property("fx", (name, found, graph, same, attributes))
    assert found == expected
    assert graph <= RTOL and same <= RTOL
    assert difference(reference, before) > 10 * RTOL, "the mask changes nothing: the oracle cannot fail"
    assert difference(run(module, arrays), before) == 0.0, "the original was changed"
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in module.parameters())


def test_the_oracle_can_fail() -> None:
    module, arrays = zoo_fx.build("bert"), zoo_fx.feeds("bert")
    options: dict[str, Any] = {**RATIOS, "repair": "none", "score": "random", "multiple_of": 1, "latency": False}
    result = prune_module(module, [arrays], checkpoint=False, **options)
    reference = masked(module, result, arrays)
    assert difference(run(result.module, arrays), reference) <= RTOL
    with torch.no_grad():
        result.module.get_parameter("encoder.layer.0.output.dense.weight")[7, 3] += 0.5
    assert difference(run(result.module, arrays), reference) > RTOL
    kept = result.changes[0].details["kept"]
    result.changes[0].details["kept"] = [k for k in range(5) if k not in kept]
    assert difference(run(result.graph_module, arrays), masked(module, result, arrays)) > RTOL


@pytest.mark.parametrize("name", ["gptj", "mixtral", pytest.param("deepseek-v3", marks=pytest.mark.rest)])
def test_layers_that_stand_side_by_side_and_experts_go_whole(name: str) -> None:
    """The run's own check compares with the original whose outputs are replaced; no rehearsal finds a fault."""
    module = zoo_fx.build(name)
    module.config.use_cache = False
    data = [zoo_fx.feeds(name, seed=seed) for seed in range(6)]
    options: dict[str, Any] = {"whole_layers": "on", "sparsity": 0.8, "checkpoint": False, "latency": False, "fresh": True}
    result = liar_opt.prune(module, data, multiple_of=4, **options)
    assert isinstance(result, ModuleResult)
    gone = [g for g in result.report["groups"] if "stand_in" in g]
    assert gone and not any("fault" in r["reason"] for r in result.report["refusals"])
    assert result.report["verification"]["exact_difference"] < 1e-5
    names = {name for name, _ in result.module.named_parameters()}
    for group in (g for g in result.groups if g.name in {g["name"] for g in gone}):
        assert names.isdisjoint(use.weight.name for consumer in group.consumers for use in consumer.uses)
