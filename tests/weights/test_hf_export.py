"""Exported folders of the Llama kind, read by transformers and by us, every tensor drawn at random."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_export import LLAMA, json_tokenizer, random_gpt
from safetensors.torch import load_file

from llm_lightning.data.templates.as_jinja import chat_of
from llm_lightning.data.templates.chat import ChatTemplate
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT
from llm_lightning.models.rope import RopeScaling
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer
from llm_lightning.weights import hf_checks
from llm_lightning.weights.families.choose import family_of
from llm_lightning.weights.hf_export import export_classifier, export_hf
from llm_lightning.weights.load import load_model
from llm_lightning.weights.safetensors_writing import write_shards

CONFIGS = {
    "LlamaForCausalLM": replace(LLAMA, tied_head=False, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    "Qwen2ForCausalLM": replace(LLAMA, qkv_bias=True),
    "Qwen3ForCausalLM": replace(LLAMA, qk_norm=True, head_dim=12, n_kv_head=None),
}
BYTES = build_tokenizer("byte")
IDS = torch.arange(2 * 24).mul(31).remainder(257).view(2, 24)


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the dev extra: transformers")


@torch.no_grad()
def assert_same_logits(theirs: Any, model: GPT) -> None:
    logits = model(IDS)
    assert (theirs.eval()(IDS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_transformers_and_we_read_what_was_exported(tmp_path: Path, architecture: str) -> None:
    config = CONFIGS[architecture]
    model, folder = random_gpt(config), tmp_path / "export"
    generation = {"eos_token_id": [7, 9], "pad_token_id": 3, "temperature": 0.6, "do_sample": True}
    report = export_hf(model, config, BYTES, folder, generation=generation, lineage={"parent_name": "hf:a/b"})
    theirs = transformers().AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(theirs).__name__ == architecture
    assert_same_logits(theirs, model)
    assert report["max_logit_difference"] < 1e-5
    assert report["lineage"] == {"parent_name": "hf:a/b"}
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 77.0  # versions 4 and 5
    assert written["max_position_embeddings"] == 48
    assert theirs.generation_config.eos_token_id == [7, 9, 256]
    assert (theirs.generation_config.pad_token_id, theirs.generation_config.temperature) == (3, 0.6)

    loaded = load_model(folder)
    with torch.no_grad():
        assert torch.equal(loaded.gpt(IDS), model(IDS))
    assert loaded.header["generation"] == generation | {"eos_token_id": [7, 9, 256], "bos_token_id": 256}
    other = tmp_path / "again"
    export_hf(loaded.gpt, loaded.gpt.config, loaded.tokenizer, other, generation=loaded.header["generation"])
    for file in ("config.json", "generation_config.json", "llm_lightning.json", "model.safetensors"):
        assert (other / file).read_bytes() == (folder / file).read_bytes()


def test_bfloat16(tmp_path: Path) -> None:
    config = CONFIGS["Qwen2ForCausalLM"]
    model = random_gpt(config)
    report = export_hf(model, config, BYTES, tmp_path / "export", dtype="bfloat16")
    theirs = transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.dtype == torch.bfloat16
    assert report["max_logit_difference"] < 1e-4  # both compute in float32 with the rounded weights
    loaded = load_model(tmp_path / "export").gpt
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"mlp": "gelu"}, "LlamaForCausalLM, has no model.mlp=gelu$"),
        ({"norm": "layer", "mlp_bias": True}, "LlamaForCausalLM, has no model.norm=layer$"),
        ({"qk_norm": True, "mlp_bias": True}, "has no model.qk_norm=True$"),
        (
            {"qkv_bias": True, "mlp_bias": True, "norm": "layer"},
            "Qwen2ForCausalLM, has no model.norm=layer, no model.m",
        ),
        ({"position": "learned", "norm": "layer", "mlp": "gelu"}, "GPT2LMHeadModel, has no model.out_bias=False, no "),
    ],
)
def test_a_model_that_no_class_computes_is_refused_by_its_fields(tmp_path: Path, change: dict, fields: str) -> None:
    config = replace(LLAMA, **change)
    with pytest.raises(
        ValueError, match=r"^transformers has no class that computes this model; the nearest, .*" + fields
    ):
        export_hf(random_gpt(config), config, BYTES, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_shards_are_those_of_transformers(tmp_path: Path) -> None:
    """Written in parts of at most 10 kB, or of one tensor; read by the library, by transformers and by us."""
    config = CONFIGS["Qwen3ForCausalLM"]
    model, folder = random_gpt(config), tmp_path / "export"
    export_hf(model, config, BYTES, folder)
    whole = load_file(folder / "model.safetensors")
    for name in ("model.safetensors", "export_report.json"):
        (folder / name).unlink()
    views = family_of(config).to_hf(model.state_dict(), config)
    write_shards(folder, "model.safetensors", views, torch.float32, 10_000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 5
    parts: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(folder / file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 10_000
        assert not parts.keys() & part.keys()
        parts |= part
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert_same_logits(transformers().AutoModelForCausalLM.from_pretrained(folder), model)
    with torch.no_grad():
        assert torch.equal(load_model(folder).gpt(IDS), model(IDS))


@pytest.mark.parametrize("begins", [False, True], ids=["", "begins"])
def test_a_tokenizer_json_and_a_template_travel(tmp_path: Path, begins: bool) -> None:
    tokenizer, config = json_tokenizer(begins), replace(LLAMA, vocab_size=300)  # more rows than tokens, as in Qwen2.5
    model, folder = random_gpt(config), tmp_path / "export"
    template = choose_template("smollm2")
    report = export_hf(model, config, tokenizer, folder, chat=chat_of(template, tokenizer))
    if begins:  # this template does not write the token that begins a text, and ours does
        assert "transformers makes other tokens of the chat template, first at position 0" in report["notes"][-1]
    else:
        assert report["notes"] == ["chat template: transformers makes our tokens of 4 conversations"]
    theirs = transformers().AutoTokenizer.from_pretrained(folder)
    text = "Say a word, ½ of it.\n"
    assert theirs(text)["input_ids"] == [258] * begins + tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (260, 258, 257)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (folder / "chat_template.jinja").read_text() == theirs.chat_template
    stops = json.loads((folder / "generation_config.json").read_text())
    assert stops == {"bos_token_id": 258 if begins else 257, "pad_token_id": 257, "eos_token_id": [260, 257]}

    loaded = load_model(folder)
    assert loaded.tokenizer.describe() == tokenizer.describe()
    assert loaded.header["template"] == template.describe()
    assert loaded.gpt.config.vocab_size == 300
    with torch.no_grad():
        assert torch.equal(loaded.gpt(IDS), model(IDS))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not what was exported"):
        load_model(folder)


def test_a_date_in_a_template_is_told(tmp_path: Path) -> None:
    """Llama 3's writes today's date for other programs; ours is a setting."""
    tokenizer, config = json_tokenizer(), replace(LLAMA, vocab_size=261)
    text = "{{ date_string or strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate("dated", text, "1999-12-31")
    report = export_hf(random_gpt(config), config, tokenizer, tmp_path / "export", chat=chat_of(template, tokenizer))
    told = "the chat template writes a date: here 31 Dec 1999, elsewhere today's, unless date_string is given"
    assert report["notes"][0] == told


def test_other_tokens_than_ours_are_told(tmp_path: Path) -> None:
    """A tokenizer.json that does not begin a text as the settings of the model say."""
    description = json_tokenizer().describe() | {"bos_id": 258}
    tokenizer, config = JsonTokenizer.from_description(description), replace(LLAMA, vocab_size=261)
    transformers()
    report = export_hf(random_gpt(config), config, tokenizer, tmp_path / "export")
    told = 'transformers makes other tokens of a text, first at position 0: "It\'s", ours are "<|begin|>It\'"'
    assert report["notes"] == [told]


def test_another_programs_numbers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose config says something else than its weights mean is not published."""
    transformers()
    real = hf_checks._theirs

    def wrong(folder: Path, architecture: str) -> Any:
        file = folder / "config.json"
        facts = json.loads(file.read_text())
        facts["rope_parameters"]["rope_theta"] = facts["rope_theta"] = 2.0
        file.write_text(json.dumps(facts))
        return real(folder, architecture)

    monkeypatch.setattr(hf_checks, "_theirs", wrong)
    model = random_gpt(LLAMA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    with pytest.raises(ValueError, match=r"computes logits from the export that differ by .*; nothing was written"):
        export_hf(model, LLAMA, BYTES, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_the_llama_kind_needs_a_head_without_a_bias(tmp_path: Path) -> None:
    config = replace(LLAMA, vocab_size=257)
    model = Classifier(random_gpt(config), 3).eval()
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification has no bias in its head, and RMS norms"):
        export_classifier(model, ["a", "b", "c"], BYTES, tmp_path / "export")
    torch.nn.init.zeros_(model.head.bias)
    report = export_classifier(model, ["a", "b", "c"], BYTES, tmp_path / "export")
    assert report["max_logit_difference"] < 1e-5
    theirs = transformers().AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    lengths = torch.tensor([24, 9])
    ids = IDS.clone().remainder(256)
    ids[1, 9:] = 256
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids, lengths), rtol=1e-5, atol=1e-5)
