"""Run folders as an attacker would leave them, and a watch on what this process does with them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tiny_run import SETTINGS

BENIGN = [word for word in SETTINGS if "samples." not in word]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.putenv")


class Outside(NamedTuple):
    """What lies beside the run folder and must stay as it is."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Outside:
        (folder / "conf" / "experiment").mkdir(parents=True)
        (folder / "bin").mkdir()
        (folder / "victim.txt").write_text("precious\n")
        (folder / "conf" / "experiment" / "evil.yaml").write_text(
            f"# @package _global_\nhydra:\n  job:\n    env_set:\n      PATH: {folder}/bin\n"
        )
        for name in ("bin/git", "sitecustomize.py"):
            (folder / name).write_text(_canary(folder))
            (folder / name).chmod(0o755)
        return cls(folder)

    @property
    def canary(self) -> Path:
        return self.folder / "canary"


def _canary(folder: Path) -> str:
    """A script, for the shell and for Python, that leaves a file."""
    return f"#!/usr/bin/env python3\nopen({str(folder / 'canary')!r}, 'w').close()\n"


def settings(outside: Path) -> list[str]:
    """Recorded words each of which makes a process run, read or write something beyond the run folder."""
    here, up = outside.as_posix(), f"../../../../../../../../{outside}"
    return [
        f"+hydra.job.env_set.PATH='{here}/bin'",
        f"++hydra.job.env_set.PYTHONPATH='{here}'",
        f"+hydra.job.env_set={{LD_PRELOAD:'{here}/x.so'}}",
        f"+hydra.job.env_set.CXX='{here}/bin/git'",
        "+hydra.job.env_copy=[SECRET]",
        "hydra.job.chdir=true",
        f"hydra.searchpath=['file://{here}/conf']",
        "hydra/launcher=basic",
        "+hydra.callbacks.x._target_=hydra.experimental.callbacks.PickleJobInfoCallback",
        f"hydra.sweep.dir={here}",
        "hydra.mode=MULTIRUN",
        f"hydra.job_logging.handlers.file.filename='{here}/victim.txt'",
        "hydra.output_subdir=.hydra",
        "data@hydra.job.env_set=pretraining",
        f"+experiment/book='{up}/conf/experiment/evil'",
        f"experiment=[book/ch05,'{up}/conf/experiment/evil']",
        "experiment@hydra.job=book/ch05",
        "allow_targets=[shutil]",
        "++allow_targets=[os]",
        "--config-dir=evil",
        "-m",
        "--experimental-rerun=x",
        "sweep=book_ch06_table",
        "pipeline=nano",
        "resume=/",
        "optimizer.lr=1,2",
        f"data.path='{here}/victim.txt'",
        "data.path=/dev/zero",
        "data.path=['/etc/passwd']",
        "data.path=${oc.env:HOME}",
        f"init_from='{here}/x.ckpt'",
        "init_from=hf:org/name",
        f"task.reference='{here}/x.ckpt'",
        f"data.hf_dataset='{here}'",
        "data.hf_dataset=../data",
        f"data.mixture=[{{name: a, hf_dataset: '{here}', weight: 1}}]",
        "data.val_sets.hard=/etc/hostname",
        "callbacks.samples.prompts=['${oc.env:SECRET}']",
        "callbacks.samples.prompts=['${hydra.runtime.cwd}']",
        f"+trainer.profiler={{_target_:lightning.pytorch.profilers.AdvancedProfiler,dirpath:'{here}',filename:p}}",
        "+trainer.profiler={_target_:lightning.pytorch.profilers.SimpleProfiler,dirpath:logs,filename:p}",
        "+trainer.model_registry=organisation/model",
        f"+trainer.strategy={{_target_:lightning.pytorch.strategies.DeepSpeedStrategy,config:'{here}/x.json'}}",
        f"+logger.x={{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:'{here}'}}",
        "+logger.x={_target_:lightning.pytorch.loggers.CSVLogger,save_dir:logs}",
        "+logger.x={_target_:lightning.pytorch.loggers.TensorBoardLogger,save_dir:'~/logs'}",
        "+logger.x={_target_:lightning.pytorch.loggers.MLFlowLogger,tracking_uri:'http://127.0.0.1:9/'}",
        "+logger.x={_target_:lightning.pytorch.loggers.WandbLogger}",
        f"+callbacks.x={{_target_:lightning.pytorch.callbacks.ModelCheckpoint,dirpath:'{here}'}}",
        "+callbacks.x={_target_:lightning.pytorch.callbacks.ModelCheckpoint,filename:'../../../x'}",
        f"+callbacks.x={{_target_:lightning.pytorch.callbacks.OnExceptionCheckpoint,_args_:['{here}']}}",
        f"+callbacks.x={{_target_:lightning.pytorch.callbacks.SpikeDetection,exclude_batches_path:'{here}/x.json'}}",
        "+callbacks.x={_target_:torchmetrics.text.bert.BERTScore,model_name_or_path:organisation/model}",
        "+callbacks.x={_target_:torch.utils.data.DataLoader}",
        "+callbacks.x._target_=shutil.rmtree",
        "data._target_=lightning.pytorch.demos.mnist_datamodule.MNISTDataModule",
        f"+logger.csv.run_dir='{here}'",
        "~hydra.job.chdir",
        "not a setting",
        "+hydra.run.dirs=x",
        "",
    ]


