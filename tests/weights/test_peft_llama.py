"""Adapters against PEFT on transformers' Llama, Qwen2 and Qwen3, every tensor drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft_format import peft, randomize, transformers

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig, adapter_state, apply_lora, load_adapter_state, merge_lora
from llm_lightning.weights.families.choose import family_of, family_of_json
from llm_lightning.weights.load import load_model
from llm_lightning.weights.peft_format import base_name_of, export_peft, import_peft

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"llama": {"mlp_bias": True}, "qwen2": {}, "qwen3": {"head_dim": 12}}
LINEAR = ("qkv_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(2 * 24).mul(31).remainder(97).view(2, 24)
PREFIX = "base_model.model."


def pair_of(kind: str) -> tuple[GPT, Any]:
    """Ours and transformers', with the same random weights."""
    settings = transformers().AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    theirs = transformers().AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    randomize(theirs, 1)
    facts = settings.to_dict()
    config: GPTConfig = family_of_json(facts).config_from_hf(facts)
    ours = GPT(config, init="torch").eval()
    ours.load_state_dict(family_of(config).from_hf(theirs.state_dict(), config))
    return ours, theirs


@torch.no_grad()
def draw(tensors: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        tensor.normal_(std=0.2, generator=generator)


def matrices(theirs: Any) -> dict[str, torch.nn.Parameter]:
    """PEFT's own, by the names of its file."""
    return {
        name.replace(".default", ""): tensor for name, tensor in theirs.named_parameters() if ".default." in f"{name}."
    }


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> None:
    """Relative to the largest magnitude of the tensor."""
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def backward(ours: GPT, theirs: Any) -> None:
    """Compare logits, and leave the gradients of one loss."""
    logits, mine = theirs(IDS).logits, ours(IDS)
    assert_close(mine, logits)
    logits.square().mean().backward()
    mine.square().mean().backward()


def assert_same_gradients(ours: GPT, theirs: Any) -> None:
    """Ours of the joint projection are theirs, stacked; of a shared A, their sum."""
    found, config = matrices(theirs), ours.config
    for key, parameter in adapter_state(ours).items():
        path, _, kind = key.rpartition(".lora_")
        several = [found.get(f"{PREFIX}{one}.lora_{kind}.weight") for one in family_of(config).module_to_hf(path)]
        rows = parameter.split(config.qkv_rows) if kind == "B" and len(several) > 1 else parameter.chunk(len(several))
        parts = [torch.zeros_like(mine) if one is None else one.grad for one, mine in zip(several, rows, strict=False)]
        if kind == "A" and len(several) > 1 and len(parameter) == 4:
            expected = torch.stack([one.grad for one in several if one is not None]).sum(0)
        else:
            expected = torch.cat(parts)
        assert parameter.grad is not None
        assert_close(parameter.grad, expected)


@torch.no_grad()
def assert_same_when_merged(ours: GPT, theirs: Any) -> None:
    merged = theirs.merge_and_unload()
    merge_lora(ours)
    assert_close(ours(IDS), merged(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "qkv"), [("llama", "fused"), ("llama", "split"), ("qwen2", "fused"), ("qwen3", "split")]
)
def test_out_to_peft(tmp_path: Path, kind: str, qkv: str) -> None:
    """Logits, the gradients of A and B, the logits after a step, and the merged model."""
    ours, base = pair_of(kind)
    config = LoRAConfig(rank=4, alpha=6.0, qkv=qkv, targets=LINEAR, scaling="rslora" if kind == "qwen2" else "standard")
    apply_lora(ours, config)
    draw(adapter_state(ours), 2)
    export_peft(ours, config, tmp_path / "adapter", base_name="hf:org/base@abc")
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (facts["base_model_name_or_path"], facts["revision"]) == ("org/base", "abc")
    assert base_name_of(tmp_path / "adapter") == "hf:org/base@abc"
    assert facts["fan_in_fan_out"] is False
    plain = base(IDS).logits
    theirs = peft().PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    assert len(matrices(theirs)) == 2 * 2 * 7
    assert (theirs(IDS).logits - plain).abs().max() > 0.1, "the adapter does something"
    backward(ours, theirs)
    assert_same_gradients(ours, theirs)
    if qkv == "split":  # the same parameters on both sides: a step leads to the same model
        for parameters in (adapter_state(ours).values(), matrices(theirs).values()):
            torch.optim.SGD(parameters, lr=0.05).step()
        assert_close(ours(IDS), theirs(IDS).logits)
    assert_same_when_merged(ours, theirs)


TARGETS = {
    "default": (None, "split", {"attn.qkv_proj"}),  # q_proj and v_proj
    "all": ("all-linear", "split", {f"{part}" for part in
            ("attn.qkv_proj", "attn.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}),
    "mlp": (["gate_proj", "up_proj"], "fused", {"mlp.gate_proj", "mlp.up_proj"}),
    "key": (["k_proj", "o_proj"], "split", {"attn.qkv_proj", "attn.out_proj"}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), [("llama", "default"), ("qwen2", "all"), ("qwen3", "mlp"), ("llama", "key")])
def test_in_from_peft(tmp_path: Path, kind: str, case: str) -> None:
    targets, qkv, parts = TARGETS[case]
    ours, base = pair_of(kind)
    theirs = peft().get_peft_model(base, peft().LoraConfig(r=4, lora_alpha=6, target_modules=targets)).eval()
    draw(matrices(theirs), 3)
    theirs.save_pretrained(tmp_path)
    config, state = import_peft(tmp_path, ours.config)
    assert (config.qkv, set(config.targets)) == (qkv, {f"blocks.{i}.{part}" for i in range(2) for part in parts})
    load_adapter_state(ours, state, config)
    backward(ours, theirs)
    assert_same_gradients(ours, theirs)
    for parameters in (adapter_state(ours).values(), matrices(theirs).values()):
        torch.optim.AdamW(parameters, lr=0.01).step()
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-3, atol=1e-4)
    if case == "default":  # what PEFT leaves without an adapter stays without one
        key = ours.blocks[1].attn.qkv_proj
        assert not key.lora_A["default"].chunk(3)[1].any()
        assert not key.lora_B["default"].split(ours.config.qkv_rows)[1].any()
    assert_same_when_merged(ours, theirs)


def test_equal_as_become_one(tmp_path: Path) -> None:
    """An adapter that came from a fused one is fused again, to the bit; with one A changed it is split."""
    ours, _ = pair_of("llama")
    config = LoRAConfig(rank=4, targets=LINEAR)
    apply_lora(ours, config)
    draw(adapter_state(ours), 2)
    export_peft(ours, config, tmp_path / "adapter")
    read, state = import_peft(tmp_path / "adapter", ours.config)
    assert (read.qkv, read.rank, read.alpha) == ("fused", 4, 16.0)
    assert all(torch.equal(state[key], tensor) for key, tensor in adapter_state(ours).items())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    (tmp_path / "adapter" / "export_report.json").unlink()
    tensors = load_file(file)
    tensors[f"{PREFIX}model.layers.1.self_attn.k_proj.lora_A.weight"][0, 0] += 1
    save_file(tensors, file)
    read, state = import_peft(tmp_path / "adapter", ours.config)
    assert read.qkv == "split"
    assert state["blocks.0.attn.qkv_proj.lora_A"].shape == (12, 32)


@torch.no_grad()
def test_ranks_and_alphas_of_single_layers(tmp_path: Path) -> None:
    """Ranks that differ are filled up; several scales, and patterns that are expressions, are refused."""
    ours, base = pair_of("llama")
    settings = peft().LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.mlp.up_proj": 6, "^model.layers.0.self_attn.q_proj": 2},
        alpha_pattern={"layers.1.mlp.up_proj": 12, "^model.layers.0.self_attn.q_proj": 4},
    )  # fmt: skip
    theirs = peft().get_peft_model(base, settings).eval()
    draw(matrices(theirs), 3)
    theirs.save_pretrained(tmp_path)
    config, state = import_peft(tmp_path, ours.config)
    assert (config.rank, config.scale) == (6, 2.0)
    load_adapter_state(ours, state, config)
    assert_close(ours(IDS), theirs(IDS).logits)

    file = tmp_path / "adapter_config.json"
    facts = json.loads(file.read_text())
    for pattern, message in (
        ({"layers.1.mlp.up_proj": 13}, r"adapter_config.json: by rank_pattern and alpha_pattern some layers scale"),
        ({"(.*)*up_proj": 12}, r"adapter_config.json: alpha_pattern has '\(\.\*\)\*up_proj'; only names"),
        ({"up_proj": "x"}, r"adapter_config.json: alpha_pattern: 'up_proj' is 'x', no number"),
        ([1], r"adapter_config.json: alpha_pattern=\[1\] must be names"),
    ):
        file.write_text(json.dumps(facts | {"alpha_pattern": pattern}))
        with pytest.raises(ValueError, match=message):
            import_peft(tmp_path, ours.config)
    file.write_text(json.dumps(facts | {"rank_pattern": {}}))
    with pytest.raises(ValueError, match=r"have rank 2, but adapter_config.json says r=4"):
        import_peft(tmp_path, ours.config)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_has_no_form_here_is_refused_by_name(tmp_path: Path) -> None:
    """Folders that PEFT itself wrote."""
    ours, base = pair_of("qwen2")
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "dora": ({"use_dora": True}, r"adapter_config.json: use_dora=True is not supported"),
        "saved": ({"modules_to_save": ["lm_head"]}, r"adapter_config.json: modules_to_save=\['lm_head'\] is not supp"),
        "pissa": ({"init_lora_weights": "pissa"}, r"adapter_config.json: init_lora_weights='pissa' is not supported"),
        "embedding": ({"target_modules": ["embed_tokens"]}, r"is not a matrix of a LoRA adapter"),
    }
    for name, (settings, message) in wrong.items():
        theirs = peft().get_peft_model(base, peft().LoraConfig(r=2, **settings))
        theirs.save_pretrained(tmp_path / name)
        theirs.unload()
        with pytest.raises(ValueError, match=message) as caught:
            import_peft(tmp_path / name, ours.config)
        assert "\n" not in str(caught.value)
    config = LoRAConfig(rank=2, targets=LINEAR)
    apply_lora(ours, config)
    export_peft(ours, config, tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .* is not a linear layer of GPT-2"):
        import_peft(tmp_path / "other", GPTConfig())
    small, _ = pair_of("llama")
    wider = GPTConfig(**(vars(small.config) | {"ffn_width": 64}))
    with pytest.raises(ValueError, match=r"does not fit the model: that of .*_proj is for a layer of (32|48) inputs"):
        import_peft(tmp_path / "other", wider)


def test_a_folder_stands_for_the_whole_model(tmp_path: Path) -> None:
    ours, base = pair_of("qwen3")
    base.save_pretrained(tmp_path / "base")
    note = {"format": 1, "tokenizer": {"name": "word", "words": [f"w{i}" for i in range(95)]}}
    (tmp_path / "base" / "llm_lightning.json").write_text(json.dumps(note))
    theirs = peft().get_peft_model(base, peft().LoraConfig(r=2)).eval()
    draw(matrices(theirs), 3)
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter", base=tmp_path / "base")
    with torch.no_grad():
        assert_close(loaded.gpt(IDS), theirs(IDS).logits)
        assert (loaded.gpt(IDS) - ours(IDS)).abs().max() > 0.1
