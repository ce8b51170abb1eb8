"""Odd files of every form and task: read as the parser that everybody uses reads them, or refused in one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llm_lightning.data.corpus.sources import open_source
from llm_lightning.data.files.compression import compression_of, open_bytes
from llm_lightning.data.files.find import find_files
from llm_lightning.data.files.form import PLAIN
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.files.rows import rows_of_files
from llm_lightning.data.files.text import TextFile
from llm_lightning.data.records.instruction import read_instructions
from llm_lightning.data.records.labelled import read_labelled
from llm_lightning.data.records.preference import read_preferences

Records = list[dict[str, Any]]

# --- files -----------------------------------------------------------------------------------------------------------


def table(records: Records, separator: str = ",", **dialect: Any) -> str:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(records[0]), delimiter=separator, **dialect)
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue()


def lines(records: Records, end: str = "\n", **how: Any) -> str:
    return "".join(json.dumps(one, **how) + end for one in records)


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.compress(data, "zstd", asbytes=True)
    return packed


def parquet(columns: dict[str, Any], **how: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, **how)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def members(pack: Callable[[bytes], bytes], *parts: str) -> bytes:
    return b"".join(pack(part.encode()) for part in parts)


SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"note"
"""A frame of Zstandard without data."""
MARKS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
"""Characters at which Python's `splitlines` parts lines, and nothing else does."""
LABELLED = [{"text": f"say “{n}”, {MARKS}", "label": "xy"[n % 2]} for n in range(5)]
QUOTED = [{"text": text, "label": "x"} for text in ('say ""hi""', 'a "b", c', "two\nlines", "\ttab", "'", "a;b")]
ASKED = [{"instruction": f"q{n}: {MARKS}", "input": "", "output": f'"{n}"\n\n2'} for n in range(5)]
PAIRS = [{"instruction": f"q{n}", "chosen": f'yes, "{n}"\n', "rejected": "no\tno"} for n in range(5)]
TURNS = [
    [{"role": "user", "content": f"q{n}", "name": None}, {"role": "assistant", "content": "a", "name": "me"}]
    for n in range(5)
]

# --- what the reference parsers read ---------------------------------------------------------------------------------


def of_csv(text: str, **dialect: Any) -> Records:
    found = [dict(one) for one in csv.DictReader(io.StringIO(text, newline=""), **dialect)]
    return with_lf([{name: cell for name, cell in one.items() if name} for one in found])


def of_lines(text: str) -> Records:
    return with_lf([json.loads(line) for line in text.split("\n") if line.strip()])


def of_parquet(content: bytes) -> Records:
    """Without the fields of structs that are null."""
    rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    return [{name: without_nulls(value) for name, value in row.items()} for row in rows]


def without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def with_lf(records: Records) -> Records:
    """Line ends as Python reads them from a file of text."""
    plain: Records = json.loads(json.dumps(records).replace(r"\r\n", r"\n").replace(r"\r", r"\n"))
    return plain


def of_text(content: bytes, encoding: str) -> Records:
    text = io.TextIOWrapper(io.BytesIO(content), encoding=encoding, newline=None).read()
    return [{"text": text}]


# --- the tasks -------------------------------------------------------------------------------------------------------


def texts_of(path: Path, options: FileOptions) -> list[str]:
    source = open_source(path=path, options=options)
    source.survey()
    return ["".join(one.chunks) for one in source.documents()]


TASKS: dict[str, tuple[Callable[[Path, FileOptions], Any], Callable[[dict[str, Any]], Any]]] = {
    "pretraining": (
        texts_of,
        lambda record: record["text"],
    ),
    "classification": (
        lambda path, options: [(one.text, one.label) for one in read_labelled(path, options=options)],
        lambda record: (record["text"], str(record["label"])),
    ),
    "instruction": (
        lambda path, options: [
            (one.turns[-1].instruction, one.turns[-1].response) for one in read_instructions(path, options=options)[0]
        ],
        lambda record: (
            tuple(one["content"] for one in record["messages"][-2:])
            if record.get("messages")
            else (record["instruction"], record["output"])
        ),
    ),
    "preference": (
        lambda path, options: [
            (one.turns[-1].instruction, one.turns[-1].response, one.rejected)
            for one in read_preferences(path, options=options)[0]
        ],
        lambda record: (record["instruction"], record["chosen"], record["rejected"]),
    ),
}
"""How a task reads a file, and what that gives of a record of the reference parser."""


@dataclass
class Odd:
    """A file, and what is read of it, or what the refusal says."""

    name: str
    content: bytes
    wanted: Records | str
    options: dict[str, Any] = field(default_factory=dict)


