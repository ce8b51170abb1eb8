"""Classes of torch.optim with their own arguments: every one trains, and wrong ones are one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm_lightning.experiments.build import build_optimizer
from llm_lightning.optim.torch_optim import REFUSED, TorchOptimConfig

CLASSES = sorted(
    name
    for name, named in vars(torch.optim).items()
    if isinstance(named, type) and issubclass(named, torch.optim.Optimizer) and name != "Optimizer"
)


def node(name: str, **options: Any) -> dict[str, Any]:
    ours = {"lr": 0.1, "weight_decay": None, "decay": "matrices", "max_grad_norm": None, "clip_after_warmup": True}
    return {"_target_": f"torch.optim.{name}", **ours, **options}


@pytest.mark.parametrize("name", [name for name in CLASSES if f"torch.optim.{name}" not in REFUSED])
def test_every_class_trains(name: str) -> None:
    layer = nn.Linear(3, 2)
    config = build_optimizer(node(name))
    optimizer = config.build(layer.named_parameters())
    assert type(optimizer).__name__ == name
    assert (config.lr, config.max_grad_norm, config.clip_after_warmup) == (0.1, None, True)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


def test_arguments_are_the_classs_own() -> None:
    config = build_optimizer(node("NAdam", betas=[0.8, 0.9], momentum_decay=1e-2, weight_decay=0.5))
    groups = config.build(nn.Linear(3, 2).named_parameters()).param_groups
    assert [(group["betas"], group["momentum_decay"], group["lr"]) for group in groups] == [((0.8, 0.9), 1e-2, 0.1)] * 2
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    default = build_optimizer(node("AdamW", decay="all")).build(nn.Linear(3, 2).named_parameters())
    assert [group["weight_decay"] for group in default.param_groups] == [1e-2]  # the class's


class Muon(torch.optim.SGD):
    """Someone's own, whatever its name, with arguments that its signature does not list."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


def test_a_class_of_ones_own() -> None:
    config = TorchOptimConfig.of(Muon, {"lr": 0.1, "momentum": 0.5, "decay": "all"})
    [group] = config.build(nn.Linear(3, 2).named_parameters()).param_groups
    assert (config.name, group["momentum"], group["lr"]) == (f"{__name__}.Muon", 0.5, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("LBFGS", {}, "torch.optim.LBFGS is not possible: it evaluates the loss several times"),
        ("SparseAdam", {}, "torch.optim.SparseAdam is not possible: it needs sparse gradients"),
        ("Muon", {}, "torch.optim.Muon is not possible: .*use optimizer=muon"),
        ("NAdam", {"fused": "auto"}, "torch.optim.NAdam has no argument fused; choose optimizer=torch"),
        ("Adam", {"fused": "auto"}, "optimizer.fused=auto: torch.optim.Adam takes.*optimizer=torch"),
        ("NAdam", {"betas": [0.9, 2]}, "torch.optim.NAdam refuses its arguments.*Invalid beta parameter"),
        ("SGD", {"nesterov": True}, "torch.optim.SGD refuses its arguments.*Nesterov momentum requires"),
        ("Rprop", {"weight_decay": 0.1}, "torch.optim.Rprop has no argument weight_decay"),
        ("SGD", {"lr": -1.0}, "optimizer.lr=-1.0 must be positive"),
        ("SGD", {"decay": "some"}, "optimizer.decay"),
    ],
)
def test_what_cannot_be_built_is_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build_optimizer(node(name, **options))
    assert "\n" not in str(caught.value)