Link = Callable[[Path, Path], None]


def links() -> dict[str, Link]:
    """What may stand in a run folder that is not its own, by name."""

    def to_file(name: str) -> Link:
        return lambda run, outside: _put(run / name).symlink_to(outside / "victim.txt")

    def to_nothing(name: str) -> Link:
        return lambda run, outside: _put(run / name).symlink_to(outside / "new_file")

    def to_folder(name: str) -> Link:
        return lambda run, outside: _put(run / name).symlink_to(outside)

    def hard(name: str) -> Link:
        return lambda run, outside: _put(run / name).hardlink_to(outside / "victim.txt")

    names = (
        "train.log",
        "samples.md",
        "metrics.csv",
        "config.yaml",
        "config.json",
        "failure.json",
        "summary.json",
        "owner.json",
        ".lock",
    )
    names += ("traceback.txt", "responses.json", "plots/loss.png", "checkpoints/step_00000009.ckpt", "command.json")
    names += ("events.out.tfevents.1.x.1.0", "tensorboard/events.out.tfevents.1.x.1.0", "_hparams_.tfevents")
    names += (f".config.yaml.{os.getpid()}.tmp", "any/where/else")
    found = {f"{name} -> a file": to_file(name) for name in names}
    found |= {f"{name} -> nothing": to_nothing(name) for name in ("samples.md", "train.log", "plots/lr.png")}
    found |= {f"{name} -> a folder": to_folder(name) for name in ("checkpoints", "tensorboard", "plots", ".hydra")}
    found |= {f"{name} = a file": hard(name) for name in ("train.log", "samples.md", "metrics.csv", ".lock")}
    return found | {"metrics.csv, a pipe": lambda run, outside: os.mkfifo(_put(run / "metrics.csv"))}


def _put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


class Hostile(NamedTuple):
    """A run folder of someone else, and why it must be refused."""

    run: Path
    why: str


def build(run: Path, outside: Outside, words: list[str], link: Link | None, config_dir: str | None, home: str) -> None:
    """A folder with everything that a careless start could run: programs, modules, plugins, and a checkpoint."""
    run.mkdir(parents=True)
    for name in ("bin/git", "sitecustomize.py", "torch.py", "hydra_plugins/evil.py", "llm_lightning/__init__.py"):
        _put(run / name).write_text(_canary(outside.folder))
        (run / name).chmod(0o755)
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['touch canary']\n")
    command = {"folder": home, "config_dir": config_dir, "overrides": [*BENIGN, *words]}
    (run / "command.json").write_text(json.dumps(command))
    if link is not None:
        link(run, outside.folder)


def folders(root: Path, outside: Outside, number: int, seed: int = 0) -> Iterator[Hostile]:
    """`number` of them: settings x links x config dirs x folders, every one of each at least once."""
    rng = random.Random(seed)
    words, named = settings(outside.folder), links()
    config_dirs = [str(outside.folder / "conf"), "conf", "."]
    homes = ["nowhere", "RUN", str(outside.folder), "/", "../.."]
    cases: list[tuple[str | None, str | None, str | None]] = [(word, None, None) for word in words]
    cases += [(None, link, None) for link in named] + [(None, None, config_dir) for config_dir in config_dirs]
    mixed = list(itertools.product(words, [None, *named], [None, *config_dirs]))
    cases += rng.sample(mixed, number - len(cases))
    for index, (word, link, config_dir) in enumerate(cases):
        run, home = root / f"{index:03}", homes[index % len(homes)]
        recorded = [word] if word is not None else []
        build(run, outside, recorded, named.get(link or ""), config_dir, home.replace("RUN", str(run)))
        yield Hostile(run, f"{word!r}, {link}, config_dir={config_dir}, folder={home}")


_watched: list[str] | None = None
_is_hooked = False


def _hook(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event == "open" and isinstance(arguments[0], str) and arguments[2] and arguments[2] & WRITES:
        _watched.append(f"open for writing {arguments[0]}")
    elif event in CHANGES or event in RUNS or event == "os.chdir":
        _watched.append(f"{event} {arguments}")
    elif event == "import" and arguments[1]:
        _watched.append(f"import {arguments[1]}")


@contextlib.contextmanager
def watch() -> Iterator[list[str]]:
    """What this process does meanwhile: files it opens for writing or changes, programs, connections, imports."""
    global _watched, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)  # for good, but deaf outside of this context
        _is_hooked = True
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None
