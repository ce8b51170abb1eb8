"""Every task in every precision, eager and compiled, with and without recomputed activations: one table of errors.

The reference of each cell is the same run in float64, eager, with all activations kept. Stated errors:

- 64-true: 1e-9. Sums in another order differ by 1e-16, and AdamW, which divides by the root of tiny squares, enlarges
  that in its first updates.
- 32-true: 2e-4, for the same reason, from 1e-7.
- bf16-mixed, bf16-true: 2e-2. bfloat16 keeps 8 bits: each product is rounded by up to 2^-9 = 2e-3, the weights of
  bf16-true too, and gradients pass through a dozen products.

Recomputed activations are the same bits in any precision, compiled or not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, assert_same, fit_here, write_corpus

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

ERRORS = {"64-true": 1e-9, "32-true": 2e-4, "bf16-mixed": 2e-2, "bf16-true": 2e-2}
REPLACED = ("trainer.precision=", "trainer.max_steps=", "model.n_layer=", "model.context_length=", "callbacks.")
SHARED = [
    *(word for word in SETTINGS if not word.startswith(REPLACED)),
    *("trainer.max_steps=3", "trainer.limit_val_batches=1", "+trainer.limit_test_batches=1", "data.eval_batches=0"),
    *("model.n_layer=2", "model.dropout=0", "scheduler=constant"),
    *("callbacks.plots=null", "callbacks.samples=null", "callbacks.responses=null"),
]
SFT = ["model.context_length=320", "data.batch_size=2"]
TASKS = {
    "pretraining": ["model.context_length=32", "data.batch_size=4"],
    "llama": ["model=nano_llama", "model.context_length=32", "data.batch_size=4"],
    "classification": [
        "task=classification",
        "model.context_length=64",
        "task.trained_blocks=all",
        "data.batch_size=4",
    ],
    "frozen": ["task=classification", "model.context_length=64", "task.trained_blocks=1", "data.batch_size=4"],
    "packed": ["task=sft", *SFT, "data.packing=true"],
    "padded": ["task=sft", *SFT, "data.packing=false"],
    "lora": ["task=lora", *SFT],
    "dpo": ["task=dpo", "model.context_length=400", "data.batch_size=2"],
}
QUICK = ("pretraining", "32-true")
COMPILED = [
    pytest.param(task, precision, marks=getattr(pytest.mark, "slow" if (task, precision) == QUICK else "soak"))
    for task in TASKS
    for precision in ("64-true", "32-true", "bf16-mixed")
]
"""Each compiles for half a minute."""
Curves = dict[str, list[tuple[int, float]]]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folder of one cell's run, made once."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt", 1000)

    @functools.cache
    def of(task: str, precision: str, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        text = [f"data.path={corpus}"] if task in ("pretraining", "llama") else []
        words = [*SHARED, *TASKS[task], *text, *more, f"trainer.precision={precision}", f"hydra.run.dir={folder}"]
        outcome = fit_here(words)
        assert outcome.code == 0, outcome.err
        return folder

    return of


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    yield
    torch.compiler.reset()


def curves(folder: Path) -> Curves:
    """Losses, learning signals and gradient norms."""
    found = read_metrics(folder / "metrics.csv")
    return {name: found[name] for name in found if name.endswith("loss") or name == "train/grad_norm"}


def assert_within(actual: Curves, expected: Curves, relative: float) -> None:
    assert actual.keys() == expected.keys()
    assert len(expected["train/loss"]) == 3
    for name in expected:
        for (step, ours), (_, theirs) in zip(actual[name], expected[name], strict=True):
            assert math.isclose(ours, theirs, rel_tol=relative, abs_tol=1e-6), (name, step, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("task", TASKS)
def test_each_precision_is_within_its_error(task: str, precision: str, run: Run) -> None:
    assert_within(curves(run(task, precision)), curves(run(task, "64-true")), ERRORS[precision])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("task", TASKS)
def test_recomputed_activations_change_no_bit(task: str, precision: str, run: Run) -> None:
    kept, recomputed = run(task, precision), run(task, precision, "model.activation_checkpointing=true")
    states = [checkpoints.load(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (kept, recomputed)]
    assert_same(*states)
    assert curves(kept) == curves(recomputed)


@pytest.mark.parametrize(("task", "precision"), COMPILED)
def test_a_compiled_model_is_within_the_error(task: str, precision: str, run: Run) -> None:
    assert_within(curves(run(task, precision, "compile=true")), curves(run(task, "64-true")), ERRORS[precision])


@pytest.mark.soak
@pytest.mark.parametrize("task", ["pretraining", "packed", "dpo"])
def test_a_compiled_model_recomputes_activations(task: str, run: Run) -> None:
    both = ("compile=true", "model.activation_checkpointing=true")
    assert_within(curves(run(task, "32-true", *both)), curves(run(task, "64-true")), ERRORS["32-true"])
