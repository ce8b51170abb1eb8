"""Sources: every document intact, or one error that names file, line and reason."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_lightning.data.corpus.sources import NAMED, Source, open_source
from llm_lightning.data.files import text as text_of_files
from llm_lightning.data.files.options import FileOptions


def texts(source: Source) -> list[str]:
    return ["".join(document.chunks) for document in source.documents()]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))


# -- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["plain", "nul \0 inside", "cr\r\nlf\rnl\n", "日本語 🧑‍🚀 \u2028", "<|endoftext|>", " \n"]
)
def test_a_file_is_one_document_unchanged_but_for_line_ends(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "a.txt", text)
    with_lf = text.replace("\r\n", "\n").replace("\r", "\n")
    assert texts(open_source(path=file)) == [with_lf]
    assert texts(open_source(path=str(write(tmp_path / "bom.txt", codecs.BOM_UTF8 + text.encode())))) == [with_lf]
    assert texts(open_source(path=file, options=FileOptions(newlines="keep"))) == [text]


def test_characters_may_lie_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aé日🧑\n" * 50
    for chunk in range(1, 9):
        monkeypatch.setattr(text_of_files, "CHUNK", chunk)
        assert texts(open_source(path=write(tmp_path / "a.txt", text))) == [text]


def test_a_folder_is_read_in_order_without_what_is_hidden_or_no_text(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.rst", "B.TXT", "c.jsonl", ".git/x.txt", ".h.txt", "code.py", "x.bin"):
        write(tmp_path / "in" / name, '{"text": "c.jsonl"}' if name.endswith("jsonl") else name)
    assert texts(open_source(path=tmp_path / "in")) == ["B.TXT", "a.rst", "a/z.md", "b.txt", "c.jsonl"]
    assert texts(open_source(path=f"{tmp_path}/in/*.py")) == ["code.py"]
    assert texts(open_source(path=f"{tmp_path}/in/**/*.md")) == ["a/z.md"]


def test_several_paths_as_a_list_or_with_commas_each_file_once(tmp_path: Path) -> None:
    one, two, comma = (write(tmp_path / name, name) for name in ("1.txt", "2.txt", "a,b.txt"))
    assert texts(open_source(path=f"{two}, {one}")) == ["2.txt", "1.txt"]
    assert texts(open_source(path=",".join([str(one)] * 100))) == ["1.txt"]
    assert texts(open_source(path=[str(two), str(tmp_path)])) == ["2.txt", "1.txt", "a,b.txt"]
    assert texts(open_source(path=comma)) == texts(open_source(path=str(comma))) == ["a,b.txt"]


def test_jsonl_gives_a_document_a_line(tmp_path: Path) -> None:
    rows = ["one", "", "two\nlines", "🧑‍🚀 \x00", "NA", "null"]
    lines = [json.dumps({"id": i, "body": row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    file = write(tmp_path / "a.jsonl", codecs.BOM_UTF8 + "\r\n".join([*lines[:3], "  ", *lines[3:], ""]).encode())
    source = open_source(path=file, text_field="body")
    assert texts(source) == rows
    assert [document.name for document in source.documents()][3] == f"{file}:5"


def test_digest_is_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    text = "some text\n" * 1000
    plain = open_source(path=write(tmp_path / "a.txt", text))
    by_hand = hashlib.sha256(hashlib.sha256(text.encode()).digest()).hexdigest()
    assert plain.digest() == by_hand
    assert open_source(path=write(tmp_path / "b.md", text)).digest() == by_hand
    assert open_source(path=write(tmp_path / "c.jsonl", json.dumps({"text": text}))).digest() == by_hand
    two = [write(tmp_path / "d.txt", text[:500]), write(tmp_path / "e.txt", text[500:])]
    assert open_source(path=list(map(str, two))).digest() != by_hand
    assert plain.survey().n_chars == plain.survey().n_bytes == len(text)
    assert plain.describe() == f"{tmp_path}/a.txt (1 document, 10,000 bytes)"


def test_python_reference_is_english_without_topics_inside_topics() -> None:
    source = open_source("python_reference")
    found = texts(source)
    assert 40 < len(found) < 90
    assert 250_000 < source.survey().n_chars < 700_000
    assert any("compound statement" in text for text in found)
    assert "for" not in [document.name for document in source.documents()]  # a section of "compound"
    seen: set[str] = set()
    for text in sorted(found, key=len, reverse=True):
        paragraphs = set(text.split("\n\n"))
        assert sum(map(len, paragraphs & seen)) <= len(text) / 2
        seen |= paragraphs


@pytest.mark.parametrize(
    ("name", "file"), [("the_verdict", "the-verdict.txt"), ("tiny_shakespeare", "tinyshakespeare.txt")]
)
def test_named_files_have_the_digest_that_is_pinned(name: str, file: str) -> None:
    folder = os.environ.get("LLM_LIGHTNING_DATA")
    if not folder:
        pytest.skip("set LLM_LIGHTNING_DATA to a folder with the real data files")
    content = (Path(folder) / file).read_bytes()
    pinned = NAMED[name]
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (pinned.sha256, pinned.n_bytes)
    placed = write(Path(os.environ["LLM_LIGHTNING_CACHE"]) / "downloads" / pinned.filename, content)
    assert texts(open_source(name)) == [placed.read_text(encoding="utf-8")]


# -- what is refused -----------------------------------------------------------------------------------------


def refused(read: Callable[[], object], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_bad_utf8_is_named_by_byte_and_line(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_of_files, "CHUNK", chunk)
    file = write(tmp_path / "latin.txt", "é first\nsecond\n".encode() + b"caf\xe9 au lait\n")
    message = refused(open_source(path=file).survey)
    assert message.startswith(f"{file}, line 3: byte 19 (0xe9) is not valid UTF-8 (invalid continuation byte)")
    cut = write(tmp_path / "cut.txt", "日本\n語".encode()[:-1])
    assert f"{cut}, line 2: byte 7 (0xe8)" in refused(open_source(path=cut).survey)
    bom = write(tmp_path / "bom.txt", codecs.BOM_UTF8 + b"ab\n\xff")
    assert f"{bom}, line 2: byte 6 (0xff)" in refused(open_source(path=bom).survey)


def test_every_kind_of_bad_jsonl_line_has_its_reason(tmp_path: Path) -> None:
    cases = {
        b'{"text": "unfinished': "not JSON: Unterminated string starting at column 10",
        b'{"text": "a"} {"text": "b"}': "not JSON: Extra data at column 15",
        b'["text"]': "a JSON list, not an object",
        b"null": "a JSON NoneType, not an object",
        b'{"body": "a", "id": 1}': "no field 'text'; its fields: 'body', 'id'",
        b"{}": "no field 'text'; its fields: none",
        b'{"text": 3}': "field 'text' holds int, not a string",
        b'{"text": null}': "field 'text' holds NoneType, not a string",
        b'{"text": "a", "text": "b"}': "field 'text' occurs twice",
        b'{"text": "ab\\ud800"}': "field 'text' holds half a surrogate pair at character 2",
        b'{"text": "caf\xe9"}': "byte 13 of the line (0xe9) is not valid UTF-8 (invalid continuation byte); say",
        b"[" * 100_000: "not JSON: nested too deeply",
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}": "Exceeds the limit",
    }
    file = tmp_path / "bad.jsonl"
    for line, reason in cases.items():
        write(file, b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
        message = refused(open_source(path=file).survey)
        assert message.startswith(f"{file}: 1 bad record: ")
        assert f" {file}:3: {reason}" in message
        assert "a string under 'text' (data.text_field)" in message


def test_all_bad_lines_are_counted_and_ten_are_listed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "".join('{"text": "x"}\n' if n % 3 else "oops\n" for n in range(99)))
    message = refused(open_source(path=file).survey)
    assert "33 bad records (the first 10 of 33): " in message
    assert message.count(f" {file}:") == 10
    assert f"{file}:1: " in message
    assert f"{file}:28: " in message
    assert f"{file}:31: " not in message


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    gone = tmp_path / "gone.txt"
    assert f"{gone} does not exist" in refused(lambda: open_source(path=gone), FileNotFoundError)
    assert "no file matches" in refused(lambda: open_source(path=f"{tmp_path}/*.none"), FileNotFoundError)
    (tmp_path / "folder").mkdir()
    assert "holds no .txt, .text, .md" in refused(lambda: open_source(path=tmp_path / "folder"), FileNotFoundError)
    for name in ("empty.txt", "empty.jsonl", "bom.txt"):
        file = write(tmp_path / name, codecs.BOM_UTF8 if name == "bom.txt" else "")
        assert f"{file} holds no text" in refused(open_source(path=file).survey)
    assert "names no file" in refused(lambda: open_source(path=[]))


def test_what_to_read_must_be_said_clearly(tmp_path: Path) -> None:
    assert "did you mean the_verdict?" in refused(lambda: open_source("the-verdict"))
    assert "python_reference, the_verdict, tiny_shakespeare" in refused(open_source)
    assert "both set" in refused(lambda: open_source(path="a", hf_dataset="b"))
    file = write(tmp_path / "a.txt", "mine")
    assert texts(open_source("python_reference", path=file)) == ["mine"]


def _damaged(draw: random.Random, lines: list[bytes]) -> bytes:
    data = bytearray(b"\n".join(lines))
    for _ in range(draw.choice([0, 1, 1, 1, 5])):
        at = draw.randrange(len(data))
        kind = draw.randrange(5)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.randrange(1, 9)]
        elif kind == 2:
            data[at:at] = draw.choice([b"\x00", b"\xff", b"\r", b"\n", b'"', b"{", b"}", b"\xe2\x80", b",", b"\\ud83d"])
        elif kind == 3:
            del data[at:]
        else:
            data[at:at] = data[: draw.randrange(40)]
        data = data or bytearray(b" ")
    return bytes(data)


def _reference(data: bytes) -> list[str] | None:
    """The documents of a JSONL file by the plainest means, or None if anything is wrong with it."""
    found = []
    for line in data.split(b"\n"):
        if line.strip():
            try:
                pairs = json.loads(line.decode(), object_pairs_hook=list)
                names = [name for name, _ in pairs]
                text = dict(pairs)["text"]
                text.encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                return None
            if len(set(names)) < len(names):
                return None
            found.append(text)
    return found if any(found) else None


@pytest.mark.slow
def test_fuzzed_jsonl_is_read_intact_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = [json.dumps({"text": f"Grüße {n} 🧑 \n", "n": n}, ensure_ascii=bool(n % 2)).encode() for n in range(6)]
    outcomes = []
    for _ in range(400):
        data = _damaged(draw, whole)
        expected = _reference(data)
        source = open_source(path=write(tmp_path / "a.jsonl", data))
        try:
            source.survey()
            assert texts(source) == expected, data
        except ValueError as error:
            assert expected is None, data
            assert str(tmp_path / "a.jsonl") in str(error)  # noqa: PT017
        outcomes.append(expected is None)
    assert 50 < sum(outcomes) < 350


def test_fuzzed_text_is_read_intact_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = [f"Grüße {n} 🧑 日本\r".encode() for n in range(20)]
    for _ in range(300):
        data = _damaged(draw, whole)
        source = open_source(path=write(tmp_path / "a.txt", data))
        try:
            source.survey()
        except ValueError as error:
            with pytest.raises(UnicodeDecodeError) as plain:
                data.decode()
            line = data[: plain.value.start].count(b"\n") + 1
            assert f"line {line}: byte {plain.value.start} " in str(error)  # noqa: PT017
        else:
            assert texts(source) == [data.decode().replace("\r\n", "\n").replace("\r", "\n")]


# -- Hugging Face datasets -----------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"body": f"row {n}\n🧑", "id": n} for n in range(30)]
    write(tmp_path / "set" / "train.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "set" / "test.jsonl", json.dumps({"body": "held out", "id": 0}))
    return tmp_path / "set"


def test_a_hugging_face_dataset_is_streamed_to_disk_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(hf_dataset=str(dataset), text_field="body")
    assert texts(source) == [f"row {n}\n🧑" for n in range(30)]
    assert texts(open_source(hf_dataset=str(dataset), text_field="body", hf_split="test")) == ["held out"]
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)  # from now on only the cache can answer
    again = open_source(hf_dataset=str(dataset), text_field="body")
    assert again.digest() == source.digest()
    write(dataset / "train.jsonl", "changed")
    with pytest.raises(ValueError, match="cannot read the Hugging Face dataset"):
        open_source(hf_dataset=str(dataset), text_field="body")


def test_hugging_face_errors_are_one_line_with_a_remedy(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\n(with a long explanation)")

    missing = refused(lambda: open_source(hf_dataset=str(dataset)))
    assert "row 0: no field 'text'; its fields: 'body', 'id'" in missing
    number = refused(lambda: open_source(hf_dataset=str(dataset), text_field="id"))
    assert "field 'id' holds int, not a string" in number
    split = refused(lambda: open_source(hf_dataset=str(dataset), text_field="body", hf_split="nope"))
    assert "nope" in split
    monkeypatch.setattr("datasets.load_dataset", no_hub)
    hub = refused(lambda: open_source(hf_dataset="nobody/nothing"))
    assert "Couldn't reach 'nobody/nothing' on the Hub; check" in hub
    for message in (missing, number, split, hub):
        assert "\n" not in message
        assert "data.hf_dataset" in message
    assert not list(Path(os.environ["LLM_LIGHTNING_CACHE"]).rglob("*.jsonl"))
