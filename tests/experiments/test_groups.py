"""`null` and `none` mean none where a group can be none; elsewhere they are refused, and the option to use is named."""

from __future__ import annotations

import copy
import functools
import inspect
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny_run import ROOT, WITH_PLOTS, train_here, write_corpus

from llm_lightning.experiments.command_line import as_hydra_reads, continue_run
from llm_lightning.experiments.settings.checks import NOTHING_READS, SET_ELSEWHERE, check_overrides
from llm_lightning.experiments.settings.ignored import ignored_settings
from llm_lightning.experiments.settings.overrides import key_of

CONF = ROOT / "conf"


def composed(line: str) -> Any:
    return check_overrides(as_hydra_reads(shlex.split(line), CONF), CONF)


@pytest.mark.slow
def test_none_switches_a_group_off_whatever_a_preset_puts_into_it() -> None:
    for line in (
        "logger=null callbacks=null",
        "logger=none callbacks=none lora=null",
        "task=sft logger=[] callbacks=null",
        "experiment=book/ch07_lora logger=NULL callbacks=None lora=none",
        "task=lora lora=null callbacks=none logger=none",
    ):
        config = composed(line)
        assert (config.logger, config.callbacks, config.lora) == ({}, {}, {}), line
    assert set(composed("task=sft logger=null").callbacks) >= {"checkpoints", "samples", "responses"}
    assert set(composed("-m logger=null,csv").callbacks) >= {"checkpoints"}


def test_the_command_line_may_add_to_what_is_none() -> None:
    monitor = "lightning.pytorch.callbacks.LearningRateMonitor"
    config = composed(f"task=sft callbacks=none +callbacks.lr._target_={monitor}")
    assert OmegaConf.to_container(config.callbacks) == {"lr": {"_target_": monitor}}


