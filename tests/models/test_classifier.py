"""The classifier against the plain computation, and against the book's model with its head exchanged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_kinds import KINDS, of_kind
from torch import Tensor

from llm_lightning.models.attention import Context, causal_mask
from llm_lightning.models.classifier import POOLINGS, Classifier, frozen_depth, train_only
from llm_lightning.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=97, context_length=12, n_layer=3, n_head=4, n_embd=32)
LENGTHS = torch.tensor([5, 12, 1])
IDS = torch.arange(3 * 12).remainder(97).view(3, 12)


def randomized(pooling: str = "last", *, causal: bool = True, classes: int = 3, kind: str = "gpt2") -> Classifier:
    """Every parameter drawn anew, biases and norms included."""
    trunk = GPT(replace(of_kind(CONFIG, kind), tied_head=True))
    model = Classifier(trunk, classes, pooling=pooling, causal=causal).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def plainly(model: Classifier, ids: Tensor, length: int) -> Tensor:
    """The logits of one row: every position of every block, then what the head reads."""
    seen = len(ids) if model.reads_pads else length
    mask = causal_mask(len(ids), len(ids), "cpu") if model.causal else torch.ones(len(ids), len(ids)).bool()
    mask[:, seen:] = False
    mask |= torch.eye(len(ids)).bool()  # a pad may see itself
    hidden = model.trunk.hidden_states(ids[None], Context(mask))[0]
    picked = {"first": hidden[0], "mean": hidden[:seen].mean(0)}.get(
        model.pooling.removesuffix("_position"), hidden[seen - 1]
    )
    return model.head(picked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_every_pooling_equals_the_plain_computation(pooling: str, causal: bool, kind: str) -> None:
    model = randomized(pooling, causal=causal, kind=kind)
    expected = torch.stack([plainly(model, ids, length) for ids, length in zip(IDS, LENGTHS.tolist(), strict=True)])
    torch.testing.assert_close(model(IDS, LENGTHS), expected, rtol=0, atol=1e-12)
    for depth in range(CONFIG.n_layer):  # lower blocks apart
        apart = model.finish(model.run_lower(IDS, LENGTHS, depth), LENGTHS, start=depth)
        torch.testing.assert_close(apart, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
@torch.no_grad()
def test_padding_changes_nothing_unless_it_is_read(pooling: str, causal: bool) -> None:
    model = randomized(pooling, causal=causal)
    other = torch.where(torch.arange(12) < LENGTHS[:, None], IDS, 96)
    torch.testing.assert_close(model(other, LENGTHS), model(IDS, LENGTHS), rtol=0, atol=1e-12)
    alone = torch.cat([model(IDS[i : i + 1, : LENGTHS[i]], LENGTHS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, model(IDS, LENGTHS), rtol=0, atol=1e-12)


def test_what_is_frozen() -> None:
    model = randomized()
    assert frozen_depth(model) == 0
    trained = {}
    for blocks in (2, 1, 0):
        model.requires_grad_(True)
        train_only(model, blocks)
        trained[blocks] = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained[0] == {"head.weight", "head.bias"}
    assert trained[1] - trained[0] == {n for n, _ in model.named_parameters() if "blocks.2." in n or "final_norm" in n}
    assert trained[2] - trained[1] == {n for n, _ in model.named_parameters() if "blocks.1." in n}
    depths = []
    for blocks in (3, 2, 1, 0):
        model.requires_grad_(True)
        train_only(model, blocks)
        depths.append(frozen_depth(model))
    assert depths == [0, 1, 2, None]
    with pytest.raises(ValueError, match=r"between 0 and model\.n_layer=3"):
        train_only(model, 4)


def test_the_books_parameter_counts() -> None:
    with torch.device("meta"):
        model = Classifier(GPT(GPTConfig()), 2)
    train_only(model, 1)
    assert sum(p.numel() for p in model.parameters()) == 124_441_346
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_090_946


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_threshold_decides_between_two_classes(threshold: float) -> None:
    model = randomized(classes=2)
    model.threshold.fill_(threshold)
    logits = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (1 / (1 + (logits[:, 0] - logits[:, 1]).exp()) >= threshold).long()
    assert torch.equal(model.predict(logits), expected)
    three = torch.randn(50, 3)
    assert torch.equal(model.predict(three), three.argmax(-1))


def test_unusable_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.pooling='middle' must be one of last, first"):
        Classifier(GPT(CONFIG), 2, pooling="middle")
    with pytest.raises(ValueError, match="1 class"):
        Classifier(GPT(CONFIG), 1)


@pytest.mark.peer
def test_a_step_equals_the_books() -> None:
    """Loss and gradients of the book's recipe: last position, pads and all, last block and final norm trained."""
    from test_book_parity import book_model, ours_from

    config = GPTConfig(211, 20, n_layer=3, n_head=4, n_embd=48, tied_head=False)
    book = book_model(config)
    book.out_head = torch.nn.Linear(48, 2)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in book.parameters():
            parameter.normal_(std=0.3, generator=generator)
    head, book.out_head = book.out_head, torch.nn.Linear(48, 211, bias=False)
    trunk = ours_from(book, config)
    book.out_head = head
    for parameter in book.parameters():
        parameter.requires_grad_(False)
    for module in (book.trf_blocks[-1], book.final_norm, book.out_head):
        module.requires_grad_(True)
    ours = _with_tied_head(trunk, head)
    train_only(ours, 1)

    ids = torch.randint(211, (8, 20), generator=generator)
    ids[:, 12:] = 210  # padding, which the book reads
    labels = torch.randint(2, (8,), generator=generator)
    theirs = F.cross_entropy(book(ids)[:, -1], labels)
    theirs.backward()
    loss = F.cross_entropy(ours(ids, torch.full((8,), 12)), labels)
    loss.backward()
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-5)
    block, other = ours.trunk.blocks[-1], book.trf_blocks[-1]
    pairs = [
        (ours.head.weight, head.weight), (ours.head.bias, head.bias),
        (ours.trunk.final_norm.weight, book.final_norm.scale), (ours.trunk.final_norm.bias, book.final_norm.shift),
        (block.attn.out_proj.weight, other.att.out_proj.weight), (block.mlp.up_proj.weight, other.ff.layers[0].weight),
        (block.mlp.down_proj.bias, other.ff.layers[2].bias), (block.attn_norm.weight, other.norm1.scale),
        (block.mlp_norm.bias, other.norm2.shift),
    ]  # fmt: skip
    for mine, book_parameter in pairs:
        torch.testing.assert_close(mine.grad, book_parameter.grad, rtol=0, atol=1e-5)
    for kind in ("weight", "bias"):
        parts = [getattr(getattr(other.att, f"W_{part}"), kind).grad for part in ("query", "key", "value")]
        torch.testing.assert_close(getattr(block.attn.qkv_proj, kind).grad, torch.cat(parts), rtol=0, atol=1e-5)
    assert sum(p.grad is not None for p in ours.parameters()) == 2 + 2 + 12


def _with_tied_head(trunk: GPT, head: torch.nn.Linear) -> Classifier:
    from dataclasses import replace

    tied = GPT(replace(trunk.config, tied_head=True))
    state = trunk.state_dict()
    state["lm_head.weight"] = state["token_embedding.weight"]
    tied.load_state_dict(state)
    model = Classifier(tied.eval(), 2, pooling="last_position")
    model.head.load_state_dict(head.state_dict())
    return model
