"""What every optimizer has: a peak rate, parameters that decay and others that do not, and gradient clipping.

`optimizer=NAME` names a YAML file, whose `_target_` is the settings of an optimizer (`adamw.py`, `muon.py`), or a class
of torch.optim itself (`torch_optim.py`). To add one, write such a dataclass with `build`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of all optimizers.

    `lr` is the peak rate; a schedule scales it. `decay` is `matrices` (no weight decay on biases and norms, as GPT-2
    and GPT-3 were trained) or `all` (PyTorch's default, and the book's).
    """

    lr: float = 3e-4
    decay: str = "matrices"
    max_grad_norm: float | None = 1.0
    clip_after_warmup: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr={self.lr} must be positive")
        if self.decay not in ("matrices", "all"):
            raise ValueError(f"optimizer.decay={self.decay!r} must be matrices or all")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"optimizer.max_grad_norm={self.max_grad_norm} must be positive, or null for no clipping")

    def check(self, *, is_sharded: bool) -> None:
        """Refuse a way to train that the optimizer cannot do, before processes start.

        Raises:
            ValueError: naming what to choose instead.
        """

    def build(
        self,
        named_parameters: Iterable[Named],
        *,
        is_scaled: bool = False,
        is_sharded: bool = False,
        qkv_rows: tuple[int, int, int] | None = None,
    ) -> torch.optim.Optimizer:
        """The optimizer of the trainable parameters; its state holds every parameter's name.

        Args:
            is_scaled: whether a gradient scaler multiplies the loss (fp16).
            is_sharded: whether each process holds a part of every parameter.
            qkv_rows: rows of query, key and value in a weight that stacks them; None: a third each.
        """
        raise NotImplementedError

    def by_decay(self, named_parameters: Iterable[Named]) -> tuple[list[Named], list[Named]]:
        """The parameters that decay, and those that do not."""
        pairs = list(named_parameters)
        decayed = [pair for pair in pairs if self.decay == "all" or pair[1].dim() >= 2]
        undecayed = [pair for pair in pairs if not (self.decay == "all" or pair[1].dim() >= 2)]
        return decayed, undecayed


def trainable(named_parameters: Iterable[Named]) -> list[Named]:
    """The parameters to train.

    Raises:
        ValueError: if there is none.
    """
    pairs = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not pairs:
        raise ValueError("nothing to train: every parameter is frozen")
    return pairs


def is_fused(setting: bool | str, *, is_scaled: bool, is_sharded: bool) -> bool:
    """Whether one kernel makes the whole update; `auto`: wherever it can.

    Raises:
        ValueError: if it cannot and `setting` is true.
    """
    # Under fp16 a fused optimizer would unscale only inside its step, after the norm was measured and clipped.
    if setting is True and is_scaled:
        raise ValueError("optimizer.fused=true and trainer.precision=16-mixed do not go together; leave fused out")
    return not (is_scaled or is_sharded) if setting == "auto" else bool(setting)


def keep_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Compute the update as this run was built, after a load: the file has the kernels of the run that wrote it."""
    for group in optimizer.param_groups:
        group.update({name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults})
        for parameter in group["params"] if group.get("fused") else ():
            step = optimizer.state.get(parameter, {}).get("step")
            if isinstance(step, torch.Tensor):  # a fused kernel reads it where the parameter is
                optimizer.state[parameter]["step"] = step.to(parameter.device)
