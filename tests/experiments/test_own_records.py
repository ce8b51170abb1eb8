"""Instruction and preference runs on files of their own: further sets, leaks, verbs, moved, resumed, quarantined."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_run import SETTINGS, train_here, write_checkpoint

from llm_lightning.cli.main import main
from llm_lightning.data.record_store import records
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints

QUIET = [word for word in SETTINGS if not word.startswith(("callbacks.samples", "trainer.max_steps", "model."))]
QUIET += ["callbacks.samples=null", "callbacks.responses.max_new_tokens=4", "logger=csv", "data.batch_size=4"]
MODEL = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.context_length=64"]
LAST = Path("checkpoints", "last.ckpt")
TASKS = ("sft", "dpo")
TEMPLATE = "data.template='{instruction}[ {input}]\\n{response}'"


def row(number: int, *, answer: str | None = None) -> dict[str, str]:
    """A record that is of use in both tasks."""
    good = f"yes {number}" if answer is None else answer
    return {"instruction": f"question {number}", "output": good, "chosen": good, "rejected": f"no {number}"}


def write(path: str, rows: Iterable[dict[str, Any]]) -> None:
    Path(path).write_text("".join(f"{json.dumps(one)}\n" for one in rows))


def words_of(task: str, folder: Path) -> list[str]:
    if task == "dpo":
        start = write_checkpoint(folder / "start.ckpt", context_length=64)
        return [*(one for one in QUIET if "responses" not in one), "task=dpo", f"init_from={start}", TEMPLATE]
    return [*QUIET, *MODEL, "task=sft", TEMPLATE]


def train(*words: str) -> str:
    outcome = train_here(words)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 40 records for training, and others of which some are in training too."""
    folder = tmp_path / "there"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write("train.jsonl", map(row, range(40)))
    # Of 12: 3 with a prompt of training, one of them twice, and one with another answer.
    write("val.jsonl", [*map(row, range(100, 108)), row(5), row(5), row(6), row(7, answer="another")])
    write("test.jsonl", [*map(row, range(200, 206)), row(0)])
    write("hard.jsonl", [{**row(number), "instruction": f"a much harder question {number}"} for number in range(5)])
    write("same.jsonl", map(row, range(40)))
    return folder


