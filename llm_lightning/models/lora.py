"""LoRA (Hu et al. 2021): a frozen linear layer learns a correction of low rank, W + scale * B A.

`apply_lora` works on a built model and keeps the names of its parameters: `blocks.0.attn.qkv_proj.weight` stays, and
gets `blocks.0.attn.qkv_proj.lora_A.default` beside it. Several adapters can share one base.

Tensor letters: R rank, I inputs, O outputs, P parts of a split projection, part p with O[p] of the outputs.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of adapters, and the layers that get one.

    Args:
        rank: R.
        alpha: the correction is scaled by alpha / rank.
        dropout: on the input of an adapter.
        targets: names of linear layers, or the ends of them: `qkv_proj`, `attn.out_proj`, `blocks.3.mlp.up_proj`.
        qkv: `fused`, one adapter for the joint projection (PEFT's form), or `split`, one each for q, k, v (the book's).
        scaling: `standard`, or `rslora`: alpha / sqrt(rank) (Kalajdzievski 2023).
        init: A is uniform with the bound 1 / sqrt(fan), where fan is the number of the layer's inputs (`kaiming`,
            PEFT's) or the rank (`book`, which stores A transposed). B is 0: at first an adapter changes nothing.

    Raises:
        ValueError: if a value is of another type or out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("qkv_proj", "out_proj", "up_proj", "down_proj")
    qkv: str = "fused"
    scaling: str = "standard"
    init: str = "kaiming"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        self._check_types()
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be positive" + (" and finite" if self.alpha > 0 else ""))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ValueError("lora.targets is empty; name linear layers, such as [qkv_proj,out_proj]")
        for name, options in (
            ("qkv", ("fused", "split")),
            ("scaling", ("standard", "rslora")),
            ("init", ("kaiming", "book")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"lora.{name}={getattr(self, name)!r} must be {' or '.join(options)}")

    def _check_types(self) -> None:
        for name, kinds, what in (("rank", (int,), "a whole number"), ("alpha", (int, float), "a number"),
                                  ("dropout", (int, float), "a number")):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"lora.{name}={reprlib.repr(value)} must be {what}")
        if not all(isinstance(target, str) for target in self.targets):
            raise ValueError(f"lora.targets={reprlib.repr(self.targets)} must be names, such as [qkv_proj,out_proj]")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


class LoRALinear(nn.Linear):
    """A linear layer with adapters beside its frozen weight; at most one of them is active.

    A is (P * R, I), B is (O, R); P is 3 for a split qkv projection, of which part p is B[p] A[p], else 1.

    Args:
        rows: O[p] of each part; None: one part.
    """

    def __init__(self, base: nn.Linear, rows: Sequence[int] | None = None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rows = tuple(rows or (base.out_features,))
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self.merged: str | None = None

    def add(self, name: str, config: LoRAConfig) -> None:
        """Add an adapter, B = 0, and make it the active one."""
        if config.rank > self.in_features:
            raise ValueError(f"lora.rank={config.rank} exceeds the {self.in_features} inputs of a layer; lower it")
        dtype, device = torch.promote_types(self.weight.dtype, torch.float32), self.weight.device
        a = torch.empty(len(self.rows) * config.rank, self.in_features, dtype=dtype, device=device)
        b = torch.zeros(self.out_features, config.rank, dtype=dtype, device=device)
        bound = 1 / math.sqrt(config.rank if config.init == "book" else self.in_features)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(a.uniform_(-bound, bound)), nn.Parameter(b)
        self.configs[name], self.active = config, name

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.active is None or self.merged == self.active:
            return out
        return out + self._correction(x, self.active).to(out.dtype)

    def delta(self, name: str) -> Tensor:
        """scale * B A, (O, I)."""
        pairs = zip(self.lora_A[name].chunk(len(self.rows)), self.lora_B[name].split(self.rows), strict=True)
        return self.configs[name].scale * torch.cat([b @ a for a, b in pairs])

    def effective_weight(self) -> Tensor:
        """(O, I): the weight with the active adapter; see the function of the same name."""
        if self.active is None or self.merged == self.active:
            return self.weight
        if self.training and self.configs[self.active].dropout:
            raise ValueError("an adapter on lm_head takes no dropout; set lora.dropout=0, or leave lm_head out")
        return self.weight + self.delta(self.active)

    def _correction(self, x: Tensor, name: str) -> Tensor:
        config, a, b = self.configs[name], self.lora_A[name], self.lora_B[name]
        low = F.linear(F.dropout(x, config.dropout, self.training).to(a.dtype), a)  # (..., P * R)
        if len(self.rows) == 1:
            return config.scale * F.linear(low, b)
        pieces = zip(low.chunk(len(self.rows), -1), b.split(self.rows), strict=True)
        return config.scale * torch.cat([F.linear(part, matrix) for part, matrix in pieces], dim=-1)


def effective_weight(layer: nn.Linear) -> Tensor:
    """(O, I): the matrix of a layer, its active adapter included; for losses that multiply by a head themselves.

    Raises:
        ValueError: in training with `lora.dropout`, which is on the inputs and cannot be part of a weight.
    """
    return layer.effective_weight() if isinstance(layer, LoRALinear) else layer.weight


def apply_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> list[str]:
    """Freeze every parameter of `model` and add an adapter to every target.

    Returns:
        the names of the layers that got one.

    Raises:
        ValueError: if a target matches no linear layer, or one whose weight is tied to another parameter.
    """
    if not name or "." in name:
        raise ValueError(f"an adapter cannot be named {name!r}; choose a name without dots")
    paths = _target_paths(model, config)
    model.requires_grad_(False)
    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, LoRALinear):
            assert isinstance(layer, nn.Linear)
            parent, _, leaf = path.rpartition(".")
            is_split = config.qkv == "split" and leaf == "qkv_proj"
            owner: Any = model.get_submodule(parent)
            layer = LoRALinear(layer, owner.qkv_rows if is_split else None)
            layer.train(model.training)
            setattr(owner, leaf, layer)
        layer.add(name, config)
    return paths


def add_adapter(model: nn.Module, config: LoRAConfig, name: str) -> list[str]:
    """Add a further adapter to a model and make it the active one.

    Raises:
        ValueError: if the name is taken, or as `apply_lora`.
    """
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter named {name!r} already; choose another name")
    return apply_lora(model, config, name)


def use_adapter(model: nn.Module, name: str | None) -> None:
    """Make one of the adapters active, or none.

    Raises:
        ValueError: if there is no such adapter.
    """
    if name is not None and name not in adapter_names(model):
        raise ValueError(f"no adapter named {name!r}; there are {', '.join(adapter_names(model)) or 'none'}")
    for _, layer in _layers(model):
        layer.active = name if name in layer.configs else None


def adapter_names(model: nn.Module) -> list[str]:
    """The names of a model's adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in _layers(model) for name in layer.configs))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Deactivate all adapters within the context: the model computes what its base computes."""
    before = [(layer, layer.active) for _, layer in _layers(model)]
    use_adapter(model, None)
    try:
        yield
    finally:
        for layer, name in before:
            layer.active = name


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """`PATH.lora_A` and `PATH.lora_B` of every layer that has the adapter, without its name."""
    state = {}
    for path, layer in _layers(model):
        if name in layer.configs:
            state[f"{path}.lora_A"], state[f"{path}.lora_B"] = layer.lora_A[name], layer.lora_B[name]
    return state


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor], config: LoRAConfig, name: str = "default") -> None:
    """Load an adapter that `adapter_state` returned, adding it if it is not there.

    Raises:
        ValueError: if the layers or shapes differ.
    """
    if name not in adapter_names(model):
        apply_lora(model, config, name)
    mine = adapter_state(model, name)
    if mine.keys() != state.keys():
        other = sorted(mine.keys() ^ state.keys())
        raise ValueError(f"the adapter is on other layers than lora.targets names, such as {other[0]}")
    for key, tensor in state.items():
        if tensor.shape != mine[key].shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(mine[key].shape)}")
        mine[key].copy_(tensor)


