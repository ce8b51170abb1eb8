"""Pretraining on several sources, and with validation and test text of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.data.corpus.sources import open_source
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.build import build_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))


def module(**options: Any) -> PretrainingDataModule:
    data = PretrainingDataModule(
        **{"tokenizer": build_tokenizer("byte"), "context_length": 8, "batch_size": 2, "eval_batches": 2, **options}
    )
    data.build()
    return data


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def made(seed: int, n: int) -> list[str]:
    draw = random.Random(seed)
    return [f"{seed} {number} " + "".join(draw.choices("abcdef ", k=30)) for number in range(n)]


def entries(**sources: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "path": path, "weight": weight} for name, (path, weight) in sources.items()]


def all_text(data: PretrainingDataModule, samples: Any) -> str:
    return data.tokenizer.decode([token for i in range(len(samples)) for token in samples[i].token_ids[1:].tolist()])


# --- own files -----------------------------------------------------------------------------------------------------


def test_the_training_text_is_whole_and_stages_are_in_order(tmp_path: Path) -> None:
    for name, text in (("train", "a" * 801), ("val", "b" * 81), ("test", "c" * 41), ("other", "d" * 17)):
        (tmp_path / f"{name}.txt").write_text(text)
    data = module(
        path=str(tmp_path / "train.txt"),
        val_path=str(tmp_path / "val.txt"),
        test_path=str(tmp_path / "test.txt"),
        val_sets={"z-1": str(tmp_path / "other.txt"), "a": str(tmp_path / "val.txt")},
    )
    assert all_text(data, data.train_samples) == "a" * 800
    assert list(data.eval_samples) == ["val", "val/z-1", "val/a", "train_eval"]
    assert list(data.test_samples) == ["test"]
    assert all_text(data, data.eval_samples["val/z-1"]) == "d" * 16
    assert all_text(data, data.test_samples["test"]) == "c" * 40
    assert "801 training, 81 validation, 17 val/z-1, 81 val/a, 41 test tokens" in data.describe()
    without_main = module(path=str(tmp_path / "train.txt"), val_sets={"a": str(tmp_path / "val.txt")})
    assert (
        all_text(without_main, without_main.train_samples) == "a" * 719
    )  # of int(0.9 * 801) tokens, all but the first
    assert list(without_main.eval_samples) == ["val", "val/a", "train_eval"]


def test_bytes_per_token_are_those_of_the_stage(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a" * 800)  # one byte, one token; 8 of them are one of gpt2's
    (tmp_path / "val.txt").write_text("word " * 100)
    data = module(
        tokenizer=build_tokenizer("gpt2"), path=str(tmp_path / "train.txt"), val_path=str(tmp_path / "val.txt")
    )
    assert data.bytes_per_token("train_eval") == 800 / data.train_file.n_tokens
    assert data.bytes_per_token("val") == 500 / 101  # word and a space in front of each but the first, and a last one


def test_leaks_are_counted_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    train, other = made(1, 60), made(2, 30)
    changed = [text.upper() for text in train[40:45]]  # not equal: counted by every character
    val = [*other[:20], *train[5:12], train[5], *changed, ""]
    test = [*other[20:], train[0]]
    data = module(
        path=write(tmp_path / "train.jsonl", train),
        val_path=write(tmp_path / "val.jsonl", val),
        test_path=write(tmp_path / "test.jsonl", test),
        val_sets={"same": write(tmp_path / "same.jsonl", train), "none": write(tmp_path / "none.jsonl", other)},
    )
    assert data.report()["leaks"] == {
        "val": {"documents": 8, "of": 33},
        "test": {"documents": 1, "of": 11},
        "val/same": {"documents": 60, "of": 60},
        "val/none": {"documents": 0, "of": 30},
    }
    assert "Documents of val also in training: 8 of 33" in caplog.text


def test_a_text_of_which_a_piece_is_trained_on_is_in_training(tmp_path: Path) -> None:
    """One document, cut by character: its piece for validation is no leak, the whole of it as a further set is."""
    path = write(tmp_path / "one.txt", [" ".join(made(1, 40))])
    data = module(path=path, split="character", val_sets={"same": path})
    assert data.report()["leaks"] == {"val/same": {"documents": 1, "of": 1}}


def documents_of(data: PretrainingDataModule, stage: str) -> list[str]:
    """The documents of a stage, from its tokens."""
    texts = [data.tokenizer.decode(file.tokens.tolist()) for file in data.files[stage]]
    return [document for text in texts for document in text.split("<|endoftext|>")]


def test_leaks_between_the_sources_of_a_mixture(tmp_path: Path) -> None:
    first, others = made(1, 40), made(2, 400)
    a, b = write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", [*first, *others])
    data = module(mixture=entries(a=(a, 1), b=(b, 1)), val_fraction=0.2, split="document")
    training, held_out = set(documents_of(data, "train")), documents_of(data, "val")
    expected = sum(document in training for document in held_out)
    assert data.report()["leaks"]["val"] == {"documents": expected, "of": len(held_out)}
    assert 0 < expected < len(held_out)
    b = write(tmp_path / "b.jsonl", others)
    clean = module(mixture=entries(a=(a, 1), b=(b, 1)), val_fraction=0.2, split="document")
    assert clean.report()["leaks"]["val"]["documents"] == 0


def test_the_digest_covers_roles_and_weights(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", made(1, 30)), write(tmp_path / "b.jsonl", made(2, 30))
    plain = module(path=a)
    assert plain.data_digest == open_source(path=a).digest()
    assert module(path=a, val_sets={}).data_digest == plain.data_digest
    digests = [
        plain.data_digest,
        module(path=a, val_path=b).data_digest,
        module(path=a, test_path=b).data_digest,
        module(path=a, val_sets={"b": b}).data_digest,
        module(mixture=entries(a=(a, 1), b=(b, 1))).data_digest,
        module(mixture=entries(a=(a, 2), b=(b, 1))).data_digest,
        module(mixture=entries(b=(b, 2), a=(a, 1))).data_digest,
    ]
    assert len(set(digests)) == len(digests)
    assert (
        module(mixture=entries(a=(a, 0.7), b=(b, 0.3))).data_digest
        == module(mixture=entries(a=(a, 7), b=(b, 3))).data_digest
    )
    assert module(path=a, val_path=b).digest_of_source() == digests[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"path": "train.txt", "val_path": "short.txt"},
            r"the val part of short\.txt .* 1 token .*lower model\.context",
        ),
        ({"mixture": entries(a=("train.txt", 1), b=("short.txt", 1))}, r"short\.txt"),
    ],
)
def test_refused(options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_text("a" * 500)
    (tmp_path / "short.txt").write_text("b")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        module(**options)


# --- mixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> list[dict[str, Any]]:
    """Texts of one letter each: `a` has 400 windows for training, `b` 100 and `c` 10."""
    sizes = {"a": 3601, "b": 901, "c": 91}
    for name, size in sizes.items():
        (tmp_path / f"{name}.txt").write_text(name * size)
    return entries(**{name: (str(tmp_path / f"{name}.txt"), w) for name, w in zip("abc", (0.7, 0.2, 0.1), strict=True)})


def test_windows_of_an_epoch_have_their_shares(three: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = module(mixture=three, val_fraction=0.1, seed=3)
    n = len(data.train_samples)  # type: ignore[arg-type]
    letters = [data.tokenizer.decode(s.token_ids[:1].tolist()) for batch in data.first_batches(n) for s in batch]
    assert len(letters) == n
    for name, weight in zip("abc", (0.7, 0.2, 0.1), strict=True):
        assert abs(letters.count(name) / n - weight) < 0.01
        assert data.report()["mixture"][name]["per_epoch"] == letters.count(name)
    assert [data.train_samples[i].sample_id for i in range(n)] == list(range(n))
    assert set(all_text(data, data.eval_samples["val"])) == {"a", "b", "c"}
    assert "Mixture: c: 10.0% of an epoch, " in caplog.text
    assert "each of which comes " in caplog.text
    assert "a mixture of a, b, c: " in data.describe()
    assert " of a: 8 targets\naaaaaaaaa" in data.preview(20)
    assert module(mixture=three, val_path=three[0]["path"]).report()["mixture"]["c"]["samples"] == 12  # whole: 90 / 8


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    return build_tokenizer("word", texts=texts)


def test_a_tokenizer_learns_from_the_training_texts_of_all_sources(tmp_path: Path) -> None:
    for name, word in (("a", "apple "), ("b", "pear "), ("v", "plum ")):
        (tmp_path / f"{name}.txt").write_text(word * 50)
    mixture = entries(**{name: (str(tmp_path / f"{name}.txt"), 1) for name in "ab"})
    for make in (train_tokenizer, partial(train_tokenizer)):
        for _ in range(2):  # the second time from the cache
            data = module(tokenizer=make, mixture=mixture, val_path=str(tmp_path / "v.txt"))
            assert data.tokenizer.decode(data.tokenizer.encode("apple pear")) == "apple pear"
            assert "plum" not in data.tokenizer.decode(data.tokenizer.encode("plum"))


def test_a_new_tokenizer_alone_has_the_key_in_the_cache_that_it_had(tmp_path: Path) -> None:
    """Hashed by hand from what the key of one source has always held."""
    text = "some words " * 50
    (tmp_path / "a.txt").write_text(text)
    source = hashlib.sha256(hashlib.sha256(text.encode()).digest()).hexdigest()
    spec = {"format": 1, "train": ["train_tokenizer", [], {}], "source": source, "split": "character"}
    key = hashlib.sha256(json.dumps({**spec, "val_fraction": 0.1}, sort_keys=True).encode()).hexdigest()[:32]
    module(tokenizer=partial(train_tokenizer), path=str(tmp_path / "a.txt"))
    assert [file.stem for file in (tmp_path / "cache" / "tokenizers").glob("*.json")] == [key]


# --- bad records, and the field of the text ------------------------------------------------------------------------


def test_bad_records_are_left_out_alike_at_every_reading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = made(1, 40)
    rows = [json.dumps({"text": text}) for text in good]
    for at, bad in ((3, "oops"), (10, '{"text": 3}'), (20, '{"text": null}')):
        rows.insert(at, bad)
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="3 bad records"):
        module(path=str(tmp_path / "a.jsonl"))
    clean = module(path=write(tmp_path / "clean.jsonl", good))
    for _ in range(2):  # from the cache, too
        caplog.clear()
        data = module(path=str(tmp_path / "a.jsonl"), bad_records="quarantine")
        assert data.data_digest == clean.data_digest
        assert [bad.place for bad in data.quarantined] == [f"{tmp_path}/a.jsonl:{line}" for line in (4, 11, 21)]
        assert data.quarantined[1].reason == "field 'text' holds int, not a string"
        assert data.report()["quarantined"] == 3
        assert "3 bad records left out (data.bad_records=quarantine): " in caplog.text
    assert data.train_file.n_tokens == clean.train_file.n_tokens


def test_a_source_of_bad_records_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match=r"all 2 records are bad, the first: .*a\.jsonl:1: field 'text' holds int"):
        module(path=str(tmp_path / "a.jsonl"), bad_records="quarantine")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": "7", "body": "one", "n": null}\n{"id": "8", "body": "two", "n": 3}\n'),
        ("a.csv", "id,body\n7,one\n8,two\n"),
        ("a.tsv", "id\tBODY\n7\tone\n8\ttwo\n"),
        ("a.json", '[{"body": "one"}, {"body": "two"}]'),
        ("a.jsonl", '{"Text": "one", "title": "x"}\n{"Text": "two", "title": "y"}\n'),
    ],
)
def test_the_only_field_that_can_be_meant_is_read(
    name: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / name).write_text(content)
    source = open_source(path=tmp_path / name)
    assert source.survey().n_documents == 2
    assert ["".join(document.chunks) for document in source.documents()] == ["one", "two"]
    assert caplog.text.count("no field 'text' (data.text_field): ") == 1


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (
            '{"a": "x", "b": "y"}\n' * 200,
            {},
            r"no record has a field 'text' .*there are 'a', 'b'; .*data\.text_field=a",
        ),
        ('{"a": 1}\n' * 200, {}, r"no record has a field 'text' .*there are 'a'"),
        ('{"body": "x"}\n', {"text_field": "bodi"}, r"no record has a field 'bodi' .*did you mean 'body'"),
    ],
)
def test_fields_are_listed_once_where_none_can_be_meant(
    content: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_source(path=tmp_path / "a.jsonl", **options).survey()
    assert len(str(caught.value)) < 400
