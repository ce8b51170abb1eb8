"""The monitored metric: its direction, its name, and what is then called the best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from tiny_run import SETTINGS, fit_here, write_checkpoint, write_corpus
from torch.utils.data import Subset

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.monitored import better_when
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.experiments import monitors, run
from llm_lightning.files.metrics_csv import read_metrics

QUIET = ["callbacks.plots=null", "logger=csv"]
CLASSIFY = [*(word for word in SETTINGS if "samples" not in word), *QUIET, "task=classification"]


def test_the_name_of_a_metric_says_when_it_is_better() -> None:
    wanted = {
        "min": ["val/loss", "train/eval_loss", "val/perplexity", "val/bits_per_byte", "val/kl_per_token", "val_loss"],
        "max": [
            "val/accuracy",
            "val/accuracy_low",
            "train/eval_f1",
            "val/precision",
            "val/recall",
            "val/auroc",
            "val/reward_accuracy",
            "test/exact_match",
        ],
        None: ["val/mine", "val/chosen_reward", "val/not_loss", "val/margin_length_correlation", "accuracy/mine"],
    }
    assert {mode: [name for name in names if better_when(name) != mode] for mode, names in wanted.items()} == {
        "min": [],
        "max": [],
        None: [],
    }
    assert (Checkpoints(monitor="val/f1").mode, Checkpoints(monitor="val/mine", mode="max").mode) == ("max", "max")
    with pytest.raises(ValueError, match=r"mode=None must be min or max, for monitor=val/mine"):
        Checkpoints(monitor="val/mine")


@pytest.mark.slow
def test_the_best_and_the_end_follow_the_metric(tmp_path: Path) -> None:
    early = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1"]
    words = [*CLASSIFY, *early, "monitor=val/accuracy", "optimizer.lr=2e-3", "data.eval_batches=0"]
    outcome = fit_here([*words, "trainer.max_steps=-1", "trainer.max_epochs=3", f"hydra.run.dir={tmp_path / 'run'}"])
    assert outcome.code == 0, outcome.err
    curve = [value for _, value in read_metrics(tmp_path / "run" / "metrics.csv")["val/accuracy"]]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_value"] == pytest.approx(max(curve))
    assert max(curve) > curve[0]  # a run that looks for the smallest stops at the second
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    modes = [config["callbacks"][name]["mode"] for name in ("checkpoints", "early_stopping")]
    assert [config["monitor_mode"], *modes] == ["max"] * 3


def settings_with(**changes: Any) -> DictConfig:
    """What the checks read of a configuration."""
    early: dict[str, Any] = {
        "_target_": "lightning.pytorch.callbacks.EarlyStopping",
        "monitor": "${monitor}",
        "mode": None,
    }
    checkpoints = {**early, "_target_": "llm_lightning.callbacks.checkpoints.Checkpoints"}
    plain = {
        "monitor": "val/loss",
        "monitor_mode": None,
        "allow_targets": [],
        "trainer": {"limit_val_batches": None, "check_val_every_n_epoch": 1},
        "callbacks": {"checkpoints": checkpoints, "samples": None, "early_stopping": early},
    }
    cfg = OmegaConf.create(plain)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


class Accuracy:
    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "accuracy_low", "auroc")


def checked(cfg: DictConfig, stages: Sequence[str] = ("val", "train_eval")) -> dict[str, Any]:
    data: Any = SimpleNamespace(eval_samples=dict.fromkeys(stages))
    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    monitors.fill_modes(settings)
    monitors.refuse_unknown(settings, Accuracy(), data)  # type: ignore[arg-type]
    return settings


def test_every_open_mode_is_filled() -> None:
    cfg = settings_with(monitor="val/accuracy", callbacks__early_stopping__monitor="val/loss")
    settings = checked(cfg)
    modes = [settings["callbacks"][name]["mode"] for name in ("checkpoints", "early_stopping")]
    assert [settings["monitor_mode"], *modes] == ["max", "max", "min"]
    own = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/auroc"}  # names no mode at all
    cfg = settings_with(monitor="val/accuracy", monitor_mode="min", callbacks__own=own)
    settings = checked(cfg)
    nodes = settings["callbacks"]
    assert [nodes[name]["mode"] for name in ("checkpoints", "early_stopping")] == ["min", "min"]
    assert monitors.missing_mode(settings, nodes["own"]) == {"mode": "max"}  # and config.yaml stays as it was typed
    assert "mode" not in nodes["own"]
    cfg = settings_with(monitor="val/mine", monitor_mode="max", allow_targets=["mine"])
    assert checked(cfg)["callbacks"]["early_stopping"]["mode"] == "max"
    checked(settings_with(monitor="val_loss"))  # as the progress bar calls it
    earlier = {"callbacks__checkpoints__mode": "min", "callbacks__early_stopping__mode": "min"}
    assert checked(settings_with()) == checked(settings_with(monitor_mode="min", **earlier))  # so that those continue


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"monitor": "val/acuracy"},
        "monitor=val/acuracy: nothing logs it; did you mean val/accuracy? There are val/loss, ",
    ),
    ({"monitor": "accuracy"}, "did you mean val/accuracy?"),
    ({"monitor": "val/acc"}, "did you mean val/accuracy?"),
    (
        {"callbacks__early_stopping__monitor": "train/loss"},
        "callbacks.early_stopping.monitor=train/loss: nothing logs it",
    ),
    ({"callbacks__early_stopping__monitor": "train/loss"}, "did you mean train/eval_loss?"),
    ({"callbacks__checkpoints__monitor": "test/loss"}, "callbacks.checkpoints.monitor=test/loss: nothing logs it"),
    (
        {"trainer__limit_val_batches": 0},
        "callbacks.early_stopping.monitor=val/loss is never measured with trainer.limit",
    ),
    ({"monitor_mode": "maximum"}, "monitor_mode='maximum' must be min, max, or null"),
    (
        {"trainer__check_val_every_n_epoch": 2, "callbacks__early_stopping__check_on_train_epoch_end": True},
        "callbacks.early_stopping.check_on_train_epoch_end=true looks after every epoch, but validation comes",
    ),
    (
        {"monitor": "val/mine", "allow_targets": ["mine"]},
        "when small or large; add monitor_mode=min or monitor_mode=max",
    ),
    (
        {"callbacks__early_stopping__monitor": "val/mine", "allow_targets": ["mine"]},
        "add callbacks.early_stopping.mode=min or callbacks.early_stopping.mode=max",
    ),
]


def test_a_wrong_metric_is_refused_by_name() -> None:
    failures = []
    for changes, message in REFUSED:
        try:
            checked(settings_with(**changes))
            failures.append((changes, "not refused"))
        except ValueError as error:
            if message not in str(error):
                failures.append((changes, str(error)))
    assert failures == []
    stages = ["val", "val/hard", "val/easy-2", "train_eval"]
    checked(settings_with(monitor="val/hard/auroc"), stages)
    for monitor, near in (
        ("val/hrad/loss", "val/hard/loss"),
        ("val/hard/los", "val/hard/loss"),
        ("val/hard", "val/hard/loss"),
        ("val/easy2/accuracy", "val/easy-2/accuracy"),
    ):
        with pytest.raises(ValueError, match=f"^monitor={monitor}: nothing logs it; did you mean {near}\\? There are "):
            checked(settings_with(monitor=monitor), stages)
    with pytest.raises(ValueError, match="did you mean val/loss"):  # only what the data have
        checked(settings_with(monitor="val/hard/loss"))
    with pytest.raises(ValueError, match="there is no validation text; set monitor=train/eval_loss"):
        checked(settings_with(), stages=["train_eval"])


def test_a_metric_that_nothing_logs_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "announce", lambda *_: pytest.fail("training began"))
    early = ["callbacks=early_stopping", "callbacks.early_stopping.monitor=train/loss"]
    outcome = fit_here([*CLASSIFY, *early, f"hydra.run.dir={tmp_path / 'run'}"])
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "did you mean train/eval_loss?" in outcome.err


@pytest.mark.slow
def test_a_further_validation_set_steers_a_run_only_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = PretrainingDataModule.build

    def with_a_set(self: Any) -> None:
        build(self)
        self.eval_samples = {"val": self.eval_samples["val"], "val/hard": Subset(self.train_samples, [0, 1, 2])}

    monkeypatch.setattr(PretrainingDataModule, "build", with_a_set)
    words = [word for word in SETTINGS if "samples" not in word]
    words += [*QUIET, "callbacks.samples=null", "trainer.val_check_interval=1", "trainer.check_val_every_n_epoch=null"]
    words += [f"data.path={write_corpus(tmp_path / 'a.txt')}", "trainer.max_steps=3", "optimizer.lr=3e-2"]
    for monitor in ("val/loss", "val/hard/loss"):
        run_dir = tmp_path / monitor.replace("/", "_")
        outcome = fit_here([*words, f"monitor={monitor}", f"hydra.run.dir={run_dir}"])
        assert outcome.code == 0, outcome.err
        curves = read_metrics(run_dir / "metrics.csv")
        assert [step for step, _ in curves["val/hard/loss"]] == [step for step, _ in curves["val/loss"]] == [0, 1, 2]
        assert curves["val/hard/loss"] != curves["val/loss"]
        summary = json.loads((run_dir / "summary.json").read_text())
        assert (summary["monitor"], summary["best_value"]) == (
            monitor,
            pytest.approx(min(value for _, value in curves[monitor])),
        )


PAIRS = ["task=dpo", "callbacks.samples=null", "data.template='{instruction}{response}'"]
FORMS = {
    "pretraining": ["callbacks.samples=null"],
    "classification": ["task=classification"],
    "sft": [
        "task=sft",
        "callbacks.samples=null",
        "callbacks.responses=null",
        "data.template='{instruction}{response}'",
    ],
    "dpo": PAIRS,
    "dpo cached": [*PAIRS, "task.reference=cached"],
    "simpo": [*PAIRS, "task.loss=simpo"],
}


@pytest.mark.parametrize("forms", [["classification", "dpo"], pytest.param(list(FORMS), marks=pytest.mark.slow)])
def test_each_task_logs_the_metrics_that_it_names(
    forms: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    names_of = monitors.metric_names
    monkeypatch.setattr(monitors, "metric_names", lambda *args: named.extend(names_of(*args)) or names_of(*args))
    rows = [{"instruction": f"Say {i}", "output": "yes", "chosen": "yes", "rejected": "no"} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    init = f"init_from={write_checkpoint(tmp_path / 'base.ckpt')}"
    failures = {}
    for form in forms:
        named.clear()
        data = {"pretraining": ["data.path=text.txt"], "classification": []}.get(form, ["data.path=rows.json"])
        data = [word.replace("=", f"={tmp_path}/") for word in data]
        settings = [word for word in SETTINGS if "samples" not in word and "max_steps" not in word]
        outcome = fit_here(
            [*settings, *QUIET, *FORMS[form], *data, init, "trainer.max_steps=1", f"hydra.run.dir={tmp_path / form}"]
        )
        assert outcome.code == 0, outcome.err
        logged = {
            name for name in read_metrics(tmp_path / form / "metrics.csv") if name.startswith(("val/", "train/eval"))
        }
        if logged != set(named):
            failures[form] = logged ^ set(named)
    assert failures == {}
