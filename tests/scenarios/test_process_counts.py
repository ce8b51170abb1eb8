"""One run on any number of processes: the same records, updates and metrics, also where another number continues it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_in
from tiny_run import CONTEXT_LENGTH, SETTINGS, assert_same, fit_here, write_corpus

from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

N_VAL = 97
"""A prime: on 2, 3 and 4 processes the last batches are short, or empty on some of them."""
UNLIKE = ("per_second", "memory", "seconds")
"""Parts of the names of what differs between any two runs."""


def words_of(folder: Path, *more: str) -> list[str]:
    names = {word.partition("=")[0] for word in more}
    own = [word for word in SETTINGS if "samples." not in word and word.partition("=")[0] not in names]
    return [*own, "callbacks.samples=null", "model.dropout=0", *more, f"hydra.run.dir={folder}"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The words of each task, with 50 training and 97 validation records."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for part, n in (("train", 50), ("val", N_VAL)):
        (folder / f"{part}.txt").write_bytes(
            draw.randbytes(n * CONTEXT_LENGTH + 1).hex()[: n * CONTEXT_LENGTH + 1].encode()
        )
        answers = [f"{draw.choice(['yes', 'no, ', 'perhaps '])}{draw.randrange(100)}" for _ in range(n)]
        rows = [
            {"instruction": f"{part} {i}", "output": answer, "chosen": answer, "rejected": "none"}
            for i, answer in enumerate(answers)
        ]
        (folder / f"{part}.json").write_text(json.dumps(rows))
        texts = [f"{part} {'ab'[i % 2] * (1 + i % 5)} {draw.randrange(100)}\t{'AB'[i % 2]}" for i in range(n)]
        (folder / f"{part}.tsv").write_text("\n".join(["text\tlabel", *texts]) + "\n")
    answers_of = ["data.template='{instruction}: {response}'", "model.context_length=48", "data.test_fraction=0.1"]

    def of(kind: str, *more: str) -> list[str]:
        return [f"data.path={folder / f'train.{kind}'}", f"data.val_path={folder / f'val.{kind}'}", *more]

    return {
        "pretraining": of("txt", "task=pretraining"),
        "sft": of("json", "task=sft", *answers_of, "callbacks.responses=null"),
        "dpo": of("json", "task=dpo", *answers_of),
        "classification": of("tsv", "task=classification", "data.balance=none", "model.context_length=32"),
    }


def metrics_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    rows = read_metrics(folder / "metrics.csv")
    return {name: row for name, row in rows.items() if not any(part in name for part in UNLIKE)}


LIMITS = ["trainer.limit_val_batches=0.4", "+trainer.limit_test_batches=1", "trainer.limit_train_batches=3"]


@pytest.mark.slow
def test_metrics_and_updates_are_equal_on_1_to_4_processes(tmp_path: Path, tasks: dict[str, list[str]]) -> None:
    """97 records, 12 samples a step, whose micro-batches of at most 5 hold 4, 3, 4 and 3; and with limits."""
    common = ["data.global_batch_size=12", "data.batch_size=5", "data.eval_batches=3", "trainer.max_steps=-1"]
    common += ["trainer.max_epochs=1"]
    kinds = tasks | {f"limited {task}": [*tasks[task], *LIMITS] for task in ("pretraining", "classification")}
    for processes in (1, 2, 3, 4):
        runs = [words_of(tmp_path / kind / str(processes), *words, *common) for kind, words in kinds.items()]
        run_in(processes, runs, tmp_path)
    for kind in kinds:
        one = metrics_of(tmp_path / kind / "1")
        assert len(one["train/loss"]) == (3 if "limited" in kind else 5 if kind == "pretraining" else 4), kind
        assert {"val/loss", "train/eval_loss"} <= one.keys()
        summary = json.loads((tmp_path / kind / "1" / "summary.json").read_text())
        if "limited" in kind:  # 97 records are 9 batches of 12, of which 0.4 are 3
            assert summary["sampled"]["val"] == {"measured": 36, "of": N_VAL, "what": summary["sampled"]["val"]["what"]}
        for processes in (2, 3, 4):
            other = metrics_of(tmp_path / kind / str(processes))
            theirs = json.loads((tmp_path / kind / str(processes) / "summary.json").read_text())
            assert theirs["processes"] == processes
            assert theirs.get("confusion") == summary.get("confusion"), kind
            assert theirs.get("sampled") == summary.get("sampled"), kind
            assert one.keys() == other.keys(), kind
            for name, rows in one.items():
                assert [step for step, _ in rows] == [step for step, _ in other[name]], (kind, name)
                # float32 sums in another order, and a few steps of Adam; a correlation of few margins magnifies them
                most = {"rel": 2e-4, "abs": 1e-3 if "correlation" in name else 2e-5}
                assert [v for _, v in rows] == pytest.approx([v for _, v in other[name]], **most), (kind, name)


FP64 = ["trainer.precision=64-true", "scheduler=constant", "data.batch_size=4", "trainer.max_epochs=-1"]


def state_of(folder: Path) -> dict[str, Any]:
    state = checkpoints.load(folder / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 9
    return {key: state[key] for key in ("state_dict", "optimizer_states", "rng", "task_module", "position")}


def leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from leaves(one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_two", "on_one", "alone"),
    [
        ([], ["data.batch_size=8"], ["data.batch_size=8"]),
        ([], ["trainer.accumulate_grad_batches=2"], ["data.batch_size=8"]),
        (["data.global_batch_size=16"], ["data.global_batch_size=16"], ["data.global_batch_size=16"]),
    ],
    ids=["larger micro-batch", "more accumulated", "global_batch_size"],
)
def test_two_processes_then_one_then_two_are_one(
    tmp_path: Path, on_two: list[str], on_one: list[str], alone: list[str]
) -> None:
    """57 windows: 8 updates of 8 (4 of 16) an epoch, the last one short; the changes are inside epochs."""
    corpus = write_corpus(tmp_path / "corpus.txt", 1)
    corpus.write_text("".join(random.Random(3).choices("abcdefgh ", k=1000)))
    data = [f"data.path={corpus}", *FP64, "trainer.val_check_interval=2", "trainer.limit_val_batches=1"]

    def words(folder: str, steps: int, more: list[str]) -> list[str]:
        return words_of(tmp_path / folder, *data, *more, f"trainer.max_steps={steps}")

    run_in(2, [words("moved", 3, on_two), words("two", 9, on_two)], tmp_path)
    for folder, steps, more in (("moved", 6, on_one), ("one", 9, alone)):
        outcome = fit_here(words(folder, steps, more))
        assert outcome.code == 0, outcome.err
        assert ("dropout masks differ between process counts" in outcome.out) == (folder == "moved")
    run_in(2, [words("moved", 9, on_two)], tmp_path)
    moved, two, one = (state_of(tmp_path / folder) for folder in ("moved", "two", "one"))
    assert moved["position"] == two["position"]
    assert moved["task_module"]["items_seen"] == one["task_module"]["items_seen"]
    for key in ("state_dict", "optimizer_states"):
        for a, b in zip(leaves(moved[key]), leaves(one[key]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64, sums in another order
    rows = {folder: metrics_of(tmp_path / folder) for folder in ("moved", "two", "one")}
    for folder in ("moved", "two"):
        for name in ("train/loss", "lr", "epoch", "val/loss", "train/eval_loss"):
            steps = [step for step, _ in rows["one"][name]]
            if "eval" not in name and "val" not in name:
                assert steps == list(range(9))
                found = dict(rows[folder][name])
            else:  # a run that ends validates once more
                found = {step: value for step, value in rows[folder][name] if step in steps}
            assert found == pytest.approx(dict(rows["one"][name]), rel=1e-6), (folder, name)


@pytest.mark.slow
def test_as_many_processes_continue_to_the_bit(tmp_path: Path) -> None:
    """With dropout; each process draws its own masks."""
    data = [f"data.path={write_corpus(tmp_path / 'corpus.txt')}", "data.global_batch_size=16", "data.batch_size=4"]
    data += ["model.dropout=0.3", "scheduler=constant", "trainer.max_epochs=-1"]
    runs = [
        words_of(tmp_path / folder, *data, f"trainer.max_steps={n}") for folder, n in (("a", 9), ("b", 4), ("b", 9))
    ]
    run_in(2, runs, tmp_path)
    whole, stopped = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert_same(whole, stopped)
    assert not torch.equal(whole["rng"][0]["torch"], whole["rng"][1]["torch"])


@pytest.mark.slow
def test_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    data = [f"data.path={write_corpus(tmp_path / 'corpus.txt')}", "data.batch_size=8"]
    assert fit_here(words_of(tmp_path / "run", *data)).code == 0
    more = [*data, "trainer.max_steps=6", "data.batch_size=4"]
    refused = fit_here(words_of(tmp_path / "run", *more))
    assert refused.code != 0
    assert refused.err == (
        "error: cannot resume: an update had 8 samples (8 x 1 accumulated x 1 process), here 4 (4 x 1 accumulated x "
        "1 process); set data.batch_size=8 or data.global_batch_size=8\n"
    )
    other = fit_here(words_of(tmp_path / "run", *more, "data.global_batch_size=8"))
    assert other.code == 0, other.err
    assert "Batch: 8 a step = 4 samples x 2 accumulated x 1 processes; 6 steps" in other.out
