"""Llama, Qwen2 and Qwen3 against transformers itself. Every tensor is drawn at random, so that no swap can hide."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.rope import frequencies
from llm_lightning.models.shapes import parameter_shapes
from llm_lightning.weights.families.choose import FAMILIES, family_of, family_of_json
from llm_lightning.weights.families.llama import (
    config_from_hf,
    config_to_hf,
    from_hf,
    module_from_hf,
    module_to_hf,
    to_hf,
)
from llm_lightning.weights.pretrained import load_pretrained

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "llama_tied_scaled": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama_head_dim": {"head_dim": 20, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": True},
    "qwen3_bias": {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True},
}
IDS = torch.arange(2 * 48).mul(31).remainder(97).view(2, 48)


def huggingface(case: str) -> torch.nn.Module:
    kind = case.split("_")[0]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **CASES[case])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    output = model(IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_transformers_gives_its_logits_and_goes_back(case: str, tmp_path: Path) -> None:
    theirs = huggingface(case)
    theirs.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    config = loaded.config
    model = GPT(config, init="torch").eval()
    model.load_state_dict(loaded.state)
    assert_close(logits(model), logits(theirs))

    targets = IDS.roll(-1, 1).flatten()
    for one in (model, theirs):
        F.cross_entropy(logits(one).flatten(0, 1), targets).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    ours_in_theirs = to_hf(gradients, config)
    for name, parameter in theirs.named_parameters():
        assert_close(ours_in_theirs[name], parameter.grad)

    exported = to_hf(model.state_dict(), config)
    expected = {n: t for n, t in theirs.state_dict().items() if n != "lm_head.weight" or not config.tied_head}
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    written = config_to_hf(config, eot_id=3)
    assert written["model_type"] == theirs.config.model_type
    assert config_from_hf(written) == config
    back = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**written), attn_implementation="eager"
    ).eval()
    back.load_state_dict(theirs.state_dict())
    assert torch.equal(logits(back), logits(theirs))


@pytest.mark.parametrize("case", ["llama", "llama_tied_scaled", "llama_head_dim", "qwen3"])
def test_version_4_of_transformers_states_the_rotation_elsewhere(case: str) -> None:
    new = huggingface(case).config.to_dict()
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
    expected = config_from_hf(new | {"rope_parameters": rope | {"rope_theta": old["rope_theta"]}})
    assert config_from_hf(old) == expected
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
        assert config_from_hf(old) == expected
    written = config_to_hf(expected, None)
    for key in ("rope_parameters", "rope_theta"):  # what one version reads, without what the other reads
        rest = {name: value for name, value in written.items() if name != key}
        if key == "rope_theta":
            rest.pop("rope_scaling")
        assert config_from_hf(rest) == expected
        assert transformers.AutoConfig.for_model(**rest).rope_parameters["rope_theta"] == expected.rope_theta


def test_the_original_context_may_be_stated_beside_the_scaling_alone() -> None:
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    stated = tiny(rope_parameters=rope, original_max_position_embeddings=16)
    config = config_from_hf(stated)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**stated))
    ours = frequencies(config.head_width, config.rope_theta, config.rope_scaling)
    torch.testing.assert_close(ours, theirs.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_absent_keys_mean_the_defaults_of_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind)
    full = config_from_hf(config.to_dict())
    assert config_from_hf({"model_type": kind}) == full
    assert full.rope_theta == config.rope_parameters["rope_theta"] == 10_000


PUBLISHED = {  # config.json of the hub, without what says nothing of the architecture; the number of parameters
    "SmolLM2-135M-Instruct": (
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
            "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "is_llama_config": True,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
            "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        },
        134_515_008,
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
            "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
            "eos_token_id": [128001, 128008, 128009], "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Qwen2.5-0.5B-Instruct": (
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
            "hidden_act": "silu", "max_window_layers": 21, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
            "num_hidden_layers": 28, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 40960, "attention_bias": False, "hidden_act": "silu", "max_window_layers": 28,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "use_sliding_window": False, "tie_word_embeddings": True,
        },
        596_049_920,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    config_json, expected = PUBLISHED[name]
    config = family_of_json(config_json).config_from_hf(config_json)
    sizes = {part: math.prod(shape) for part, shape in parameter_shapes(config).items()}
    assert sum(sizes.values()) - sizes["lm_head.weight"] == expected
    assert config.rope_theta == config_json["rope_theta"]
    assert (config.rope_scaling is not None) == (config_json.get("rope_scaling") is not None)


def tiny(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen2", "num_key_value_heads": 2, **SIZES} | changes


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "swish"},
        {"sliding_window": 16},  # with use_sliding_window absent, which is false
        {"use_sliding_window": False, "max_window_layers": 1},
        {"use_sliding_window": True, "max_window_layers": 3},  # no layer is beyond
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"layer_types": ["full_attention"] * 3},
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"attention_dropout": None},
        {"pretraining_tp": 2},  # the same sums in another order
        {"quantization_config": None},
        {"attention_bias": False},  # transformers' Qwen2 does not read it
    ],
)
def test_neutral_values_are_accepted(change: dict) -> None:
    assert config_from_hf(tiny(**change)) == config_from_hf(tiny())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' is not a family known here: gpt2, llama, qwen2, qwen3"),
        ({"model_type": "qwen2_moe"}, "model_type='qwen2_moe' is not a family known here"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not a family"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported: quantised weights"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported; it must be 'silu' or 'swish'"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with 'sliding_attention'"),
        ({"layer_types": 3}, "layer_types=3 must be a list"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"per_layer_config": {"1": {"hidden_act": "gelu"}}}, "per_layer_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of kind 'linear' is not supported; it must be default"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of kind 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "of kind 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "factor='8' must be a number"),
        ({"rope_scaling": 3}, "rope_parameters=3 must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "with one set of values for all layers"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta twice, 5.0 and 6.0"),
        ({"rope_scaling": LLAMA3 | {"rope_theta": None}, "rope_parameters": {"rope_theta": 6.0}}, "in place of rope_p"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}, "max_position_embeddings twice, 16"),
        ({"is_causal": False}, "is_causal=False is not supported; it must be True"),  # embeddings of texts, by Qwen2
        ({"rope_theta": "1e6"}, "rope_theta='1e6' must be a number"),
        ({"num_key_value_heads": 3}, "n_kv_head=3"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True must be a number"),
        ({"hidden_size": None}, "hidden_size=None must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"attention_dropout": "0.1"}, "attention_dropout='0.1'"),
    ],
)  # fmt: skip
def test_what_we_do_not_implement_is_refused_by_name(change: dict, message: str) -> None:
    config_json = tiny(**change)
    with pytest.raises(ValueError, match=message) as caught:
        family_of_json(config_json).config_from_hf(config_json)
    assert "\n" not in str(caught.value)


CONFIG = GPTConfig(
    97, 64, 2, 4, 32, norm="rms", position="rope", mlp="swiglu", n_kv_head=2, head_dim=8, ffn_width=52,
    qkv_bias=False, out_bias=False, mlp_bias=False, tied_head=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": True, "mlp_bias": True}, "the nearest, Qwen2ForCausalLM, has no model.mlp_bias=True"),
        ({"out_bias": True}, "LlamaForCausalLM, has no model.qkv_bias=False, no model.out_bias=True"),
        ({"qk_norm": True, "qkv_bias": True}, "nearest, Qwen2ForCausalLM, has no model.qk_norm=True"),
        ({"norm": "layer"}, "nearest, LlamaForCausalLM, has no model.norm=layer$"),
        ({"mlp": "gelu"}, "nearest, LlamaForCausalLM, has no model.mlp=gelu$"),
        ({"position": "learned"}, "nearest, LlamaForCausalLM, has no model.position=learned$"),
    ],
)
def test_a_model_without_a_form_in_transformers_is_refused(change: dict, message: str) -> None:
    config = replace(CONFIG, **change)
    with pytest.raises(ValueError, match=message):
        family_of(config).config_to_hf(config, None)


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = to_hf(random_state(CONFIG), CONFIG) | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def random_state(config: GPTConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}
    return state | ({"lm_head.weight": state["token_embedding.weight"]} if config.tied_head else {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, "fit this Llama; missing: model.layers.1.self_attn.k_proj"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "unknown: model.layers.0.self_attn.q_proj.bias"),
        ({"model.layers.0.block_sparse_moe.gate.weight": torch.zeros(2)}, "unknown: .*block_sparse_moe"),
        ({"model.layers.0.self_attn.v_proj.weight": torch.zeros(32, 32)}, r"\(32, 32\), expected \(16, 32\)"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "model.norm.weight is torch.int8"),
        ({"lm_head.weight": torch.ones(97, 32)}, "lm_head.weight differs from the token embedding"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(broken(**changes), CONFIG)
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000, but the weights are only 20 tensors"):
        from_hf(broken(), replace(CONFIG, n_layer=10**9))


def test_files_without_prefix_and_with_old_buffers() -> None:
    state = random_state(CONFIG)
    old = {name.removeprefix("model."): tensor for name, tensor in to_hf(state, CONFIG).items()}
    old["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    old["lm_head.weight"] = old["embed_tokens.weight"]
    back = from_hf(old, CONFIG)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_one_of_our_linear_layers_has_up_to_three_of_theirs() -> None:
    assert module_to_hf("blocks.3.attn.qkv_proj") == tuple(
        f"model.layers.3.self_attn.{part}_proj" for part in ("q", "k", "v")
    )
    ours = ["lm_head", *(f"blocks.3.{name}" for name in ("attn.qkv_proj", "attn.out_proj", "mlp.gate_proj"))]
    pairs = [(name, number) for name in ours for number in range(len(module_to_hf(name)))]
    assert [module_from_hf(module_to_hf(name)[number]) for name, number in pairs] == pairs
    assert module_from_hf("layers.3.mlp.down_proj") == ("blocks.3.mlp.down_proj", 0)
    for wrong in ("model.layers.3.input_layernorm", "model.layers.3.self_attn.q_norm", "model.embed_tokens", "x"):
        with pytest.raises(ValueError, match="is not a linear layer"):
            module_from_hf(wrong)


def test_every_family_names_its_architecture_as_transformers_does() -> None:
    for kind in FAMILIES:
        config = family_of_json({"model_type": kind}).config_from_hf({"model_type": kind})
        written = json.loads(json.dumps(family_of(config).config_to_hf(config, None)))
        known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        assert written["architectures"] == [known[kind]]
