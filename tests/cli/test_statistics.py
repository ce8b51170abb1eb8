"""`llm-lightning statistics`: figures that can be counted by hand, and those of the book's files."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_lightning.cli import statistics
from llm_lightning.cli.main import main
from llm_lightning.tokenizers.build import build_tokenizer

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name a colour.", "input": "", "output": "red"},
    {"instruction": "Name a colour.", "input": "", "output": "blue"},
    {"instruction": "Name a colour.", "input": "of the sea", "output": "blue"},
    {"instruction": "Say nothing.", "input": "  ", "output": ""},
    {"instruction": "Say nothing.", "input": "  ", "output": ""},
    {"instruction": "na\u00efve\nquestion", "input": None, "output": "\x1b[31mr\u00e9d"},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def facts_of(capsys: pytest.CaptureFixture, *words: str) -> dict[str, Any]:
    assert main(["statistics", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_records_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "x.jsonl", RECORDS)
    facts = facts_of(capsys, str(file), "--tokenizer", "byte")
    assert (facts["records"], list(facts["keys"])) == (6, ["instruction", "input", "output"])
    assert {key: one["empty"] for key, one in facts["keys"].items()} == {"instruction": 0, "input": 5, "output": 2}
    # Outputs of 3, 4, 4 and 8 characters; the last one has 9 bytes.
    assert facts["keys"]["output"]["characters"] == {
        "min": 3, "mean": 19 / 4, "median": 4, "p95": pytest.approx(4 + 0.85 * 4), "max": 8, "total": 19,
    }  # fmt: skip
    assert facts["keys"]["output"]["tokens"] == {
        "min": 3, "mean": 5, "median": 4, "p95": pytest.approx(4 + 0.85 * 5), "max": 9, "total": 20,
    }  # fmt: skip
    assert (facts["repeated_prompts"], facts["repeated_records"]) == (2, 1)
    assert facts["longest"][0] == {"place": f"{file}:3", "tokens": 14 + 10 + 4}
    assert len(facts["longest"]) == 5


def test_what_is_printed_is_what_was_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "x.jsonl", RECORDS)
    assert main(["statistics", str(file), "--tokenizer", "byte"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert rows[0] == [f"{file}:", "6", "records", "(tokens:", "byte)"]
    assert rows[6] == ["output", "2", "characters", "3", "4.8", "4.0", "7.4", "8", "19"]
    assert rows[7] == ["tokens", "3", "5.0", "4.0", "8.2", "9", "20"]
    assert "prompts: 2; whole records: 1" in printed
    assert ["28", "tokens", f"{file}:3"] in rows
    assert "\x1b" not in printed


def test_messages_by_role(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chats = [
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")],
        [("user", "Hi\nBye"), ("assistant", "Hello\nBye")],
        [("user", "Hi\nBye"), ("assistant", "Hm")],
    ]
    records = [{"messages": [{"role": role, "content": said} for role, said in chat]} for chat in chats]
    facts = facts_of(capsys, str(write(tmp_path / "x.jsonl", records)), "--tokenizer", "byte")
    assert {key: one["empty"] for key, one in facts["keys"].items()} == {"system": 2, "user": 0, "assistant": 0}
    assert [facts["keys"][role]["characters"]["total"] for role in facts["keys"]] == [9, 18, 20]
    assert (facts["repeated_prompts"], facts["repeated_records"]) == (1, 0), "the first one has a system message"


def test_preference_records_and_keys_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    records = [{"instruction": "a", "chosen": "bc", "rejected": [1], "note": "d" * n} for n in range(4)]
    file = write(tmp_path / "x.jsonl", records)
    assert list(facts_of(capsys, str(file), "--tokenizer", "byte")["keys"]) == ["instruction", "chosen"]
    note = facts_of(capsys, str(file), "--tokenizer", "byte", "--keys", "note")["keys"]["note"]
    assert (note["empty"], note["tokens"]["total"], note["tokens"]["median"]) == (1, 6, 2)


def test_a_text_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes("\ufeffTwo words\n\u00e9t\u00e9 2\r\nend".encode())
    facts = facts_of(capsys, str(file), "--tokenizer", "byte")
    expected = {"characters": 19, "bytes": 21, "words": 5, "lines": 3, "tokens": 21, "bytes_per_token": 1.0}
    assert {name: facts[name] for name in expected} == expected
    assert main(["statistics", str(file), "--tokenizer", "byte"]) == 0
    assert ["tokens", "21", "(byte)"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_a_text_is_counted_in_pieces_as_it_is_whole(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PIECE", piece)
    draw = random.Random(0)
    for name in ("gpt2", "byte"):
        tokenizer = build_tokenizer(name)
        for _ in range(50):
            text = "".join(draw.choices("ab  ,'s\n1\u00e9\U0001f600", k=draw.randrange(1, 300)))
            assert statistics._n_tokens(text, tokenizer) == len(tokenizer.encode(text))


@pytest.mark.slow
def test_a_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(tmp_path / "x.jsonl", RECORDS)
    assert main(["statistics", str(file), "--plot", str(tmp_path / "x.png"), "--tokenizer", "byte"]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n")
    capsys.readouterr()


@pytest.mark.parametrize("longest", [1, 50, 51, 1000])
def test_histograms_count_every_value_that_is_not_empty(longest: int) -> None:
    lengths = [0, 1, *range(1, longest + 1), longest]
    figure = statistics._histograms({"output": lengths, "input": [0, 0]}, "byte")
    heights = [sum(bar.get_height() for bar in axes.patches) for axes in figure.axes]
    assert heights == [len(lengths) - 1, 0]
    assert len(figure.axes[0].patches) <= statistics.BARS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("TMP/none.json", "none.json does not exist"),
        ("TMP/none.txt", "none.txt does not exist"),
        ("TMP/empty.txt", "empty.txt is empty"),
        ("TMP/latin1.txt", "latin1.txt, line 1: byte 1 (0xe9) is not valid UTF-8"),
        ("FILE --keys inptu", "no record has the key 'inptu'; there are 'input', 'instruction', 'output'"),
        ("TMP/other.jsonl", "no record has the key 'instruction'; there are 'question'"),
        ("TMP/number.jsonl", "number.jsonl:1: field 'output' holds int, not text"),
        ("FILE --tokenizer gpt5", "unknown tokenizer 'gpt5'"),
        ("FILE --tokenizer bpe", "--tokenizer bpe is trained on text; use gpt2"),
        ("TMP/latin1.txt --plot TMP/x.png", "--plot and --keys are for files of records"),
        ("FILE --plot TMP/x.foo", "Format 'foo' is not supported"),
        ("FILE --plot TMP/none/x.png", "none/x.png"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    file = write(tmp_path / "x.jsonl", RECORDS)
    write(tmp_path / "other.jsonl", [{"question": "a"}])
    write(tmp_path / "number.jsonl", [{"instruction": "a", "output": 3}])
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes(b"a\xe9b")
    words = [word.replace("FILE", str(file)).replace("TMP", str(tmp_path)) for word in options.split()]
    assert main(["statistics", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("llm-lightning statistics: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_the_real_records(data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    file = data_dir / "instruction-data.json"
    records = json.loads(file.read_text(encoding="utf-8"))
    facts = facts_of(capsys, str(file))
    assert facts["records"] == 1100
    assert facts["records"] - facts["keys"]["input"]["empty"] == 325
    tokenizer = build_tokenizer("gpt2")
    lengths = [len(tokenizer.encode(record["output"])) for record in records]
    measures = (min(lengths), np.mean(lengths), np.median(lengths), np.percentile(lengths, 95), max(lengths))
    assert list(facts["keys"]["output"]["tokens"].values())[:5] == pytest.approx(measures)
    assert facts["keys"]["output"]["tokens"]["total"] == sum(lengths)
    prompts = Counter((record["instruction"], record["input"]) for record in records)
    assert facts["repeated_prompts"] == sum(prompts.values()) - len(prompts) > 0
    assert facts["repeated_records"] == 0


def test_the_real_text(data_dir: Path, capsys: pytest.CaptureFixture) -> None:
    facts = facts_of(capsys, str(data_dir / "the-verdict.txt"))
    assert (facts["characters"], facts["tokens"]) == (20_479, 5_145)
