"""Adapters against arithmetic by hand; `tests/weights/test_peft_format.py` compares them with PEFT."""

from __future__ import annotations

import copy
import math
from itertools import accumulate

import pytest
import torch
from torch import nn

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_names,
    adapter_state,
    adapters_off,
    add_adapter,
    apply_lora,
    load_adapter_state,
    merge_and_unload,
    merge_lora,
    use_adapter,
)

CONFIG = GPTConfig(vocab_size=61, context_length=10, n_layer=2, n_head=2, n_embd=16)
IDS = torch.arange(20).view(2, 10)
EVERY_LINEAR = ("qkv_proj", "out_proj", "up_proj", "down_proj", "head")


def gpt(dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(1)
    return GPT(CONFIG).to(dtype).eval()


@torch.no_grad()
def randomize(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    """Draw both matrices of an adapter; B starts as zeros, behind which any mistake could hide."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model, name).values():
        tensor.normal_(std=0.2, generator=generator)


@torch.no_grad()
def test_a_fresh_adapter_changes_no_bit() -> None:
    model = gpt(torch.float32)
    before = model(IDS)
    apply_lora(model, LoRAConfig(rank=4))
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("rows", [(6,), (2, 2, 2), (4, 1, 1)])
@torch.no_grad()
def test_forward_is_the_formula(scaling: str, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 6).double()
    layer = LoRALinear(base, rows)
    layer.add("default", LoRAConfig(rank=2, alpha=3.0, scaling=scaling))
    a, b = layer.lora_A["default"].normal_(), layer.lora_B["default"].normal_()
    x = torch.randn(7, 5, dtype=torch.float64)
    ends = list(accumulate(rows, initial=0))
    delta = torch.cat([b[ends[p] : ends[p + 1]] @ a[2 * p : 2 * p + 2] for p in range(len(rows))])
    scale = 3.0 / (math.sqrt(2) if scaling == "rslora" else 2)
    expected = x @ (base.weight + scale * delta).T + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("qkv", ["fused", "split"])
@torch.no_grad()
def test_merged_and_unloaded(qkv: str) -> None:
    model = gpt()
    base = model(IDS)
    names = set(model.state_dict())
    apply_lora(model, LoRAConfig(rank=4, qkv=qkv))
    assert names < set(model.state_dict()), "the base keeps its names"
    randomize(model)
    adapted = model(IDS)
    assert (adapted - base).abs().max() > 0.01
    with adapters_off(model):
        assert torch.equal(model(IDS), base)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(merged(IDS), adapted, rtol=0, atol=1e-12)
    assert merge_and_unload(model) is model
    assert set(model.state_dict()) == names
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(model(IDS), adapted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_several_adapters_on_one_base() -> None:
    model = gpt()
    base = model(IDS)
    apply_lora(model, LoRAConfig(rank=2), "first")
    add_adapter(model, LoRAConfig(rank=4, targets=("qkv_proj",), qkv="fused"), "second")
    randomize(model, "first", 1)
    randomize(model, "second", 2)
    use_adapter(model, "first")
    first = model(IDS)
    use_adapter(model, "second")
    second = model(IDS)
    use_adapter(model, None)
    assert torch.equal(model(IDS), base)
    use_adapter(model, "first")
    assert torch.equal(model(IDS), first)
    assert not torch.allclose(first, second)
    assert adapter_names(model) == ["first", "second"]
    with pytest.raises(ValueError, match="no adapter named 'third'; there are first, second"):
        use_adapter(model, "third")
    with pytest.raises(ValueError, match="already"):
        add_adapter(model, LoRAConfig(), "first")


@torch.no_grad()
def test_an_adapter_moves_to_another_model() -> None:
    one, other = gpt(), gpt()
    config = LoRAConfig(rank=3, qkv="split")
    apply_lora(one, config)
    randomize(one)
    load_adapter_state(other, adapter_state(one), config, "mine")
    assert torch.equal(other(IDS), one(IDS))
    with pytest.raises(ValueError, match="other layers"):
        load_adapter_state(gpt(), adapter_state(one), LoRAConfig(rank=3, targets=("up_proj",)), "mine")
    with pytest.raises(ValueError, match="shape"):
        load_adapter_state(gpt(), adapter_state(one), LoRAConfig(rank=4, qkv="split"), "mine")


def test_only_adapters_are_trained_and_a_bf16_base_is_enough() -> None:
    model = gpt(torch.bfloat16)
    apply_lora(model, LoRAConfig(rank=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    model(IDS).float().square().mean().backward()
    gradients = [p.grad for name, p in trained.items() if "lora_B" in name]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def test_dropout_acts_on_the_adapter_alone() -> None:
    model = gpt()
    base = model(IDS)
    apply_lora(model, LoRAConfig(rank=4, dropout=0.5))
    model.train()
    assert torch.equal(model(IDS), base), "B is zero, and the base has no dropout"
    randomize(model)
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize(("init", "fan"), [("kaiming", 768), ("book", 16)])
def test_spread_of_a_is_that_of_kaiming_uniform(init: str, fan: int) -> None:
    layer = LoRALinear(nn.Linear(768, 32))
    layer.add("default", LoRAConfig(rank=16, init=init))
    reference = torch.empty(16 if init == "kaiming" else 768, 768 if init == "kaiming" else 16)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    a = layer.lora_A["default"]
    assert a.abs().max().item() == pytest.approx(1 / math.sqrt(fan), rel=1e-2)
    assert a.std().item() == pytest.approx(reference.std().item(), rel=0.05)


def test_the_books_number_of_trained_parameters() -> None:
    with torch.device("meta"):
        model = Classifier(GPT(GPTConfig()), 2)
        apply_lora(model, LoRAConfig(rank=16, alpha=16, qkv="split", targets=EVERY_LINEAR, init="book"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2_666_528
    assert sum(p.numel() for p in model.parameters()) - trained == 124_441_346


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj"]}, r"'q_proj' matches no linear layer; there are down_proj, lm_head, out_proj"),
        ({"targets": ["lm_head"]}, r"lm_head.weight is tied to token_embedding.weight.*model.tied_head=false"),
        ({"targets": []}, r"lora.targets is empty"),
        ({"rank": 0}, r"lora.rank=0 must be at least 1"),
        ({"rank": 17}, r"lora.rank=17 exceeds"),
        ({"alpha": -1.0}, r"lora.alpha=-1.0 must be positive"),
        ({"dropout": 1.0}, r"lora.dropout=1.0"),
        ({"qkv": "both"}, r"lora.qkv='both' must be fused or split"),
        ({"scaling": "none"}, r"lora.scaling='none'"),
        ({"init": "zeros"}, r"lora.init='zeros'"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_lora(gpt(), LoRAConfig(**settings))
