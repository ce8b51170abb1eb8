"""Token files: the ids of whole documents, split without leaks, built once, verified when opened."""

from __future__ import annotations

import gc
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from llm_lightning.data.corpus import encoding
from llm_lightning.data.corpus import token_files as module
from llm_lightning.data.corpus.sources import InMemory, Source, open_source
from llm_lightning.data.corpus.token_files import build_token_files
from llm_lightning.files.atomic import commit, write_atomically
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.build import build_tokenizer

WORDS = [
    "the",
    "quick",
    "don't",
    "42",
    "日本語",
    "🧑\u200d🚀",
    "é",
    "<|endoftext|>",
    "--",
    "\n",
    "\n\n",
    "\t,",
    ".",
    "'ll",
    " ",
    "  ",
]


def source_of(*texts: str) -> Source:
    return Source("texts", [InMemory({f"{number}": text for number, text in enumerate(texts)})])


def random_text(n_words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(["", " ", " ", " ", "\n"]) for _ in range(n_words))


def train_tokenizer(name: str, vocab_size: int | None, texts: Iterable[str]) -> Tokenizer:
    return build_tokenizer(name, vocab_size=vocab_size, texts=texts)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))


# -- ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "byte", "word", "bpe"])
@pytest.mark.parametrize("piece", [1, 50, 1 << 18])
def test_ids_are_those_of_whole_documents(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", piece)
    documents = [random_text(n, seed=n) for n in (1000, 1, 300, 7)]
    tokenizer = train_tokenizer(name, 400 if name == "bpe" else None, documents if name in ("word", "bpe") else ())
    for add_eot in (True, False):
        source = source_of("", documents[0], "", *documents[1:])
        file = build_token_files(source, tokenizer, val_fraction=0, add_eot=add_eot)["train"]
        expected = tokenizer.encode(documents[0])
        for document in documents[1:]:
            expected += [tokenizer.eot_id] * add_eot + tokenizer.encode(document)
        assert file.tokens.tolist() == expected
        assert (file.n_tokens, file.n_documents) == (len(expected), 4)
        assert file.n_bytes == sum(len(document.encode()) for document in documents)


def test_each_document_begins_with_the_id_that_the_tokenizer_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 50)
    tokenizer, documents = build_tokenizer("byte"), [random_text(300, seed=n) for n in range(4)]
    monkeypatch.setattr(tokenizer, "bos_id", 0, raising=False)
    for add_eot in (True, False):
        file = build_token_files(source_of("", *documents), tokenizer, val_fraction=0, add_eot=add_eot)["train"]
        begun = [[0, *tokenizer.encode(document)] for document in documents]
        expected = begun[0] + [token for ids in begun[1:] for token in [tokenizer.eot_id] * add_eot + ids]
        assert file.tokens.tolist() == expected
    parts = build_token_files(source_of(*documents), tokenizer, val_fraction=0.5, split="document")
    assert [part.tokens[0] for part in parts.values()] == [0, 0]
    assert sum(part.tokens.tolist().count(0) for part in parts.values()) == 4


def test_a_document_without_any_split_point_is_still_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE", 10)
    tokenizer = build_tokenizer("gpt2")
    for text in ("a" * 5000, "ab " * 3 + "-" * 2000 + " end of it", "\n" * 3000):
        assert build_token_files(source_of(text), tokenizer, val_fraction=0)[
            "train"
        ].tokens.tolist() == tokenizer.encode(text)


def test_the_smallest_type_that_holds_the_vocabulary_is_used() -> None:
    class Wide(type(build_tokenizer("byte"))):  # type: ignore[misc]
        vocab_size = 70_000

    narrow = build_token_files(source_of("text"), build_tokenizer("gpt2"), val_fraction=0)["train"]
    wide = build_token_files(source_of("text"), Wide(), val_fraction=0, cache=narrow.path.parent)["train"]
    assert (narrow.tokens.dtype, narrow.path.stat().st_size) == (np.uint16, 2 * narrow.n_tokens)
    assert (wide.tokens.dtype, wide.path.stat().st_size) == (np.uint32, 4 * 4)
    assert narrow.digest == hashlib.sha256(narrow.path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="read-only"):
        narrow.tokens[0] = 0


# -- splits --------------------------------------------------------------------------------------------------


def test_the_verdict_is_split_as_in_the_book() -> None:
    folder = os.environ.get("LLM_LIGHTNING_DATA")
    if not folder:
        pytest.skip("set LLM_LIGHTNING_DATA to a folder with the real data files")
    files = build_token_files(open_source(path=Path(folder) / "the-verdict.txt"), build_tokenizer("gpt2"))
    assert {name: file.n_tokens for name, file in files.items()} == {"train": 4612, "val": 534}
    assert files["train"].tokens[:4].tolist() == [40, 367, 2885, 1464]


