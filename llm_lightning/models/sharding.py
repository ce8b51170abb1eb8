"""Fully sharded weights (FSDP2): every process holds a part of each matrix and gathers one block at a time.

Embeddings, final norm and head form one group, that of the root. It stays whole after a forward pass, because losses
multiply by the head themselves, and becomes parts again in the backward pass; where none follows, call `release`. The
most that a process holds is thus its parts, the root's group and the blocks at work.

Before, every process builds the whole model in its host's memory (weights from a float32 checkpoint are only mapped);
block by block, it moves to the device and is cut there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT

ENTRANCES = ("hidden_states", "run_lower", "vectors", "finish", "read")
"""Methods of a model that are called from outside: each gathers the weights of the root first."""


def shard(model: GPT | Classifier, device_type: str, n_processes: int) -> None:
    """Shard a model in place, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if is_sharded(model):
        return
    # Not the strategy's mesh: by default all processes of a node are on its tensor-parallel axis.
    mesh = init_device_mesh(device_type, (n_processes,))
    for block in model.trunk.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name in ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # of FSDPModule, whose import takes a second


def release(model: nn.Module) -> None:
    """Cut a sharded model that has only forward passes into parts again, and forget their order."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()  # type: ignore[operator]  # the order would grow by an entry per block and pass
    elif is_sharded(model):  # PyTorch before 2.13
        model.reshard()  # type: ignore[operator]


def without_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Inference mode; on sharded weights, whose gathered form a later backward pass uses, only `no_grad`."""
    sharded = any(map(is_sharded, model.modules()))
    return torch.no_grad() if sharded else torch.inference_mode()


# --- whole tensors and parts -----------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in every process; all of them call it together. Any other tensor as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """A nested state with whole tensors on the CPU, for a process that is to `keep` it; {} in the others.

    All processes call it together. Tensors are gathered one by one, and one that occurs twice (a tied head) once.
    """
    known: dict[int, Tensor | None] = {}

    def gather(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: gather(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(gather, value))
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            full = whole(value)
            known[id(value)] = full.cpu() if keep else None
        return known[id(value)]

    result = gather(state)
    return result if keep else {}


@torch.no_grad()
def copy_parts(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load whole tensors, of which each process copies its part; without `strict`, those that there are.

    Raises:
        ValueError: if one is missing.
    """
    for name, mine in module.state_dict(keep_vars=True).items():
        if name in state:
            mine.copy_(part_like(mine, state[name]))
        elif strict:
            raise ValueError(f"state_dict.{name} is missing in the checkpoint of this run")


def part_like(mine: Any, full: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `mine` is; no process sends anything."""
    if not hasattr(mine, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mine.device_mesh, mine.placements, src_data_rank=None)


def optimizer_parts(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state of an optimizer, with this process's part of what is kept in the shape of a parameter.

    A state belongs to the parameter at the same place in the groups, whatever number the file gives it.
    """
    mine = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parts = {}
    for number, parameter in zip(numbers, mine, strict=True):
        parts[number] = {
            # Cloned: a part of a mapped file would keep the file open.
            name: part_like(parameter, value).clone() if _is_like(value, parameter) else value
            for name, value in state["state"].get(number, {}).items()
        }
    return {**state, "state": {number: kept for number, kept in parts.items() if kept}}


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape
