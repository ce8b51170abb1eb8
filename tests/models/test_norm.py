"""RMS norms and rotations that work in blocks equal the plain formulas, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm as plain_norm

from llm_lightning.models import norm, rope
from llm_lightning.models.norm import rms_norm
from llm_lightning.models.rope import rotate, rotation


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, of which the last one is smaller."""
    monkeypatch.setattr(norm, "BLOCK_ELEMENTS", 4 * 24)
    monkeypatch.setattr(rope, "BLOCK_ELEMENTS", 3 * 2 * 3 * 8)


def with_gradients(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """A result, and the gradients of a weighted sum of it."""
    weights = torch.linspace(-1, 1, result.numel()).reshape(result.shape).bfloat16()  # exact in every type
    return result, *torch.autograd.grad(result, inputs, weights.to(result.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_equals_pytorchs(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(2, 5, 24)).to(dtype).requires_grad_()
    weight = torch.randn(24).to(dtype).requires_grad_()
    ours = with_gradients(rms_norm(x, weight, 1e-5), x, weight)
    exact = with_gradients(plain_norm(x.double(), (24,), weight.double(), 1e-5), x, weight)
    close = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() <= close * other.abs().max()


def test_a_norm_of_narrow_vectors_by_a_wide_weight_is_rounded_once() -> None:
    x, weight = torch.randn(7, 24).bfloat16(), torch.randn(24)
    exact = plain_norm(x.float(), (24,), weight, 1e-5)
    assert torch.equal(rms_norm(x, weight.requires_grad_(), 1e-5), exact.bfloat16())


def test_a_norm_keeps_its_input_and_one_number_per_row() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight = torch.randn(9, 24, requires_grad=True), torch.ones(24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rms_norm(x, weight, 1e-5)
    assert sorted(tensor.numel() for tensor in kept) == [9, 24, 9 * 24]


def test_gradients_are_exact_under_autocast_too() -> None:
    x, weight = torch.randn(7, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    plain = with_gradients(plain_norm(x, (24,), weight, 1e-5), x, weight)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass within it as well
        ours = with_gradients(rms_norm(x, weight, 1e-5), x, weight)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_row_at_all_is_no_error() -> None:
    x, weight = torch.randn(0, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", [torch.arange(11), torch.randint(0, 99, (2, 11))])
def test_a_rotation_equals_a_product_of_complex_numbers(dtype: torch.dtype, positions: Tensor) -> None:
    heads = torch.randn(2, 11, 4, 8).to(dtype).requires_grad_()  # of which 3 are rotated
    ours = with_gradients(rotate(heads.transpose(1, 2), rotation(positions, 8, 100.0), 3), heads)

    angles = positions[..., None].double() * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(-3)
    wide = heads.transpose(1, 2).double()
    turned = torch.complex(wide[..., :4], wide[..., 4:])[:, :3] * turn
    exact = torch.cat((torch.cat((turned.real, turned.imag), -1), wide[:, 3:]), 1)

    with torch.no_grad():  # few positions in generation take another path
        at_once = rotate(heads.transpose(1, 2)[:1, :, :2], rotation(positions[..., :2].flatten()[:2], 8, 100.0), 3)
    torch.testing.assert_close(at_once, ours[0][:1, :, :2])
    for one, other in zip(ours, with_gradients(exact, heads), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other.double(), rtol=2**-7 if dtype != torch.float64 else 0, atol=1e-5)