@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("n_documents", [1, 5])
def test_split_by_character_cuts_the_joined_text_once(val_fraction: float, n_documents: int) -> None:
    documents = [random_text(50 * n, seed=n) for n in range(1, n_documents + 1)]
    tokenizer = build_tokenizer("byte")
    options: dict[str, Any] = {"split": "character", "val_fraction": val_fraction, "add_eot": False}
    files = build_token_files(source_of(*documents), tokenizer, **options)
    whole = "".join(documents)
    cut = int((1 - val_fraction) * len(whole))
    assert tokenizer.decode(files["train"].tokens.tolist()) == whole[:cut]
    assert tokenizer.decode(files["val"].tokens.tolist()) == whole[cut:]


def parts_of(documents: list[str], val_fraction: float = 0.1) -> dict[str, list[str]]:
    tokenizer = build_tokenizer("byte")
    files = build_token_files(source_of(*documents), tokenizer, split="document", val_fraction=val_fraction)
    ids = {name: file.tokens.tolist() for name, file in files.items()}
    joined = {name: "".join("\0" if i == tokenizer.eot_id else chr(i) for i in part) for name, part in ids.items()}
    return {name: text.split("\0") for name, text in joined.items()}


def test_split_by_document_is_close_stable_and_without_leaks() -> None:
    draw = random.Random(3)
    documents = [f"document {n} " * draw.randrange(1, 60) for n in range(150)]
    twice = documents + documents[:75]
    parts = parts_of(twice)
    assert sorted(parts["train"] + parts["val"]) == sorted(twice)
    assert not set(parts["train"]) & set(parts["val"])
    assert 0.09 < sum(map(len, parts["val"])) / sum(map(len, twice)) <= 0.1
    shuffled = parts_of(draw.sample(twice, len(twice)))
    assert sorted(shuffled["val"]) == sorted(parts["val"])
    assert [document for document in twice if document in set(parts["val"])] == parts["val"]


def test_auto_splits_by_document_from_twenty_on() -> None:
    tokenizer = build_tokenizer("byte")
    for n, kind in ((19, "character"), (20, "document")):
        source = source_of(*(f"document {i} of some length" for i in range(n)))
        auto = build_token_files(source, tokenizer, val_fraction=0.2)
        assert auto == build_token_files(source, tokenizer, val_fraction=0.2, split=kind)


def test_the_embedded_corpus_has_a_tenth_for_validation() -> None:
    files = build_token_files(open_source("python_reference"), build_tokenizer("byte"))
    assert files["val"].n_bytes / (files["val"].n_bytes + files["train"].n_bytes) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "documents"}, "data.split=documents is unknown; use auto, document or character"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0 must be at least 0 and less than 1"),
        ({"val_fraction": -0.1}, "data.val_fraction=-0.1 must be"),
        ({"split": "document"}, "leaves a part empty: texts has 2 documents with 20 characters"),
        ({"val_fraction": 0.999}, "leaves a part empty"),
        ({"split": "document", "val_fraction": 0.49}, "set data.val_fraction=0 for no validation"),
    ],
)
def test_a_split_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_token_files(source_of("0123456789", "abcdefghij"), build_tokenizer("byte"), **options)


def test_no_validation_is_no_file() -> None:
    documents = ["", *(f"document {n}" for n in range(30)), ""]
    assert list(build_token_files(source_of(*documents), build_tokenizer("byte"), val_fraction=0)) == ["train"]


def test_a_part_without_tokens_is_refused() -> None:
    tokenizer = build_tokenizer("word", texts=["some words"])
    with pytest.raises(ValueError, match="a part without tokens"):
        build_token_files(source_of("some words" + " " * 10), tokenizer, val_fraction=0.1)


# -- trained tokenizers --------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_on_the_training_part_and_kept() -> None:
    source, seen = source_of("known words " * 30 + "later words " * 10), []

    def train(texts: Iterable[str]) -> Tokenizer:
        seen.append("".join(texts))
        return build_tokenizer("word", texts=seen)

    files = build_token_files(source, train, val_fraction=0.25)
    assert seen == ["known words " * 30]
    tokenizer = files["val"].tokenizer
    assert tokenizer.decode(files["train"].tokens.tolist()[:4]) == "known words known words"
    assert tokenizer.decode(files["val"].tokens.tolist()[:4]) == "<|unk|> words <|unk|> words"


def test_a_trained_tokenizer_is_cached_by_its_settings_and_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(3000)
    trained = partial(train_tokenizer, "bpe", 300)
    first = build_token_files(source_of(text), trained)["train"]
    monkeypatch.setitem(globals(), "build_tokenizer", None)  # from now on nothing can be trained
    again = build_token_files(source_of(text), partial(train_tokenizer, "bpe", 300))["train"]
    assert first == again
    assert first.tokenizer.describe() == again.tokenizer.describe()
    for changed in (partial(train_tokenizer, "bpe", 301), partial(train_tokenizer, "word", 300)):
        with pytest.raises(TypeError, match="not callable"):
            build_token_files(source_of(text), changed)
    with pytest.raises(TypeError, match="not callable"):
        build_token_files(source_of(text + "!"), trained)


# -- the cache -----------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    return [path for path in (Path(os.environ["LLM_LIGHTNING_CACHE"]) / "tokens").iterdir() if path.is_dir()]


