"""The model against hand arithmetic, against itself by another path, and against PyTorch's own layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from model_kinds import KINDS, of_kind

from llm_lightning.models.attention import Context, attend, attend_explicitly, causal_mask
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.rope import RopeScaling, frequencies, rotate, rotation
from llm_lightning.models.shapes import linear_shapes, parameter_shapes

CONFIG = GPTConfig(vocab_size=61, context_length=16, n_layer=2, n_head=4, n_embd=32)
SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
IDS = torch.tensor([[5, 9, 60, 3, 3, 17, 0, 42, 11, 8, 1], [7, 7, 1, 30, 2, 50, 6, 12, 44, 10, 9]])


def random_gpt(config: GPTConfig = CONFIG, kind: str = "gpt2", **options: bool) -> GPT:
    """A float64 model, so that two ways to a number agree to 1e-12; every parameter is drawn at random."""
    model = GPT(of_kind(config, kind), **options).double().eval()
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


def test_flops_of_grouped_heads_count_the_query_heads() -> None:
    with torch.device("meta"):
        model = random_shape("qwen3")
    width, d, inner, vocabulary = 32, 6, 40, 61
    block = width * (4 + 2 * 2) * d + 4 * d * width + 3 * width * inner
    biases, norms = (4 + 2 * 2) * d, 2 * width + 2 * d
    per_token = 2 * (block + biases + norms) + width + width * vocabulary
    assert model.flops_per_token(100) == 6 * per_token + 12 * 2 * (4 * d) * 100


def random_shape(kind: str) -> GPT:
    return GPT(of_kind(CONFIG, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_by_arithmetic_are_those_of_the_model(kind: str) -> None:
    config = of_kind(CONFIG, kind)
    with torch.device("meta"):
        model = GPT(config)
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    linears = {name: module for name, module in model.blocks[0].named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear_shapes(config) == {name: tuple(linear.weight.shape) for name, linear in linears.items()}


def test_a_rotated_query_meets_a_rotated_key_by_their_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=generator)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        at = [rotation(torch.tensor([place]), 8, 100.0) for place in (query_at, key_at)]
        return (rotate(query, at[0], 1) * rotate(key, at[1], 1)).sum()

    torch.testing.assert_close(score(7, 3), score(1004, 1000), rtol=1e-4, atol=1e-4)  # float32 tables
    torch.testing.assert_close(score(5, 5), (query * key).sum(), rtol=1e-6, atol=1e-6)
    assert abs(score(7, 3) - score(7, 2)) > 0.05


def test_llama_3_stretches_slow_rotations_and_leaves_fast_ones() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192)
    plain, scaled = frequencies(128, 500000.0), frequencies(128, 500000.0, scaling)
    turns = 8192 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns >= 4], plain[turns >= 4])
    torch.testing.assert_close(scaled[turns <= 1], plain[turns <= 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


@torch.no_grad()
def test_bfloat16_weights_keep_far_positions_apart() -> None:
    """In bfloat16 the position 8,001 is 8,000, and 8,017 is the nearest that differs."""
    model = GPT(replace(of_kind(CONFIG, "qwen3"), context_length=9000)).bfloat16()
    far = [model.hidden_states(IDS, Context(positions=start + torch.arange(11))) for start in (8000, 0)]
    torch.testing.assert_close(far[0], far[1], rtol=0.05, atol=0.05)


def test_mlp_uses_the_tanh_gelu() -> None:
    mlp = random_gpt().blocks[0].mlp
    x = torch.randn(3, 32, dtype=torch.float64)
    hidden = mlp.up_proj(x)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    assert_same(mlp(x), mlp.down_proj(gelu))


@pytest.mark.parametrize("new", [9, 1], ids=["all", "one_new"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "given_mask"])
def test_attention_by_hand_equals_the_fast_one(masked: bool, kv_heads: int, new: int) -> None:
    query = torch.randn(2, 4, new, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, 9, 8, dtype=torch.float64)
    mask = torch.eye(9, dtype=torch.bool) | (torch.rand(9, 9) < 0.4) if masked else causal_mask(9, 9, "cpu")
    mask = mask[-new:]
    mixed, weights = attend_explicitly(query, key, value, mask)
    assert_same(mixed, attend(query, key, value, mask if masked else None))
    repeated = key.repeat_interleave(4 // kv_heads, 1)
    plain = (query @ repeated.mT / math.sqrt(8)).masked_fill(~mask, -math.inf).softmax(-1)
    assert_same(weights, plain)
    assert_same(mixed, plain @ value.repeat_interleave(4 // kv_heads, 1))
    assert not weights[..., ~mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (5, 1, 1, 3, 1)], ids=["prefill", "one_by_one", "chunks"])
@torch.no_grad()
def test_kv_cache_in_chunks_equals_one_forward(chunks: tuple[int, ...], kind: str) -> None:
    model = random_gpt(kind=kind)
    cache = model.new_cache(batch_size=2, capacity=11)
    logits = torch.cat([model(part, Context(cache=cache)) for part in IDS.split(list(chunks), dim=1)], dim=1)
    assert cache.length == 11
    assert cache.keys[0].shape == (2, model.config.kv_heads, 11, model.config.head_width)
    assert_same(logits, model(IDS))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_left_padded_batch_equals_each_row_alone(kind: str) -> None:
    model, lengths, total = random_gpt(kind=kind), [11, 4], 11
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


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_later_token_does_not_change_earlier_logits(kind: str) -> None:
    model, changed = random_gpt(kind=kind), IDS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 61
    before, after = model(IDS), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_head_on_chosen_positions_only(kind: str) -> None:
    model = random_gpt(kind=kind)
    hidden = model.hidden_states(IDS)
    assert hidden.shape == (2, 11, 32)
    assert_same(model.logits(hidden[:, -1]), model(IDS)[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    config = replace(CONFIG, embedding_dropout=0.1, attention_dropout=0.1, residual_dropout=0.1)
    gradients = []
    for recompute in (False, True):
        model = random_gpt(config, kind, activation_checkpointing=recompute).train()
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
        ({"n_kv_head": 3}, r"n_head=4 must be a multiple of model.n_kv_head=3"),
        ({"n_kv_head": 0}, r"n_kv_head=0 must be at least 1"),
        ({"norm": "batch"}, r"norm='batch' must be layer or rms"),
        ({"position": "rope", "head_dim": 7}, r"position=rope rotates pairs, and heads are 7 wide"),
        ({"rope_theta": 0.0}, r"rope_theta=0.0 must be positive"),
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling: high_freq_factor is missing or unknown"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_the_identity_of_gpt2_is_its_heads_and_of_others_all_that_differs() -> None:
    assert replace(CONFIG, n_head=8, tied_head=False).cache_key_fields() == {"n_head": 8}
    llama = of_kind(CONFIG, "llama").cache_key_fields()
    assert (llama["norm"], llama["position"], llama["n_kv_head"], llama["rope_theta"]) == ("rms", "rope", 1, 500.0)
    assert llama["rope_scaling"]["original_context_length"] == 8
    assert replace(CONFIG, layer_norm_eps=1e-6).cache_key_fields() == {"n_head": CONFIG.n_head, "layer_norm_eps": 1e-6}


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="init='xavier' must be gpt2 or torch"):
        GPT(CONFIG, init="xavier")
