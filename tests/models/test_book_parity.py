"""The model against that of the book (`llms_from_scratch`, chapters 3 to 5), and the numbers that the book prints.

Of the printed numbers, those apply that hang on the weights alone: computed with dropout off, from the book's own
initialisation (its order of drawing random numbers is not ours, so its weights are copied over). Not here: chapter
4's first logits, printed with dropout active, and everything that needs the released weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.build import build_tokenizer

pytestmark = pytest.mark.peer

NAMES = {"norm1": "attn_norm", "norm2": "mlp_norm", "att.out_proj": "attn.out_proj"}
NAMES |= {"ff.layers.0": "mlp.up_proj", "ff.layers.2": "mlp.down_proj"}


def book_model(config: GPTConfig, dropout: float = 0.0) -> nn.Module:
    ch04 = pytest.importorskip("llms_from_scratch.ch04", reason="needs the bench extra: llms-from-scratch")
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "emb_dim": config.n_embd,
        "n_heads": config.n_head,
        "n_layers": config.n_layer,
        "drop_rate": dropout,
        "qkv_bias": config.qkv_bias,
    }
    return ch04.GPTModel(settings).eval()


def ours_from(book: nn.Module, config: GPTConfig) -> GPT:
    """Copy the book's weights: query, key and value are three matrices there, and norms have a scale and a shift."""
    theirs: dict[str, Tensor] = book.state_dict()
    state = {
        "token_embedding.weight": theirs["tok_emb.weight"],
        "position_embedding.weight": theirs["pos_emb.weight"],
        "final_norm.weight": theirs["final_norm.scale"],
        "final_norm.bias": theirs["final_norm.shift"],
        "lm_head.weight": theirs["out_head.weight"],
    }
    for layer in range(config.n_layer):
        block, prefix = f"blocks.{layer}", f"trf_blocks.{layer}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [theirs[f"{prefix}.att.W_{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{block}.attn.qkv_proj.{kind}"] = torch.cat(parts)
        for name, our_name in NAMES.items():
            kinds = ("scale", "shift") if "norm" in name else ("weight", "bias")
            state[f"{block}.{our_name}.weight"] = theirs[f"{prefix}.{name}.{kinds[0]}"]
            state[f"{block}.{our_name}.bias"] = theirs[f"{prefix}.{name}.{kinds[1]}"]
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.no_grad()
def test_logits_equal_those_of_the_book(qkv_bias: bool) -> None:
    config = GPTConfig(211, 20, n_layer=3, n_head=4, n_embd=48, qkv_bias=qkv_bias, tied_head=False)
    book = book_model(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in book.parameters():  # norms included, so that no swap can hide
        parameter.normal_(std=0.3, generator=generator)
    ids = torch.randint(211, (3, 20), generator=generator)
    torch.testing.assert_close(ours_from(book, config)(ids), book(ids), rtol=0, atol=1e-5)


def seeded(context_length: int) -> GPT:
    """GPT-124M as the book has it after `torch.manual_seed(123)`."""
    config = GPTConfig(context_length=context_length, qkv_bias=False, tied_head=False)
    torch.manual_seed(123)
    return ours_from(book_model(config, dropout=0.1), config)


@torch.no_grad()
def test_chapter_4_greedy_tokens() -> None:
    model = seeded(context_length=1024)
    ids = torch.tensor([[15496, 11, 314, 716]])  # "Hello, I am"
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert ids[0, 4:].tolist() == [27018, 24086, 47843, 30961, 42348, 7267]


@torch.no_grad()
def test_chapter_5_cross_entropy_and_perplexity() -> None:
    model = seeded(context_length=256)
    inputs = torch.tensor([[16833, 3626, 6100], [40, 1107, 588]])  # "every effort moves", "I really like"
    targets = torch.tensor([[3626, 6100, 345], [1107, 588, 11311]])  # " effort moves you", " really like chocolate"
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(10.7940, abs=1e-4)
    assert loss.exp().item() == pytest.approx(48725.8203, rel=1e-5)


@torch.no_grad()
def test_chapter_5_losses_before_training() -> None:
    data = os.environ.get("LLM_LIGHTNING_DATA")
    if not data:
        pytest.skip("needs the-verdict.txt: set LLM_LIGHTNING_DATA")
    text = (Path(data) / "the-verdict.txt").read_text(encoding="utf-8")
    model, cut = seeded(context_length=256), int(0.9 * len(text))
    for part, windows, published in ((text[:cut], 18, 10.987583), (text[cut:], 2, 10.981106)):
        ids = torch.tensor(build_tokenizer("gpt2").encode(part)[: 256 * windows + 1])
        inputs, labels = ids[:-1].view(windows, 256), ids[1:]
        losses = [F.cross_entropy(model(x[None])[0], y) for x, y in zip(inputs, labels.view_as(inputs), strict=True)]
        assert torch.stack(losses).mean().item() == pytest.approx(published, abs=1e-4)
