"""AdamW's settings and groups."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from llm_lightning.optim.adamw import AdamWConfig


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamWConfig(lr=0), "optimizer.lr=0"),
        (lambda: AdamWConfig(decay="some"), "matrices or all"),
        (lambda: AdamWConfig(max_grad_norm=0), "null for no clipping"),
        (lambda: AdamWConfig().build([]), "nothing to train"),
        (lambda: AdamWConfig(fused=True).build(nn.Linear(2, 2).named_parameters(), is_scaled=True), "leave fused out"),
    ],
)
def test_wrong_values_name_the_key(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(("is_scaled", "is_sharded", "fused"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_fused_wherever_it_can_be(is_scaled: int, is_sharded: int, fused: bool) -> None:
    built = AdamWConfig().build(
        nn.Linear(2, 2).named_parameters(), is_scaled=bool(is_scaled), is_sharded=bool(is_sharded)
    )
    assert [group["fused"] for group in built.param_groups] == [fused, fused]


def test_decay_of_matrices_or_of_all() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    layer[2].requires_grad_(False)
    matrices = AdamWConfig().build(layer.named_parameters())
    assert [(g["param_names"], g["weight_decay"]) for g in matrices.param_groups] == [
        (["0.weight"], 0.1),
        (["0.bias", "1.weight", "1.bias"], 0.0),
    ]
    everything = AdamWConfig(decay="all").build(layer.named_parameters())
    assert [(len(g["params"]), g["weight_decay"]) for g in everything.param_groups] == [(4, 0.1)]
