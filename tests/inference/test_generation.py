"""Generation against the uncached loop, transformers' own generate, and hand-computed distributions."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
from model_kinds import KINDS, of_kind

from llm_lightning.inference.generation import PACKING_PAYS_FROM, Sampling, generate, next_ids, packed_linears
from llm_lightning.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=61, context_length=32, n_layer=2, n_head=2, n_embd=16, tied_head=False)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [60, 0, 60]]


@pytest.fixture
def model() -> GPT:
    return drawn("gpt2")


def drawn(kind: str) -> GPT:
    """Positions and biases drawn too; the matrices large enough that the next tokens differ clearly."""
    torch.manual_seed(0)
    model = GPT(of_kind(CONFIG, kind))
    for name, parameter in model.named_parameters():
        std = 1.0 if parameter.dim() > 1 else 0.1
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name), std=std)
    return model.eval()


@torch.no_grad()
def uncached(model: GPT, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The book's loop: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_mixed_batch_is_what_its_prompt_gives_alone(kind: str) -> None:
    model = drawn(kind)
    together = generate(model, PROMPTS, max_new_tokens=20)
    assert together == [uncached(model, prompt, 20) for prompt in PROMPTS]
    assert together == [generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]


def test_rows_stay_exact_when_others_stop_and_leave_the_batch(model: GPT) -> None:
    full = [uncached(model, prompt, 20) for prompt in PROMPTS]
    stop_ids = {full[1][6], full[2][9], full[3][6]}
    expected = [ids[: next((i for i, token in enumerate(ids) if token in stop_ids), 20)] for ids in full]
    assert len({len(ids) for ids in expected}) > 2
    assert generate(model, PROMPTS, max_new_tokens=20, stop_ids=stop_ids) == expected


def test_sampling_depends_on_seed_and_row_only(model: GPT) -> None:
    settings = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    together = generate(model, PROMPTS, seed=7, **settings)
    assert together == generate(model, PROMPTS, seed=7, **settings)
    assert together[:2] == generate(model, PROMPTS[:2], seed=7, **settings)
    assert together != generate(model, PROMPTS, seed=8, **settings)
    twins = generate(model, [[5], [5]], seed=7, **settings)
    assert twins[0] != twins[1]
    assert generate(model, PROMPTS, **settings) != generate(model, PROMPTS, **settings)


def test_temperature_near_zero_is_greedy(model: GPT) -> None:
    greedy = generate(model, PROMPTS, max_new_tokens=10)
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=1e-30, seed=0) == greedy
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=9.0, top_k=1, seed=0) == greedy
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=9.0, top_p=1e-9, seed=0) == greedy


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),  # p^2, renormalised
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),  # 7/9 of the top three
        ({"temperature": 1.0, "top_k": 99, "top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_draws_follow_the_distribution(settings: dict, expected: list[float]) -> None:
    """A regular grid of uniform numbers hits each token in proportion to its probability."""
    steps = 9000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(steps, 4)
    uniform = ((torch.arange(steps) + 0.5) / steps)[:, None]
    counts = torch.bincount(next_ids(logits, uniform, Sampling(**settings)), minlength=4)
    torch.testing.assert_close(counts / steps, torch.tensor(expected), atol=2 / steps, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 5.0])  # more tokens than the short list holds, and fewer
def test_top_p_over_a_large_vocabulary(spread: float) -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * spread
    ordered = logits.double().softmax(-1).sort(descending=True)
    cumulative = ordered.values.cumsum(-1)[0]
    nucleus = cumulative[: int((cumulative < 0.9).sum()) + 1]
    uniform = torch.linspace(0, 1 - 2**-24, 200)[:, None]
    expected = torch.searchsorted(nucleus, uniform[:, 0].double() * nucleus[-1], right=True)
    drawn = next_ids(logits.expand(200, -1), uniform, Sampling(temperature=1.0, top_p=0.9))
    ranks = (ordered.indices == drawn[:, None]).int().argmax(-1)
    assert (ranks - expected).abs().max() <= 1  # rounding may move a boundary to its neighbour


def test_largest_uniform_number_draws_a_token_that_exists() -> None:
    logits = torch.tensor([[0.0, 1.0, -float("inf"), 2.0, -float("inf")]])
    uniform = torch.tensor([[1 - 2**-24]])
    assert next_ids(logits, uniform, Sampling(temperature=1.0)).item() == 3
    assert next_ids(logits, uniform, Sampling(temperature=1.0, top_p=0.5)).item() == 3


def test_random_state_and_modes_are_left_alone(model: GPT) -> None:
    model.train()
    model.blocks[1].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    generate(model, PROMPTS, max_new_tokens=3, temperature=1.0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_weights_can_still_be_trained_afterwards(model: GPT) -> None:
    generate(model, PROMPTS, max_new_tokens=40)
    model(torch.tensor(PROMPTS[:1])).sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_weights_give_the_same_logits(model: GPT, dtype: torch.dtype, tolerance: float) -> None:
    model.to(dtype)
    ids = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        plain = model(ids)
        with packed_linears(model, PACKING_PAYS_FROM):
            packed = model(ids)
    torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


def test_an_interrupted_generation_leaves_the_model_as_it_was(model: GPT) -> None:
    def interrupt(_row: int, _token: int) -> None:
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[5]], max_new_tokens=PACKING_PAYS_FROM, on_token=interrupt)
    assert all(module.training and "forward" not in vars(module) for module in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(model: GPT, dtype: torch.dtype) -> None:
    on_gpu = copy.deepcopy(model).to("cuda", dtype)
    settings = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 1}
    assert generate(on_gpu, PROMPTS, **settings) == generate(on_gpu, PROMPTS, **settings)
    if dtype is torch.float32:
        assert generate(on_gpu, PROMPTS, max_new_tokens=20) == generate(model, PROMPTS, max_new_tokens=20)
        assert generate(on_gpu, PROMPTS, **settings) == generate(model, PROMPTS, **settings)


def test_on_token_sees_every_token_in_order(model: GPT) -> None:
    seen: list[list[int]] = [[] for _ in PROMPTS]
    new_ids = generate(
        model, PROMPTS, max_new_tokens=9, stop_ids=[3], on_token=lambda row, token: seen[row].append(token)
    )
    assert seen == new_ids


def test_generation_ends_at_the_context_limit_and_says_so_once(model: GPT, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        new_ids = generate(model, [[1] * 30, [2] * 32, [3] * 4], max_new_tokens=5)
    assert [len(ids) for ids in new_ids] == [3, 1, 5]
    assert [record.getMessage() for record in caplog.records] == [
        "generation stopped at context_length=32 before max_new_tokens=5"
    ]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1] * 33], {}, "prompt 1 of 33 tokens exceeds context_length=32; shorten it"),
        ([[1, 61]], {}, "prompt 1 holds token id 61, but vocab_size=61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_input_is_named(model: GPT, prompts: list[list[int]], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 5} | settings)


def test_no_prompts_give_no_rows(model: GPT) -> None:
    assert generate(model, [], max_new_tokens=5) == []