STORY = f"One.\r\nTwo {MARKS}.\rThree “é” 🧑.\n\nFour"
COLUMNS = {
    "text": pyarrow.array([f"t{n}" for n in range(30)], pyarrow.large_string()),
    "label": pyarrow.array(["a", "b", "c"] * 10).dictionary_encode(),
    "note": pyarrow.array([None, {"x": 1, "y": None}] * 15),
}
CHATS = {"messages": pyarrow.array(TURNS), "system": pyarrow.array([None] * 5, pyarrow.string())}
TWICE = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
TEXTS = [
    Odd("bom.txt", STORY.encode("utf-8-sig"), of_text(STORY.encode(), "utf-8")),
    Odd("cr.txt", b"a\rb\r\rc", of_text(b"a\rb\r\rc", "utf-8")),
    Odd("nul.md", b"a\0b\n", [{"text": "a\0b\n"}]),
    Odd("le.txt", STORY.encode("utf-16"), of_text(STORY.encode("utf-16"), "utf-16")),
    Odd("be.txt", b"\xfe\xff" + STORY.encode("utf-16-be"), of_text(STORY.encode(), "utf-8")),
    Odd("utf32.txt", STORY.encode("utf-32"), of_text(STORY.encode("utf-32"), "utf-32")),
    Odd("no_mark.txt", STORY[:8].encode("utf-16-le"), "set data.encoding=utf-16-le"),
    Odd("cp1252.txt", "“a” €\n".encode("cp1252"), [{"text": "“a” €\n"}], {"encoding": "cp1252"}),
    Odd("not_said.txt", "“a” €\n".encode("cp1252"), "those of cp1252 .*: set data.encoding=cp1252"),
    Odd("empty.txt", b"", "holds no text: it is empty"),
    Odd("members.txt.gz", members(gzip.compress, "a\r", "", "\nb"), [{"text": "a\nb"}]),
    Odd("members.txt.bz2", members(bz2.compress, "", "a\n", "", "b"), [{"text": "a\nb"}]),
    Odd("padded.txt.xz", members(lzma.compress, "a", "b") + bytes(8), [{"text": "ab"}]),
    Odd("noted.txt.zst", SKIPPABLE + members(zstd, "a", "", "b") + SKIPPABLE, [{"text": "ab"}]),
    Odd("cells.csv", table(QUOTED).encode(), of_csv(table(QUOTED))),
    Odd("half.jsonl", b'{"text": "a\\ud83d"}\n', "'text' holds half a surrogate pair at character 1"),
    Odd("pair.jsonl", b'{"text": "\\ud83d\\ude00\\r\\n"}\n', of_lines('{"text": "\\ud83d\\ude00\\r\\n"}')),
    Odd("texts.csv", parquet(COLUMNS, compression="zstd"), of_parquet(parquet(COLUMNS))),
]
TABLES = [
    Odd("quotes.csv", table(QUOTED, quoting=csv.QUOTE_ALL).encode(), of_csv(table(QUOTED))),
    Odd("blank.csv", b"\n\ntext,label\n\na,x\n\n", [{"text": "a", "label": "x"}]),
    Odd("semi.csv", table(QUOTED, ";").encode(), of_csv(table(QUOTED)), {"separator": ";"}),
    Odd("semi_not_said.csv", table(LABELLED, ";").encode(), "\"data.separator=';'\""),
    Odd("sep.csv", b"sep=;\r\n" + table(QUOTED, ";").encode(), of_csv(table(QUOTED))),
    Odd("tabs.csv", table(QUOTED, "\t").encode(), of_csv(table(QUOTED)), {"separator": "\\t"}),
    Odd("quotes.tsv", table(QUOTED, "\t").encode(), of_csv(table(QUOTED)), {"quotes": True}),
    Odd("quotes_not_said.tsv", table(QUOTED, "\t").encode(), "set data.quotes=true"),
    Odd("parted.tsv", b'text\tlabel\n"a\nb"\tx\n', "1 column, fewer .* data.quotes=true"),
    Odd(
        "marks.tsv",
        b'text\tlabel\n"a\tx\nb"" c"\ty\n',
        of_csv('text\tlabel\n"a\tx\nb"" c"\ty\n', delimiter="\t", quoting=csv.QUOTE_NONE),
    ),
    Odd("excel.txt", table(LABELLED, "\t").encode("utf-16"), of_csv(table(LABELLED))),
    Odd("utf32.csv", table(QUOTED).encode("utf-32"), of_csv(table(QUOTED))),
    Odd("cr.csv", table(LABELLED).replace("\r\n", "\r").encode(), LABELLED),
    Odd("trailing.csv", b"text,label,\r\na,x,\r\nb,y,\r\n", of_csv("text,label,\na,x,\nb,y,\n")),
    Odd("index.csv", b",text,label\n0,a,x\n1,b,y\n", of_csv(",text,label\n0,a,x\n1,b,y\n")),
    Odd("ragged.csv", b"text,label\na,b,c\nok,x\nd\n", "2 bad records: line 2: 3 columns, .*; line 4"),
    Odd("open.csv", b'text,label\na,x\n"b,y\nc,z\n', "line 3: quotes are not balanced from here on"),
    Odd("twice.csv", b"text,label,label\na,b,c\n", "the column 'label' occurs twice"),
    Odd("header.csv", b"text,label\n", "holds no records"),
    Odd("one.csv", b"text,label\na,x", [{"text": "a", "label": "x"}]),
    Odd("long.csv", b"text,label\n" + b"a" * 200_000 + b",x\n", [{"text": "a" * 200_000, "label": "x"}]),
    Odd("packed.csv", gzip.compress(table(QUOTED).encode()), of_csv(table(QUOTED))),
    Odd("plain.csv.gz", table(QUOTED).encode(), of_csv(table(QUOTED))),
    Odd("gzip_of_gzip.csv.gz", gzip.compress(gzip.compress(b"text,label\na,x\n")), "compressed twice"),
    Odd("damaged.csv.bz2", bz2.compress(b"text,label\na,x\n") + b"BZ?", "bz2 data are damaged or cut"),
    Odd("damaged.csv.xz", lzma.compress(b"text,label\na,x\n") + b"?", "xz data are damaged or cut"),
    Odd("other.csv.gz", gzip.compress(bytes(99), mtime=0)[:-9] + bytes(9), "gz data are damaged or cut"),
    Odd("lfs.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    Odd(
        "nan.jsonl",
        lines([*LABELLED, {"text": "a", "label": 1, "x": float("nan")}]).encode(),
        [*LABELLED, {"text": "a", "label": 1}],
    ),
    Odd("cut.csv", table(QUOTED).encode("utf-16")[:-1], "is the file cut"),
    Odd("columns.parquet", parquet(COLUMNS, row_group_size=7), of_parquet(parquet(COLUMNS))),
    Odd("v1.parquet.gz", gzip.compress(parquet(COLUMNS, version="1.0")), of_parquet(parquet(COLUMNS))),
    Odd("null.parquet", parquet({"text": [None], "label": ["a"]}), "record 1: column 'text' holds None"),
    Odd("bytes.parquet", parquet({"text": [b"a"], "label": ["a"]}), "'text' holds bytes, not text"),
]
QUESTIONS = [
    Odd("indented.json", json.dumps(ASKED, indent=2).encode("utf-16"), ASKED),
    Odd("blank.ndjson", b"\r\n \r\n" + lines(ASKED, "\r\n\r\n", ensure_ascii=False).encode(), ASKED),
    Odd("joined.jsonl", members(lambda data: b"\xef\xbb\xbf" + data, lines(ASKED[:2]), lines(ASKED[2:])), ASKED),
    Odd("cr.jsonl", lines(ASKED, "\r").encode() + b"\n", ASKED),
    Odd("deep.jsonl", lines([ASKED[0] | {"x": json.loads("[" * 150 + "]" * 150)}]).encode(), ASKED[:1]),
    Odd("too_deep.jsonl", b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}\n", "line 1: nested too deeply: 901 levels"),
    Odd("far_too_deep.jsonl", b'{"x": ' + b"[" * 9000 + b"]" * 9000 + b"}\n", "line 1: not JSON: nested too deep"),
    Odd("too_deep.json", b'[{"x": ' + b"[" * 900 + b"]" * 900 + b"}]\n", "line 1: nested too deeply: 901 levels"),
    Odd("brackets.jsonl", lines([ASKED[0] | {"x": '["\\' * 900}]).encode(), ASKED[:1]),
    Odd("numbers.jsonl", lines([ASKED[0] | {"x": 10**4000, "y": 1e308}]).encode(), ASKED[:1]),
    Odd("too_long.jsonl", b'{"x": ' + b"1" * 5000 + b"}\n", "line 1: Exceeds the limit"),
    Odd("twice.jsonl", b'{"output": "a", "output": "a"}\n', "line 1: field 'output' occurs twice"),
    Odd("nan.json", b'[{"x": NaN}]', "line 1: NaN is not JSON; write null or a number"),
    Odd("comma.json", json.dumps(ASKED)[:-1].encode() + b",]", "not JSON: a comma after the last record"),
    Odd("commas.jsonl", lines(ASKED, ",\n").encode(), "line 1: not JSON: Extra data at column"),
    Odd("arrays.json", json.dumps(ASKED).encode() * 2, "not JSON: more after the end of the array"),
    Odd("object.json", json.dumps({"data": ASKED}, indent=1).encode(), "starts with an object"),
    Odd("lists.jsonl", b'["a", "b"]\n["c", "d"]\n', "all 2 records are bad, the first: line 1: a JSON list"),
    Odd("nul.jsonl", lines([ASKED[0] | {"output": "a\0b"}]).encode(), [ASKED[0] | {"output": "a\0b"}]),
    Odd("raw_nul.jsonl", b'{"output": "a\0b"}\n', "not JSON: Invalid control character at column 14"),
    Odd("latin1.jsonl", '{"output": "é"}\n'.encode("latin1"), r"byte 12 of the line \(0xe9\) is not valid"),
    Odd("python.jsonl", f"{ASKED[0]}\n".encode(), "not JSON: Expecting property name enclosed in double"),
    Odd("empty.json", b"", "is empty; give a JSON array"),
    Odd("none.json", b"[]", "holds no records"),
    Odd("array.jsonl.gz", gzip.compress(json.dumps(ASKED, indent=1).encode()), ASKED),
    Odd("chats.parquet", parquet(CHATS, row_group_size=2), of_parquet(parquet(CHATS))),
    Odd("none.parquet", parquet({"text": pyarrow.array([], pyarrow.string())}), "holds no records"),
]
PREFERENCES = [
    Odd("lines.json.zst", members(zstd, lines(PAIRS[:2]), "", lines(PAIRS[2:])), PAIRS),
    Odd("bom.json.xz", lzma.compress(json.dumps(PAIRS).encode("utf-8-sig")), PAIRS),
    Odd("pairs.csv", table(PAIRS).encode("utf-8-sig"), of_csv(table(PAIRS))),
    Odd(
        "pairs.tsv",
        b"instruction\tchosen\trejected\nq\tyes \tno\n",
        [{"instruction": "q", "chosen": "yes ", "rejected": "no"}],
    ),
    Odd("pairs.parquet", parquet({name: [one[name] for one in PAIRS] for name in PAIRS[0]}), PAIRS),
]
FILES = {"pretraining": TEXTS, "classification": TABLES, "instruction": QUESTIONS, "preference": PREFERENCES}
ODD = {one.name: (task, one) for task, files in FILES.items() for one in files}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file(tmp_path: Path, name: str) -> None:
    (task, odd), path = ODD[name], tmp_path / name
    path.write_bytes(odd.content)
    (read, of_record), options = TASKS[task], FileOptions(**odd.options)
    if isinstance(odd.wanted, str):
        with pytest.raises(ValueError, match=odd.wanted) as error:
            read(path, options)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
    else:
        assert read(path, options) == [of_record(one) for one in odd.wanted]


