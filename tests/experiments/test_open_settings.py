"""Settings that are open until weights are read: what given weights bring, and optimizer.lr=auto."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from model_kinds import OTHERS
from tiny_run import SETTINGS, fit_here, write_checkpoint, write_corpus

from llm_lightning.experiments.build import model_config, task_of
from llm_lightning.experiments.foreign import continued
from llm_lightning.experiments.open_settings import take_from_run, take_from_weights, take_rate
from llm_lightning.experiments.settings.changes import refuse_changes
from llm_lightning.experiments.settings.checks import check_overrides
from llm_lightning.experiments.settings.nodes import plain
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tasks.sft import SFTModule
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.renamed import ADDED, REPLACED, translated, with_keys_of_today

CONF = Path(__file__).parents[2] / "conf"
BYTES, GPT2 = build_tokenizer("byte"), build_tokenizer("gpt2")
GIVEN = GPTConfig(300, 2048, 3, 4, 32, 0.01, 0.02, 0.03, layer_norm_eps=1e-6, **OTHERS["llama"])
"""Weights that agree with nano in nothing."""


def settings_of(*words: str) -> dict[str, Any]:
    settings: dict[str, Any] = plain(check_overrides(list(words), CONF))
    return settings


# --- what weights bring ----------------------------------------------------------------------------------------------


def test_weights_say_what_the_model_is_and_nothing_of_the_chosen_one_is_left() -> None:
    for choice in ([], ["model=gpt2_small", "tokenizer=word"]):
        settings = settings_of("init_from=x", *choice)
        take_from_weights(settings, GIVEN, BYTES)
        taken = {name: settings["model"][name] for name in asdict(GIVEN)}
        assert taken == asdict(GIVEN) | {"context_length": 1024}
        assert settings["tokenizer"] == {"name": "byte", "vocab_size": None}


def test_an_experiment_may_choose_dropout_context_and_an_untied_head_for_given_weights(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: gpt2_medium\ninit_from: x\n"
        "model: {tied_head: false, context_length: 512}\n"
    )
    settings = settings_of(f"--config-dir={tmp_path}", "task=sft", "experiment=mine", "model.attention_dropout=0.2")
    take_from_weights(settings, GIVEN, BYTES)
    model = settings["model"]
    assert (model["tied_head"], model["context_length"], model["n_layer"]) == (False, 512, 3)
    assert [model[f"{name}_dropout"] for name in ("embedding", "attention", "residual")] == [0.0, 0.2, 0.0]


def test_typed_sizes_that_the_weights_overrule_are_named(caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_of("init_from=x", "model.n_layer=3", "model.n_embd=64", "model.mlp=gelu")
    with caplog.at_level(logging.INFO):
        take_from_weights(settings, GIVEN, BYTES)
    assert [line for line in caplog.messages if "ignored" in line] == [
        "model.n_embd=64 is ignored: the weights of init_from have 32",
        "model.mlp=gelu is ignored: the weights of init_from have swiglu",
    ]
    assert "model.context_length=1024, although the weights allow 2048: set it for more" in caplog.messages


def test_a_context_beyond_the_weights_is_refused_before_data_are_read() -> None:
    settings = settings_of("init_from=x", "model.context_length=2049")
    with pytest.raises(ValueError, match=r"context_length=2049 exceeds the 2048 positions .*=2048 or less"):
        take_from_weights(settings, GIVEN, BYTES)


@pytest.mark.parametrize("word", ["model.context_length=abc", "model.dropout=high", "model.n_layr=3", "optimizer.lr=x"])
def test_a_wrong_key_or_kind_is_refused_although_the_weights_decide(word: str) -> None:
    key = re.escape(word.partition("=")[0])
    with pytest.raises(ValueError, match=rf"{key}.*(must be a|did you mean 'model.n_layer')"):
        settings_of("init_from=x", word)


# --- the learning rate -----------------------------------------------------------------------------------------------

RATES = [
    ("", BYTES, 3e-3),
    ("task=sft", BYTES, 1e-3),
    ("task=lora", BYTES, 1e-3),
    ("task=classification", BYTES, 1e-3),
    ("task=dpo", BYTES, 2e-4),
    ("task=dpo lora=default", BYTES, 2e-4),
    ("model=nano_llama optimizer=muon", BYTES, 3e-3),
    ("model=nano", GPT2, 3e-3),
    ("model=gpt2_small", GPT2, 6e-4),
    ("model=gpt2_small model.tied_head=false optimizer=torch optimizer._target_=torch.optim.NAdam", GPT2, 6e-4),
    ("model=gpt2_medium model.tied_head=false", GPT2, 3e-4),
    ("model=gpt2_large", GPT2, 2.5e-4),
    ("model=gpt2_xl", GPT2, 2e-4),
    ("model=gpt2_small task=sft", GPT2, 5e-5),
    ("model=gpt2_xl task=classification", GPT2, 5e-5),
    ("model=gpt2_medium task=dpo", GPT2, 5e-6),
    ("model=smollm2_135m model.vocab_size=49152 task=lora", BYTES, 5e-4),
    ("model=smollm2_135m model.vocab_size=49152 task=dpo lora=default", BYTES, 1e-4),
    ("model=llama3_2_1b model.vocab_size=128256", BYTES, 2e-4),
    ("task=sft optimizer=sgd", BYTES, 0.3),
    ("task=sft optimizer.lr=7e-4", BYTES, 7e-4),
]


@pytest.mark.parametrize(("line", "tokenizer", "rate"), RATES, ids=[line or "default" for line, _, _ in RATES])
def test_every_recipe_has_its_rate(line: str, tokenizer: Any, rate: float) -> None:
    settings = settings_of(*line.split())
    table = settings["optimizer"].pop("rates", {})
    take_rate(settings, table, task_of(settings), model_config(settings, task_of(settings), tokenizer))
    assert settings["optimizer"]["lr"] == rate


def test_pretraining_goes_on_at_a_lower_rate_than_it_began() -> None:
    for model, rate in (("gpt2_small", 1e-4), ("nano", 3e-3)):
        settings = settings_of(f"model={model}")
        config = model_config(settings, task_of(settings), GPT2)
        take_rate(settings | {"init_from": "x"}, settings["optimizer"].pop("rates"), task_of(settings), config)
        assert settings["optimizer"]["lr"] == rate


def test_a_task_of_ones_own_has_the_rates_of_the_one_it_is_made_from() -> None:
    class Polite(SFTModule):
        task = "polite"

    class Other(Polite):
        task = "other"

    settings = settings_of("task=sft")
    take_rate(settings, {"up_to": [1e9], "pretraining": [1, 2], "sft": [3, 4]}, Other, GIVEN)
    assert settings["optimizer"]["lr"] == 3


@pytest.mark.parametrize(
    ("table", "refusal"),
    [
        ({}, "optimizer.lr=auto: optimizer.rates has no pretraining; set optimizer.lr=NUMBER"),
        ({"sft": [1.0]}, "optimizer.lr=auto: optimizer.rates has no up_to"),
        ({"up_to": [1e9]}, "optimizer.lr=auto: optimizer.rates has no pretraining; set optimizer.lr=NUMBER"),
        ({"up_to": [1e9], "pretraining": [1.0]}, "optimizer.rates.pretraining has 1 rates, but up_to divides 2 sizes"),
    ],
)
def test_rates_that_are_no_table_are_refused(table: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ValueError, match=re.escape(refusal)):
        take_rate(settings_of(), table, SFTModule, GIVEN)


# --- earlier versions ------------------------------------------------------------------------------------------------


def test_keys_that_are_gone_are_refused_where_they_are_typed_or_written(tmp_path: Path) -> None:
    for key in REPLACED:
        with pytest.raises(ValueError, match=rf"{key} was removed; write optimizer.lr=VALUE"):
            check_overrides([f"{key}=1e-3"], CONF)
    for group in ("model", "optimizer"):
        (tmp_path / group).mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults:\n  - nano\n  - _self_\npeak_lr: 1e-3\n")
    with pytest.raises(ValueError, match=r"model.peak_lr was removed; set optimizer.lr instead"):
        check_overrides([f"--config-dir={tmp_path}", "model=mine"], CONF)
    (tmp_path / "optimizer" / "mine.yaml").write_text("defaults:\n  - adamw\n  - _self_\nlr: ${model.peak_lr}\n")
    with pytest.raises(ValueError, match=r"optimizer.lr=\$\{model.peak_lr\}: model.peak_lr was removed; leave"):
        check_overrides([f"--config-dir={tmp_path}", "optimizer=mine"], CONF)


def test_a_run_of_an_earlier_version_goes_on_with_its_rate_and_its_model(tmp_path: Path) -> None:
    """Its header has the rates of the model, and lacks the architecture."""
    before = settings_of("task=sft")
    del before["optimizer"]["rates"]
    before["model"] = {"context_length": 128, "n_layer": 4, "n_head": 2, "n_embd": 128, "vocab_size": None}
    before["model"] |= {f"{kind}dropout": 0.0 for kind in ("", "embedding_", "attention_", "residual_")}
    before["model"] |= {"qkv_bias": True, "tied_head": True, "init": "gpt2", "activation_checkpointing": False}
    before["model"] |= {"peak_lr": 3e-3, "finetune_lr": 1e-3, "preference_lr": 2e-4}
    before["optimizer"]["lr"] = 1e-3
    for words in (["task=sft"], ["task=sft", "init_from=x"]):
        now = settings_of(*words)
        del now["optimizer"]["rates"]
        take_from_run(now, {"config": translated(before)})
        refuse_changes(translated(before), now)
        assert now["optimizer"]["lr"] == 1e-3
    with pytest.raises(ValueError, match=r"model.n_layer was 4 and is 5"):
        refuse_changes(translated(before), now | {"model": now["model"] | {"n_layer": 5}})
    command = {"folder": "x", "config_dir": None, "overrides": ["task=sft", "model.finetune_lr=2e-3"]}
    (tmp_path / "command.json").write_text(json.dumps(command))
    assert "optimizer.lr=2e-3" in continued([f"resume={tmp_path}"], CONF)


def test_runs_of_before_and_of_today_are_listed_with_the_same_keys() -> None:
    before = {"model.n_layer": 4, "model.peak_lr": 3e-3, "seed": 1}
    assert with_keys_of_today(before) == {"model.n_layer": 4, "seed": 1} | ADDED
    today = {"model.n_layer": 4, "model.norm": "rms", "model.rope_scaling.factor": 8.0}
    assert with_keys_of_today(dict(today)) == today


# --- the whole run ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_weights_records_what_they_brought_and_goes_on(tmp_path: Path) -> None:
    given = write_checkpoint(tmp_path / "given.ckpt", 2, 2048, kind="qwen3")
    words = [word for word in SETTINGS if not word.startswith(("model.", "tokenizer"))]
    words += ["lora=default", f"init_from={given}", f"data.path={write_corpus(tmp_path / 'text', 1500)}"]
    words += ["data.eval_batches=1", "data.batch_size=2"]
    out = fit_here([*words, f"hydra.run.dir={tmp_path / 'run'}"]).out
    assert "model.context_length=1024, although the weights allow 2048" in out
    assert "optimizer.lr=0.003: auto for pretraining_lora" in out
    assert "ignored" not in out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    model = {"n_layer": 2, "head_dim": 6, "qk_norm": True, "tied_head": False, "dropout": None, "context_length": 1024}
    assert {key: config["model"][key] for key in model} == model
    assert (config["tokenizer"]["name"], config["optimizer"]["lr"]) == ("byte", 3e-3)
    assert "rates" not in config["optimizer"]
    given.unlink()  # the checkpoint has everything
    longer = fit_here([*words, f"hydra.run.dir={tmp_path / 'run'}", "trainer.max_steps=5"])
    assert "Finished 5 steps" in longer.out, longer.err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == config["model"]


def test_a_run_from_before_line_ends_were_changed_keeps_them() -> None:
    groups: dict[str, Any] = {"model": {}, "tokenizer": {}, "optimizer": {"lr": 1.0}}
    for before, kept in (({"path": "a"}, "keep"), ({"path": "a", "newlines": "lf"}, "lf")):
        now = {**groups, "data": {"path": "a", "newlines": "lf"}}
        take_from_run(now, {"config": {**groups, "data": before}})
        refuse_changes({**groups, "data": before}, now)
        assert now["data"]["newlines"] == kept
