"""Checkpoints and adapters of models of the Llama kind come back to the bit; lies in their headers are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from made_export import json_tokenizer, random_gpt
from model_kinds import OTHERS

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig, adapter_state, apply_lora
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.adapters import save_adapter
from llm_lightning.weights.checkpoint import HEADER, CheckpointError
from llm_lightning.weights.digests import base_digest
from llm_lightning.weights.hf_export import export_hf
from llm_lightning.weights.load import load_model

QWEN3 = GPTConfig(264, 32, 2, 2, 16, **OTHERS["qwen3"])
CONFIGS = {"llama": GPTConfig(264, 32, 2, 2, 16, **OTHERS["llama"]), "qwen3": QWEN3}
TARGETS = ("qkv_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(24)[None] * 31 % 257
State = dict[str, Any]


def state_of(config: GPTConfig, lora: LoRAConfig | None = None, *, classes: int = 0, **lineage: Any) -> State:
    """What a run saves, without optimizer; every tensor is drawn, adapters too."""
    model: GPT | Classifier = random_gpt(config)
    more: dict[str, Any] = {}
    if classes:
        model = Classifier(model, classes)
        labels = [str(number) for number in range(classes)]
        more["classifier"] = {"labels": labels, "pooling": "last", "causal": True, "pad_to": None, "pad_id": 0}
    if lora is not None:
        more["lora"] = asdict(lora)
        lineage = {"base": base_digest(model)} | lineage
        apply_lora(model, lora)
        with torch.no_grad():
            for tensor in adapter_state(model).values():
                tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    task = "classification" if classes else "pretraining"
    header = checkpoints.describe(
        task=task, model_config=config, tokenizer=json_tokenizer(), lineage={"base": None} | lineage, **more
    )
    weights = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {"state_dict": weights, HEADER: header}


@torch.no_grad()
def outputs(path: Path, **options: Any) -> torch.Tensor:
    model = load_model(path, **options).model
    return model(IDS, torch.tensor([24])) if isinstance(model, Classifier) else model(IDS)


@pytest.mark.parametrize(("kind", "qkv"), [("llama", "split"), ("qwen3", "fused")])
def test_an_adapter_alone_and_its_base_are_the_whole(tmp_path: Path, kind: str, qkv: str) -> None:
    """The base as a checkpoint, and as a folder for transformers where it has a class."""
    config, lora = CONFIGS[kind], LoRAConfig(rank=2, targets=TARGETS, qkv=qkv)
    base, whole, alone = (tmp_path / f"{name}.ckpt" for name in ("base", "whole", "alone"))
    digest = checkpoints.save(base, state_of(config))
    state = state_of(config, lora, parent=digest, parent_name=str(base), base_of=digest)
    checkpoints.save(whole, state)
    save_adapter(whole, alone)
    assert set(checkpoints.load(alone)["state_dict"]) == {name for name in state["state_dict"] if "lora_" in name}
    assert torch.equal(outputs(alone), outputs(whole))
    assert not torch.equal(outputs(whole), outputs(base))
    assert checkpoints.examine(whole)[1] == sum(p.numel() for p in load_model(whole).model.parameters())
    if kind == "llama":
        loaded = load_model(base)
        export_hf(loaded.gpt, config, loaded.tokenizer, tmp_path / "folder")
        assert torch.equal(outputs(alone, base=tmp_path / "folder"), outputs(whole))
        adapters = {"default": alone}
        assert torch.equal(outputs(tmp_path / "folder", adapters=adapters), outputs(whole))


def test_a_classifier_with_adapters(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    base, whole, alone = (tmp_path / f"{name}.ckpt" for name in ("base", "whole", "alone"))
    checkpoints.save(base, state_of(config))
    lora = LoRAConfig(rank=2, targets=(*TARGETS, "head"), qkv="split")
    checkpoints.save(whole, state_of(config, lora, classes=3, parent_name=str(base)))
    save_adapter(whole, alone)
    assert torch.equal(outputs(alone), outputs(whole))


def alone(state: State) -> None:
    """Leave what `adapter.ckpt` holds."""
    state[HEADER]["base"] = state[HEADER]["lineage"]["base"]
    state["state_dict"] = {name: tensor for name, tensor in state["state_dict"].items() if "lora_" in name}


def model(**fields: Any) -> Callable[[State], None]:
    return lambda state: state[HEADER]["model"].update(fields)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    def changed(state: State) -> None:
        state["state_dict"][f"model.{name}"] = change(state["state_dict"][f"model.{name}"])

    return changed


def adapter_with(**fields: Any) -> Callable[[State], None]:
    """An adapter alone, for a model with other fields."""

    def changed(state: State) -> None:
        alone(state)
        state[HEADER]["model"].update(fields)

    return changed


A, B = "blocks.1.attn.qkv_proj.lora_A.default", "blocks.1.attn.qkv_proj.lora_B.default"
LIES: dict[str, tuple[Callable[[State], None], str]] = {
    "more key heads than there are": (model(n_kv_head=2), r"qkv_proj.weight has shape \(32, 16\), .* it is \(48, 16\)"),
    "key heads that do not divide": (model(n_kv_head=3), r"model.n_head=2 must be a multiple of model.n_kv_head=3"),
    "an odd width of heads": (model(head_dim=7), r"heads are 7 wide; make it even"),
    "another kind of MLP": (model(mlp="gelu"), r"mlp.gate_proj.weight is not known|gate_proj"),
    "a kind nobody has": (model(norm="batch"), r"llm_lightning.model.norm='batch' must be layer or rms"),
    "a table of positions": (model(position="learned"), r"position_embedding.weight is missing"),
    "norms of heads": (model(qk_norm=True), r"[qk]_norm.weight is missing"),
    "biases": (model(mlp_bias=True), r"mlp.\w+.bias is missing"),
    "no end of the scaling": (model(rope_scaling={"factor": 8.0}), r"model.rope_scaling: \w+ is missing or unknown"),
    "a huge MLP": (model(ffn_width=10**12), r"gate_proj.weight has shape"),
    "a base that is no number": (model(rope_theta="big"), r"model.rope_theta='big' must be a number"),
    "one A for three": (tensor(A, lambda a: a[:2]), r"lora_A has shape \(2, 16\), .* it is \(6, 16\)"),
    "B of equal thirds": (tensor(B, lambda b: b[:30]), r"lora_B has shape \(30, 2\), .* it is \(32, 2\)"),
    "other key heads in an adapter": (adapter_with(n_kv_head=2), r"lora_B has shape \(32, 2\), but .* \(48, 2\)"),
    "no gate in an adapter": (adapter_with(mlp="gelu"), r"gate_proj has an adapter, but .* has no such layer"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_does_not_fit_its_weights_is_named(tmp_path: Path, lie: str) -> None:
    change, message = LIES[lie]
    state = state_of(CONFIGS["llama"], LoRAConfig(rank=2, targets=TARGETS, qkv="split"))
    change(state)
    checkpoints.save(tmp_path / "lie.ckpt", state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "lie.ckpt")
    assert str(caught.value).startswith(str(tmp_path / "lie.ckpt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1e6}, r"model.rope_theta=1000000.0, but the weights under the adapter have 500.0"),
        ({"rope_scaling": None}, r"model.rope_scaling=None, but the weights under the adapter have RopeScaling\("),
        ({"layer_norm_eps": 1e-6}, r"model.layer_norm_eps=1e-06, but the weights under the adapter have 1e-05"),
        ({"context_length": 64}, r"model.context_length=64, but the weights under the adapter have 32"),
    ],
)
def test_an_adapter_of_another_model_is_refused_by_the_field(tmp_path: Path, fields: State, message: str) -> None:
    """Fields that no shape shows."""
    config = CONFIGS["llama"]
    checkpoints.save(tmp_path / "base.ckpt", state_of(config))
    state = state_of(config, LoRAConfig(rank=2), parent_name=str(tmp_path / "base.ckpt"))
    adapter_with(**fields)(state)
    checkpoints.save(tmp_path / "alone.ckpt", state)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "alone.ckpt")


def test_other_weights_under_an_adapter_are_refused(tmp_path: Path) -> None:
    """Rotary weights have no positions to cut: the digest is of all tensors but a tied head."""
    config = CONFIGS["qwen3"]
    checkpoints.save(tmp_path / "whole.ckpt", state_of(config, LoRAConfig(rank=2)))
    save_adapter(tmp_path / "whole.ckpt", tmp_path / "alone.ckpt")
    other = state_of(config)
    other["state_dict"]["model.blocks.0.mlp.gate_proj.weight"][0, 0] += 1e-3
    checkpoints.save(tmp_path / "other.ckpt", other)
    with pytest.raises(CheckpointError, match="is an adapter for other weights than these"):
        load_model(tmp_path / "alone.ckpt", base=tmp_path / "other.ckpt")
