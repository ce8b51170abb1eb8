"""Optimizer settings, schedules as tables, clipping against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm_lightning.optim import AdamWConfig, ConstantConfig, WarmupCosineConfig, scale_and_clip_gradients

APPENDIX_D = WarmupCosineConfig(initial_lr=1e-5, min_lr=1e-5, warmup=0.2)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 1e-5),
        (1, 1e-5 + (1e-3 - 1e-5) / 27),
        (26, 9.6333e-4),  # published
        (27, 1e-3),  # the peak, published
        (81, 1e-5 + 0.5 * (1e-3 - 1e-5)),  # halfway down: cos(pi / 2) = 0
        (134, 1.0209e-5),  # the last, published
        (135, 1e-5),
        (999, 1e-5),
    ],
)
def test_appendix_d_schedule(step: int, lr: float) -> None:
    assert APPENDIX_D.lr_at(step, peak_lr=1e-3, total_steps=135) == pytest.approx(lr, rel=1e-4)


def test_warmup_as_fraction_steps_or_none() -> None:
    assert APPENDIX_D.warmup_steps(135) == 27
    assert WarmupCosineConfig(warmup=20).warmup_steps(135) == 20
    no_warmup = WarmupCosineConfig(warmup=0)
    assert no_warmup.lr_at(0, peak_lr=0.1, total_steps=10) == 0.1
    assert ConstantConfig().lr_at(7, peak_lr=0.1, total_steps=10) == 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WarmupCosineConfig(warmup=10).warmup_steps(10), "10 warmup steps.*only 10"),
        (lambda: WarmupCosineConfig(warmup=1.5), "fraction below 1 or a whole number"),
        (lambda: WarmupCosineConfig(min_lr=-1), "scheduler.min_lr=-1"),
        (lambda: AdamWConfig(lr=0), "optimizer.lr=0"),
        (lambda: AdamWConfig(decay="some"), "matrices or all"),
        (lambda: AdamWConfig(max_grad_norm=0), "null for no clipping"),
        (lambda: AdamWConfig().build([], fused=False), "nothing to train"),
    ],
)
def test_wrong_values_name_the_key(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_decay_of_matrices_or_of_all() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    layer[2].requires_grad_(False)
    matrices = AdamWConfig().build(layer.named_parameters(), fused=False)
    assert [(g["param_names"], g["weight_decay"]) for g in matrices.param_groups] == [
        (["0.weight"], 0.1),
        (["0.bias", "1.weight", "1.bias"], 0.0),
    ]
    everything = AdamWConfig(decay="all").build(layer.named_parameters(), fused=False)
    assert [(len(g["params"]), g["weight_decay"]) for g in everything.param_groups] == [(4, 0.1)]


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_scaling_and_clipping_equals_pytorch(max_norm: float | None) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
    for parameter in ours:
        parameter.grad = torch.randn_like(parameter)
    theirs = [parameter.grad * 0.25 for parameter in ours]  # type: ignore[operator]
    references = [nn.Parameter(torch.zeros_like(gradient)) for gradient in theirs]
    for reference, gradient in zip(references, theirs, strict=True):
        reference.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(references, max_norm if max_norm is not None else math.inf)
    norm = scale_and_clip_gradients(ours, 0.25, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    for parameter, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


def test_norm_of_no_gradients_and_of_infinite_ones() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert scale_and_clip_gradients([parameter], 1.0, None) == 0.0
    parameter.grad = torch.tensor([1.0, math.inf])
    assert scale_and_clip_gradients([parameter], 1.0, 1.0) == math.inf