@pytest.mark.slow
def test_a_file_may_switch_a_group_off(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    for text in (
        "defaults:\n  - override /logger: null\n  - override /callbacks: none",
        "defaults:\n  - override /task: sft\n  - override /logger: none\n  - override /callbacks: null",
        "logger: null\ncallbacks: null",
    ):
        file.write_text(f"# @package _global_\n{text}\n")
        config = composed(f"--config-dir {tmp_path} experiment=mine")
        assert (config.logger, config.callbacks) == ({}, {}), text
    file.write_text("# @package _global_\nscheduler: null\n")
    with pytest.raises(ValueError, match=r"scheduler: null in experiment=mine.*scheduler=constant"):
        composed(f"--config-dir {tmp_path} experiment=mine")
    file.write_text("# @package _global_\ndefaults:\n  - override /optimizer: null\n")
    with pytest.raises(ValueError, match=r"optimizer: null in experiment=mine.*optimizer=adamw"):
        composed(f"--config-dir {tmp_path} experiment=mine")


def test_a_preset_that_is_none_is_not_chosen_before_either() -> None:
    for none in ("null", "none"):
        assert composed(f"experiment=book/ch05 experiment={none}").seed == 1234
        assert composed(f"sweep={none} debug={none} pipeline=null").seed == 1234


def test_resume_without_the_experiment_that_a_run_had(tmp_path: Path) -> None:
    (tmp_path / "command.json").write_text('{"folder": "/", "config_dir": null, "overrides": ["experiment=book/ch05"]}')
    words = as_hydra_reads(continue_run([f"resume={tmp_path}", "experiment=null"], CONF), CONF)
    assert not [word for word in words if word.startswith("experiment")]


# (command line, what the one line says)
REFUSED = [
    ("scheduler=null", "scheduler=null: every run needs one; scheduler=constant"),
    ("scheduler=none", "scheduler=none: every run needs one; scheduler=constant"),
    ("-m scheduler=constant,null", "every run needs one; scheduler=constant"),
    ("optimizer=null", "optimizer=adamw"),
    ("model=none", "model=nano"),
    ("tokenizer=null", "tokenizer=byte"),
    ("data=null", "data: classification, instruction, preference, pretraining"),
    ("task=null", "task=pretraining"),
    ("trainer=null", "trainer=default"),
    ("accelerator=null", "accelerator=auto"),
    ("scheduler=[]", "every run needs one; scheduler=constant"),
    (
        "callbacks=none callbacks.samples.n_prompts=3",
        "n_prompts would have no effect: callbacks=none",
    ),
    ("lora=none lora.rank=3", "lora.rank would have no effect: lora=none"),
    ("lora.rank=4", "lora.rank is a setting of lora=default; choose that as well"),
    (
        "callbacks.early_stopping.patience=3",
        "patience is a setting of callbacks=early_stopping",
    ),
    ("callbacks.responses.max_records=3", "callbacks.responses.max_records is a setting of task=sft"),
    ("scheduler=constant scheduler.warmup=3", "scheduler.warmup is a setting of scheduler=warmup_cosine"),
    ("data.label_column=x", "data.label_column is a setting of task=classification"),
    ("task.beta=0.2", "task.beta is a setting of task=dpo"),
    ("+trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_algorithm would have no effect"),
    ("+trainer.enable_model_summary=true", "trainer.enable_model_summary would have no effect"),
    ("+trainer.overfit_batches=1", "trainer.overfit_batches would have no effect; set debug=overfit instead"),
    ("trainer.use_distributed_sampler=true", "trainer.use_distributed_sampler must stay false"),
]


@pytest.mark.slow
def test_what_cannot_have_an_effect_is_refused() -> None:
    for line, message in REFUSED:
        with pytest.raises(ValueError, match=r".") as error:
            composed(line)
        assert message in str(error.value), line
        assert "\n" not in str(error.value)


def test_every_argument_of_the_trainer_that_is_refused_exists() -> None:
    arguments = {f"trainer.{name}" for name in inspect.signature(L.Trainer.__init__).parameters}
    assert {key for key in (*NOTHING_READS, *SET_ELSEWHERE) if key.startswith("trainer.")} <= arguments


# (command line, what the line begins with; None: no line)
IGNORED = [
    ("", None),
    ("data.path=a.txt data.name=the_verdict", "data.name=the_verdict is ignored: data.path"),
    ("task=classification data.path=a.tsv data.name=sms_spam", None),
    ("data.hf_split=train", "data.hf_split=train is ignored"),
    ("task=sft data.columns.output=x", "data.columns.output=x is ignored"),
    ("task=sft data.columns.output=x data.path=a.json", None),
    ("task=sft data.split=order data.split_seed=3", "data.split_seed=3 is ignored"),
    ("task=sft data.shuffle=false data.bucket=true", "data.bucket=true is ignored"),
    ("init_from=a.ckpt tokenizer.vocab_size=300", "tokenizer.vocab_size=300 is ignored"),
    ("init_from=a.ckpt model.init=torch", "model.init=torch is ignored"),
    ("task=dpo task.gamma=1", "task.gamma=1 is ignored"),
    ("task=dpo task.loss=simpo task.gamma=1", None),
    ("task=dpo task.loss=simpo task.reference=copy", "task.reference=copy is ignored"),
    ("task=classification lora=default task.trained_blocks=2", "task.trained_blocks=2 is ignored"),
    ("scheduler=constant optimizer.clip_after_warmup=true", "optimizer.clip_after_warmup=true is ignored"),
    ("scheduler.warmup=0 scheduler.initial_lr=1e-4", "scheduler.initial_lr=0.0001 is ignored"),
    ("init_from=a.ckpt model=gpt2_small", "model=gpt2_small is ignored: the weights of init_from"),
    ("init_from=a.ckpt tokenizer=byte", "tokenizer=byte is ignored: it comes with the weights"),
    ("init_from=a.ckpt model.context_length=64 model.dropout=0.1", None),
    ("callbacks.samples.n_prompts=2", "callbacks.samples.n_prompts=2 is ignored"),
    ("callbacks.samples.n_prompts=2 callbacks.samples.prompts=null", None),
    ("callbacks.samples.temperature=0 callbacks.samples.top_k=9", "callbacks.samples.top_k=9 is ignored"),
    ("callbacks=none monitor=train/loss", "monitor=train/loss is ignored"),
    ("logger=none trainer.log_every_n_steps=5", "trainer.log_every_n_steps=5 is ignored"),
    ("logger=tensorboard callbacks.plots.every_n_seconds=5", "callbacks.plots.every_n_seconds=5 is ignored"),
    (
        "data.global_batch_size=64 trainer.accumulate_grad_batches=4",
        "trainer.accumulate_grad_batches=4 is ignored: it follows from data.global_batch_size",
    ),
    ("data.batch_size=64 trainer.accumulate_grad_batches=4", None),
    ("debug=fast_dev_run trainer.max_epochs=5", "trainer.max_epochs=5 is ignored"),
    ("callbacks.checkpoints=null", "No checkpoints are kept"),
    ("logger=null", "No curves are drawn"),
]


def test_a_setting_that_is_ignored_is_named_in_one_line() -> None:
    for line, beginning in IGNORED:
        words = as_hydra_reads(shlex.split(line), CONF)
        groups = tuple(word for word in words if "." not in key_of(word))
        config = copy.deepcopy(_chosen(groups))
        for word in words:
            if word not in groups:
                OmegaConf.update(config, key_of(word), OverridesParser.create().parse_override(word).value())
        lines = list(ignored_settings(OmegaConf.to_container(config, resolve=True), words))
        assert any(one.startswith(beginning) for one in lines) if beginning else not lines, (line, lines)


OWN_FILES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"val_path": "v.txt", "val_fraction": 0.2}, "val_fraction", "data.val_fraction=0.2 is ignored: data.val_path"),
    ({"val_path": None, "val_fraction": 0.2}, "val_fraction", None),
    ({"val_path": "v.txt", "test_fraction": 0.2}, "test_fraction", None),
    ({"test_path": ["a"], "test_fraction": 0.2}, "test_fraction", "data.test_fraction=0.2 is ignored: data.test_path"),
    ({"hf_dataset": "x", "hf_val_split": "v", "val_fraction": 0.2}, "val_fraction", "data.val_fraction=0.2 is ignored"),
    ({"hf_val_split": "v", "val_fraction": 0.2}, "val_fraction", None),
    ({"mixture": [{"name": "a"}], "name": "b"}, "name", "data.name=b is ignored: data.mixture takes precedence"),
    ({"mixture": [{"name": "a"}], "text_field": "b"}, "text_field", None),
    ({"name": "b", "val_sets": {"hard": "x"}, "text_field": "b"}, "text_field", None),
    ({"name": "b", "val_sets": {}, "text_field": "b"}, "text_field", "data.text_field=b is ignored: a named data set"),
]


