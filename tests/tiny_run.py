"""Runs through the real entry points, small enough for tests: in this process, or in one of their own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from model_kinds import of_kind

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints

if TYPE_CHECKING:
    from forked import Forked

ROOT = Path(__file__).resolve().parents[1]
CONTEXT_LENGTH = 16
SETTINGS = [
    "tokenizer=byte",
    "accelerator=cpu",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    f"model.context_length={CONTEXT_LENGTH}",
    "trainer.max_steps=4",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.samples.prompts=['to be ']",
    "callbacks.samples.max_new_tokens=8",
    "callbacks.plots=null",  # drawing takes longer than training
]
WITH_PLOTS = [word for word in SETTINGS if word != "callbacks.plots=null"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def train_here(arguments: Sequence[str]) -> Outcome:
    """What `python train.py ARGUMENTS` does, in this process, which is then left as it was."""
    from llm_lightning.cli.main import VERBS
    from llm_lightning.experiments.launch import main

    def typed() -> None:
        sys.argv[:] = ["train.py", *arguments]
        main(ROOT / "train.py", VERBS)

    return _here(typed)


def fit_here(arguments: Sequence[str]) -> Outcome:
    """The run that `python train.py ARGUMENTS` makes, without Hydra's part, which takes longer than a tiny run.

    The files are composed once for each choice of groups; on a copy, the other settings are set as Hydra does. There
    is no `train.log`. Git and the installed packages are asked once a process.
    """
    from llm_lightning.experiments import summary
    from llm_lightning.experiments.errors import guarded
    from llm_lightning.experiments.settings.checks import Checked
    from llm_lightning.experiments.settings.overrides import parse_arguments
    from llm_lightning.experiments.start import run_checked

    config, run_dir = _composed(arguments)

    def trained() -> None:
        logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))
        logging.getLogger().setLevel(logging.INFO)
        run = functools.partial(run_checked, Checked(config, config), run_dir, parse_arguments(arguments), Path.cwd())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(summary, "git_state", once(summary.git_state))
            patch.setattr(summary, "version", once(summary.version))
            code, _ = guarded(run, log_dir=run_dir)
        if code:
            sys.exit(code)

    return _here(trained)


@functools.cache
def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called once for each of its arguments."""
    return functools.cache(function)


def _composed(arguments: Sequence[str]) -> tuple[Any, Path]:
    """The configuration that Hydra would compose, and the run folder."""
    from omegaconf import OmegaConf

    from llm_lightning.experiments.settings.overrides import key_of, parsed

    groups = {folder.name for folder in (ROOT / "conf").iterdir()}
    chosen = tuple(word for word in arguments if word[0] in "+~" or word.partition("=")[0] in groups)
    given = [word for word in arguments if key_of(word) == "init_from" and parsed(word).value() is not None]
    config = pickle.loads(_chosen((*chosen, *(["init_from=weights"] if given else []))))
    folder = ""
    for word in arguments:
        if key_of(word) == "hydra.run.dir":
            folder = parsed(word).value()
        elif word not in chosen:
            OmegaConf.update(config, key_of(word), parsed(word).value())
    return config, Path(folder)


@functools.cache
def _chosen(groups: tuple[str, ...]) -> bytes:
    """Pickled: that copies six times faster than `copy.deepcopy` does."""
    from llm_lightning.experiments.command_line import rewritten
    from llm_lightning.experiments.settings.checks import checked

    return pickle.dumps(checked(rewritten(list(groups), ROOT / "conf"), ROOT / "conf").config)


def _here(action: Callable[[], None]) -> Outcome:
    """Call what ends as a process does; this one is then left as it was."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    root, folder = logging.getLogger(), Path.cwd()
    handlers, level = root.handlers[:], root.level
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["train.py"])
        patch.setattr(logging, "raiseExceptions", True)
        patch.setattr(threading, "excepthook", threading.excepthook)
        for name in ("HYDRA_FULL_ERROR", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        try:
            action()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os.chdir(folder)
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            torch.use_deterministic_algorithms(False)
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
    return Outcome(code, out.getvalue(), err.getvalue())


def start(arguments: Sequence[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
    """`python train.py ARGUMENTS`, typed in `folder`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=_take_signals, **options)


def _take_signals() -> None:
    """As an interactive shell starts a process: it ignores none, though the tests may run in the background."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)


def living(group: int) -> list[int]:
    """The running processes of a process group; a container may keep those that have ended. None but on Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def finish(process: subprocess.Popen[str] | Forked) -> Outcome:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=300)
    return Outcome(process.returncode, out, err)


def write_corpus(path: Path, n_words: int = 400) -> Path:
    """A text of few words, in random order."""
    path.write_text("".join(random.Random(1).choices(["to be ", "or not ", "that is\n"], k=n_words)))
    return path


def write_checkpoint(
    path: Path, n_layer: int = 1, context_length: int = CONTEXT_LENGTH, n_embd: int = 16, kind: str = "gpt2"
) -> Path:
    """An untrained model of the sizes above."""
    torch.manual_seed(0)
    sizes = GPTConfig(vocab_size=257, context_length=context_length, n_layer=n_layer, n_head=2, n_embd=n_embd)
    config = of_kind(sizes, kind)
    header = checkpoints.describe(task="pretraining", model_config=config, tokenizer=build_tokenizer("byte"), config={})
    state = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    checkpoints.save(path, {"state_dict": state, checkpoints.HEADER: header})
    return path


def digests(folder: Path) -> dict[Path, str]:
    """sha256 of every file below `folder`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """Equal to the last bit, whatever it is made of; `path` says where it is not."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}.{index}")
    else:
        assert one == other, path
