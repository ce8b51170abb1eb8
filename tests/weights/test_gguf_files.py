"""GGUF files: written and read back, read by transformers, and written by the package `gguf` and read by us."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import made_gguf
import numpy as np
import pytest
import torch
import transformers
from made_gguf import CONFIGS, SMALL, random_model, write
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.rope import RopeScaling
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.chat import Chat
from llm_lightning.weights.gguf import llama_cpp, writing
from llm_lightning.weights.gguf.checking import check_file, read_model
from llm_lightning.weights.gguf.exporting import export_gguf
from llm_lightning.weights.gguf.header import read_header
from llm_lightning.weights.gguf.layout import architecture_of, halves_from_pairs, pairs_from_halves
from llm_lightning.weights.gguf.reading import read_gguf
from llm_lightning.weights.gguf.rope_factors import factors_of, scaling_of

IDS = torch.arange(40)[None] * 7919 % 266
THEIRS = {
    "gpt2": transformers.GPT2LMHeadModel, "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM,
}  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama.cpp, which tests of its own ask."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


# --- out and in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_reads_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind])
    loaded = read_gguf(write(tmp_path / "model.gguf", model))
    again = GPT(loaded.config)
    again.load_state_dict(loaded.state)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS), model(IDS))
    if kind != "gpt2 without biases":  # which become zeros
        assert loaded.config == architecture_defaults(model.config)
        assert all(torch.equal(loaded.state[name], tensor) for name, tensor in model.state_dict().items())
    assert (loaded.state["lm_head.weight"] is loaded.state["token_embedding.weight"]) == model.config.tied_head


def architecture_defaults(config: GPTConfig) -> GPTConfig:
    """The config as a file states it: GPT-2's key of the inner width is stored."""
    return config if config.ffn_width else GPTConfig(**{**SMALL, "ffn_width": 4 * config.n_embd})


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama 3"])  # transformers reads no factors
def test_transformers_computes_the_same_from_a_file(kind: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind])
    write(tmp_path / "model.gguf", model)
    architecture = architecture_of(model.config)
    more = {"gpt2": {"n_positions": 64}, "qwen3": {"head_dim": 32}}.get(architecture, {})  # which its reader forgets
    cls = THEIRS[architecture]
    theirs = cls.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **more).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_have_the_type_and_the_rest_is_float32(dtype: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS["gpt2"])
    reader = gguf.GGUFReader(write(tmp_path / "model.gguf", model, dtype))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_down.weight"] == dtype.upper()
    assert {kinds[name] for name in ("position_embd.weight", "blk.0.attn_qkv.bias", "output_norm.weight")} == {"F32"}
    assert "output.weight" not in kinds
    loaded, state = read_gguf(tmp_path / "model.gguf"), model.state_dict()
    weight, before = loaded.state["blocks.1.mlp.down_proj.weight"], state["blocks.1.mlp.down_proj.weight"]
    largest = before.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, dim=-1)  # of each block
    bounds = {"f16": before.abs() / 2**11, "bf16": before.abs() / 2**8, "q8_0": (0.5 + 127 / 2**11) * largest / 127}
    difference = (weight - before).abs()
    assert (difference <= bounds[dtype] + 1e-7).all()
    assert difference.max() > 0


def test_rows_of_a_head_change_between_pairs_and_halves() -> None:
    # One head of width 6: 0 rotates with 1, 2 with 3, 4 with 5; in halves 0 with 3, 1 with 4, 2 with 5.
    pairs = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    assert halves_from_pairs(pairs, 1).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    two = torch.cat((pairs, 10 + pairs))
    assert halves_from_pairs(two, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]
    assert torch.equal(pairs_from_halves(halves_from_pairs(two, 2), 2), two)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_quantised_tensors_become_what_the_package_says(kind: str, tmp_path: Path) -> None:
    model, number = random_model(CONFIGS["qwen2"]), gguf.GGMLQuantizationType[kind]
    matrix = model.state_dict()["blocks.1.mlp.up_proj.weight"].numpy()
    content = gguf.quantize(matrix, number)
    file = changed("qwen2", tmp_path / "model.gguf", tensors={"blk.1.ffn_up.weight": (content, number)})
    loaded = read_gguf(file).state["blocks.1.mlp.up_proj.weight"].numpy()
    assert np.array_equal(loaded, gguf.dequantize(content, number))
    assert not np.array_equal(loaded, matrix)