OWN = ["data.path=train.jsonl", "data.val_path=val.jsonl", "data.test_path=[test.jsonl]"]
SETS = ["data.val_sets.hard=hard.jsonl", "data.val_sets.same=same.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_run_on_records_of_its_own(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    words = [*words_of(task, there), *OWN, *SETS, "monitor=val/hard/loss", "run_name=first"]
    out = train(*words, "data.val_fraction=0.3", "trainer.max_steps=3")
    assert "data.val_fraction=0.3 is ignored: data.val_path or data.hf_val_split gives the validation data" in out
    assert "Best val/hard/loss " in out
    assert "Val prompts also in training: 4 of 12" in out
    run = there / "outputs" / task / "first"
    summary = summary_of(run)
    facts, measured = summary["data"], summary["metrics"]
    leaks = {split: (one["prompts"], one["of"]) for split, one in facts["leaks"].items()}
    assert leaks == {"val": (4, 12), "val/hard": (0, 5), "val/same": (40, 40), "test": (1, 7)}
    last = {name: points[-1][1] for name, points in read_metrics(run / "metrics.csv").items()}
    splits = ("val", "val/hard", "val/same")
    assert len({round(last[f"{split}/loss"], 6) for split in splits}) == 3
    for split in splits:
        assert measured[f"{split}/loss"] == pytest.approx(last[f"{split}/loss"], rel=1e-6)
        found = json.loads(said(capsys, "evaluate", str(run / LAST), "--split", split, "--json"))
        assert found["loss"] == pytest.approx(last[f"{split}/loss"], rel=1e-5)
    said(capsys, "respond", str(run), "--split", "test", "-o", "answers.json", "--max-new-tokens", "2")
    answers = json.loads(Path("answers.json").read_text())
    assert [one["instruction"] for one in answers] == [row(n)["instruction"] for n in (*range(200, 206), 0)]
    shown = said(capsys, "inspect-data", str(run), "--split", "val/hard", "-n", "2")
    assert "harder" in shown

    moved = there.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run = moved / "outputs" / task / "first"
    again = train(f"resume={run}", "trainer.max_steps=5")
    assert "Resuming from " in again
    places = checkpoints.read_header(run / LAST)["lineage"]["places"]
    assert places["data.val_sets.hard"]["found"] == [str(moved / "hard.jsonl")]
    assert [step for step, _ in read_metrics(run / "metrics.csv")["train/loss"]] == list(range(5))


@pytest.mark.slow
@pytest.mark.parametrize(("monitor", "best"), [("val/hard/loss", min), ("val/loss", max)])
def test_another_set_steers_only_where_it_is_named(there: Path, monitor: str, best: Any) -> None:
    """Answers in letters that training never sees get less likely from step to step, the others more likely."""
    write("hard.jsonl", [row(number, answer="ZXQJ" * 4) for number in range(300, 305)])
    train(*words_of("sft", there), *OWN, *SETS, f"monitor={monitor}", "run_name=first", "trainer.max_steps=12",
          "trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=null", "optimizer.lr=0.01")  # fmt: skip
    run = there / "outputs" / "sft" / "first"
    losses = {name: dict(points) for name, points in read_metrics(run / "metrics.csv").items() if name.endswith("loss")}
    hard, main_set = losses["val/hard/loss"], losses["val/loss"]
    assert list(hard) == list(main_set) == [3, 7, 11]
    assert min(hard, key=hard.__getitem__) == min(hard)
    assert min(main_set, key=main_set.__getitem__) == max(main_set)
    assert checkpoints.read_header(run / "checkpoints" / "best.ckpt")["step"] == best(hard) + 1


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_splits_of_a_dataset_of_the_hub(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", there / "datasets")  # a slice is kept there
    Path("set").mkdir()
    for name, target in (("train", "train"), ("val", "validation"), ("test", "test")):
        Path(f"{name}.jsonl").rename(f"set/{target}.jsonl")
    hub = ["data.hf_dataset=set", "data.hf_val_split=validation", "data.hf_test_split=train[:25%]"]
    out = train(*words_of(task, there), *hub, SETS[0], "run_name=first", "trainer.max_steps=2")
    run = there / "outputs" / task / "first"
    leaks = summary_of(run)["data"]["leaks"]
    assert {split: (one["prompts"], one["of"]) for split, one in leaks.items()} == {
        "val": (4, 12),
        "val/hard": (0, 5),
        "test": (10, 10),
    }
    assert "Val prompts also in training: 4 of 12" in out
    last = {name: points[-1][1] for name, points in read_metrics(run / "metrics.csv").items()}
    found = json.loads(said(capsys, "evaluate", str(run / LAST), "--split", "val", "--json"))
    assert found["loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    train(f"resume={run}", "data.hf_dataset=set", "trainer.max_steps=3")  # a folder that is named again is trusted


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_bad_records_are_listed_at_every_start(there: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    bad = {"train.jsonl": ['{"instruction": 3}', '{"instruction": "a"', "[]"], "val.jsonl": ["null"]}
    for name, lines in bad.items():
        with Path(name).open("a") as file:
            file.writelines(f"{line}\n" for line in lines)
    words = [*words_of(task, there), *OWN, SETS[0], "run_name=first"]
    refused = train_here([*words, "trainer.max_steps=1"])
    assert refused.code == 2
    assert "train.jsonl" in refused.err
    for steps in (1, 2):
        out = train(*words, "data.bad_records=quarantine", f"trainer.max_steps={steps}")
        assert out.count("4 bad records left out (data.bad_records=quarantine)") == 1
        run = there / "outputs" / task / "first"
        rows = [json.loads(line) for line in (run / "bad_records.jsonl").read_text().splitlines()]
        assert [Path(one["place"]).name for one in rows] == [
            *(f"train.jsonl:{n}" for n in (41, 42, 43)),
            "val.jsonl:13",
        ]
        assert summary_of(run)["data"]["quarantined"] == 4
        assert "4 records that could not be read were left out" in out
        (run / "bad_records.jsonl").unlink()
        monkeypatch.setattr(records, "open_records", None)  # from now on only the cache can answer
