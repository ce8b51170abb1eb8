"""Digests of weights, whatever file they come from, and of the code that runs them."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT
from llm_lightning.models.sharding import whole


def base_digest(model: GPT | Classifier) -> str:
    """The digest of a trunk's own weights, without adapters: the identity of an adapter's base."""
    return digest_of({name: tensor for name, tensor in model.trunk.state_dict().items() if "lora_" not in name})


def digest_of(state: dict[str, torch.Tensor]) -> str:
    """The digest of weights in float32, whatever their type and order."""
    # Some files hold a tied head and some do not.
    return weights_digest((name, state[name].float()) for name in sorted(state) if name != "lm_head.weight")


def digest_under(header: dict[str, Any], trunk: GPT) -> str:
    """The base digest of `trunk`, cut to the context length of the adapter of `header`."""
    return digest_of(base_weights(header, trunk))


def base_weights(header: dict[str, Any], trunk: GPT) -> dict[str, torch.Tensor]:
    """The weights of a GPT without adapters, with as many positions as the model of `header`."""
    state = {name: tensor for name, tensor in trunk.state_dict().items() if "lora_" not in name}
    if trunk.position_embedding is not None:
        positions = header["model"]["context_length"]
        state["position_embedding.weight"] = state["position_embedding.weight"][:positions]
    return state


@functools.cache
def code_digest(*names: str) -> str:
    """sha256 of the code of folders and modules of this package, without its comments and docstrings.

    Stored results carry it: whoever edits the model gets no results of the model of before.
    """
    digest = hashlib.sha256()
    for path in (Path(__file__).parents[1] / name for name in names):
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text("utf-8"))
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [one for one in body if not _is_docstring(one)]  # type: ignore[attr-defined]
            digest.update(f"{file.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    """Whether it is a string on its own, which does nothing wherever it is."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def weights_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, types, shapes and values; with sharded weights, all processes call it together."""
    digest = hashlib.sha256()
    for name, tensor in named_tensors:
        tensor = whole(tensor).cpu().contiguous()  # of sharded weights, one tensor at a time
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
