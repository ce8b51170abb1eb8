"""Records that are left out are listed in the run folder, counted in the summary, and named in the closing lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import SETTINGS, fit_here, write_corpus

from llm_lightning.data.files.bad_records import BadRecord
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.experiments.quarantine import write_bad_records

BAD = [
    BadRecord("a.jsonl:3", "no field 'text'; its fields: 'body'"),
    BadRecord("gr\u00fc\u00dfe\udcff.jsonl:1", 'a "quote"\nand \u2028'),
]


def test_the_file_has_one_object_a_line_and_goes_with_the_last_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "bad_records.jsonl"
    write_bad_records(tmp_path, BAD)
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [{"place": place, "reason": reason} for place, reason in BAD]
    assert (lines[-1], "grüße" in lines[1]) == ("", True)
    write_bad_records(tmp_path, [])
    write_bad_records(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_has_of_bad_records_is_listed(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"to be or not to be, {number}"}) for number in range(40)]
    lines[3], lines[7] = '{"text": 3}', '{"text": "a'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    words = [*(word for word in SETTINGS if "samples" not in word), "callbacks.samples=null", "logger=csv"]
    words += [f"data.path={tmp_path / 'a.jsonl'}", f"hydra.run.dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    assert "2 bad records" in fit_here(words).err
    outcome = fit_here([*words, "data.bad_records=quarantine"])
    assert (outcome.code, outcome.err) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [row["place"].rpartition(":")[2] for row in rows] == ["4", "8"]
    assert "2 records that could not be read were left out" in outcome.out


@pytest.mark.slow
def test_a_run_lists_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantined: list[BadRecord] = []
    build = PretrainingDataModule.build

    def building(self: Any) -> None:
        build(self)
        self.quarantined = list(quarantined)

    monkeypatch.setattr(PretrainingDataModule, "build", building)
    run = tmp_path / "run"
    words = [*(word for word in SETTINGS if "samples" not in word), "callbacks.samples=null", "logger=csv"]
    words = [*words, f"data.path={write_corpus(tmp_path / 'a.txt')}", f"hydra.run.dir={run}"]

    def train(*more: str) -> str:
        outcome = fit_here([*words, *more])
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    assert "left out" not in train()
    assert not (run / "bad_records.jsonl").exists()
    quarantined[:] = BAD
    train("data.preview=true", f"hydra.run.dir={tmp_path / 'shown'}")
    assert not (tmp_path / "shown").exists()
    out = train("trainer.max_steps=5")
    assert f"2 records that could not be read were left out: {run}/bad_records.jsonl says which and why." in out
    assert len((run / "bad_records.jsonl").read_text("utf-8").split("\n")) == 3
    assert json.loads((run / "summary.json").read_text())["data"]["quarantined"] == 2
    quarantined.clear()
    assert "left out" not in train("trainer.max_steps=6")
    assert not (run / "bad_records.jsonl").exists()
