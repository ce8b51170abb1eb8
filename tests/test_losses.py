"""The chunked head loss against the textbook's three lines, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_lightning import losses
from llm_lightning.losses import IGNORE_INDEX, causal_lm_loss


def textbook(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, head_weight).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


def problem(dtype: torch.dtype = torch.float64, vocabulary: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 50, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (3, 50), generator=generator)
    labels[0, :20] = IGNORE_INDEX
    labels[2, 7:] = IGNORE_INDEX
    return hidden, weight, labels


def loss_and_gradients(function, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    loss = function(hidden, weight, labels)
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, (hidden, weight))]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("chunk", [1024, 33, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_plain_cross_entropy_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    monkeypatch.setattr(losses, "CHUNK_POSITIONS", chunk)
    inputs = problem(dtype)
    assert_close(loss_and_gradients(causal_lm_loss, *inputs), loss_and_gradients(textbook, *inputs), tolerance)


@pytest.mark.slow
def test_gradcheck() -> None:
    hidden, weight, labels = problem(vocabulary=7)
    assert torch.autograd.gradcheck(lambda h, w: causal_lm_loss(h, w, labels[:, 15:22]), (hidden[:, 15:22], weight))


def test_without_targets_loss_and_gradients_are_zero() -> None:
    hidden, weight, labels = problem()
    for part in loss_and_gradients(causal_lm_loss, hidden, weight, torch.full_like(labels, IGNORE_INDEX)):
        assert torch.equal(part, torch.zeros_like(part))


def test_improbable_targets_do_not_underflow() -> None:
    logit = 5000.0
    hidden, weight = torch.tensor([[[logit]]]), torch.tensor([[1.0], [-1.0]])
    assert causal_lm_loss(hidden, weight, torch.tensor([[1]])).item() == 2 * logit
    assert causal_lm_loss(hidden, weight, torch.tensor([[0]])).item() == 0


def test_autocast_and_pure_bfloat16_agree_with_the_same_matrix_product_in_float32() -> None:
    hidden, weight, labels = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_and_gradients(causal_lm_loss, hidden, weight, labels)
    pure = loss_and_gradients(causal_lm_loss, hidden.bfloat16(), weight.bfloat16(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert [part.dtype for part in mixed] == [torch.float32] * 3
    assert pure[0].dtype == torch.float32
    torch.testing.assert_close(mixed[0], expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(pure[0], expected.detach(), rtol=1e-6, atol=0)
    reference = loss_and_gradients(textbook, hidden, weight, labels)
    assert_close([g.float() for g in pure[1:]], reference[1:], 2e-2)
    assert_close(mixed[1:], reference[1:], 2e-2)


def test_gradients_add_up_on_a_tied_weight() -> None:
    _, weight, labels = problem()
    ids = labels.clamp(min=0)

    def tied(function) -> Tensor:
        loss = function(F.embedding(ids, weight), weight, labels)
        return torch.autograd.grad(loss, weight)[0]

    assert_close([tied(causal_lm_loss)], [tied(textbook)], 1e-12)


def test_a_frozen_head_and_no_grad_cost_no_gradient() -> None:
    hidden, weight, labels = problem()
    expected = textbook(hidden, weight, labels)
    with torch.no_grad():
        loss = causal_lm_loss(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    frozen = causal_lm_loss(hidden, weight.detach(), labels)
    expected_gradient = torch.autograd.grad(expected, hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden)[0], expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_a_gpu_the_head_is_that_of_float64(dtype: torch.dtype, tolerance: float) -> None:
    """GPT-2's vocabulary, more than one chunk, deterministic algorithms as in training."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 700, 64, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(50257, 64, generator=generator, dtype=torch.float64).mul(0.1).requires_grad_()
    labels = torch.randint(0, 50257, (2, 700), generator=generator)
    labels[0, :100] = IGNORE_INDEX
    expected = loss_and_gradients(textbook, hidden, weight, labels)
    inputs = [tensor.detach().to("cuda", torch.float32).requires_grad_() for tensor in (hidden, weight)]
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
            found = [loss_and_gradients(causal_lm_loss, *inputs, labels.cuda()) for _ in range(2)]
            log_probs = losses.token_log_probs(inputs[0].flatten(0, 1)[100:], inputs[1], labels.flatten()[100:].cuda())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert_close([part.double().cpu() for part in found[0]], expected, tolerance)
    assert_close([-log_probs.sum().double().cpu()], expected[:1], tolerance)
