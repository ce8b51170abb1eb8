"""Files as people have them: each is read whole, or refused in one line that says what it is and what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data.corpus.sources import open_source
from llm_lightning.data.files.find import find_files
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.records.instruction import read_instructions
from llm_lightning.data.records.labelled import read_labelled

RECORDS = [{"text": f"é “{n}” \u2028 🧑", "label": "ab"[n % 2]} for n in range(40)]


def csv_text(records: list[dict[str, str]], separator: str = ",") -> str:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(records[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue()


def as_jsonl(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode()


def zstd(data: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.compress(data, "zstd", asbytes=True)
    return packed


def as_parquet(records: list[dict[str, Any]]) -> bytes:
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, row_group_size=7)
    content: bytes = sink.getvalue().to_pybytes()
    return content


FORMS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "x.csv": lambda records: csv_text(records).encode(),
    "bom.csv": lambda records: csv_text(records).encode("utf-8-sig"),
    "utf16.csv": lambda records: csv_text(records).encode("utf-16"),
    "crs.csv": lambda records: csv_text(records).replace("\r\n", "\r").encode(),
    "x.tsv": lambda records: "".join(
        "\t".join(row) + "\n" for row in [list(records[0]), *(list(r.values()) for r in records)]
    ).encode(),
    "x.json": lambda records: json.dumps(records).encode(),
    "indented.json": lambda records: json.dumps(records, indent=1, ensure_ascii=False).encode("utf-8-sig"),
    "lines.json": as_jsonl,
    "x.jsonl": as_jsonl,
    "array.jsonl": lambda records: json.dumps(records).encode(),
    "crs.jsonl": lambda records: as_jsonl(records).replace(b"\n", b"\r"),
    "utf16.jsonl": lambda records: as_jsonl(records).decode().encode("utf-16"),
    "x.parquet": as_parquet,
    "parquet_named.csv": as_parquet,
    "x.csv.gz": lambda records: gzip.compress(csv_text(records).encode()),
    "x.jsonl.bz2": lambda records: bz2.compress(as_jsonl(records)),
    "x.json.xz": lambda records: lzma.compress(json.dumps(records).encode()),
    "x.jsonl.zst": lambda records: zstd(as_jsonl(records)),
    "two_frames.jsonl.gz": lambda records: b"".join(
        gzip.compress(as_jsonl(part)) for part in (records[:9], records[9:])
    ),
    "two_frames.jsonl.zst": lambda records: b"".join(zstd(as_jsonl(part)) for part in (records[:9], records[9:])),
    "packed_without_a_name.jsonl": lambda records: gzip.compress(as_jsonl(records)),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_records_in_every_form(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(FORMS[name](RECORDS))
    found = read_labelled(file)
    assert [{"text": one.text, "label": one.label} for one in found] == RECORDS
    questions = [{"instruction": one["text"], "output": one["label"]} for one in RECORDS]
    file.write_bytes(FORMS[name](questions))
    conversations, _ = read_instructions(file)
    assert [
        {"instruction": one.turns[0].instruction, "output": one.turns[0].response} for one in conversations
    ] == questions
    file.write_bytes(FORMS[name]([{"text": one["text"], "id": "1"} for one in RECORDS]))
    assert ["".join(one.chunks) for one in open_source(path=file).documents()] == [one["text"] for one in RECORDS]


def test_a_folder_saved_by_datasets_and_the_names_of_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["bad", "good"], "label": [0, 1]}, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "x.parquet"))
    for path in (tmp_path / "saved", tmp_path / "x.parquet"):
        assert [(one.text, one.label) for one in read_labelled(path)] == [("bad", "no"), ("good", "yes")]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"holds the splits test, train; name one: data.path=\S+both/test"):
        read_labelled(tmp_path / "both")
    assert len(read_labelled(tmp_path / "both" / "train")) == 2


def test_null_fields_of_structs_are_absent_keys(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": "me"}]
    (tmp_path / "x.parquet").write_bytes(as_parquet([{"messages": messages, "system": None}]))
    (conversation,), _ = read_instructions(tmp_path / "x.parquet")
    assert conversation.turns[0].response == "a"
    assert conversation.record["messages"][0] == {"role": "user", "content": "q"}


FOREIGN = {
    "sheet.xlsx": (b"PK\x03\x04" + bytes(40), "zip archive, as .xlsx and .docx files are"),
    "named.csv": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "x.pdf": (b"%PDF-1.7\n", "is a PDF"),
    "old.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(40), "an Office document"),
    "x.tar": (bytes(257) + b"ustar\0", "a tar archive"),
    "x.tar.gz": (gzip.compress(bytes(257) + b"ustar\0"), "a tar archive"),
    "x.sqlite": (b"SQLite format 3\0", "an SQLite database"),
    "x.gguf": (b"GGUF\3\0\0\0", "weights go into init_from"),
    "x.parquet": (b"text,label\n", "does not begin as parquet does"),
    "wide.csv": (
        "text,label\nabcdef,x\n".encode("utf-16-le"),
        "UTF-16 without a byte-order mark; set data.encoding=utf-16-le",
    ),
    "cut.csv.gz": (gzip.compress(csv_text(RECORDS).encode())[:-20], "the gz data are damaged or cut"),
    "cut.jsonl.zst": (zstd(as_jsonl(RECORDS))[:-20], "the zst data are damaged or cut"),
    "cut.parquet": (as_parquet(RECORDS)[:-20], "no parquet file that can be read"),  # type: ignore[arg-type]
    "quotes.csv": ("text,label\n“a”,x\n".encode("cp1252"), "those of cp1252 .*: set data.encoding=cp1252"),
    "empty.jsonl": (b"", "holds no records"),
    "header.csv": (b"text,label\n", "holds no records"),
    "story.txt": (b"Once upon a time\n", "is running text"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_labelled(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_encoding_of_ones_own(tmp_path: Path) -> None:
    for encoding in ("cp1252", "utf-16-le", "shift_jis"):
        file = tmp_path / f"{encoding}.csv"
        file.write_bytes(
            "text,label\ncaf\u00e9,x\n".replace("\u00e9", "e" if encoding == "shift_jis" else "é").encode(encoding)
        )
        (found,) = read_labelled(file, options=FileOptions(encoding=encoding))
        assert (found.text.replace("é", "e"), found.label) == ("cafe", "x")
    with pytest.raises(ValueError, match=r"data.encoding='latim1' is unknown"):
        read_labelled(file, options=FileOptions(encoding="latim1"))


def test_runs_from_before_these_settings_kept_line_ends() -> None:
    assert FileOptions.of({"path": "x.txt", "split": "auto"}) == FileOptions(newlines="keep")
    assert FileOptions.of({"newlines": "lf", "encoding": "cp1252"}) == FileOptions(encoding="cp1252")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.parquet"])
def test_line_ends_of_records_become_lf_and_that_is_said_once(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"instruction": f"q{n}", "output": "one\r\ntwo\rthree\n"} for n in range(3)]
    (tmp_path / name).write_bytes(FORMS[name](records))
    with caplog.at_level(logging.INFO):
        found = [read_instructions(tmp_path / name)[0] for _ in range(2)]
    assert {one.turns[0].response for one in found[0] + found[1]} == {"one\ntwo\nthree\n"}
    assert caplog.text.count("CRLF and CR are read as LF") == 1
    kept, _ = read_instructions(tmp_path / name, options=FileOptions(newlines="keep"))
    assert kept[0].turns[0].response == records[0]["output"]


def test_json_is_not_learnt_as_running_text_unless_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text('[{"text": "one"}, {"text": "two"}]')
    with caplog.at_level(logging.INFO):
        assert ["".join(one.chunks) for one in open_source(path=file).documents()] == ["one", "two"]
    assert f"{file} is read as json, which its content is" in caplog.text
    as_text = open_source(path=file, options=FileOptions(format="text"))
    assert ["".join(one.chunks) for one in as_text.documents()] == [file.read_text()]
    for text in ("[1] a list of sources", "{braces} in prose", '["a", "b"]'):
        file.write_text(text)
        assert ["".join(one.chunks) for one in open_source(path=file).documents()] == [text]


def test_a_folder_gives_records_of_all_forms_and_counts_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.csv", "a/x.jsonl.gz", ".hidden.csv", "notes.docx", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(
            gzip.compress(as_jsonl(RECORDS[:2])) if name.endswith("gz") else csv_text(RECORDS[2:4]).encode()
        )
    with caplog.at_level(logging.INFO):
        found = read_labelled(tmp_path)
    assert [{"text": one.text, "label": one.label} for one in found] == RECORDS[:4]
    assert "2 files read, 1 hidden and 2 of other kinds (1 .md, 1 .docx) left out" in caplog.text
    assert [one.name for one in find_files([tmp_path / "b.csv", f"{tmp_path}/a/*"]).files] == ["b.csv", "x.jsonl.gz"]
    (tmp_path / "b.csv").write_text("text,label\nx\n")
    with pytest.raises(ValueError, match=r"1 bad record: b.csv, line 2: 1 column, fewer than the 2 of the header"):
        read_labelled(tmp_path)


def test_a_line_of_many_megabytes(tmp_path: Path) -> None:
    text = "x" * 5_000_000
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text, "label": "a"}) + '\n{"text": "y", "label": "b"}\n')
    (tmp_path / "x.tsv").write_text(f"text\tlabel\n{text}\ta\ny\tb\n")
    for name in ("x.jsonl", "x.tsv"):
        assert [(len(one.text), one.label) for one in read_labelled(tmp_path / name)] == [(5_000_000, "a"), (1, "b")]


def test_a_large_array_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_lightning.data.files.json_array.MOST_BYTES", 100)
    (tmp_path / "x.json").write_text(json.dumps(RECORDS))
    with pytest.raises(ValueError, match=r"x.json is a JSON array .*write one object per line \(.jsonl\): jq -c"):
        read_labelled(tmp_path / "x.json")


# --- the cases that failed -------------------------------------------------------------------------------------------

SETTINGS = {
    "cp1252.csv": {"encoding": "cp1252"},
    "no_header.csv": {"header": False},
    "quoted.tsv": {"quotes": True},
    "semicolon.csv": {"separator": ";"},
    "tabs.csv": {"separator": "\\t"},
}
"""Files that are refused once, naming the setting with which they are read."""
REFUSED = {
    "backslash_quotes.csv": "double a quotation mark inside quotes, also where a backslash stands before it",
    "case_labels.csv": r"the labels 'Praise' \(6 records\) and 'praise' \(24 records\) differ only in their case",
    "empty_label.csv": "1 bad record: line 62: the label is ''",
    "list_label.jsonl": r"all 60 records are bad, the first: line 1: the label is \['praise'\]",
    "null_text.jsonl": "1 bad record: line 61: column 'text' holds NoneType",
    "space_quotes.csv": "line 1: a quotation mark stands behind a space",
}


def _wanted(folder: Path) -> dict[str, int]:
    lines = (folder / "wanted.tsv").read_text().splitlines()[1:]
    return {name: int(n) for name, n, _ in (line.split("\t") for line in lines)}


def test_the_cases_of_tables(data_dir: Path) -> None:
    folder = data_dir.parent / "cases" / "cls_formats"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for name, n_records in _wanted(folder).items():
        file = folder / name
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                read_labelled(file)
            continue
        options = SETTINGS.get(name, {})
        for key in options:
            with pytest.raises(ValueError, match=f"data.{key}="):
                read_labelled(file)
        columns = {"text_column": "2", "label_column": "1"} if name == "no_header.csv" else {}
        found = read_labelled(file, options=FileOptions(**options), **columns)  # type: ignore[arg-type]
        assert len(found) == n_records, name
        assert {one.label for one in found} <= {"praise", "complaint", "0", "1", "0.0", "1.0"} or name == "scale.csv"
        assert not any(re.search(r'^"|""', one.text) for one in found), name
    assert len({one.label for one in read_labelled(folder / "case_labels.csv", fold_labels=True)}) == 2


def test_one_encoding_serves_files_of_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is UTF-8 by its bytes is read so, and that is said; latin1 has no typographic quotes."""
    text = "Größe “57”"
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": text, "label": "x"}] * 2))
    (tmp_path / "b.csv").write_bytes(f"text,label\n{text},x\n".encode("cp1252"))
    with caplog.at_level(logging.INFO):
        found = read_labelled([tmp_path / "a.jsonl", tmp_path / "b.csv"], options=FileOptions(encoding="cp1252"))
    assert [one.text for one in found] == [text] * 3
    assert "a.jsonl is UTF-8, and is read so, not as data.encoding=cp1252" in caplog.text
    assert "b.csv is UTF-8" not in caplog.text
    with caplog.at_level(logging.WARNING):
        read_labelled(tmp_path / "b.csv", options=FileOptions(encoding="latin1"))
    assert "unused control characters in latin1" in caplog.text
    assert "set data.encoding=cp1252" in caplog.text
