"""GPT-2 weights against transformers itself. Every tensor is drawn at random, so that no swap can hide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.weights.families.gpt2 import config_from_hf, config_to_hf, from_hf, infer_config, to_hf

CONFIG = GPTConfig(vocab_size=97, context_length=24, n_layer=3, n_head=4, n_embd=32)
IDS = torch.arange(2 * 24).remainder(97).view(2, 24)


def randomized(model: torch.nn.Module, seed: int = 7) -> torch.nn.Module:
    """Draw every parameter anew, biases and norms included; a tied weight once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def huggingface(config: GPTConfig) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GPT2Config(**config_to_hf(config, eot_id=None))
    return transformers.GPT2LMHeadModel._from_config(settings, attn_implementation="eager")


def ours(config: GPTConfig, state: dict[str, torch.Tensor]) -> GPT:
    model = GPT(config).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    output = model(IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
def test_weights_from_transformers_give_its_logits(tied_head: bool) -> None:
    config = replace(CONFIG, tied_head=tied_head)
    theirs = randomized(huggingface(config))
    model = ours(config, from_hf(theirs.state_dict(), config_from_hf(theirs.config.to_dict())))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    for one in (model(IDS), theirs(IDS).logits):
        F.cross_entropy(one.flatten(0, 1), IDS.roll(-1, 1).flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    ours_in_theirs = to_hf(gradients, config)
    for name, parameter in theirs.named_parameters():
        assert (ours_in_theirs[name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_weights_to_transformers_give_our_logits(tied_head: bool, qkv_bias: bool) -> None:
    config = replace(CONFIG, tied_head=tied_head, qkv_bias=qkv_bias)
    model = randomized(GPT(config))
    theirs = huggingface(config).eval()
    missing, unexpected = theirs.load_state_dict(to_hf(model.state_dict(), config), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied_head else [], [])
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied_head", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qkv_bias", [True, False], ids=["bias", "no_bias"])
def test_round_trip_is_bitwise(tied_head: bool, qkv_bias: bool) -> None:
    config = replace(CONFIG, tied_head=tied_head, qkv_bias=qkv_bias, attention_dropout=0.2)
    state = randomized(GPT(config)).state_dict()
    assert config_from_hf(config_to_hf(config, eot_id=3)) == config
    back = from_hf(to_hf(state, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_old_files_without_prefix_with_mask_buffers_and_padding() -> None:
    state = randomized(GPT(CONFIG)).state_dict()
    old = {name.removeprefix("transformer."): tensor for name, tensor in to_hf(state, CONFIG).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    old["h.2.attn.masked_bias"] = torch.tensor(-1e4)
    old["wte.weight"] = torch.cat([old["wte.weight"], torch.ones(128 - 97, 32)])
    old["lm_head.weight"] = old["wte.weight"]
    back = from_hf(old, CONFIG)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_padded_vocabulary_is_cut_on_the_way_out() -> None:
    model = randomized(GPT(replace(CONFIG, vocab_size=128)))
    exported = to_hf(model.state_dict(), CONFIG)
    assert torch.equal(exported["transformer.wte.weight"], model.token_embedding.weight[:97])


def test_exported_tensors_are_named_as_transformers_names_them() -> None:
    exported = to_hf(GPT(CONFIG).state_dict(), CONFIG)
    assert exported.keys() == huggingface(CONFIG).state_dict().keys() - {"lm_head.weight"}
    assert exported["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)  # Conv1D: (in, out)


def test_sizes_inferred_from_shapes() -> None:
    config = GPTConfig(vocab_size=50, context_length=12, n_layer=2, n_head=2, n_embd=128, tied_head=False)
    state = to_hf(GPT(config).state_dict(), config)
    assert infer_config(state) == config
    assert infer_config({name: t for name, t in state.items() if name != "lm_head.weight"}).tied_head
    with pytest.raises(ValueError, match=r"n_embd=32 is not a multiple of 64.*config.json"):
        infer_config(to_hf(GPT(CONFIG).state_dict(), CONFIG))
    with pytest.raises(ValueError, match="not GPT-2 weights"):
        infer_config({"model.embed_tokens.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"activation_function": "gelu"}, r"activation_function='gelu'.*'gelu_new' or 'gelu_pytorch_tanh'"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"num_attention_heads": 2}, "n_head=4 and num_attention_heads=2, which mean the same"),
        ({"n_inner": "100"}, "n_inner=.100. must be a number"),
        ({"n_layer": "3"}, "n_layer='3' must be a number"),
        ({"n_layer": True}, "n_layer=True must be a number"),
        ({"n_head": 5}, "multiple of model.n_head=5"),
        ({"embd_pdrop": None}, "embd_pdrop=None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ],
)
def test_a_config_that_we_do_not_implement_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(CONFIG, None) | change)


def test_absent_config_keys_mean_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert config_from_hf({"n_inner": 3072}) == config_from_hf(transformers.GPT2Config().to_dict())
    assert config_from_hf({"n_ctx": 77}).context_length == 77


def test_a_stated_width_that_is_the_default_goes_and_comes_back_as_the_same() -> None:
    config = replace(CONFIG, ffn_width=4 * CONFIG.n_embd)  # as a GGUF file has it
    assert config_to_hf(config, None) == config_to_hf(config_from_hf(config_to_hf(config, None)), None)
    assert config_from_hf(config_to_hf(replace(CONFIG, ffn_width=52), None)).ffn_width == 52


def test_config_keys_may_have_the_names_of_other_families() -> None:
    transformers = pytest.importorskip("transformers")
    named = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5, "max_position_embeddings": 48}
    theirs = transformers.GPT2Config(**named).to_dict()
    assert not named.keys() & theirs.keys()
    assert config_from_hf(named) == config_from_hf(theirs)


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = to_hf(GPT(CONFIG).state_dict(), CONFIG) | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.h.1.ln_2.bias": None}, r"missing: h\.1\.ln_2\.bias"),
        ({"transformer.wte.weight": None}, "missing: .*wte.weight"),
        ({"score.weight": torch.zeros(2, 32)}, "unknown: score.weight"),
        ({"transformer.h.3.ln_1.bias": torch.zeros(32)}, r"unknown: h\.3\.ln_1\.bias"),
        ({"transformer.wpe.weight": torch.zeros(25, 32)}, r"wpe.weight .* \(25, 32\), expected \(24, 32\)"),
        ({"transformer.wte.weight": torch.zeros(96, 32)}, r"wte.weight .* \(96, 32\), expected \(97, 32\)"),
        ({"transformer.wte.weight": torch.zeros(300, 32)}, r"\(300, 32\), expected \(97, 32\)"),
        # a file in nn.Linear layout, as some converters write it
        (
            {"transformer.h.0.attn.c_attn.weight": torch.zeros(96, 32)},
            r"c_attn.weight .* expected \(32, 96\)",
        ),
        ({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}, "ln_f.bias is torch.int8"),
        ({"lm_head.weight": torch.ones(97, 32)}, "lm_head.weight differs from the token embedding.*tied"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(broken(**changes), CONFIG)


def test_a_lying_layer_count_is_refused_before_it_costs_memory() -> None:
    with pytest.raises(ValueError, match="n_layer=1000000000, but the weights are only 40 tensors"):
        from_hf(broken(), replace(CONFIG, n_layer=10**9))


def test_our_states_are_checked_as_well() -> None:
    state = GPT(CONFIG).state_dict()
    with pytest.raises(ValueError, match=r"missing: final_norm.bias; unknown: _orig_mod.final_norm.bias"):
        to_hf({n.replace("final", "_orig_mod.final", n.count("bias")): t for n, t in state.items()}, CONFIG)
    with pytest.raises(ValueError, match="lm_head"):
        to_hf(state | {"lm_head.weight": torch.ones(97, 32)}, CONFIG)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        from_hf(broken(), replace(CONFIG, tied_head=False))
    biased = broken(**{"transformer.h.0.attn.c_attn.bias": torch.ones(96)})
    with pytest.raises(ValueError, match=r"qkv_bias=false, but blocks.0.attn.qkv_proj.bias is not zero"):
        from_hf(biased, replace(CONFIG, qkv_bias=False))
