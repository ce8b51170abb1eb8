"""JSON records are read strictly: every one intact with its place, or one error that names file, line and remedy."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.records.placed import PlacedRecord, has_text, placed_records, text_of

AS_WRITTEN = FileOptions(newlines="keep")


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def random_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {str(number): random_value(draw, depth + 1) for number in range(draw.randrange(4))}
    text = "".join(draw.choices('ab "\\\n\r\t\u2028\u00e9\U0001f600[]{},:', k=draw.randrange(12)))
    return [None, True, draw.randrange(10**30), draw.random() * 1e300, text, ""][kind]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_is_what_json_reads(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    draw = random.Random(0)
    records = [{"id": number, "value": random_value(draw)} for number in range(200)]
    file = put(tmp_path / "x.json", json.dumps(records, indent=indent, ensure_ascii=ascii_only))
    assert [record for record, _ in placed_records(file, AS_WRITTEN)] == records


def test_json_lines_are_what_json_reads(tmp_path: Path) -> None:
    draw = random.Random(1)
    records = [{"id": number, "value": random_value(draw)} for number in range(200)]
    content = "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    for name in ("x.jsonl", "x.NDJSON"):
        assert [record for record, _ in placed_records(put(tmp_path / name, content), AS_WRITTEN)] == records


def test_each_record_has_the_line_where_it_starts(tmp_path: Path) -> None:
    file = put(tmp_path / "x.json", '\n[ {"a": "1\\n"},\n\n {"a":\n 2}, \n{"a": 3}\n]\n')
    assert [place for _, place in placed_records(file)] == [f"{file}:{line}" for line in (2, 4, 6)]
    file = put(tmp_path / "x.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [place for _, place in placed_records(file)] == [f"{file}:{line}" for line in (1, 3)]


def test_records_on_one_line_are_numbered(tmp_path: Path) -> None:
    file = put(tmp_path / "x.json", '[{"a": 1}, {"a": 2}]')
    assert [place for _, place in placed_records(file)] == [f"{file}, record 1", f"{file}, record 2"]


def test_a_byte_order_mark_and_whole_surrogate_pairs(tmp_path: Path) -> None:
    file = put(tmp_path / "x.json", '\ufeff[{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}]')
    assert placed_records(file)[0].record == {"a": "\U0001f600", "b": "\\ud83d"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "", "x.json is empty; give a JSON array"),
        ("x.json", " \n", "x.json is empty; give a JSON array"),
        ("x.json", "[ ]", "x.json holds no records; give .jsonl"),
        ("x.json", '{\n"a": 1}', "x.json starts with an object, .* name the file .jsonl"),
        ("x.json", '"a"', "x.json, line 1, column 1: not JSON: a file of records starts with"),
        ("x.json", '[{"a": 1},\n {"a": tru}]', "x.json, line 2, column 8: not JSON: Expecting value"),
        ("x.json", '[{"a": 1},\n]', "x.json, line 1, column 10: not JSON: a comma after the last record"),
        ("x.json", '[{"a": 1}\n {"a": 2}]', "x.json, line 2, column 2: not JSON: expecting ',' or ']'"),
        ("x.json", '[{"a": 1}\n', "x.json, line 2, column 1: not JSON: the file ends before"),
        ("x.json", '[{"a": 1},', "x.json, line 1, column 11: not JSON: Expecting value"),
        ("x.json", '[{"a": 1}]\n[]', "x.json, line 2, column 1: not JSON: more after the end"),
        ("x.json", '[{"a": "\n"}]', "x.json, line 1, column 9: not JSON: Invalid control character"),
        ("x.json", "[" * 100_000, "x.json, line 1, column 2: not JSON: nested too deeply"),
        ("x.json", '[{"a": 1},\n["a"]]', "x.json: 1 bad record: line 2: a JSON list, not an object"),
        ("x.json", '[{"a": 1, "a": 2}]', "1 bad record: line 1: field 'a' occurs twice"),
        ("x.json", '[{"a": {"b": 1, "b": 2}}]', "1 bad record: line 1: field 'b' occurs twice"),
        ("x.json", '[{"a": NaN}]', "1 bad record: line 1: NaN is not JSON"),
        ("x.json", '[{"a": ' + "1" * 5000 + "}]", "1 bad record: line 1: Exceeds the limit"),
        (
            "x.json",
            '[{"a": "xy\\ud83d"}]',
            "1 bad record: line 1: field 'a' holds half a surrogate pair at character 2",
        ),
        ("x.json", '[{"a": ["\\uDE00"]}]', "1 bad record: line 1: field 'a' holds half a surrogate pair"),
        ("x.json", "[{},\n1,\n{},\nnull]", "2 bad records: line 2: a JSON int, .*; line 4: a JSON NoneType"),
        ("x.json", '["a", {}, 3]', "2 bad records: record 1: a JSON str, .*; record 3: a JSON int"),
        ("x.jsonl", "\n", "x.jsonl holds no records"),
        ("x.jsonl", '{"a": 1}\n{"a": }', "1 bad record: line 2: not JSON: Expecting value at column 7"),
        (
            "x.jsonl",
            '{"a": 1} {"a": 2}',
            "1 bad record: line 1: not JSON: Extra data at column 10",
        ),
        ("x.jsonl", '{"a": "b', "1 bad record: line 1: not JSON: Unterminated string starting at column 7"),
        ("x.jsonl", '{"a": ' + "[" * 100_000, "1 bad record: line 1: not JSON: nested too deeply"),
        ("x.jsonl", '{"a": 1, "a": 2}\n\n3', "2 bad records: line 1: field 'a' occurs twice; line 3: a JSON int"),
        ("x.jsonl", '{"a": Infinity}', "1 bad record: line 1: Infinity is not JSON"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = put(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        placed_records(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_all_bad_records_are_counted_and_ten_are_shown(tmp_path: Path, name: str) -> None:
    records = "\n".join("3" for _ in range(25))
    file = put(tmp_path / name, records if name == "x.jsonl" else "[" + records.replace("\n", ",\n") + "]")
    with pytest.raises(ValueError, match=r"25 bad records \(the first 10 of 25\)") as error:
        placed_records(file)
    assert str(error.value).count("line ") == 10


def test_bytes_that_are_no_text_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.json, line 2: byte 8 \(0xe9\)"):
        placed_records(put(tmp_path / "x.json", b'[{"a":\n"\xe9"}]'))
    for path in (tmp_path / "nowhere.json", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=r"does not exist|folder .* holds no "):
            placed_records(path)


def test_the_real_file(data_dir: Path) -> None:
    file = data_dir / "instruction-data.json"
    records = placed_records(file)
    assert [record for record, _ in records] == json.loads(file.read_text(encoding="utf-8"))
    lines = file.read_text(encoding="utf-8").split("\n")
    for record, place in records:
        start = int(place.rpartition(":")[2])
        assert lines[start - 1].strip() == "{"
        assert json.loads("{" + lines[start].strip().removesuffix(",") + "}") == {"instruction": record["instruction"]}


# -- texts -------------------------------------------------------------------------------------------------------------

CHAT = PlacedRecord(
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "42"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Bye!"},
        ],
        "text": "x",
    },
    "x.jsonl:1",
)


def test_the_text_of_a_field_and_of_a_role() -> None:
    alpaca = PlacedRecord({"instruction": "Go.", "input": None, "user": "somebody"}, "x.jsonl:1")
    assert [text_of(alpaca, key) for key in ("instruction", "input", "output", "user")] == ["Go.", "", "", "somebody"]
    assert [has_text(alpaca, key) for key in ("instruction", "input", "output")] == [True, True, False]
    said = {"system": "Be brief.", "user": "Hi\nBye", "assistant": "\nBye!", "text": "x", "input": ""}
    assert {key: text_of(CHAT, key) for key in said} == said
    assert (text_of(CHAT, "instruction"), text_of(CHAT, "output")) == (said["user"], said["assistant"])
    assert [has_text(CHAT, key) for key in ("instruction", "output", "text", "input")] == [True, True, True, False]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"output": 3}, "x.jsonl:7: field 'output' holds int, not text"),
        ({"messages": "hi"}, "x.jsonl:7: field 'messages' must be a list of messages"),
        ({"messages": ["hi"]}, "x.jsonl:7: message 1 must be an object with 'role'"),
        (
            {"messages": [{"role": "narrator", "content": ""}]},
            "x.jsonl:7: message 1 has the role 'narrator', which is none of system, user, assistant, tool",
        ),
        ({"messages": [{"role": "user", "content": 1}]}, "x.jsonl:7: message 1 has no text under 'content'"),
    ],
)
def test_what_is_no_text_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(PlacedRecord(record, "x.jsonl:7"), "output")
