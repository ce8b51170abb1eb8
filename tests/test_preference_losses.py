"""Log-probabilities of tokens and losses of pairs: by hand, against the book's formulas, and against TRL's code.

`tests/data/test_preference_data.py` compares with TRL's DPO trainer, from text on.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_lightning import losses
from llm_lightning.losses import PREFERENCE_LOSSES, preference_loss, sequence_log_probs, token_log_probs

# --- log-probabilities ------------------------------------------------------------------------------------------------


def problem(dtype: torch.dtype = torch.float64, n: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head weight, labels, and a weight for each token, as the losses of pairs give."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(301, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, 301, (n,), generator=generator)
    return hidden, weight, labels, torch.randn(n, generator=generator, dtype=torch.float64)


def values_and_gradients(found: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor) -> list[Tensor]:
    return [found.detach(), *torch.autograd.grad((found * scale).sum(), (hidden, weight))]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("chunk", [1024, 50, 33, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_token_log_probs_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    monkeypatch.setattr(losses, "CHUNK_POSITIONS", chunk)
    hidden, weight, labels, scale = problem(dtype)
    plain = F.linear(hidden, weight).log_softmax(-1)[torch.arange(len(labels)), labels]
    ours = token_log_probs(hidden, weight, labels)
    assert ours.shape == labels.shape
    sides = (values_and_gradients(found, hidden, weight, scale.to(dtype)) for found in (ours, plain))
    assert_close(*sides, tolerance)
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(hidden, weight, labels), ours.detach(), rtol=0, atol=0)


def test_no_more_than_a_chunk_of_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_POSITIONS", 8)
    hidden, weight, labels, _ = problem()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_log_probs(hidden, weight, labels)
    assert max(kept, default=0) <= weight.numel()
    assert sum(size == 8 * len(weight) for size in kept) == 0, "(8, V) logits"


@pytest.mark.parametrize("chunk", [1024, 8])
def test_under_autocast_products_are_bfloat16_and_the_softmax_float32(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(losses, "CHUNK_POSITIONS", chunk)
    hidden, weight, labels, scale = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_log_probs(hidden, weight, labels)
    assert found.dtype == torch.float32
    logits = F.linear(hidden.bfloat16(), weight.bfloat16()).float()
    plain = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    # Of products of another height, bfloat16 keeps 8 bits.
    torch.testing.assert_close(found.detach(), plain.detach(), rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad((found * scale.float()).sum(), (hidden, weight))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_without_tokens_gradients_are_zero() -> None:
    hidden, weight, labels, _ = problem()
    sums = sequence_log_probs(token_log_probs(hidden[:0], weight, labels[:0]), labels[:0], 0)
    assert sums.shape == (0,)
    for gradient in torch.autograd.grad(sums.sum(), (hidden, weight)):
        assert not gradient.any()


def test_sequences_are_summed_by_branch() -> None:
    found = sequence_log_probs(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 3]), 4)
    assert found.tolist() == [1, 0, 6, 8]


@pytest.mark.parametrize("chunk", [1024, 7])
def test_kl_is_that_of_torch_distributions(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(losses, "CHUNK_POSITIONS", chunk)
    hidden, weight, _, _ = problem()
    other, other_weight = hidden.detach().flip(0), weight.detach().flip(1)
    policy, reference = (
        torch.distributions.Categorical(logits=F.linear(*pair)) for pair in ((hidden, weight), (other, other_weight))
    )
    found = losses.token_kl(hidden, weight, other, other_weight)
    assert not found.requires_grad
    expected = torch.distributions.kl_divergence(policy, reference).detach()
    assert expected.min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert losses.token_kl(hidden, weight, hidden, weight).abs().max() < 1e-12


# --- losses by hand ---------------------------------------------------------------------------------------------------

BETA = 0.5
CHOSEN, REJECTED = torch.tensor([-2.0, -6.0, -3.0]).double(), torch.tensor([-4.0, -5.0, -3.0]).double()
REFERENCE_CHOSEN, REFERENCE_REJECTED = (
    torch.tensor([-3.0, -4.0, -3.0]).double(),
    torch.tensor([-3.0, -6.0, -3.0]).double(),
)
N_CHOSEN, N_REJECTED = torch.tensor([2, 4, 3]), torch.tensor([1, 5, 6])
"""Of the three pairs, the policy likes the first better than the reference does, the second worse, the third alike.

