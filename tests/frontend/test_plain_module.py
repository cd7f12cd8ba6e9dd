"""Out of wrappers, parametrisations folded on a copy, the module itself untouched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from liar_opt.frontend.plain_module import copied_module, evaluating, plain_module
from liar_opt.runtime.errors import ModelError


class LowRank(nn.Module):
    """W + B A, as LoRA is written as a parametrisation."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, columns)), nn.Parameter(torch.randn(rows, 2))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.b @ self.a


def lora(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))


KINDS: dict[str, Callable[[Any], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "lora": lora,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),  # type: ignore[no-untyped-call]
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_parametrisations_are_folded_on_a_copy(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(KINDS[kind](nn.Linear(5, 7)), nn.ReLU(), KINDS[kind](nn.Linear(7, 3))).train()
    x = torch.randn(4, 5)
    module(x).sum().backward()  # what has been computed is kept in some of them
    module[1].eval()
    before, modes = {k: v.clone() for k, v in module.state_dict().items()}, [m.training for m in module.modules()]
    plain, notes = plain_module(module)
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in plain.parameters())
    assert notes == ("2 weights that are computed from other parameters were folded into plain ones",)
    assert [m.training for m in module.modules()] == modes and False in modes
    assert {k: v.tolist() for k, v in module.state_dict().items()} == {k: v.tolist() for k, v in before.items()}
    with evaluating(module), torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), module(x))


def test_wrappers_are_taken_off() -> None:
    module = nn.Sequential(nn.Linear(5, 3))
    assert plain_module(module) == (module, ())
    compiled: Any = torch.compile(module)
    for wrapped in (compiled, nn.DataParallel(module), nn.DataParallel(compiled)):
        assert plain_module(wrapped).module is module
    averaged = AveragedModel(module)
    found = plain_module(averaged)
    assert found.module is averaged.module and found.notes == ("the result is the module inside AveragedModel",)


def test_adapters_are_named() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    for module in (adapted, base):  # the layers of the base have been replaced
        with pytest.raises(ModelError, match=r"holds LoRA adapters .*merge them first \(merge_and_unload\)"):
            plain_module(module)
    assert plain_module(adapted.merge_and_unload()).notes == ()


def test_what_cannot_be_copied_is_said() -> None:
    module = nn.Linear(5, 3)
    kept: Any = module
    kept.last = module(torch.randn(2, 5))
    assert copied_module(module).last.shape == (2, 3)
    kept.source = (i for i in range(3))
    with pytest.raises(ModelError, match=r"Linear cannot be copied \(.*generator"):
        copied_module(module)
