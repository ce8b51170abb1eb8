"""`python train.py`, end to end: what a run leaves, how it goes on, how it stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forked
from tiny_run import (
    SETTINGS,
    WITH_PLOTS,
    Outcome,
    digests,
    finish,
    fit_here,
    living,
    start,
    train_here,
    write_checkpoint,
    write_corpus,
)

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import load_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.txt")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Outcome]:
    """One epoch of 10 steps."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, train_here(one_epoch(corpus, folder, base=WITH_PLOTS))


@pytest.fixture
def run(first: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(first[0], tmp_path / "run"))


def one_epoch(corpus: Path, folder: Path, *more: str, base: list[str] = SETTINGS) -> list[str]:
    """A command line; `more` wins."""
    base = [*base, "trainer.max_epochs=1", "trainer.max_steps=-1", f"data.path={corpus}", f"hydra.run.dir={folder}"]
    return list({word.partition("=")[0]: word for word in [*base, *more]}.values())


def steps(folder: Path, name: str = "train/loss") -> list[int]:
    return [step for step, _ in read_metrics(folder / "metrics.csv")[name]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "checkpoints" / "last.ckpt")["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


# --- what a run leaves -------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(first: tuple[Path, Outcome], corpus: Path) -> None:
    folder, outcome = first
    assert (outcome.code, outcome.err) == (0, "")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    promised = {"config.yaml", "config.json", "command.json", "train.log", "metrics.csv", "samples.md", "summary.json"}
    promised |= {"plots/loss.png", "plots/lr.png", "plots/gradient_norm.png"}
    promised |= {f"checkpoints/{name}.ckpt" for name in ("last", "best", "step_00000010")}
    assert promised <= files
    assert files - promised - {".lock"} == {name for name in files if name.startswith("events.out.tfevents")}
    assert (folder / "metrics.csv").read_text().startswith("step,train/loss,val/loss,train/eval_loss,")
    assert steps(folder) == list(range(10))
    assert steps(folder, "val/loss") == steps(folder, "train/eval_loss") == [9]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == checkpoints.read_header(folder / "checkpoints" / "last.ckpt")["config"]
    assert (config["data"]["path"], config["model"]["attention_dropout"]) == (str(corpus), config["model"]["dropout"])
    assert "    to be " in (folder / "samples.md").read_text()


def test_the_numbers_of_a_run_agree(first: tuple[Path, Outcome], corpus: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, outcome = first
    summary = json.loads((folder / "summary.json").read_text())
    metrics = read_metrics(folder / "metrics.csv")
    best = checkpoints.read_header(folder / "checkpoints" / "best.ckpt")
    assert (summary["finished"], summary["steps"], summary["total_steps"], summary["epochs"]) == (True, 10, 10, 1)
    assert summary["tokens"] == len(corpus.read_bytes()) * 9 // 10 - 1  # every training byte but the first
    assert summary["best_value"] == best["metrics"]["val/loss"] == pytest.approx(metrics["val/loss"][-1][1])
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(10))
    for name in ("lr", "val/loss", "val/perplexity", "train/grad_norm"):
        assert events.Scalars(name)[-1].value == pytest.approx(metrics[name][-1][1], rel=1e-6)
    assert "Batch: 16 a step = 16 samples x 1 accumulated x 1 processes; 10 steps" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("Next: llm-lightning generate ")


# --- the same command, and others --------------------------------------------------------------------------------


def test_the_same_command_again_says_that_the_run_is_finished(run: Path, corpus: Path) -> None:
    before = digests(run)
    code, out, err = train_here(one_epoch(corpus, run))
    assert (code, err) == (0, "")
    assert (
        "This run is finished: it ends at the first of trainer.max_epochs=1 and trainer.max_steps=-1. To train on, "
        in out
    )
    assert digests(run) == before


@pytest.mark.slow
def test_more_epochs_continue(run: Path, corpus: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    code, out, err = fit_here(one_epoch(corpus, run, "trainer.max_epochs=2"))
    assert (code, err) == (0, "")
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "Resuming from " in out
    assert steps(run) == list(range(20))
    assert steps(run, "val/loss") == [9, 19]
    assert json.loads((run / "summary.json").read_text())["steps"] == 20
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_a_changed_setting_is_refused_by_name_old_and_new_value(run: Path, corpus: Path) -> None:
    before = digests(run)
    code, _, err = fit_here(one_epoch(corpus, run, "optimizer.lr=0.5", "trainer.max_epochs=2"))
    assert code == 2
    assert err.startswith("error: cannot resume with other settings: optimizer.lr was 0.003 and is 0.5; ")
    assert err.count("\n") == 1
    assert {path: digest for path, digest in digests(run).items() if path in before} == before


def test_resume_continues_a_run_from_any_folder(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was started with relative paths and a `--config-dir`, and is continued from elsewhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "mine" / "experiment").mkdir(parents=True)
    (home / "mine" / "experiment" / "warm.yaml").write_text("# @package _global_\nseed: 77\n")
    elsewhere.mkdir()
    shutil.copy(corpus, home / "corpus.txt")
    monkeypatch.chdir(home)
    more = ["experiment=warm", "hydra.run.dir='run=1'", "callbacks.samples=null"]
    base = [word for word in one_epoch(Path("corpus.txt"), Path(), *more) if "samples." not in word]
    assert train_here(["--config-dir=mine", *base]).code == 0
    monkeypatch.chdir(elsewhere)
    before = digests(home)
    code, _, err = train_here(["resume=../home/run=1"])
    assert code == 2
    assert "command.json asks for --config-dir=mine (files that can set anything)" in err
    assert digests(home) == before
    code, out, err = train_here(["resume=../home/run=1", "--config-dir=../home/mine"])
    assert (code, err) == (0, "")
    assert "This run is finished" in out
    code, out, err = train_here(["trainer.max_epochs=2", "resume=../home/run=1", "--config-dir", "../home/mine"])
    assert (code, err) == (0, "")
    assert steps(home / "run=1") == list(range(20))
    header = checkpoints.read_header(home / "run=1" / "checkpoints" / "last.ckpt")
    assert (header["config"]["seed"], header["config"]["data"]["path"]) == (77, "corpus.txt")
    assert header["lineage"]["places"]["data.path"]["from_run"] == ["../corpus.txt"]
    recorded = json.loads((home / "run=1" / "command.json").read_text())
    assert (recorded["config_dir"], recorded["folder"]) == ("../home/mine", str(elsewhere))
    assert not list(elsewhere.iterdir())


def test_preview_shows_windows_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    code, out, err = fit_here(one_epoch(corpus, tmp_path / "run", "data.preview=true"))
    assert (code, err) == (0, "")
    text = corpus.read_text()
    assert out.startswith(f"--- window 0: 16 targets\n{text[:17]}\n--- window 1: 16 targets\n{text[16:33]}")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text("of a run")
    assert fit_here(one_epoch(corpus, tmp_path / "run", "data.preview=true")).code == 0
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == {"train.log": "of a run"}


def test_plot_lr_draws_the_schedule_of_the_run_and_leaves_no_folder(corpus: Path, tmp_path: Path) -> None:
    words = ["plot_lr=true", "scheduler.warmup=2", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=3"]
    code, out, err = fit_here(one_epoch(corpus, tmp_path / "run", *words))
    assert (code, err) == (0, "")
    rate, _, drawn = out.partition("\n")
    assert rate.startswith("optimizer.lr=0.003: auto for pretraining")
    assert drawn.startswith("Learning rate of 15 steps, the first 2 of them warmup:\n  step         0   1e-05\n")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = fit_here(one_epoch(corpus, tmp_path / "run", "plot_lr=true", "scheduler.warmup=10"))
    assert (code, err.count("\n")) == (2, 1)
    assert "10 warmup steps, but the run has only 10" in err


def test_a_run_without_checkpoints_advises_none_and_takes_an_old_traceback_away(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traceback.txt").write_text("of the first try")
    quick = ["trainer.max_steps=1", "callbacks.checkpoints=null"]
    code, out, err = fit_here(one_epoch(corpus, tmp_path / "run", *quick))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("Run folder: ")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["checkpoint"] is None
    assert not (tmp_path / "run" / "traceback.txt").exists()
    more = [f"init_from={write_checkpoint(tmp_path / 'given.ckpt')}", "lora=default", "lora.rank=2"]
    code, out, err = fit_here(one_epoch(corpus, tmp_path / "lora", *quick, *more))
    assert (code, err.count("\n")) == (2, 1)
    assert "callbacks.checkpoints=null keeps nothing of the adapters that lora trains" in err
    assert "Batch: " not in out  # before training


@pytest.mark.slow
def test_init_from_starts_at_the_given_weights(corpus: Path, tmp_path: Path) -> None:
    """At a learning rate of almost nothing they stay what they were; the shorter context takes its positions."""
    given = write_checkpoint(tmp_path / "given.ckpt")
    more = ["scheduler=constant", "optimizer.lr=1e-12", "trainer.max_steps=1", "model.context_length=8"]
    more += [f"init_from={given}", "tokenizer=word", "model.n_layer=3"]
    code, out, err = fit_here(one_epoch(corpus, tmp_path / "run", *more))
    assert (code, err) == (0, "")
    assert "model.n_layer=3 is ignored: the weights of init_from have 1" in out
    assert "tokenizer=word is ignored" in out
    before, after = checkpoints.load(given)["state_dict"], weights(tmp_path / "run")
    before["model.position_embedding.weight"] = before["model.position_embedding.weight"][:8]
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-9)
    header = checkpoints.read_header(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert header["lineage"]["parent"] == checkpoints.verify(given)
    assert header["model"]["context_length"] == 8


def test_fast_dev_run_leaves_no_results(corpus: Path, tmp_path: Path) -> None:
    code, _, err = fit_here(one_epoch(corpus, tmp_path / "run", "debug=fast_dev_run"))
    assert (code, err) == (0, "")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- how a run stops ---------------------------------------------------------------------------------------------

LONG = [
    "trainer.max_steps=90",
    "trainer.max_epochs=-1",
    "trainer.check_val_every_n_epoch=20",
    "model.dropout=0.1",
    "trainer.accumulate_grad_batches=2",
    "callbacks.checkpoints.every_n_steps=10",
]


def long_run(corpus: Path, folder: Path) -> list[str]:
    return one_epoch(corpus, folder, *LONG)


def wait_for_a_checkpoint(process: Any, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_ends_as_if_there_had_been_none(
    corpus: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    command = long_run(corpus, tmp_path / "stopped")
    process = Forked([*command, "data.num_workers=2"], tmp_path, start_new_session=True)
    wait_for_a_checkpoint(process, tmp_path / "stopped")
    os.killpg(process.pid, signum)  # as a terminal does, and many a scheduler: the loader processes get it, too
    outcome = finish(process)
    assert outcome.code == code
    step = checkpoints.read_header(tmp_path / "stopped" / "checkpoints" / "last.ckpt")["step"]
    assert 10 <= step < 90
    saved = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert outcome.err == f"stopped by {signum.name}; saved {saved}; continue with resume={tmp_path / 'stopped'}\n"
    assert not (tmp_path / "stopped" / "summary.json").exists()
    for arguments in (command, long_run(corpus, tmp_path / "whole")):
        assert fit_here(arguments).code == 0
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert steps(tmp_path / "stopped") == steps(tmp_path / "whole") == list(range(90))


@pytest.mark.slow
def test_a_run_that_left_no_checkpoint_says_that_it_starts_again(corpus: Path, tmp_path: Path) -> None:
    words = one_epoch(corpus, tmp_path / "run", "callbacks.checkpoints=null", "trainer.max_epochs=-1")
    said = "Starting again from step 0: the earlier run in "
    assert said not in fit_here([*words, "trainer.max_steps=2"]).out
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed
    assert fit_here([*words, "trainer.max_steps=2"]).out.count(said) == 1
    assert said not in fit_here([*words, "trainer.max_steps=2"]).out, "it is finished"
    assert said in fit_here([*words, "trainer.max_steps=3"]).out


@pytest.mark.slow
def test_adapters_on_a_frozen_bfloat16_model(corpus: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.ckpt")
    command = one_epoch(corpus, tmp_path / "run", f"init_from={base}", "lora=default", "trainer.precision=bf16-mixed")
    outcome = fit_here(command)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "samples.md").read_text().startswith("## step")
    losses = [loss for _, loss in read_metrics(tmp_path / "run" / "metrics.csv")["train/loss"]]
    assert losses[-1] < losses[0]
    saved = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert saved["model.blocks.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert saved["model.blocks.0.mlp.up_proj.lora_A.default"].dtype == torch.float32
    kept = checkpoints.load(base)["state_dict"]["model.blocks.0.mlp.up_proj.weight"]
    assert torch.equal(saved["model.blocks.0.mlp.up_proj.weight"], kept.bfloat16()), "the base is not trained"
    assert load_model(tmp_path / "run").gpt.lm_head.weight.dtype == torch.float32


# --- several processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_log_the_losses_of_one_with_the_double_batch(corpus: Path, tmp_path: Path) -> None:
    two = [
        "accelerator=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "data.batch_size=8",
        "model.dropout=0",  # two processes draw other noise than one
    ]
    outcome = finish(start(one_epoch(corpus, tmp_path / "two", *two, "trainer.max_epochs=2"), tmp_path))
    assert outcome.code == 0, outcome.err
    assert fit_here(one_epoch(corpus, tmp_path / "one", "trainer.max_epochs=2", "model.dropout=0")).code == 0
    curves = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    for name in ("train/loss", "val/loss", "train/eval_loss", "lr", "tokens_seen", "train/loss_epoch"):
        assert [step for step, _ in curves[0][name]] == [step for step, _ in curves[1][name]]
        for (_, one), (_, other) in zip(curves[0][name], curves[1][name], strict=True):
            assert one == pytest.approx(other, rel=1e-5), name
    assert outcome.out.count("Finished 20 steps") == 1


@pytest.mark.slow
@pytest.mark.parametrize("to", [os.kill, os.killpg])
def test_a_signal_to_one_of_two_processes_or_to_both_saves(corpus: Path, tmp_path: Path, to: Any) -> None:
    two = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.num_workers=1", *LONG]
    process = start(one_epoch(corpus, tmp_path / "run", *two), tmp_path, start_new_session=True)
    wait_for_a_checkpoint(process, tmp_path / "run")
    to(process.pid, signal.SIGUSR1)
    outcome = finish(process)
    assert outcome.code == 128 + signal.SIGUSR1
    assert outcome.err.count("stopped by SIGUSR1; saved") == 1
    assert not living(process.pid)


@pytest.mark.slow
def test_started_workers_train_as_no_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import multiprocessing\nmultiprocessing.set_start_method('spawn')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = one_epoch(corpus, tmp_path / "spawned", "trainer.max_epochs=2", "data.num_workers=1")
    outcome = finish(start(command, tmp_path))
    assert outcome.code == 0, outcome.err
    assert fit_here(one_epoch(corpus, tmp_path / "here", "trainer.max_epochs=2")).code == 0
    assert_same_weights(tmp_path / "spawned", tmp_path / "here")