@torch.no_grad()
def merge_lora(model: nn.Module, name: str = "default") -> None:
    """Add an adapter to the weights, so that it costs nothing. A model without this adapter is left as it is."""
    for _, layer in _layers(model):
        if name not in layer.configs:
            continue
        assert layer.merged is None, "an adapter is merged already"
        delta = layer.delta(name)
        layer.weight.data = (layer.weight.to(delta.dtype) + delta).to(layer.weight.dtype)  # rounded once
        layer.merged = layer.active = name


def merge_and_unload(model: Model) -> Model:
    """Merge the default adapter and make every layer a plain one again; `model` itself is changed and returned."""
    merge_lora(model)
    for path, layer in list(_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.train(layer.training)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear))


def _target_paths(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The paths of the layers that `config.targets` matches."""
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = dict.fromkeys(path for path in linears for target in config.targets if _ends_with(path, target))
    names = sorted({path.rpartition(".")[2] for path in linears})
    for target in config.targets:
        if not any(_ends_with(path, target) for path in linears):
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; there are {', '.join(names)}")
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path in chosen:
        others = [owner for owner in owners[id(linears[path].weight)] if owner != f"{path}.weight"]
        if others:
            raise ValueError(
                f"lora.targets: {path}.weight is tied to {others[0]}, which an adapter on it would not follow; "
                "leave it out, or set model.tied_head=false"
            )
    return list(chosen)


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")
