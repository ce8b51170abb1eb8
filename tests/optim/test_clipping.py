"""Scaling and clipping against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm_lightning.optim.clipping import scale_and_clip_gradients


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
