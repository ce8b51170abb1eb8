"""`llm-lightning judge` as it is typed: its table, its files, and bad input."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, records, scripted, serving

from llm_lightning.cli import main as entry
from llm_lightning.metrics.judge import client as judging

RECORD = {"instruction": "Name a fruit.", "input": "", "output": "A banana.", "model_response": "A lemon."}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_DELAY", 0.0)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(scripted) as found:
        yield found


def write(path: Path, rows: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=2))
    return path


def judge(*words: object) -> int:
    return entry.main(["judge", *map(str, words)])


def table(printed: str) -> list[dict[str, str]]:
    """The rows of the table, by the names in its header."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    start = next(index for index, cells in enumerate(lines) if len(cells) > 4)
    width = len(lines[start])
    return [dict(zip(lines[start], cells, strict=True)) for cells in lines[start + 1 :] if len(cells) == width]


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_table_a_report_and_a_histogram(
    server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ["--url", server.url]
    rows = records()
    assert judge(write(tmp_path / "quick.json", [row for row in rows if "slow" not in row["model_response"]]), *to) == 0
    capsys.readouterr()
    file = write(tmp_path / "responses.json", rows)
    assert judge(file, *to, "--timeout", 0.3) == 0
    printed = capsys.readouterr()
    (row,) = table(printed.out)
    interval = row.pop("95% interval")
    assert row == {
        "column": "model_response", "mean": "50.50", "scored": "100", "unparsable": "5", "timeout": "3", "failed": "2",
        "of": "110",
    }  # fmt: skip
    report = json.loads((tmp_path / "responses.judged.json").read_text())
    summary = report["summary"]["columns"]["model_response"]
    assert interval == f"{summary['low']:.2f} to {summary['high']:.2f}"
    assert summary["low"] < summary["scored_low"] < summary["mean"] < summary["scored_high"] < summary["high"]
    assert sum(summary["outcomes"].values()) == summary["n"] == 110
    without = f"{summary['scored_low']:.2f} to {summary['scored_high']:.2f}"
    assert (
        f"counts the 10 others as 0 at its lower and as 100 at its upper end (without them: {without})" in printed.out
    )
    for example in ("unparsable, for example: 'I would give it 85/100.'", "no answer within 0.3 s", "HTTP 500: out of"):
        assert example in printed.out
    assert "--retry-failed sends them again" in printed.out

    first, scored = report["records"][0], report["records"][10]
    assert first["record"] == 1
    assert first["model_response"]["outcome"] == "unparsable"
    assert first["model_response"]["score"] is None
    assert first["model_response"]["answer"] == "I would give it 85/100."
    assert scored["model_response"] == {
        "outcome": "scored", "score": 41, "answer": "41", "error": "", "attempts": 1,
        "prompt_sha256": scored["model_response"]["prompt_sha256"],
    }  # fmt: skip
    assert len({record["model_response"]["prompt_sha256"] for record in report["records"]}) == 110
    assert (tmp_path / "responses.judged.png").read_bytes().startswith(b"\x89PNG")

    sent = len(server.requests)
    assert judge(file, *to) == 0
    assert capsys.readouterr().out == printed.out
    assert len(server.requests) == sent


@pytest.mark.slow
def test_columns_files_limit_and_json(server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = lambda prompt, _: "90" if "good" in prompt else "10"
    rows = [{**RECORD, "output": f"{i}", "model_response": "good", "model 2 response": "bad"} for i in range(9)]
    one, two = write(tmp_path / "one.json", rows), write(tmp_path / "two.jsonl", rows[:4])
    columns = ["--column", "model_response", "--column", "model 2 response"]
    assert judge(one, two, "--url", server.url, "--limit", 5, "--json", *columns) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [first["columns"]["model_response"][name] for name in ("n", "mean")] == [5, 90]
    assert [second["columns"]["model 2 response"][name] for name in ("n", "mean")] == [4, 10]
    assert len(server.requests) == 10
    assert (tmp_path / "two.judged.json").is_file()
    assert judge(one, "--url", server.url, "--limit", 1, "-o", tmp_path / "x.json") == 0
    assert [row["column"] for row in table(capsys.readouterr().out)] == ["model_response"]
    assert (tmp_path / "x.png").is_file()


def test_the_rubric(server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = lambda *_: "4"
    file = write(tmp_path / "responses.json", [RECORD, {**RECORD, "model_response": "Lime"}])
    assert judge(file, "--url", server.url, "--prompt", "rubric", "--model", "phi3") == 0
    printed = capsys.readouterr().out
    assert "judged by phi3, prompt rubric (1 to 5)" in printed
    assert table(printed)[0]["mean"] == "4.00"
    assert json.loads((tmp_path / "responses.judged.json").read_text())["summary"]["scale"] == [1, 5]


def test_half_a_surrogate_pair_from_a_judge(server: JudgeServer, tmp_path: Path) -> None:
    server.script = lambda *_: "\ud800"
    assert judge(write(tmp_path / "responses.json", [RECORD]), "--url", server.url) == 0
    (record,) = json.loads((tmp_path / "responses.judged.json").read_text())["records"]
    assert (record["model_response"]["outcome"], record["model_response"]["answer"]) == ("unparsable", "\ud800")


def test_pairwise(server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = lambda prompt, _: "A" if "wins" in prompt.split("[Response A]")[1].split("[Response B]")[0] else "B"
    rows = [{**RECORD, "model_response_1": "wins", "model_response_2": "x", "instruction": f"{i}"} for i in range(7)]
    rows.append({**rows[0], "model_response_1": "x", "model_response_2": "wins"})
    for row in rows:
        del row["model_response"]
    file = write(tmp_path / "responses.json", rows)
    assert judge(file, "--url", server.url, "--pairwise") == 0
    printed = capsys.readouterr().out
    (row,) = table(printed)
    assert [row[name] for name in ("wins", "ties", "losses", "win rate", "of")] == ["7", "0", "1", "0.875", "8"]
    assert "the response shown first was chosen in 50% of the 16 answers that were not a tie" in printed
    report = json.loads((tmp_path / "responses.pairwise.json").read_text())
    assert report["records"][7]["winner"] == "B"
    assert [order["choice"] for order in report["records"][7]["orders"]] == ["B", "A"]


# --- without a judge -------------------------------------------------------------------------------------------------


def test_lexical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = ["Simile.", "Metaphor.", "Simile.", "The cat is on the mat."]
    responses = ["simile", "simile", "simile", "the cat sat on the mat"]
    rows = [{**RECORD, "output": a, "model_response": b} for a, b in zip(outputs, responses, strict=True)]
    assert judge(write(tmp_path / "responses.json", rows), "--lexical") == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("model_response"))
    assert re.split(r"\s{2,}", line)[:4] == ["model_response", "0.500", "0.150 to 0.850", f"{(2 + 5 / 6) / 4:.3f}"]
    assert "always answering 'Simile.', the most frequent reference, has an exact match of 0.500" in printed
    report = json.loads((tmp_path / "responses.lexical.json").read_text())
    assert [record["model_response"]["exact_match"] for record in report["records"]] == [True, False, True, False]
    assert report["records"][3]["model_response"]["rouge_l"] == pytest.approx(5 / 6)


# --- bad input -------------------------------------------------------------------------------------------------------


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in RECORD.items() if name != field}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, "", r"responses\.json does not exist"),
        ('[\n{"instruction": "x"}\n{', "", r"responses\.json, line 3, column 1: not JSON"),
        ([], "", r"responses\.json holds no records"),
        ({}, "", r"responses\.json: no field starts with model_response"),
        ([RECORD, without("output")], "", r"responses\.json: 1 bad record: record 2 \(line \d+\): no field 'output'; "
         r"there are 'instruction', 'input', 'model_response'"),
        ([RECORD, without("model_response")], "", r"record 2 .*: no field 'model_response'"),
        ([RECORD, {**RECORD, "model_response": None}], "", r"record 2 .*: field 'model_response' holds NoneType, not"),
        ([{**RECORD, "input": ["x"]}], "", r"record 1 .*: field 'input' holds list, not text"),
        ([without("output")] * 12, "", r"12 bad records \(the first 10 of 12\): record 1 "),
        ([RECORD], "--column answer", r"no field 'answer' \(--column\); there are 'instruction', 'input', 'output', "),
        ([without("model_response")], "", r"no field starts with model_response; name one with --column, there are"),
        ([RECORD], "--pairwise", r"--pairwise compares two columns, not 1 \('model_response'\); give --column twice"),
        ([RECORD], "--limit 0", r"--limit 0 must be at least 1"),
        ([RECORD], "--retries -1", r"retries=-1 must be at least 0"),
        ([RECORD], "--url localhost:11434", r"url=localhost:11434 must be an address such as http://localhost:11434/v1"),
        ([RECORD], "-o TMP/none/x.json", r"the folder .*none does not exist"),
        ([RECORD], "-o TMP/responses.json", r"must be a file of its own, such as responses\.judged\.json"),
        ([RECORD], "-o TMP/x.png", r"must be a file of its own, such as"),
        ([RECORD], "TMP/responses.jsonl", r"responses\.judged\.json would hold the reports of two files"),
        ([RECORD], "TMP/other.json -o TMP/x.json", r"x\.json is one file and there are 2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, words: str, message: str
) -> None:
    file = tmp_path / "responses.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    assert judge(file, *words.replace("TMP", str(tmp_path)).split()) == 2
    assert_one_line(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["responses.json"] * (content is not None)


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("llm-lightning judge: ")
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err


def test_no_judge_at_the_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    file = write(tmp_path / "responses.json", records())
    assert judge(file, "--url", f"http://127.0.0.1:{port}/v1") == 2
    assert_one_line(capsys, rf"no judge answers at http://127\.0\.0\.1:{port}/v1 .*start one with `ollama serve` and")
    assert not (tmp_path / "responses.judged.json").exists()


def test_a_model_that_is_not_there(server: JudgeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.script = lambda *_: 404
    assert judge(write(tmp_path / "responses.json", records()), "--url", server.url, "--model", "gone") == 2
    assert_one_line(capsys, r"has no model 'gone' .*there are phi3; get it with `ollama pull gone`, .*--model")


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "torchmetrics", "matplotlib", "lightning", "numpy"}
    code = f"import sys, llm_lightning.cli.judge; print({heavy!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