def test_what_files_of_ones_own_make_ineffective_is_named() -> None:
    for data, typed, beginning in OWN_FILES:
        lines = [one for one in ignored_settings({"data": data}, [f"data.{typed}=x"]) if "is ignored" in one]
        assert len(lines) == (beginning is not None), (data, lines)
        assert all(one.startswith(str(beginning)) for one in lines), (data, lines)


@functools.cache
def _chosen(groups: tuple[str, ...]) -> Any:
    return check_overrides(groups, CONF)


@pytest.mark.slow
def test_runs_without_logs_or_callbacks(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
    settings = [word for word in WITH_PLOTS if "samples." not in word] + [f"data.path={corpus}"]
    bare = train_here([*settings, "logger=null", "callbacks=null", f"hydra.run.dir={tmp_path / 'bare'}"])
    assert bare.code == 0, bare.err
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert names == {".lock", "command.json", "config.json", "config.yaml", "summary.json", "train.log"}
    assert "No checkpoints are kept" in bare.out

    folder = tmp_path / "unlogged"
    assert train_here([*settings, "logger=none", f"hydra.run.dir={folder}"]).code == 0
    names = {path.name for path in folder.iterdir()}
    assert not {"metrics.csv", "plots"} & names
    assert not any("tfevents" in name for name in names)
    longer = train_here([f"resume={folder}", "trainer.max_steps=6"])
    assert "Finished 6 steps" in longer.out, longer.err
    assert not (folder / "metrics.csv").exists()