def test_what_the_ids_depend_on_makes_the_key(tmp_path: Path) -> None:
    text = random_text(200)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    byte, gpt2 = build_tokenizer("byte"), build_tokenizer("gpt2")
    build_token_files(source_of(text), byte)
    build_token_files(open_source(path=tmp_path / "a.txt"), byte, split="character")  # the same content and split
    assert len(folders()) == 1
    build_token_files(source_of(text), gpt2)
    build_token_files(source_of(text), byte, val_fraction=0.2)
    build_token_files(source_of(text + "."), byte)
    assert len(folders()) == 4


def test_a_second_call_encodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, tokenizer = source_of(random_text(200)), build_tokenizer("byte")
    files = build_token_files(source, tokenizer)
    monkeypatch.setattr(type(tokenizer), "encode_array", None)
    assert build_token_files(source, tokenizer) == files


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "manifest.json"])
def test_a_damaged_cache_is_built_anew(name: str, how: str) -> None:
    source, tokenizer = source_of(random_text(500)), build_tokenizer("byte")
    files = build_token_files(source, tokenizer)
    damage(files["train"].path.parent / name, how)
    again = build_token_files(source, tokenizer)
    assert again == files
    assert all(hashlib.sha256(file.path.read_bytes()).hexdigest() == file.digest for file in again.values())


def test_any_flipped_bit_is_noticed() -> None:
    source, tokenizer = source_of(random_text(30)), build_tokenizer("byte")
    files = build_token_files(source, tokenizer)
    folder, draw = files["train"].path.parent, random.Random(0)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            opened = module._opened(folder, tokenizer)
            same = path.suffix == ".json" and _content(bad) == _content(good)  # a bit of white space, say
            assert opened is None or (same and opened == files)
        path.write_bytes(good)
    assert module._opened(folder, tokenizer) == files


def _content(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_text_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    source = open_source(path=path)
    source.survey()
    path.write_text("after it all")
    with pytest.raises(ValueError, match="changed while it was being tokenised"):
        build_token_files(source, build_tokenizer("byte"), val_fraction=0)
    assert folders() == []


def test_a_full_disk_leaves_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(signal, "SIGXFSZ", signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    source = source_of(random_text(20_000))
    try:
        with pytest.raises(OSError, match=r"cannot write the token files in .*File too large.*LLM_LIGHTNING_CACHE"):
            build_token_files(source, build_tokenizer("byte"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folders() == []
    assert build_token_files(source, build_tokenizer("byte"))["val"].n_tokens > 0


def _build_in_child(text: str, log: Path) -> None:
    build = module._build

    def counted(*arguments: Any) -> None:
        with log.open("a") as file:
            file.write("built\n")
        build(*arguments)

    module._build = counted
    file = build_token_files(source_of(text), build_tokenizer("byte"))["train"]
    assert hashlib.sha256(file.tokens.tobytes()).hexdigest() == file.digest


@pytest.mark.slow
def test_eight_processes_build_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    arguments = (random_text(100_000), tmp_path / "log")
    children = [fork.Process(target=_build_in_child, args=arguments) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    assert (tmp_path / "log").read_text() == "built\n"


def _build_and_die(source: Source, n_lines: int) -> None:
    """Build, but die before line number `n_lines` of the code that touches the disk."""
    gc.freeze()  # or a collection would copy the memory of the test process
    writers = {module._build, module._write_parts, module._Part.write, module._Part.finish, write_atomically, commit}
    codes, left = {inspect.unwrap(function).__code__ for function in writers}, n_lines

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if event == "line" and frame.f_code in codes:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace if frame.f_code in codes else None

    sys.settrace(trace)
    build_token_files(source, build_tokenizer("byte"))
    sys.settrace(None)


@pytest.mark.slow
def test_builders_killed_at_any_line_leave_nothing_behind_for_the_next_one(tmp_path: Path) -> None:
    source, fork = source_of(random_text(200)), multiprocessing.get_context("fork")
    expected = build_token_files(source, build_tokenizer("byte"), cache=tmp_path / "undisturbed")
    digests = {name: file.digest for name, file in expected.items()}
    for n_killed in itertools.count():
        child = fork.Process(target=_build_and_die, args=(source, n_killed))
        child.start()
        child.join()
        files = build_token_files(source, build_tokenizer("byte"))
        assert folders() == [files["train"].path.parent], n_killed
        assert {name: file.digest for name, file in files.items()} == digests
        shutil.rmtree(folders()[0])
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert n_killed > 30  # the lines that a whole build takes, so that the writers are still those named above


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, suffix: str) -> None:
    """A corpus of 60 MB, one document or many, is built within 40 MiB above what the imports need."""
    path = tmp_path / f"large{suffix}"
    paragraph = random_text(3000)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < 60_000_000:
            file.write(paragraph if suffix == ".txt" else json.dumps({"text": paragraph}) + "\n")
    code = f"""
import resource
from llm_lightning.data.corpus.sources import open_source
from llm_lightning.data.corpus.token_files import build_token_files
from llm_lightning.tokenizers.build import build_tokenizer
tokenizer = build_tokenizer("byte")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
build_token_files(open_source(path={str(path)!r}), tokenizer, val_fraction=0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(grown) < 40 * 1024
