"""`llm-lightning near-duplicates`: what it prints, and the file without the later ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.cli.main import main

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Edit the following sentence for grammar.", "input": "", "output": "He goes to the park."},
    {"instruction": "What is the capital of Italy?", "input": "", "output": "Rome\x1b[2J, \u00e9ternal"},
    {
        "instruction": "Edit the following sentence for grammar!",
        "input": "They was walking quickly, because of rain",
        "output": "We go home.",
    },
    {"instruction": "what is the capital of italy", "input": None, "output": "rome[2j,  \u00e9ternal"},
    {
        "instruction": "Sort the words.",
        "input": "they was walking quickly because of rain",
        "output": "goes home we",
        "number": 4,
    },
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8")
    return path


def test_pairs_are_printed_with_the_numbers_of_their_records(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["near-duplicates", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "instruction: 5 texts; pairs: 2; groups: 2; later ones of a group: 2"
    assert [line.split(maxsplit=2) for line in lines[1:5:2]] == [
        ["1.00", "1", RECORDS[0]["instruction"]],
        ["1.00", "2", RECORDS[1]["instruction"]],
    ]
    assert [line.split(maxsplit=1) for line in lines[2:5:2]] == [
        ["3", RECORDS[2]["instruction"]],
        ["4", RECORDS[3]["instruction"]],
    ]
    assert lines[5] == "input: 2 texts; pairs: 1; groups: 1; later ones of a group: 1"
    assert [line.split()[-7] for line in lines[6:8]] == ["They", "they"]
    assert lines[8] == "output: 5 texts; pairs: 1; groups: 1; later ones of a group: 1"
    assert lines[9].split(maxsplit=2)[2] == r"Rome\x1b[2J, " + "\u00e9ternal", "no control character reaches a terminal"
    assert len(lines) == 11


def test_json_has_all_groups_and_as_many_pairs_as_are_wanted(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["near-duplicates", str(file), "--json", "--show", "1", "--keys", "instruction", "prompt"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["records"], facts["threshold"], list(facts["keys"])) == (5, 0.9, ["instruction", "prompt"])
    assert facts["keys"]["instruction"] == {
        "n_pairs": 2,
        "n_later": 2,
        "pairs": [[1, 3, 1.0]],
        "groups": [[1, 3], [2, 4]],
    }
    assert facts["keys"]["prompt"]["groups"] == [[2, 4]], "instruction and input together"


def test_fewer_pairs_are_shown_than_there_are(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["near-duplicates", str(file), "--show", "1", "--keys", "instruction"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == ["  more pairs: 1 (--show 2)"]


@pytest.mark.parametrize(
    ("options", "kept", "by"),
    [
        ([], [0, 1, 2], "input, output"),
        (["--keys", "output"], [0, 1, 2, 4], "output"),
        (["--keys", "instruction"], [0, 1, 4], "instruction"),
        (["--keys", "prompt"], [0, 1, 2, 4], "prompt"),
        (["--keys", "input", "--threshold", "1"], [0, 1, 2, 3], "input"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_first_of_each_group_is_kept(
    file: Path, capsys: pytest.CaptureFixture, options: list[str], kept: list[int], by: str, suffix: str
) -> None:
    before, cleaned = file.read_bytes(), file.with_name("cleaned" + suffix)
    assert main(["near-duplicates", str(file), *options, "--remove", "-o", str(cleaned)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{cleaned}: {len(kept)} records, {5 - len(kept)} removed ({by})"
    content = cleaned.read_text(encoding="utf-8")
    written = json.loads(content) if suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    assert written == [RECORDS[index] for index in kept]
    assert "\u00e9ternal" in content
    assert file.read_bytes() == before


def test_what_is_written_has_no_near_duplicates_left(file: Path, capsys: pytest.CaptureFixture) -> None:
    cleaned = file.with_name("cleaned.json")
    assert main(["near-duplicates", str(file), "--keys", "output", "input", "--remove", "-o", str(cleaned)]) == 0
    capsys.readouterr()
    assert main(["near-duplicates", str(cleaned), "--keys", "output", "input", "--json"]) == 0
    assert [key["n_pairs"] for key in json.loads(capsys.readouterr().out)["keys"].values()] == [0, 0]


def test_messages_are_compared_by_who_says_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    chats = [
        ["Hello there!", "Hi.", "How are you?", "Fine."],
        ["Tell me a joke.", "Knock knock."],
        ["Hello there", "Good morning.", "how are you", "Well."],
    ]
    file = tmp_path / "chats.jsonl"
    messages = [
        [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(chat)] for chat in chats
    ]
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages), encoding="utf-8")
    assert main(["near-duplicates", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["keys"]
    assert {key: one["groups"] for key, one in facts.items()} == {"instruction": [[1, 3]], "output": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("TMP/none.json", "none.json does not exist"),
        ("FILE --threshold 1.5", "threshold=1.5 must be above 0 and at most 1"),
        ("FILE --show -1", "--show -1 must be 0 or more"),
        ("FILE --remove", "--remove and --output FILE belong together"),
        ("FILE -o TMP/x.json", "--remove and --output FILE belong together"),
        ("FILE --remove -o FILE", "is the file that is read; name another one"),
        ("FILE --remove -o TMP/link.json", "is the file that is read; name another one"),
        ("FILE --remove -o TMP/none/x.json", "there is no folder"),
        ("FILE --keys inptu", "no record has the key 'inptu'; there are 'instruction', 'input', 'output', 'number'"),
        ("FILE --keys number", "data.json:22: field 'number' holds int, not text"),
        ("TMP/other.json", "no record has the key 'instruction'; there are 'question'"),
        ("TMP/broken.jsonl", "broken.jsonl: 1 bad record: line 2"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: str, message: str
) -> None:
    (tmp_path / "other.json").write_text('[{"question": "a"}]', encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a"}\n{"instruction": ', encoding="utf-8")
    (tmp_path / "link.json").symlink_to(file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    words = [word.replace("FILE", str(file)).replace("TMP", str(tmp_path)) for word in options.split()]
    assert main(["near-duplicates", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("llm-lightning near-duplicates: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_real_file(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, cleaned = data_dir / "instruction-data.json", tmp_path / "cleaned.json"
    records = json.loads(file.read_text(encoding="utf-8"))
    assert main(["near-duplicates", str(file), "--keys", "prompt", "--remove", "-o", str(cleaned), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    left = json.loads(cleaned.read_text(encoding="utf-8"))
    prompts = [(record["instruction"], record["input"]) for record in left]
    assert len(set(prompts)) == len(prompts) == facts["kept"]
    # 2 test and 4 validation prompts stand in the training split, too (the book's data, known in advance).
    train = {(record["instruction"], record["input"]) for record in records[:935]}
    assert sum((record["instruction"], record["input"]) in train for record in records[935:]) == 6
    assert facts["removed"] == facts["keys"]["prompt"]["n_later"] >= 6
