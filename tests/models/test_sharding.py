"""States of an optimizer are matched by their place in the groups, whatever number a file gives them."""

from __future__ import annotations

from typing import Any

import torch
from ragged import tiny_module
from tiny_run import assert_same

from llm_lightning.models.sharding import copy_parts, gathered, optimizer_parts, without_gradients
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.base import keep_kernels


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model after an update with other gradients for each of its parameters."""
    model = tiny_module().model
    optimizer = AdamWConfig().build(model.named_parameters())
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.full_like(parameter, float(number))
    optimizer.step()
    return model, optimizer


def numbered_by_all_parameters(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """As Lightning's ModelParallelStrategy numbers the states: in the order of the model, not of the groups."""
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    pairs = [zip(group["params"], group["param_names"], strict=True) for group in state["param_groups"]]
    names = dict(pair for of_group in pairs for pair in of_group)
    groups = [{**group, "params": [order[name] for name in group["param_names"]]} for group in state["param_groups"]]
    return {"state": {order[names[i]]: kept for i, kept in state["state"].items()}, "param_groups": groups}


def test_a_state_with_other_numbers_is_the_same() -> None:
    model, optimizer = trained()
    before = optimizer.state_dict()
    other = numbered_by_all_parameters(model, before)
    assert list(other["state"]) != sorted(other["state"]), "the groups are not in the model's order"
    fresh = AdamWConfig().build(tiny_module().model.named_parameters())
    fresh.load_state_dict(optimizer_parts(fresh, other))
    assert_same(fresh.state_dict(), before)


def test_gathered_keeps_ties_and_structure() -> None:
    model, optimizer = trained()
    state = {"weights": model.state_dict(keep_vars=True), "optimizer": optimizer.state_dict()}
    found = gathered(state, keep=True)
    assert_same(found, {"weights": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
    assert found["weights"]["lm_head.weight"] is found["weights"]["token_embedding.weight"]
    assert not found["weights"]["lm_head.weight"].requires_grad
    assert gathered(state, keep=False) == {}


def test_whole_tensors_are_copied() -> None:
    model, _ = trained()
    other = tiny_module().model
    copy_parts(other, model.state_dict())
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_a_load_keeps_the_kernel_of_the_run() -> None:
    _, plain = trained()
    for group in plain.param_groups:
        group["fused"] = False
    fused = AdamWConfig(fused=True).build(tiny_module().model.named_parameters())
    fused.load_state_dict(plain.state_dict())
    assert not any(group["fused"] for group in fused.param_groups)
    keep_kernels(fused)
    assert all(group["fused"] for group in fused.param_groups)


def test_plain_weights_are_read_in_inference_mode() -> None:
    with without_gradients(tiny_module().model):
        assert torch.is_inference_mode_enabled()
