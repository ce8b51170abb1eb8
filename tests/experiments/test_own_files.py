"""Runs with files of their own for validation and test, further validation sets, mixtures: typed, moved, resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_run import SETTINGS, train_here

from llm_lightning.cli.main import main
from llm_lightning.data.of_checkpoint import tokens_of
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import load_model

QUIET = [word for word in SETTINGS if "samples" not in word and "max_steps" not in word]
QUIET = [*QUIET, "callbacks.samples=null", "logger=csv"]
LAST = Path("checkpoints", "last.ckpt")


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        words = random.Random(number).choices(["to be ", "or not ", f"{name}\n"], k=300)
        (folder / name).write_text("".join(words))


def train(*words: str) -> str:
    outcome = train_here([*QUIET, *words])
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def go_on(run: Path, steps: int) -> str:
    outcome = train_here([f"resume={run}", f"trainer.max_steps={steps}"])
    assert (outcome.code, outcome.err) == (0, "")
    assert "Resuming from " in outcome.out
    return outcome.out


def evaluated(run: Path, split: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(run / LAST), "--split", split, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_on_files_of_its_own_is_moved_resumed_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    write(there, "a.txt", "v.txt", "t.txt", "h.txt", "1984")
    monkeypatch.chdir(there)
    paths = ["data.path=a.txt", "data.val_path=v.txt", "data.test_path=[t.txt]", "data.val_sets.hard=h.txt"]
    out = train(*paths, "data.val_sets.year=1984", "monitor=val/hard/loss", "data.val_fraction=0.2", "run_name=first",
                "trainer.max_steps=2")  # fmt: skip
    assert "data.val_fraction=0.2 is ignored: data.val_path or data.hf_val_split gives the validation data" in out
    assert "Best val/hard/loss " in out
    moved = there.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run = moved / "outputs" / "pretraining" / "first"
    assert "is read from" not in go_on(run, 4)
    places = checkpoints.read_header(run / LAST)["lineage"]["places"]
    assert {key: place["found"] for key, place in places.items()} == {
        "data.path": [str(moved / "a.txt")],
        "data.val_path": [str(moved / "v.txt")],
        "data.test_path": [str(moved / "t.txt")],
        "data.val_sets.hard": [str(moved / "h.txt")],
        "data.val_sets.year": [str(moved / "1984")],
    }
    last = {name: points[-1][1] for name, points in read_metrics(run / "metrics.csv").items()}
    assert len({round(last[f"val/{name}loss"], 6) for name in ("", "hard/", "year/")}) == 3
    for split in ("val", "val/hard", "val/year"):
        assert evaluated(run, split, capsys)["loss"] == pytest.approx(last[f"{split}/loss"], rel=1e-5)
    assert evaluated(run, "test", capsys)["n_bytes"] == (moved / "t.txt").stat().st_size
    assert main(["evaluate", str(run), "--split", "val/hrad"]) == 2
    assert "no validation set val/hrad; there are val, val/hard, val/year" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(run), "--split", "valid"])
    refused = capsys.readouterr().err
    assert "{train,val,val/NAME,test}" in refused
    assert "invalid choice: 'valid'" in refused
    (moved / "h.txt").write_text("another text, " * 50)
    outcome = train_here([f"resume={run}", "trainer.max_steps=5"])
    assert outcome.code == 2
    assert outcome.err.startswith("error: cannot resume: data.path, data.val_path, data.test_path, data.val_sets.hard")


@pytest.mark.slow
def test_a_mixture_is_typed_recorded_moved_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    write(there, "web.txt", "1984")
    monkeypatch.chdir(there)
    mixture = "data.mixture=[{name: web, path: web.txt, weight: 0.7}, {name: book, path: 1984, weight: 0.3}]"
    train(mixture, "run_name=first", "trainer.max_steps=1")
    moved = there.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    run = moved / "outputs" / "pretraining" / "first"
    go_on(run, 2)
    header = checkpoints.read_header(run / LAST)
    assert header["config"]["data"]["mixture"][1] == {"name": "book", "path": "1984", "weight": 0.3}
    assert sorted(header["lineage"]["places"]) == ["data.mixture.0.path", "data.mixture.1.path"]
    assert len(tokens_of(load_model(run), "val", instead="")) == 2
    monkeypatch.chdir(moved)
    other = mixture.replace("0.7", "0.6")
    outcome = train_here([*QUIET, other, "run_name=first", "trainer.max_steps=3"])
    assert outcome.code == 2
    assert "cannot resume with other settings: data.mixture was [{'name': 'web', 'weight': 0.7}" in outcome.err


@pytest.mark.slow
def test_a_sweep_over_mixtures_and_sets_has_readable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "web.txt", "book.txt")
    mixtures = [
        f"[{{name: web, path: web.txt, weight: {web}}}, {{name: book, path: book.txt, weight: 1}}]" for web in (1, 3)
    ]
    outcome = train_here(["-m", *QUIET, f"data.mixture={','.join(mixtures)}", "data.val_sets.own=book.txt",
                          "run_name=study", "trainer.max_steps=1"])  # fmt: skip
    assert outcome.code == 0, outcome.err
    jobs = sorted(path.parent.name for path in tmp_path.glob("outputs/**/job.json"))
    assert jobs == ["mixture_web_1_book_1", "mixture_web_3_book_1"]
    [recorded] = tmp_path.glob("outputs/**/mixture_web_3_book_1/job.json")
    content = json.loads(recorded.read_text())["content"]
    assert sorted(content) == ["data.mixture.0.path", "data.mixture.1.path", "data.val_sets.own"]
    assert content["data.mixture.1.path"] == content["data.val_sets.own"]
    again = train_here(["-m", *QUIET, f"data.mixture={','.join(mixtures)}", "data.val_sets.own=book.txt",
                        "run_name=study", "trainer.max_steps=1"])  # fmt: skip
    assert "2 finished, 0 to run" in again.out