@pytest.mark.parametrize("name", [one.name for one in QUESTIONS + PREFERENCES if not isinstance(one.wanted, str)])
def test_all_fields_of_a_record_and_not_only_its_texts(tmp_path: Path, name: str) -> None:
    _, odd = ODD[name]
    content, wanted = odd.content, odd.wanted
    (tmp_path / name).write_bytes(content)
    found = [row.record for row in rows_of_files(find_files(tmp_path / name), FileOptions())]
    if name in ("deep.jsonl", "brackets.jsonl", "numbers.jsonl"):  # with a field that the task does not read
        wanted = of_lines(content.decode())
    assert found == wanted


def test_a_parquet_column_that_occurs_twice(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(TWICE, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: the column 'text' occurs twice; there are text, text"):
        list(rows_of_files(find_files(tmp_path / "x.parquet"), FileOptions()))


def test_a_class_of_minus_one_is_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features).to_parquet(
        str(tmp_path / "x.parquet")
    )
    with pytest.raises(ValueError, match=r"1 bad record: record 2: the label is None"):
        read_labelled(tmp_path / "x.parquet")


def test_an_array_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_lightning.data.files.json_array.MOST_BYTES", 2_000_000)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b"[" + b" " * 3_000_000 + b"]"))
    with pytest.raises(
        ValueError, match=r"is a JSON array of at least 2 MB, .* 2 MB are the most; write one object per"
    ):
        read_instructions(tmp_path / "x.json.gz")


def test_a_name_that_says_another_compression_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (("x.jsonl.gz", b'{"text": "a"}\n'), ("y.jsonl.bz2", gzip.compress(b'{"text": "a"}\n'))):
        (tmp_path / name).write_bytes(content)
    with caplog.at_level("INFO"):
        assert len(list(rows_of_files(find_files(tmp_path), FileOptions()))) == 2
    assert "x.jsonl.gz is read as a file that is not compressed, which it is" in caplog.text
    assert "y.jsonl.bz2 is read as gz, which it is" in caplog.text


def test_line_ends_between_the_rows_of_a_table_are_in_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.csv").write_bytes(b"text,label\r\na,x\r\n")
    (tmp_path / "y.csv").write_bytes(b'text,label\r\n"a\r\nb",x\r\n')
    with caplog.at_level("INFO"):
        assert [one.text for one in read_labelled(tmp_path)] == ["a", "a\nb"]
    assert "x.csv: CRLF" not in caplog.text
    assert "y.csv: CRLF and CR are read as LF" in caplog.text


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_lines_are_those_of_python_wherever_a_chunk_ends(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_lightning.data.files.text.CHUNK", chunk)
    draw, path = random.Random(chunk), tmp_path / "x.txt"
    for _ in range(200):
        text = "".join(draw.choices("ab\r\n\u2028é", k=draw.randrange(12)))
        path.write_bytes(text.encode())
        for keeps_ends, newline in ((True, ""), (False, None)):
            found = list(TextFile(path, PLAIN, keeps_ends).lines())
            assert found == io.StringIO(text, newline=newline).readlines(), text


@pytest.mark.parametrize(("pack", "unpack"), [(bz2.compress, bz2.decompress), (lzma.compress, lzma.decompress)])
def test_joined_members_wherever_a_piece_ends(
    tmp_path: Path,
    pack: Callable[[bytes], bytes],
    unpack: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw, path = random.Random(0), tmp_path / "x"
    for _ in range(50):
        monkeypatch.setattr("llm_lightning.data.files.compression.PIECE", draw.randrange(1, 60))
        content = b"".join(pack(draw.randbytes(draw.randrange(50))) for _ in range(draw.randrange(1, 5)))
        path.write_bytes(content)
        with open_bytes(path, compression_of(path)) as file:
            assert file.read() == unpack(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv", "x.json", "x.txt"])
def test_a_line_of_50_megabytes_takes_ten_times_as_long_as_one_of_5(tmp_path: Path, name: str) -> None:
    """With quotes, brackets and escapes, at which expressions could search back."""
    seconds = []
    for n in (500_000, 5_000_000):
        record = {"text": '"[{, a\\b' + '"" [{,b' * n, "label": "x"}
        path = tmp_path / name
        path.write_text({
            "x.jsonl": lines([record]), "x.json": json.dumps([record]), "x.csv": table([record]),
            "x.tsv": f"text\tlabel\n{record['text']}\tx\n", "x.txt": record["text"],
        }[name])  # fmt: skip
        start = time.process_time()
        if name == "x.txt":
            (document,) = open_source(path=path).documents()
            assert "".join(document.chunks) == record["text"]
        else:
            assert [(one.text, one.label) for one in read_labelled(path)] == [(record["text"], "x")]
        seconds.append(time.process_time() - start)
    assert seconds[1] < 30 * max(seconds[0], 0.1), seconds


@pytest.mark.slow
def test_lines_of_json_take_at_most_three_times_as_long_as_python_without_checks(tmp_path: Path) -> None:
    """About one and a half times when it was written; walks through values that need none took three times."""
    path = tmp_path / "x.jsonl"
    text = "How “so”?\nBecause the text is long enough. " * 10
    turns = [{"role": role, "content": text} for role in ("user", "assistant")] * 3
    path.write_text(lines([{"id": n, "messages": turns} for n in range(5_000)], ensure_ascii=False))

    def ours() -> int:
        return sum(1 for _ in rows_of_files(find_files(path), FileOptions()))

    def plain() -> int:
        with path.open(encoding="utf-8") as file:
            return sum(1 for _ in map(json.loads, file))

    assert fastest(ours) < 3 * fastest(plain)


def fastest(read: Callable[[], int]) -> float:
    seconds = []
    for _ in range(5):
        start = time.process_time()
        assert read() == 5_000
        seconds.append(time.process_time() - start)
    return min(seconds)
