"""Every task on two processes in every precision, eager and compiled, with and without recomputed activations.

The reference of each cell is one process in float64, eager, with all activations kept, and the errors are those of
test_forms.py: the weights are whole (DDP) or sharded (FSDP2). test_many_processes.py has the float64 cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import finish_two
from test_forms import ERRORS, SHARED, TASKS, assert_within, curves
from tiny_run import assert_same, fit_here, write_corpus

from llm_lightning.weights import checkpoint as checkpoints

Run = Callable[..., Path]
STRATEGIES = ("ddp", "fsdp")
PRECISIONS = [precision for precision in ERRORS if precision != "64-true"]
QUICK = {("pretraining", "ddp", "bf16-true"), ("llama", "fsdp", "bf16-mixed"), ("dpo", "fsdp", "32-true")}
CELLS = [
    pytest.param(*cell, marks=getattr(pytest.mark, "slow" if cell in QUICK else "soak"))
    for cell in ((task, strategy, precision) for task in TASKS for strategy in STRATEGIES for precision in PRECISIONS)
]
RECOMPUTED = ("model.activation_checkpointing=true",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of one cell's run, made once."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt", 1000)

    @functools.cache
    def of(task: str, strategy: str, precision: str, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        text = [f"data.path={corpus}"] if task in ("pretraining", "llama") else []
        words = [*SHARED, *TASKS[task], *text, *more, f"trainer.precision={precision}", f"hydra.run.dir={folder}"]
        outcome = fit_here(words) if strategy == "one" else finish_two(of_two(words, strategy), folder)
        assert outcome.code == 0, outcome.err[-3000:]
        return folder

    return of


def of_two(words: list[str], strategy: str) -> list[str]:
    """The words of a run on two processes, each with half of the batch."""
    size = next(int(word.partition("=")[2]) for word in words if word.startswith("data.batch_size="))
    own = [word for word in words if not word.startswith(("accelerator=", "data.batch_size="))]
    return [
        f"accelerator={strategy}",
        *own,
        f"data.batch_size={size // 2}",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
    ]


@pytest.mark.parametrize(("task", "strategy", "precision"), CELLS)
def test_two_processes_are_within_the_error_of_one(task: str, strategy: str, precision: str, run: Run) -> None:
    assert_within(curves(run(task, strategy, precision)), curves(run(task, "one", "64-true")), ERRORS[precision])


@pytest.mark.parametrize(("task", "strategy", "precision"), CELLS)
def test_recomputed_activations_change_no_bit(task: str, strategy: str, precision: str, run: Run) -> None:
    kept, recomputed = run(task, strategy, precision), run(task, strategy, precision, *RECOMPUTED)
    assert_same(
        *(checkpoints.load(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (kept, recomputed))
    )
    assert curves(kept) == curves(recomputed)


@pytest.mark.soak
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", TASKS)
def test_a_compiled_model_of_two_processes_is_within_the_error(task: str, strategy: str, run: Run) -> None:
    compiled = run(task, strategy, "32-true", "compile=true")
    assert_within(curves(compiled), curves(run(task, "one", "64-true")), ERRORS["32-true"])