Sums of log ratios: chosen 1, -2, 0; rejected -1, 1, 0; their difference 2, -3, 0.
Means: chosen 1/2, -1/2, 0; rejected -1, 1/5, 0; their difference 3/2, -7/10, 0.
The policy alone, means: chosen -1, -3/2, -1; rejected -4, -1, -1/2; their difference 3, -1/2, -1/2.
"""


def cost(x: float) -> float:
    """-log sigmoid"""
    return math.log(1 + math.exp(-x))


def by_hand(kind: str, **options: float) -> losses.PreferenceResult:
    sums = (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)
    return preference_loss(*sums, N_CHOSEN, N_REJECTED, kind=kind, **{"beta": BETA, **options})


MEAN_REWARDS = ([0.25, -0.25, 0], [-0.5, 0.1, 0])


@pytest.mark.parametrize(
    ("kind", "options", "expected", "rewards"),
    [
        ("sigmoid", {}, [cost(1), cost(-1.5), math.log(2)], ([0.5, -1, 0], [-0.5, 0.5, 0])),
        (
            "sigmoid",
            {"label_smoothing": 0.1},
            [0.9 * cost(1) + 0.1 * cost(-1), 0.9 * cost(-1.5) + 0.1 * cost(1.5), math.log(2)],
            ([0.5, -1, 0], [-0.5, 0.5, 0]),
        ),
        ("average", {}, [cost(0.75), cost(-0.35), math.log(2)], MEAN_REWARDS),
        ("ipo", {}, [0.25, 1.7**2, 1], MEAN_REWARDS),  # 1 / (2 beta) = 1
        ("simpo", {"gamma": 0.3}, [cost(1.2), cost(-0.55), cost(-0.55)], ([-0.5, -0.75, -0.5], [-2, -0.5, -0.25])),
    ],
    ids=["sigmoid", "smoothed", "average", "ipo", "simpo"],
)
def test_three_pairs_by_hand(
    kind: str, options: dict[str, float], expected: list[float], rewards: tuple[list[float], list[float]]
) -> None:
    found = by_hand(kind, **options)
    assert found.loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.chosen_reward.tolist() == pytest.approx(rewards[0], abs=1e-12)
    assert found.rejected_reward.tolist() == pytest.approx(rewards[1], abs=1e-12)


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
def test_gradients_reach_the_policy_alone(kind: str) -> None:
    """Up with the chosen answer and down with the rejected one, except where ipo has gone far enough."""
    policy = [one.clone().requires_grad_() for one in (CHOSEN, REJECTED)]
    found = preference_loss(*policy, REFERENCE_CHOSEN, REFERENCE_REJECTED, N_CHOSEN, N_REJECTED, kind=kind, beta=BETA)
    assert not found.chosen_reward.requires_grad
    assert not found.rejected_reward.requires_grad
    chosen, rejected = torch.autograd.grad(found.loss.sum(), policy)
    signs = [1, -1, -1] if kind == "ipo" else [-1, -1, -1]
    assert chosen.sign().tolist() == signs
    assert rejected.sign().tolist() == [-sign for sign in signs]


def test_simpo_needs_no_reference_and_the_others_do() -> None:
    found = preference_loss(CHOSEN, REJECTED, None, None, N_CHOSEN, N_REJECTED, kind="simpo", beta=BETA, gamma=0.3)
    assert torch.equal(found.loss, by_hand("simpo", gamma=0.3).loss)
    with pytest.raises(AssertionError, match="sigmoid needs the reference"):
        preference_loss(CHOSEN, REJECTED, None, None, N_CHOSEN, N_REJECTED, kind="sigmoid", beta=BETA)


def test_far_off_pairs_stay_finite() -> None:
    far = torch.tensor([-1e4, 1e4])
    zero, one = torch.zeros(2), torch.ones(2)
    for smoothing in (0.0, 0.1):
        found = preference_loss(
            far.requires_grad_(), zero, zero, zero, one, one, kind="sigmoid", beta=1.0, label_smoothing=smoothing
        )
        assert found.loss.isfinite().all()
        assert torch.autograd.grad(found.loss.sum(), far)[0].isfinite().all()
    assert preference_loss(far, zero, zero, zero, one, one, kind="sigmoid", beta=1.0).loss[0].item() == 1e4


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sigmiod", {}, r"preference loss 'sigmiod' is unknown: did you mean sigmoid\? use sigmoid, average"),
        ("dpo", {}, r"preference loss 'dpo' is unknown: .*use sigmoid"),
        ("sigmoid", {"beta": 0.0}, r"beta=0.0 must be more than 0"),
        ("sigmoid", {"beta": math.nan}, r"beta=nan must be more than 0"),
        ("sigmoid", {"label_smoothing": 0.5}, r"label_smoothing=0.5 must be at least 0 and less than 0.5"),
        ("sigmoid", {"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be at least 0"),
        ("ipo", {"label_smoothing": 0.1}, r"label_smoothing=0.1 has no meaning for ipo; set it to 0"),
        ("simpo", {"gamma": -1.0}, r"gamma=-1.0 must be at least 0"),
    ],
)
def test_settings_that_cannot_be(kind: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_hand(kind, **options)


# --- the book and TRL -------------------------------------------------------------------------------------------------


def random_pairs(n: int = 100) -> tuple[list[Tensor], Tensor, Tensor]:
    """Four summed log-probabilities, and the lengths."""
    generator = torch.Generator().manual_seed(1)
    n_chosen, n_rejected = (torch.randint(1, 40, (n,), generator=generator) for _ in range(2))
    lengths = (n_chosen, n_rejected, n_chosen, n_rejected)
    return [-3 * count * torch.rand(n, generator=generator).double() for count in lengths], n_chosen, n_rejected


def test_average_is_the_books_formula() -> None:
    """ch07/04, compute_logprobs and compute_dpo_loss: the mean over the answer's tokens, then over pairs."""
    sums, n_chosen, n_rejected = random_pairs()
    model_chosen, model_rejected, reference_chosen, reference_rejected = (
        total / count for total, count in zip(sums, (n_chosen, n_rejected, n_chosen, n_rejected), strict=True)
    )
    model_logratios = model_chosen - model_rejected
    reference_logratios = reference_chosen - reference_rejected
    expected = -F.logsigmoid(0.1 * (model_logratios - reference_logratios))
    found = preference_loss(*sums, n_chosen, n_rejected, kind="average", beta=0.1)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    # The book prints rewards without beta.
    torch.testing.assert_close(found.chosen_reward, 0.1 * (model_chosen - reference_chosen), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        found.rejected_reward, 0.1 * (model_rejected - reference_rejected), rtol=1e-12, atol=1e-15
    )


@pytest.mark.peer
@pytest.mark.parametrize(
    ("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("simpo", 0.0), ("simpo", 0.2)]
)
def test_sigmoid_label_smoothing_and_simpo_are_those_of_trls_cpo_loss(kind: str, label_smoothing: float) -> None:
    """CPO is DPO without a reference. Its caller passes means per token for simpo."""
    pytest.importorskip("trl", reason="needs trl")
    from trl.experimental.cpo import CPOTrainer

    settings = {"alpha": 0.0, "loss_type": kind, "beta": 0.7, "label_smoothing": label_smoothing, "simpo_gamma": 0.4}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    (chosen, rejected, *references), n_chosen, n_rejected = random_pairs()
    if kind == "sigmoid":
        given = (chosen - references[0], rejected - references[1])
    else:
        given = (chosen / n_chosen, rejected / n_rejected)
    expected = CPOTrainer.cpo_loss(trainer, *given)
    options = {"beta": 0.7, "label_smoothing": label_smoothing, "gamma": 0.4}
    found = preference_loss(chosen, rejected, *references, n_chosen, n_rejected, kind=kind, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
