"""`compile=true` where nothing compiles: the run goes on, and says why in one line."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, fit_here, write_corpus
from torch._inductor import config

from llm_lightning.experiments import compiler

pytestmark = pytest.mark.slow  # PyTorch's compiler takes seconds to import


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    compiler.why_not_compiled.cache_clear()
    yield
    compiler.why_not_compiled.cache_clear()
    torch.compiler.reset()


@config.patch({"cpp.cxx": ("no-such-compiler",)})
def test_a_missing_compiler_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt", 300)
    words = [*SETTINGS, f"data.path={corpus}", "callbacks.samples=null", "model.dropout=0.1"]
    states = []
    for folder in ("true", "false"):
        outcome = fit_here([*words, f"compile={folder}", f"hydra.run.dir={tmp_path / folder}"])
        assert outcome.code == 0, outcome.err
        said = [line for line in outcome.out.splitlines() if "not compiled" in line]
        assert len(said) == (folder == "true")
        assert all("InvalidCxxCompiler" in line and "no-such-compiler" in line for line in said)
        path = tmp_path / folder / "checkpoints" / "last.ckpt"
        states.append(torch.load(path, weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1]), "the attempt drew random numbers"


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    """It answers to --version, and cannot compile."""
    program = tmp_path / "broken-compiler"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "fatal error: omp.h: no such file" >&2\nexit 1\n'
    )
    program.chmod(0o755)
    assert subprocess.run([program, "--version"], check=False).returncode == 0
    with config.patch({"cpp.cxx": (str(program),)}):
        reason = compiler.why_not_compiled("cpu")
    assert reason is not None
    assert "\n" not in reason
    assert "Error" in reason


def test_a_compiler_that_works_is_used() -> None:
    assert compiler.why_not_compiled("cpu") is None
