"""Muon against torch.optim.Muon and torch.optim.AdamW, on whole models."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig, matrices_in
from llm_lightning.models.lora import LoRAConfig, apply_lora
from llm_lightning.optim.muon import Muon, MuonConfig

CONFIG = GPTConfig(vocab_size=20, context_length=8, n_layer=2, n_head=2, n_embd=16)
EVERYTHING_ELSE = ["token_embedding.weight", "position_embedding.weight"]


def model(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def named(optimizer: Muon) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def step_with_random_gradients(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_every_matrix_of_a_block_is_muons_and_nothing_else_is() -> None:
    gpt = model()
    found = {name: matrices_in(name) for name, _ in gpt.named_parameters()}
    in_blocks = {name: p for name, p in gpt.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    assert {name for name, n in found.items() if n} == set(in_blocks)
    assert {name: n for name, n in found.items() if n > 1} == {f"blocks.{i}.attn.qkv_proj.weight": 3 for i in (0, 1)}
    groups = named(MuonConfig().build(gpt.named_parameters()))
    assert list(groups) == ["muon", "muon_qkv", "adamw", "adamw_no_decay"]
    assert groups["adamw"] == EVERYTHING_ELSE
    assert sum(map(len, groups.values())) == len(found)


def test_groups_of_a_classifier_of_adapters_and_of_decay_all() -> None:
    groups = named(MuonConfig(decay="all").build(Classifier(model(), 2).named_parameters()))
    assert groups["muon_qkv"] == [f"trunk.blocks.{i}.attn.qkv_proj.weight" for i in (0, 1)]
    assert {"head.weight", "head.bias"} <= set(groups["adamw"])
    assert "adamw_no_decay" not in groups


def test_adapters_are_adamws_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    gpt = model()
    apply_lora(gpt, LoRAConfig())
    groups = named(MuonConfig().build(gpt.named_parameters()))
    assert list(groups) == ["adamw"]
    assert all(".lora_" in name for name in groups["adamw"])
    assert caplog.messages == ["optimizer=muon: no matrix of a block is trained here, and AdamW updates everything"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjust_lr_fn": "original", "adamw_lr": 1e-3, "nesterov": False},
        {"weight_decay": 0.5, "momentum": 0.8, "ns_steps": 3, "fused": False},
    ],
    ids=str,
)
def test_steps_equal_torchs_muon_on_three_parameters_and_adamw_on_the_rest(options: dict[str, Any]) -> None:
    check_against_torchs_muon(model(), options)


def test_grouped_heads_are_split_where_their_matrices_end() -> None:
    check_against_torchs_muon(model(replace(CONFIG, n_kv_head=1)), {})


def check_against_torchs_muon(gpt: GPT, options: dict[str, Any]) -> None:
    rows = gpt.config.qkv_rows
    optimizer = MuonConfig(lr=0.02, **options).build(gpt.named_parameters(), qkv_rows=rows)
    start = copy.deepcopy(gpt.state_dict())

    def split(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(rows) if matrices_in(name) == 3 else (tensor,)

    apart = {
        name: [nn.Parameter(piece.detach().clone()) for piece in split(name, parameter)]
        for name, parameter in gpt.named_parameters()
    }
    used = {key: value for key, value in options.items() if key not in ("adamw_lr", "fused")}
    theirs = torch.optim.Muon(
        [piece for name, pieces in apart.items() if matrices_in(name) for piece in pieces],
        lr=0.02,
        **{"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", **used},
    )
    rest = {name: pieces[0] for name, pieces in apart.items() if not matrices_in(name)}
    adamw = torch.optim.AdamW(
        [
            {"params": [rest[name] for name in EVERYTHING_ELSE], "weight_decay": options.get("weight_decay", 0.1)},
            {"params": [rest[name] for name in rest if name not in EVERYTHING_ELSE], "weight_decay": 0.0},
        ],
        lr=options.get("adamw_lr", 0.02),
        betas=(0.9, 0.95),
        fused=options.get("fused", True),
    )
    for seed in range(3):
        step_with_random_gradients(optimizer, list(gpt.parameters()), seed)
        for name, parameter in gpt.named_parameters():
            assert parameter.grad is not None
            for piece, gradient in zip(apart[name], split(name, parameter.grad), strict=True):
                piece.grad = gradient.clone()
        theirs.step()
        adamw.step()
        for name, parameter in gpt.named_parameters():
            torch.testing.assert_close(parameter, torch.cat(apart[name]), atol=1e-6, rtol=0, msg=name)
    assert not any(torch.equal(parameter, start[name]) for name, parameter in gpt.named_parameters())


def test_the_three_parts_are_not_what_torchs_muon_makes_of_the_whole() -> None:
    """Else the test above would not see a missing split."""
    gpt, whole = model(), model()
    name = "blocks.0.attn.qkv_proj.weight"
    step_with_random_gradients(MuonConfig(lr=0.02).build([(name, gpt.get_parameter(name))]), list(gpt.parameters()), 0)
    theirs = torch.optim.Muon([whole.get_parameter(name)], lr=0.02, adjust_lr_fn="match_rms_adamw")
    step_with_random_gradients(theirs, list(whole.parameters()), 0)
    assert (gpt.get_parameter(name) - whole.get_parameter(name)).abs().max() > 1e-3


def test_bfloat16_weights_keep_their_momentum() -> None:
    """Newton-Schulz works in bfloat16, too: it must not work in the buffer itself."""
    gpt = model().bfloat16()
    optimizer = MuonConfig(nesterov=False, momentum=0.5).build(gpt.named_parameters())
    step_with_random_gradients(optimizer, list(gpt.parameters()), 0)
    parameter = gpt.blocks[0].get_parameter("attn.out_proj.weight")
    assert parameter.grad is not None
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], parameter.grad * 0.5)


def test_a_loaded_state_goes_on_to_the_last_bit() -> None:
    one, other = model(), model()
    first, second = (MuonConfig(lr=0.02).build(gpt.named_parameters()) for gpt in (one, other))
    step_with_random_gradients(first, list(one.parameters()), 0)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in (1, 2):
        step_with_random_gradients(first, list(one.parameters()), seed)
        step_with_random_gradients(second, list(other.parameters()), seed)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"ns_steps": 0}, "optimizer.ns_steps=0"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn='spectral' must be match_rms_adamw or original"),
        ({"adamw_lr": 0.0}, "optimizer.adamw_lr=0.0"),
        ({"betas": (0.9,)}, "optimizer.betas"),
    ],
)
def test_wrong_values_name_the_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MuonConfig(**options)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer=muon needs whole matrices.*use accelerator=ddp"):
        MuonConfig().build(model().named_parameters(), is_sharded=True)


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    here, there = model(), model().cuda()
    step_with_random_gradients(MuonConfig(lr=0.02).build(here.named_parameters()), list(here.parameters()), 0)
    optimizer = MuonConfig(lr=0.02).build(there.named_parameters())
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        assert mine.grad is not None
        theirs.grad = mine.grad.cuda()
    optimizer.step()
    for (name, mine), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        # Newton-Schulz multiplies in bfloat16: its updates of about 0.02 differ in the third digit.
        torch.testing.assert_close(theirs.cpu(), mine, atol=1e-3, rtol=0, msg=name)
