"""Adapters against PEFT on transformers' GPT-2, every tensor drawn at random, the adapters' B included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import (
    LoRAConfig,
    adapter_state,
    apply_lora,
    load_adapter_state,
    merge_lora,
)
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.families.gpt2 import config_to_hf, module_from_hf, module_to_hf, to_hf
from llm_lightning.weights.load import load_model
from llm_lightning.weights.peft_format import export_peft, import_peft

CONFIG = GPTConfig(vocab_size=97, context_length=24, n_layer=2, n_head=4, n_embd=32)
IDS = torch.arange(2 * 24).remainder(97).view(2, 24)
FORMS = [
    LoRAConfig(rank=4, alpha=6.0, qkv=qkv, scaling=s) for qkv in ("fused", "split") for s in ("standard", "rslora")
]


def peft() -> Any:
    """Imported late: it takes a second, and each process that runs tests reads this file."""
    return pytest.importorskip("peft", reason="needs the dev extra: peft")


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the dev extra: transformers")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def huggingface(ours: GPT) -> Any:
    settings = transformers().GPT2Config(**config_to_hf(CONFIG, eot_id=None))
    theirs = transformers().GPT2LMHeadModel._from_config(settings, attn_implementation="eager").eval()
    theirs.load_state_dict(to_hf(ours.state_dict(), CONFIG), strict=False)
    return theirs


def adapted(config: LoRAConfig) -> tuple[GPT, Any]:
    """Ours with random adapters, and transformers with the same base."""
    ours = GPT(CONFIG)
    randomize(ours, 1)
    theirs = huggingface(ours)
    apply_lora(ours, config)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for tensor in adapter_state(ours).values():
            tensor.normal_(std=0.2, generator=generator)
    return ours, theirs


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.qkv}-{c.scaling}")
def test_out_to_peft(tmp_path: Path, config: LoRAConfig) -> None:
    """Forward, gradients on the adapters, and the merged model."""
    ours, base = adapted(config)
    plain = base(IDS).logits
    base.save_pretrained(tmp_path / "base")
    export_peft(ours, config, tmp_path / "adapter", base_name=str(tmp_path / "base"))
    found = peft().AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(found(IDS).logits, ours(IDS), rtol=0, atol=1e-5)
    theirs = peft().PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    logits, mine = theirs(IDS).logits, ours(IDS)
    assert (logits - plain).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-5)

    logits.square().mean().backward()
    mine.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    state = adapter_state(ours)
    for key, parameter in state.items():
        path, _, kind = key.rpartition(".lora_")
        found = gradients[f"base_model.model.{module_to_hf(path)[0]}.lora_{kind}.default.weight"]
        expected = parameter.grad
        assert expected is not None
        if config.qkv == "split" and path.endswith("qkv_proj") and kind == "B":
            # outside the blocks PEFT's wider B has gradients too, which our form does not have
            found = torch.cat([part[:, 4 * p : 4 * p + 4] for p, part in enumerate(found.chunk(3, 0))])
        torch.testing.assert_close(expected, found, rtol=0, atol=1e-5)
    with torch.no_grad():
        merged = theirs.merge_and_unload()
        merge_lora(ours)
        torch.testing.assert_close(ours(IDS), merged(IDS).logits, rtol=0, atol=1e-5)
        weight = ours.blocks[1].attn.qkv_proj.weight
        torch.testing.assert_close(weight, merged.transformer.h[1].attn.c_attn.weight.t(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True], ids=["standard", "rslora"])
@torch.no_grad()
def test_in_from_peft(tmp_path: Path, rslora: bool) -> None:
    ours = GPT(CONFIG)
    randomize(ours, 1)
    settings = peft().LoraConfig(
        r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, use_rslora=rslora
    )
    theirs = peft().get_peft_model(huggingface(ours), settings).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    config, state = import_peft(tmp_path, CONFIG)
    load_adapter_state(ours, state, config, "theirs")
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=1e-5)
    assert set(config.targets) == {
        f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv_proj", "mlp.down_proj")
    }


@torch.no_grad()
def test_there_and_back(tmp_path: Path) -> None:
    config = FORMS[0]
    ours, _ = adapted(config)
    export_peft(ours, config, tmp_path / "adapter")
    read, state = import_peft(tmp_path / "adapter", CONFIG)
    other = GPT(CONFIG)
    randomize(other, 1)
    load_adapter_state(other, state, read)
    assert torch.equal(other(IDS), ours(IDS))
    assert (read.rank, read.alpha) == (config.rank, config.alpha)


def test_names_there_and_back() -> None:
    names = [f"blocks.7.{part}" for part in ("attn.qkv_proj", "attn.out_proj", "mlp.up_proj", "mlp.down_proj")]
    assert [module_from_hf(module_to_hf(name)[0]) for name in names] == [(name, 0) for name in names]
    for wrong in ("transformer.h.0.ln_1", "model.layers.0.q_proj", "score"):
        with pytest.raises(ValueError, match="not a linear layer of GPT-2"):
            module_from_hf(wrong)


def test_an_adapter_on_the_head_stays_here(tmp_path: Path) -> None:
    model = Classifier(GPT(CONFIG), 2)
    config = LoRAConfig(rank=2, targets=("head", "qkv_proj"))
    apply_lora(model, config)
    with pytest.raises(ValueError, match=r"head cannot go to PEFT.*--format hf"):
        export_peft(model, config, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("modules_to_save", ["wte"]),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    config = FORMS[0]
    export_peft(adapted(config)[0], config, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    file.with_name("export_report.json").unlink()
    with pytest.raises(ValueError, match=f"adapter_config.json: {key}="):
        import_peft(tmp_path / "adapter", CONFIG)


def test_missing_and_occupied_folders(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no adapter_model.safetensors; pickled adapters"):
        import_peft(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="is not empty"):
        export_peft(adapted(FORMS[0])[0], FORMS[0], tmp_path)


@pytest.mark.slow
def test_odd_values_in_a_folder_of_peft(tmp_path: Path) -> None:
    """Each is one line that names the file and the key, before an adapter is built."""
    config, folder, base = FORMS[0], tmp_path / "adapter", tmp_path / "base.ckpt"
    export_peft(adapted(config)[0], config, folder, base_name=str(folder))
    model, tokenizer = GPT(CONFIG), build_tokenizer("word", texts=["to be"])
    header = checkpoints.describe(task="pretraining", model_config=CONFIG, tokenizer=tokenizer)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoints.save(base, {"state_dict": weights, checkpoints.HEADER: header})
    file = folder / "adapter_config.json"
    (folder / "export_report.json").unlink()
    facts, tensors = json.loads(file.read_text()), load_file(folder / "adapter_model.safetensors")
    key = next(iter(tensors))
    settings: list[tuple[str, Any]] = [
        ("r", "2"), ("r", 2.5), ("r", True), ("r", 0), ("r", None), ("r", 10**12), ("r", [4]), ("r", 3),
        ("lora_alpha", None), ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", "6"),
        ("lora_alpha", 0), ("lora_alpha", -1), ("lora_dropout", "no"), ("lora_dropout", 1.0), ("use_rslora", "yes"),
        ("base_model_name_or_path", 3), ("base_model_name_or_path", ["gpt2"]), ("use_dora", 10**5 * "x"),
        ("base_model_name_or_path", str(folder)), ("base_model_name_or_path", None),
    ]  # fmt: skip
    matrices: list[tuple[str, Any]] = [
        ("nan", torch.full_like(tensors[key], math.nan)),
        ("infinite", torch.full_like(tensors[key], math.inf)),
        ("integers", tensors[key].long()),
        ("one dimension", tensors[key].flatten()),
        ("another rank", torch.ones(5, 5)),
        ("none", None),
    ]
    texts = [b"{", b"[1]", b"7", b"", b"\xff", b"[" * 100_000]
    wrong = []

    def refused(what: str, named: str) -> None:
        try:
            load_model(folder)
            wrong.append(f"{what}: loaded")
        except ValueError as error:
            if named not in str(error) or "\n" in str(error) or len(str(error)) > 500:
                wrong.append(f"{what}: {error}")
        except Exception as error:
            wrong.append(f"{what}: {error!r}")

    file.write_text(json.dumps(facts | {"base_model_name_or_path": str(base)}))
    load_model(folder)  # or everything below would be refused for another reason
    for name, value in settings:
        file.write_text(json.dumps(facts | {"base_model_name_or_path": str(base)} | {name: value}))
        named = "names itself" if value == str(folder) else "adapter_config.json"
        refused(f"{name}={value!r:.40}", named)
    file.write_text(json.dumps(facts | {"base_model_name_or_path": str(base)}))
    for what, matrix in matrices:
        changed = {name: tensor for name, tensor in (tensors | {key: matrix}).items() if tensor is not None}
        save_file(changed, folder / "adapter_model.safetensors")
        refused(what, "adapter_model.safetensors")
    save_file({}, folder / "adapter_model.safetensors")
    refused("no matrix", "adapter_model.safetensors")
    for text in texts:
        file.write_bytes(text)
        refused(f"{text!r:.20}", "adapter_config.json")
    assert not wrong, "\n".join(wrong)
