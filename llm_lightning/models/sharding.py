"""Fully sharded weights (FSDP2): every process holds a part of each matrix and gathers one block at a time."""

from __future__ import annotations

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT


def shard(model: GPT | Classifier, device_type: str, n_processes: int) -> None:
    """Shard a model in place, block by block. Embeddings, final norm and head form the root's own group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        return
    # Not the strategy's mesh: by default all processes of a node are on its tensor-parallel axis.
    mesh = init_device_mesh(device_type, (n_processes,))
    for block in model.trunk.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("hidden_states", "finish"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
