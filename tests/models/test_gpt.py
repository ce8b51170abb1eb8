"""The model against hand arithmetic, against itself by another path, and against PyTorch's own layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from llm_lightning.models.attention import Context, attend, attend_explicitly, causal_mask
from llm_lightning.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=61, context_length=16, n_layer=2, n_head=4, n_embd=32)
SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 0, 42, 11, 8, 1], [7, 7, 1, 30, 2, 50, 6, 12, 44, 10, 9]])


def random_gpt(config: GPTConfig = CONFIG, **options: bool) -> GPT:
    """A float64 model, so that two ways to a number agree to 1e-12; every parameter is drawn at random."""
    model = GPT(config, **options).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "tied", "qkv_bias", "context_length", "parameters"),
    [
        # as released: tied head, query-key-value bias
        ("small", True, True, 1024, 124_439_808),
        ("medium", True, True, 1024, 354_823_168),
        ("large", True, True, 1024, 774_030_080),
        ("xl", True, True, 1024, 1_557_611_200),
        # the book, chapter 4: untied head, no such bias; "without head" there is tied here
        ("small", False, False, 1024, 163_009_536),
        ("medium", False, False, 1024, 406_212_608),
        ("large", False, False, 1024, 838_220_800),
        ("xl", False, False, 1024, 1_637_792_000),
        ("small", True, False, 1024, 124_412_160),
        ("medium", True, False, 1024, 354_749_440),
        ("large", True, False, 1024, 773_891_840),
        ("xl", True, False, 1024, 1_557_380_800),
        # the book, chapters 5 (short context) and 7 (pretrained, untied)
        ("small", False, False, 256, 162_419_712),
        ("small", False, True, 1024, 163_037_184),
        ("medium", False, True, 1024, 406_286_336),
    ],
)
def test_parameter_counts(size: str, tied: bool, qkv_bias: bool, context_length: int, parameters: int) -> None:
    layers, heads, width = SIZES[size]
    config = GPTConfig(
        context_length=context_length,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        tied_head=tied,
        qkv_bias=qkv_bias,
    )
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_parameters() == parameters


def test_parameters_of_one_block_are_those_of_the_book() -> None:
    with torch.device("meta"):
        block = GPT(GPTConfig(n_layer=1, qkv_bias=False)).blocks[0]
    assert sum(p.numel() for p in block.attn.parameters()) == 2_360_064
    assert sum(p.numel() for p in block.mlp.parameters()) == 4_722_432


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token(tied: bool) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(tied_head=tied))
    matrices = 124_439_808 - 1024 * 768  # the head is a product once, tied or not; the input embedding never is
    assert model.flops_per_token(256) == 6 * matrices + 12 * 12 * 768 * 256


def test_mlp_uses_the_tanh_gelu() -> None:
    mlp = random_gpt().blocks[0].mlp
    x = torch.randn(3, 32, dtype=torch.float64)
    hidden = mlp.up_proj(x)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert_same(mlp(x), mlp.down_proj(gelu))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "given_mask"])
def test_attention_by_hand_equals_the_fast_one(masked: bool) -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    mask = torch.eye(9, dtype=torch.bool) | (torch.rand(9, 9) < 0.4) if masked else causal_mask(9, 9, "cpu")
    mixed, weights = attend_explicitly(query, key, value, mask)
    assert_same(mixed, attend(query, key, value, mask if masked else None))
    assert_same(weights.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
    assert not weights[..., ~mask].any()


@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (5, 1, 1, 3, 1)], ids=["prefill", "one_by_one", "chunks"])
@torch.no_grad()
def test_kv_cache_in_chunks_equals_one_forward(chunks: tuple[int, ...]) -> None:
    model = random_gpt()
    cache = model.new_cache(batch_size=2, capacity=11)
    logits = torch.cat([model(part, Context(cache=cache)) for part in IDS.split(list(chunks), dim=1)], dim=1)
    assert cache.length == 11
    assert_same(logits, model(IDS))


@torch.no_grad()
def test_left_padded_batch_equals_each_row_alone() -> None:
    model, lengths, total = random_gpt(), [11, 4], 11
    pads = total - torch.tensor(lengths)
    ids = torch.stack([IDS[0], IDS[1].roll(7)])  # the last four of row 1 are its first four tokens
    places = torch.arange(total)
    real = places >= pads[:, None]  # (B, T)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    # a pad may see itself: a row of softmax needs something to look at
    mask = (causal & real[:, None, :] | torch.eye(total, dtype=torch.bool))[:, None]  # (B, 1, T, T)
    logits = model(ids, Context(mask, positions=(places - pads[:, None]).clamp(min=0)))
    assert_same(logits[0], model(IDS[:1])[0])
    assert_same(logits[1, -4:], model(IDS[1:, :4])[0])


@torch.no_grad()
def test_a_later_token_does_not_change_earlier_logits() -> None:
    model, changed = random_gpt(), IDS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    before, after = model(IDS), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()


def test_head_on_chosen_positions_only() -> None:
    model = random_gpt()
    hidden = model.hidden_states(IDS)
    assert hidden.shape == (2, 11, 32)
    assert_same(model.logits(hidden[:, -1]), model(IDS)[:, -1])


def test_activation_checkpointing_changes_no_gradient() -> None:
    config = replace(CONFIG, embedding_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1)
    gradients = []
    for recompute in (False, True):
        model = random_gpt(config, activation_checkpointing=recompute).train()
        torch.manual_seed(0)
        model(IDS).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["embedding_dropout", "attention_dropout", "residual_dropout"])
def test_each_dropout_acts_in_training_and_only_there(name: str) -> None:
    model = random_gpt(replace(CONFIG, **{name: 0.5}))
    assert_same(model(IDS), random_gpt()(IDS))
    model.train()
    assert not torch.allclose(model(IDS), model(IDS))


def test_gpt2_init_follows_the_paper() -> None:
    config = GPTConfig(vocab_size=600, context_length=200, n_layer=8, n_head=4, n_embd=128, tied_head=False)
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("out_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < expected / 20, name


def test_torch_init_is_that_of_the_layers_themselves() -> None:
    torch.manual_seed(11)
    model = GPT(replace(CONFIG, tied_head=False), init="torch")
    drawn = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(11)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(drawn[name], parameter) for name, parameter in model.named_parameters())


def test_a_tied_head_is_the_token_embedding() -> None:
    tied = GPT(CONFIG)
    assert tied.lm_head.weight is tied.token_embedding.weight
    untied = GPT(replace(CONFIG, tied_head=False))
    assert untied.lm_head.weight is not untied.token_embedding.weight


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    model = random_gpt()
    with pytest.raises(ValueError, match=r"sequence of 17 tokens exceeds context_length=16; shorten it"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    cache = model.new_cache(batch_size=1, capacity=20)
    model(torch.zeros(1, 16, dtype=torch.int64), Context(cache=cache))
    with pytest.raises(ValueError, match="sequence of 17 tokens"):
        model(torch.zeros(1, 1, dtype=torch.int64), Context(cache=cache))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, r"n_embd=32 must be a multiple of model.n_head=5"),
        ({"n_layer": 0}, r"n_layer=0 must be at least 1"),
        ({"context_length": -1}, r"context_length=-1 must be at least 1"),
        ({"attention_dropout": 1.0}, r"attention_dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_the_identity_of_gpt2_is_its_heads_and_of_others_all_that_differs() -> None:
    assert replace(CONFIG, n_head=8, tied_head=False).cache_key_fields() == {"n_head": 8}
    assert replace(CONFIG, layer_norm_eps=1e-6).cache_key_fields() == {"n_head": CONFIG.n_head, "layer_norm_eps": 1e-6}


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="init='xavier' must be gpt2 or torch"):
        GPT(CONFIG, init="xavier")
