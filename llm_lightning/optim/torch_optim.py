"""Any optimizer of torch.optim, by its class and its own arguments: `optimizer=sgd`, `optimizer=torch`.

The keys of `OptimizerConfig` are ours (clipping, and which parameters decay); every other key of the file is an
argument of the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from llm_lightning.optim.base import Named, OptimizerConfig, is_fused, trainable

REFUSED = {
    "torch.optim.LBFGS": "it evaluates the loss several times in one update; use optimizer=adamw",
    "torch.optim.SparseAdam": "it needs sparse gradients, and no model here has any; use optimizer=adamw",
    "torch.optim.Muon": "it takes whole matrices alone; use optimizer=muon, which splits query, key and value",
}
"""Classes that cannot train these models: why, and what to choose instead."""


@dataclass(frozen=True, kw_only=True)
class TorchOptimConfig(OptimizerConfig):
    """A class of torch.optim and its arguments besides the parameters and `lr`."""

    optimizer: type[torch.optim.Optimizer]
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in REFUSED:
            raise ValueError(f"optimizer._target_={self.name} is not possible: {REFUSED[self.name]}")
        self._refuse_unknown()
        try:
            self._make([nn.Parameter(torch.zeros(1, 1))])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.name} refuses its arguments in optimizer: {error}") from None

    @classmethod
    def of(cls, optimizer: type[torch.optim.Optimizer], node: Mapping[str, Any]) -> TorchOptimConfig:
        """The settings in a node of a config; an argument that is null keeps the default of the class.

        Raises:
            ValueError: if the class cannot train here, or does not accept an argument.
        """
        ours = {field.name for field in fields(OptimizerConfig)}
        arguments = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in node.items()
            if key not in {*ours, "_target_"} and value is not None
        }
        own = {key: value for key, value in node.items() if key in ours}
        return cls(optimizer=optimizer, arguments=arguments, **own)

    @property
    def name(self) -> str:
        module = self.optimizer.__module__
        return f"{'torch.optim' if module.startswith('torch.optim.') else module}.{self.optimizer.__name__}"

    def build(
        self,
        named_parameters: Iterable[Named],
        *,
        is_scaled: bool = False,
        is_sharded: bool = False,
        qkv_rows: tuple[int, int, int] | None = None,
    ) -> torch.optim.Optimizer:
        is_fused(self.arguments.get("fused", False), is_scaled=is_scaled, is_sharded=is_sharded)
        decayed, undecayed = self.by_decay(trainable(named_parameters))
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
        return self._make([group for group in groups if group["params"]])

    def _make(self, parameters: list[Any]) -> torch.optim.Optimizer:
        make: Callable[..., torch.optim.Optimizer] = self.optimizer
        return make(parameters, lr=self.lr, **self.arguments)

    def _refuse_unknown(self) -> None:
        remedy = "choose optimizer=torch as well, which sets no argument of another class"
        parameters = inspect.signature(self.optimizer).parameters
        accepted = sorted(set(parameters) - {"params"})
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = sorted(set(self.arguments) - set(accepted))
        if unknown and not takes_any:
            raise ValueError(
                f"{self.name} has no argument {', '.join(unknown)}; {remedy} (it has {', '.join(accepted)})"
            )
        if self.arguments.get("fused") == "auto":
            raise ValueError(f"optimizer.fused=auto: {self.name} takes true or false; {remedy}")
