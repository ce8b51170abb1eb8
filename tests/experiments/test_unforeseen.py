"""The net: an unforeseen exception is one line with its place and where the traceback is; exit code 70."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import ROOT, SETTINGS, train_here, write_checkpoint, write_corpus

from llm_lightning.cli import inspect as inspect_verb
from llm_lightning.cli.main import main as cli
from llm_lightning.experiments import run as runs
from llm_lightning.experiments import unforeseen
from llm_lightning.experiments.settings.help import help_text
from llm_lightning.experiments.settings.yaml_files import group_options

CONF = ROOT / "conf"


def broken(*_: object, **__: object) -> None:
    raise KeyError("a fault\nof ours")


@pytest.mark.reaches_net
def test_a_run_that_meets_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "build_datamodule", broken)
    folder = tmp_path / "run"
    outcome = train_here([*SETTINGS, f"data.path={write_corpus(tmp_path / 'a.txt')}", f"hydra.run.dir={folder}"])
    assert outcome.code == unforeseen.EXIT_CODE == 70
    [line] = outcome.err.splitlines()
    assert line.startswith("error: unforeseen KeyError at llm_lightning/experiments/whereabouts.py:")
    assert f"the traceback is in {folder / 'traceback.txt'}" in line
    assert "in broken" in (folder / "traceback.txt").read_text()
    monkeypatch.setenv(unforeseen.SHOW_TRACEBACK, "1")
    shown = train_here([*SETTINGS, f"hydra.run.dir={folder}"])
    assert "Traceback" in shown.err
    assert shown.err.splitlines()[-1].startswith("error: unforeseen KeyError")


@pytest.mark.reaches_net
def test_a_fault_before_there_is_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_lightning.experiments.settings.checks.checked_settings", broken)
    outcome = train_here([])
    assert outcome.code == 70
    assert str(tmp_path / "cache" / "tracebacks" / "train.txt") in outcome.err
    assert "in broken" in (tmp_path / "cache" / "tracebacks" / "train.txt").read_text()


@pytest.mark.reaches_net
def test_a_verb_that_meets_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect_verb, "run", broken)
    assert cli(["inspect", "x.ckpt"]) == 70
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("llm-lightning inspect: unforeseen KeyError at llm_lightning/cli/main.py:")
    assert "in broken" in (tmp_path / "cache" / "tracebacks" / "inspect.txt").read_text()
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(write_checkpoint(tmp_path / "a_file") / "below"))
    assert cli(["inspect", "x.ckpt"]) == 70
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.slow
def test_too_little_memory_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate"),
    ):

        def too_large(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(runs, "build_datamodule", too_large)
        outcome = train_here([*SETTINGS, f"hydra.run.dir={tmp_path / 'run'}"])
        assert outcome.code == 2
        assert "lower data.batch_size" in outcome.err


@pytest.mark.slow
def test_code_of_the_users_own_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own.py").write_text(
        "import lightning as L\n"
        "class Mine(L.Callback):\n"
        "    def __init__(self, kind): self.kind = kind\n"
        "    def on_fit_start(self, trainer, module):\n"
        "        raise ValueError('mine') if self.kind == 'value' else KeyError('mine')\n"
    )
    (tmp_path / "my_broken.py").write_text("nothing\n")
    monkeypatch.syspath_prepend(tmp_path)
    command = [*SETTINGS, f"data.path={write_corpus(tmp_path / 'a.txt')}", "+callbacks.x._target_=my_own.Mine"]
    command += ["allow_targets=[my_own]", f"hydra.run.dir={tmp_path / 'run'}"]
    outcome = train_here([*command, "+callbacks.x.kind=value"])
    assert outcome.code == 2
    assert "in on_fit_start" in outcome.err
    assert outcome.err.endswith("error: mine\n")
    with pytest.raises(KeyError, match="mine"):
        train_here([*command, "+callbacks.x.kind=key"])
    outcome = train_here(["+callbacks.x._target_=my_broken.Mine", "allow_targets=my_broken"])
    assert outcome.code == 2
    assert 'my_broken.py", line 1' in outcome.err


def test_every_help_prints_help(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    for group in groups:
        text = help_text(["--help", group], CONF)
        assert text is not None
        missing = [option for option in group_options(CONF, group) if f"\n{group}={option}: " not in text]
        assert not missing, group
    assert "data.label_column" not in help_text(["--help", "task"], CONF)  # a preset picks; it builds on no other group
    assert "task.beta=0.1" in help_text(["--help", "task"], CONF)


@pytest.mark.slow
def test_help_ends_quietly_when_its_reader_has_gone(tmp_path: Path) -> None:
    commands = [[str(ROOT / "train.py"), "--help"], ["-m", "llm_lightning.cli.main", "--help"]]
    for command in commands:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()  # before it has printed anything
        assert (process.wait(60), process.stderr.read()) == (0, b"")
        process.stderr.close()


# (what is typed beside the tiny settings, what the one line says)
LATE = [
    ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0 must be at least 1; logger=none"),
    ("seed=null", "seed=null: this setting needs a value"),
    ("+logger.x._target_=lightning.pytorch.loggers.WandbLogger", "needs a package that is not installed: .*wandb"),
    ("+callbacks.x._target_=lightning.pytorch.callbacks.Timer +callbacks.x.duration=5", "Timer cannot be built"),
    ("optimizer.lr=1e30 callbacks.samples.top_k=5", "not finite|non-finite"),
]


@pytest.mark.slow
def test_what_was_a_traceback_is_one_line(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
    for line, message in LATE:
        keys = {word.partition("=")[0] for word in line.split()}
        settings = [word for word in SETTINGS if word.partition("=")[0] not in keys]
        outcome = train_here([*settings, f"data.path={corpus}", *line.split(), f"hydra.run.dir={tmp_path / 'run'}"])
        assert outcome.code == 2, line
        assert re.search(message, outcome.err.splitlines()[-1]), outcome.err