def changed(kind: str, file: Path, keys: Any = (), tensors: Any = ()) -> Path:
    """Write a model by the package, with other keys and tensors: (data, type) each; None leaves one out."""
    original = original_of(kind)
    metadata, contents = original[0] | dict(keys), original[1] | dict(tensors)
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, content in contents.items():
        if content is not None:
            writer.add_tensor(name, content[0], raw_dtype=content[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@cache
def original_of(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder) / "model.gguf", random_model(CONFIGS[kind]))
        tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
        return read_header(file).metadata, tensors


# --- Llama 3's scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "theta", "scaling"),
    [
        (128, 500000.0, RopeScaling(8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (64, 500000.0, RopeScaling(32.0, 1.0, 4.0, 8192)),  # Llama 3.2
        (64, 10000.0, RopeScaling(16.0, 1.0, 8.0, 2048)),
    ],
)
def test_the_scaling_is_found_from_its_factors(width: int, theta: float, scaling: RopeScaling) -> None:
    parameters = {
        "rope_type": "llama3", "rope_theta": theta, "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context_length,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        head_dim=width, hidden_size=2 * width, num_attention_heads=2, rope_parameters=parameters
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    factors = plain / theirs
    torch.testing.assert_close(factors_of(width, theta, scaling), factors, rtol=1e-6, atol=0)
    assert scaling_of(factors, width, theta) == scaling
    assert scaling_of(torch.ones(width // 2), width, theta) is None


@pytest.mark.parametrize("factors", [torch.linspace(1, 8, 32), torch.full((32,), 0.5), torch.ones(4) * 2])
def test_other_factors_are_refused(factors: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not those of Llama 3's scaling"):
        scaling_of(factors, 64, 10000.0)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"general.architecture": "qwen3moe"},
            "general.architecture='qwen3moe' is not implemented; did you mean qwen3",
        ),
        ({"general.architecture": "mamba"}, "there are gpt2, llama, qwen2, qwen3"),
        ({"qwen3.block_count": None}, "qwen3.block_count is missing"),
        ({"qwen3.block_count": 3}, "tensor 'blk.2.attn_norm.weight' is missing"),
        ({"qwen3.block_count": 1}, "tensor 'blk.1.attn_norm.weight' has no place"),
        ({"qwen3.block_count": 2**31 - 1}, "tensor 'blk.2.attn_norm.weight' is missing"),
        ({"qwen3.attention.head_count": 8}, "'blk.0.attn_q.weight' has the shape"),
        ({"qwen3.attention.head_count": [4, 4]}, "head_count=a list of 2 must be a whole number"),
        ({"qwen3.attention.head_count_kv": 0}, "head_count_kv=0 must be a whole number"),
        ({"qwen3.embedding_length": 2**31 - 1}, "'token_embd.weight' has the shape"),
        ({"qwen3.feed_forward_length": 2**31 - 1}, "'blk.0.ffn_gate.weight' has the shape"),
        ({"qwen3.attention.layer_norm_rms_epsilon": "small"}, "must be a number"),
        ({"qwen3.rope.dimension_count": 16}, "rope.dimension_count=16 must be the width of a head, 32"),
        ({"qwen3.attention.value_length": 16}, "attention.value_length=16 must be the width of a head, 32"),
        ({"qwen3.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn' is not implemented, only none"),
        ({"qwen3.attention.causal": False}, "attention.causal=False is not implemented, only True"),
        ({"qwen3.rope.scaling.attn_factor": 0.5}, "rope.scaling.attn_factor=0.5 is not implemented, only 1.0"),
        ({"qwen3.expert_count": 8}, "expert_count=8 is not implemented"),
        ({"qwen3.attention.sliding_window": 4096}, "attention.sliding_window=4096 is not implemented"),
        ({"qwen3.vocab_size": 300}, "'token_embd.weight' has the shape"),
        ({"split.count": 3}, "one of 3 files of a model"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "tokenizer.ggml.pre='deepseek-llm' is not implemented"),
    ],
)
def test_keys_of_what_is_not_implemented_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = changed("qwen3", tmp_path / "model.gguf", keys)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*{re.escape(message)}"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "'blk.1.ffn_up.weight' is missing, which llama needs"),
        ({"token_embd.weight": None}, "'token_embd.weight' is missing"),
        ({"blk.0.attn_q.bias": (np.zeros(64, np.float32), None)}, "'blk.0.attn_q.bias' has no place in llama"),
        ({"blk.0.attn_q.weight": (np.zeros((64, 32), np.float32), None)}, "has the shape (64, 32)"),
        (
            {"output_norm.weight": (np.full(64, np.nan, np.float32), None)},
            "'output_norm.weight' has values that are not",
        ),
        (
            {"output_norm.weight": (np.zeros(64, np.int32), None)},
            "type I32, which the package gguf does not dequantise",
        ),
        ({"rope_freqs.weight": (np.linspace(1, 9, 8, dtype=np.float32), None)}, "not those of Llama 3's scaling"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = changed("llama", tmp_path / "model.gguf", tensors=tensors)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*{re.escape(message)}"):
        read_gguf(file)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "model.gguf", random_model(CONFIGS["llama"]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'llm-lightning\[gguf\]'"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "gelu"}, "model.mlp=gelu does not fit llama"),
        ({"qkv_bias": True, "head_dim": 8}, "model.head_dim=8 does not fit qwen2"),
        ({"qk_norm": True, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 64)}, "model.rope_scaling="),
        ({"qk_norm": True, "qkv_bias": True}, "does not fit qwen"),
    ],
)
def test_a_model_without_an_architecture_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"GGUF has no architecture for this model: .*{message}"):
        architecture_of(replace(CONFIGS["llama"], **changes))


# --- the export ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_an_export_has_a_file_a_modelfile_and_a_report(tmp_path: Path) -> None:
    model, description = random_model(CONFIGS["llama"]), {"kind": "jinja", "name": "llama3", "text": "{{ messages }}"}
    chat = Chat(description, "{{ messages }}", made_gguf.tokenizer().eot_id, {}, {}, ())
    folder = tmp_path / "export"
    for _ in range(2):
        report = export_gguf(model, made_gguf.tokenizer(), folder, chat=chat, origin={"digest": "abc"}, overwrite=True)
    assert {file.name for file in folder.iterdir()} == {"model.gguf", "Modelfile", "export_report.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["export"]
    assert 0 < report["max_difference"] < report["bound"]
    metadata = read_header(folder / "model.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["llm_lightning.digest"] == "abc"
    assert metadata["general.file_type"] == 1
    assert len(metadata["tokenizer.ggml.tokens"]) == model.config.vocab_size
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert 'TEMPLATE """{{ if .System }}<|start_header_id|>system<|end_header_id|>' in lines
    assert 'PARAMETER stop "<|endoftext|>"' in lines
    assert "PARAMETER num_ctx 64" in lines
    loaded = read_gguf(folder / "model.gguf")
    assert loaded.template is not None
    assert loaded.template["text"] == "{{ messages }}"
    assert loaded.generation is not None
    assert loaded.generation["eos_token_id"] == [made_gguf.tokenizer().eot_id]


@pytest.mark.parametrize("wrong", ["halves_from_pairs", "scale"])
@pytest.mark.usefixtures("alone")
def test_a_file_that_computes_something_else_is_not_published(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "scale":
        monkeypatch.setitem(writing.KINDS, "f32", writing.Kind("F32", 0, lambda matrix: (matrix * 1.01).numpy()))
    else:
        monkeypatch.setattr("llm_lightning.weights.gguf.reading.halves_from_pairs", lambda rows, heads: rows)
    with pytest.raises(ValueError, match=r"log-probabilities that differ by .*, and the bound is"):
        export_gguf(random_model(CONFIGS["llama"]), made_gguf.tokenizer(), tmp_path / "export", dtype="f32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": build_tokenizer("byte")}, "GGUF has no form for tokenizer=byte"),
        ({"dtype": "q4_0"}, "dtype='q4_0' must be f32, f16, bf16, q8_0"),
        ({"dtype": "q8_0", "model": GPT(GPTConfig(**{**SMALL, "n_embd": 40}))}, "q8_0 stores rows in blocks of 32"),
        ({"model": GPT(GPTConfig(**{**SMALL, "vocab_size": 260}))}, "the tokenizer has 266 ids"),
    ],
)
def test_what_has_no_form_in_gguf_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {"model": random_model(CONFIGS["gpt2"]), "tokenizer": made_gguf.tokenizer(), **change}
    with pytest.raises(ValueError, match=message):
        export_gguf(**options, folder=tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = random_model(CONFIGS["gpt2"])
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up_proj\.weight has values that are not finite in f16"):
        write(tmp_path / "model.gguf", model, "f16")
    write(tmp_path / "model.gguf", model, "bf16")
    assert read_model(tmp_path / "model.gguf").blocks[1].mlp.up_proj.weight[0, 0].item() == pytest.approx(1e5, rel=0.01)


def test_a_check_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    model = random_model(CONFIGS["llama"]).bfloat16().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = check_file(write(tmp_path / "model.gguf", model, "bf16"), model, list(range(40)), "bf16")
    assert report["max_difference"] == 0  # bfloat16 into bfloat16
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
