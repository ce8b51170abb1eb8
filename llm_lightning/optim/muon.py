"""Muon (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks"): `optimizer=muon`.

The update of a matrix inside a block is its momentum, made nearly orthogonal by Newton-Schulz iterations. All else,
embeddings, the head, norms, biases and adapters, is updated by AdamW, in the same optimizer.

The arithmetic is that of `torch.optim.Muon`, which updates whole parameters. Here query, key and value, which are
stacked in one parameter, are orthogonalised one by one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from llm_lightning.models.gpt import matrices_in
from llm_lightning.optim.adamw import check_adamw
from llm_lightning.optim.base import Named, OptimizerConfig, is_fused, trainable

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; they maximise its slope at 0."""
EPS = 1e-7
AT_ONCE = 1 << 25
"""Maximum number of elements whose directions are orthogonalised together."""
ADJUSTMENTS = ("match_rms_adamw", "original")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of blocks and AdamW for everything else; see `OptimizerConfig`.

    Args:
        adjust_lr_fn: `match_rms_adamw` scales an update to the size of AdamW's (0.2 times the square root of the larger
            side, Liu et al. 2025), so that AdamW's rate and decay apply; `original` is Jordan's, by the square root of
            rows / columns where that is above 1.
        adamw_lr: the peak rate of everything else; None: `lr`.
        weight_decay: decoupled, of both.
        betas, eps, fused: of AdamW.
    """

    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"
    adamw_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    fused: bool | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adamw(self.betas, self.eps, self.weight_decay, self.fused)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum={self.momentum} must be from 0 to below 1, such as 0.95")
        if not 1 <= self.ns_steps < 100:
            raise ValueError(f"optimizer.ns_steps={self.ns_steps} must be from 1 to 99; 5 are enough")
        if self.adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"optimizer.adjust_lr_fn={self.adjust_lr_fn!r} must be {' or '.join(ADJUSTMENTS)}")
        if self.adamw_lr is not None and self.adamw_lr <= 0:
            raise ValueError(f"optimizer.adamw_lr={self.adamw_lr} must be positive, or null for optimizer.lr")

    def check(self, *, is_sharded: bool) -> None:
        if is_sharded:
            raise ValueError(
                "optimizer=muon needs whole matrices, and accelerator=fsdp gives each process a part of them; "
                "use accelerator=ddp or optimizer=adamw"
            )

    def build(
        self,
        named_parameters: Iterable[Named],
        *,
        is_scaled: bool = False,
        is_sharded: bool = False,
        qkv_rows: tuple[int, int, int] | None = None,
    ) -> Muon:
        self.check(is_sharded=is_sharded)
        pairs = trainable(named_parameters)
        stacked = [pair for pair in pairs if matrices_in(pair[0]) > 1]
        single = [pair for pair in pairs if matrices_in(pair[0]) == 1]
        if not stacked and not single:
            log.warning("optimizer=muon: no matrix of a block is trained here, and AdamW updates everything")
        decayed, undecayed = self.by_decay(pair for pair in pairs if not matrices_in(pair[0]))
        fused = is_fused(self.fused, is_scaled=is_scaled, is_sharded=is_sharded)
        is_grouped = qkv_rows is not None and len(set(qkv_rows)) > 1
        groups = [
            self._muon_group("muon", single, parts=1),
            self._muon_group("muon_qkv", stacked, parts=list(qkv_rows or ()) if is_grouped else 3),
            self._adamw_group("adamw", decayed, self.weight_decay, fused=fused),
            self._adamw_group("adamw_no_decay", undecayed, 0.0, fused=fused),
        ]
        return Muon([group for group in groups if group["params"]])

    def _muon_group(self, name: str, pairs: list[Named], parts: int | list[int]) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("lr", "weight_decay", "momentum", "nesterov", "ns_steps")}
        return {"name": name, "params": pairs, "parts": parts, "adjust_lr_fn": self.adjust_lr_fn, **own}

    def _adamw_group(self, name: str, pairs: list[Named], weight_decay: float, *, fused: bool) -> dict[str, Any]:
        own = {"betas": tuple(self.betas), "eps": self.eps, "fused": fused}
        return {"name": name, "params": pairs, "lr": self.adamw_lr or self.lr, "weight_decay": weight_decay, **own}


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `ns_steps`, AdamW for the others.

    Args:
        groups: each complete, with its `name`; a Muon group has `parts`, the number of matrices of one shape that are
            stacked in each of its parameters, one above the other; or a list, the rows of each matrix.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._update_matrices if "ns_steps" in group else self._update_rest
            update(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def _update_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for alike in _of_one_shape(parameters):
            self._update_alike(group, alike)

    def _update_alike(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters of one shape by products of many matrices at once: one at a time they are too small."""
        lr, momentum, parts = group["lr"], group["momentum"], group["parts"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        stacked = torch.stack([direction.bfloat16() for direction in directions])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        rows = parts if isinstance(parts, list) else [stacked.size(1)]
        number = 1 if isinstance(parts, list) else parts
        pieces = zip(*(parameter.split(rows) for parameter in parameters), strict=True)
        for piece, of_parameters in zip(stacked.split(rows, 1), pieces, strict=True):
            matrices = piece.unflatten(1, (number, -1)).flatten(0, 1)
            step_size = lr * adjustment(group["adjust_lr_fn"], *matrices.shape[1:])
            updates = orthogonalised(matrices, group["ns_steps"]).reshape(piece.shape)
            for parameter, update in zip(of_parameters, updates, strict=True):
                parameter.add_(update, alpha=-step_size)

    def _update_rest(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                device = parameter.device if group["fused"] else torch.device("cpu")  # as in torch.optim.AdamW
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _of_one_shape(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of parameters that are updated together; of large ones a few, since the copies of all are kept."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        at_once = max(1, AT_ONCE // shape.numel())
        for first in range(0, len(alike), at_once):
            yield alike[first : first + at_once]


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """The nearest matrices with orthogonal rows or columns, roughly: singular values between 0.5 and 1.5.

    Args:
        matrices: (N, rows, columns), in bfloat16.
        steps: of the Newton-Schulz iteration.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    # The spectral norm is then at most 1. Not in place: x may be a view of the momentum itself.
    x = x / torch.stack([matrix.norm() for matrix in x]).clamp(min=EPS)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def adjustment(kind: str, rows: int, columns: int) -> float:
    """The factor of the rate of a matrix, by its shape."""
    if kind == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
