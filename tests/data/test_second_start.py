"""A second start: nothing is read that is as it was; whatever changed is."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data import hugging_face
from llm_lightning.data.corpus import token_files
from llm_lightning.data.corpus.readers import Records, WholeFile
from llm_lightning.data.corpus.sources import Source, open_source
from llm_lightning.data.corpus.token_files import TokenFile, build_token_files
from llm_lightning.data.files.options import FileOptions
from llm_lightning.tokenizers.build import build_tokenizer

OLD = 1_700_000_000


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))


def write(path: Path, text: str, changed: float | None = OLD) -> Path:
    path.write_text(text)
    if changed is not None:
        os.utime(path, (changed, changed))
    return path


class Reads:
    """Counts how often a file is read as documents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        for reader in (WholeFile, Records):
            monkeypatch.setattr(reader, "documents", self._counted(reader.documents))

    def _counted(self, documents: Any) -> Any:
        def counted(reader: Any, bad: Any = None) -> Any:
            self.n += 1
            return documents(reader, bad)

        return counted


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_a_survey_is_recorded_whole(tmp_path: Path, reads: Reads) -> None:
    rows = ['{"text": "one <|im_end|>"}', "oops", '{"text": ""}', '{"text": "é"}']
    file = write(tmp_path / "a.jsonl", "\n".join(rows))
    first = open_source(path=file, policy="quarantine").survey()
    assert reads.n == 1
    again = open_source(path=file, policy="quarantine").survey()
    assert reads.n == 1
    assert again == first
    assert (again.n_documents, again.n_bytes, list(again.lengths)) == (3, 16, [14, 0, 1])
    assert (again.control_words, again.quarantined[0].place) == ({"<|im_end|>": 1}, f"{file}:2")


@pytest.mark.parametrize("how", ["content", "size", "time", "inode", "verify", "encoding", "policy", "file", "damaged"])
def test_what_is_read_again(how: str, tmp_path: Path, reads: Reads) -> None:
    file, options = write(tmp_path / "a.txt", "some text"), dict[str, Any]()
    digest = open_source(path=file).digest()
    if how == "content":
        write(file, "same size", OLD + 1)
    elif how == "size":
        write(file, "some longer text")
    elif how == "time":
        os.utime(file, (OLD + 1, OLD + 1))
    elif how == "inode":
        write(tmp_path / "b.txt", "same size").replace(file)
    elif how == "file":
        file = write(tmp_path / "b.txt", "some text")
    elif how == "damaged":
        (record,) = (tmp_path / "cache" / "surveys").glob("*.npz")
        record.write_bytes(record.read_bytes()[:-100])
    else:
        options = {"verify": True} if how == "verify" else {"policy": "quarantine"}
        options = {"options": FileOptions(encoding="latin1")} if how == "encoding" else options
    source = open_source(path=file, **options)
    assert (source.digest() != digest) == (how in ("content", "size", "inode"))
    assert reads.n == 2
    open_source(path=file, **options | {"verify": False}).survey()
    assert reads.n == 2, "the new survey is recorded"


def test_a_file_of_the_last_seconds_is_read_again(tmp_path: Path, reads: Reads) -> None:
    file = write(tmp_path / "a.txt", "some text", changed=None)
    for _ in range(2):
        open_source(path=file).survey()
    assert reads.n == 2


def test_one_changed_file_of_a_folder_is_noticed(tmp_path: Path, reads: Reads) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        write(tmp_path / "in" / f"{name}.txt", name)
    before = open_source(path=tmp_path / "in").digest()
    assert open_source(path=tmp_path / "in").digest() == before
    assert reads.n == 2
    write(tmp_path / "in" / "b.txt", "c", OLD + 5)
    assert open_source(path=tmp_path / "in").digest() != before


def test_a_guess_of_the_field_is_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = write(tmp_path / "a.jsonl", '{"body": "x"}')
    for _ in range(2):
        caplog.clear()
        open_source(path=file).survey()
        assert f"{file}: no field 'text' (data.text_field): 'body' is read" in caplog.text


def test_relative_names_of_two_folders_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for name in ("one", "two", "one"):
        (tmp_path / name).mkdir(exist_ok=True)
        write(tmp_path / name / "a.txt", name)
        monkeypatch.chdir(tmp_path / name)
        digests.append(open_source(path="a.txt").digest())
    assert digests[0] == digests[2] != digests[1]


# --- token files and downloads -------------------------------------------------------------------------------------


def built(source: Source, **options: Any) -> dict[str, TokenFile]:
    return build_token_files(source, build_tokenizer("byte"), val_fraction=0.5, split="character", **options)


def test_token_files_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(path=write(tmp_path / "a.txt", "0123456789"))
    files = built(source)
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "sha256_of", None)
        assert built(source) == files
        with pytest.raises(TypeError):
            built(source, verify=True)
        os.utime(files["val"].path)  # as a change without another size does
        with pytest.raises(TypeError):
            built(source)
    assert built(source) == files


def test_damage_of_the_same_size_is_noticed_at_once(tmp_path: Path) -> None:
    source = open_source(path=write(tmp_path / "a.txt", "0123456789"))
    for _ in range(20):
        file = built(source)["train"]
        file.path.write_bytes(b"x" * file.path.stat().st_size)
        assert built(source)["train"].tokens.tolist() == list(b"01234")


def test_files_that_were_touched_are_hashed_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(path=write(tmp_path / "a.txt", "0123456789"))
    files = built(source)
    os.utime(files["train"].path, (OLD, OLD))
    assert built(source) == files
    monkeypatch.setattr(token_files, "sha256_of", None)
    assert built(source) == files


def test_a_download_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"text": f"row {number}"}) for number in range(10)]
    write(tmp_path / "set" / "train.jsonl", "\n".join(rows))
    write(tmp_path / "set" / "test.jsonl", rows[0])
    settings: dict[str, Any] = {"hf_dataset": str(tmp_path / "set")}
    digest = open_source(**settings).digest()
    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "sha256_of", None)
        assert open_source(**settings).digest() == digest
        with pytest.raises(TypeError):
            open_source(**settings, verify=True)
    assert open_source(**settings, verify=True).digest() == digest


@pytest.mark.parametrize(("split", "rows"), [("train[:50%]", range(5)), ("train+test", [*range(10), 0])])
def test_slices_of_the_hubs_splits(
    split: str, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", "\n".join(json.dumps({"text": str(number)}) for number in range(10)))
    write(tmp_path / "set" / "test.jsonl", '{"text": "0"}')
    source = open_source(hf_dataset=str(tmp_path / "set"), hf_split=split)
    assert ["".join(document.chunks) for document in source.documents()] == [str(row) for row in rows]
