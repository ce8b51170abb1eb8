"""The cache of records, tokens and samples: it gives what reading anew would give, whatever changes."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_lightning.data.conversations import ConversationDataModule
from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.preference import PreferenceDataModule
from llm_lightning.data.record_store import pool, records, snapshot
from llm_lightning.data.record_store.records import Reading, RecordStore, open_store
from llm_lightning.data.records.instruction import InstructionForm
from llm_lightning.data.templates.conversation import Turn
from llm_lightning.files import columns
from llm_lightning.tokenizers.build import build_tokenizer

OLD = 1_700_000_000
BYTES = build_tokenizer("byte")
SHORT = "[{system}\n][{input}]Q{instruction}A{response}|"


def write(path: Path, outputs: list[str], changed: float | None = OLD) -> Path:
    path.write_text("\n".join(json.dumps({"instruction": f"q{n}", "output": one}) for n, one in enumerate(outputs)))
    if changed is not None:
        os.utime(path, (changed, changed))
    return path


def opened(source: Any, *, verify: bool = False, **options: Any) -> RecordStore:
    return open_store(str(source), Reading(InstructionForm(), FileOptions(), **options), verify=verify)


def outputs_of(store: RecordStore) -> list[str]:
    return [one.turns[-1].response for one in store]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The label of each source that is read."""
    found: list[str] = []

    def counted(source: Any, *args: Any, **options: Any) -> Any:
        found.append(str(source))
        return original(source, *args, **options)

    original = records.open_records
    monkeypatch.setattr(records, "open_records", counted)
    return found


# --- sources that change ----------------------------------------------------------------------------------------------


def test_what_is_as_before_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    file = write(tmp_path / "a.jsonl", ["one", "two"])
    assert [outputs_of(opened(file)) for _ in range(3)] == [["one", "two"]] * 3
    os.utime(file)  # the same content
    assert outputs_of(opened(file)) == ["one", "two"]
    assert len(reads) == 1


@pytest.mark.parametrize("changed", [OLD, None])
@pytest.mark.parametrize("how", ["content", "size", "inode", "verify"])
def test_what_changed_is_read_again(how: str, changed: float | None, tmp_path: Path) -> None:
    """Within two seconds of a change, without another size or time, too."""
    file = write(tmp_path / "a.jsonl", ["one", "two"], changed)
    state = file.stat()
    assert outputs_of(opened(file)) == ["one", "two"]
    wanted = ["six", "two"] if how != "size" else ["three", "two"]
    if how == "inode":
        write(tmp_path / "b.jsonl", wanted, changed).replace(file)
    else:
        write(file, wanted, OLD + 1 if how == "content" and changed else changed)
    if how != "content":
        os.utime(file, ns=(state.st_mtime_ns, state.st_mtime_ns))
    assert outputs_of(opened(file, verify=how == "verify")) == wanted
    write(file, ["one", "two"], OLD + 2)
    assert outputs_of(opened(file)) == ["one", "two"]


def test_a_change_with_the_size_time_and_inode_of_before_needs_verify(tmp_path: Path) -> None:
    """As it is documented; nothing of the old data is left when it is found out."""
    file = write(tmp_path / "a.jsonl", ["one", "two"])
    assert outputs_of(opened(file)) == ["one", "two"]
    write(file, ["six", "two"])
    assert outputs_of(opened(file)) == ["one", "two"]
    assert outputs_of(opened(file, verify=True)) == ["six", "two"]
    assert outputs_of(opened(file)) == ["six", "two"]


def in_between(monkeypatch: pytest.MonkeyPatch, where: str, change: Callable[[], Any]) -> None:
    """Let `change` happen once, after the files are hashed or while they are read."""
    todo = [change]

    def then(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if todo:
            todo.pop()()
        return result

    module, name = {"hashed": (snapshot, "content_of"), "read": (records, "open_records")}[where]
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: then(original, *args, **options))


@pytest.mark.parametrize("where", ["hashed", "read"])
@pytest.mark.parametrize("changed", [OLD, None])
def test_a_file_that_changes_meanwhile_is_refused(
    where: str, changed: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A young file even where neither its size nor its time tell."""
    file = write(tmp_path / "a.jsonl", ["one", "two"], changed)
    state = file.stat()

    def change() -> None:
        write(file, ["six", "two"], OLD + 1 if changed else None)
        if not changed:
            os.utime(file, ns=(state.st_mtime_ns, state.st_mtime_ns))

    with monkeypatch.context() as patch:
        in_between(patch, where, change)
        with pytest.raises(ValueError, match=r"a\.jsonl changed while it was being read; run again"):
            opened(file)
    assert outputs_of(opened(file)) == ["six", "two"]
    write(file, ["one", "two"], OLD + 2)
    assert outputs_of(opened(file)) == ["one", "two"], "nothing was kept under the content of before"


@pytest.mark.parametrize("where", ["hashed", "read"])
def test_a_file_that_is_added_meanwhile_belongs_to_the_next_start(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", ["one"])
    with monkeypatch.context() as patch:
        in_between(patch, where, lambda: write(tmp_path / "in" / "b.jsonl", ["two"]))
        assert outputs_of(opened(tmp_path / "in")) == ["one"]
    assert outputs_of(opened(tmp_path / "in")) == ["one", "two"]
    (tmp_path / "in" / "b.jsonl").unlink()
    assert outputs_of(opened(tmp_path / "in")) == ["one"]


def test_a_file_that_is_removed_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", ["one"])
    in_between(monkeypatch, "hashed", file.unlink)
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl") as caught:
        opened(file)
    assert "make room" not in str(caught.value)


def test_what_is_left_out_of_a_folder_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", ["one"])
    (tmp_path / "in" / "notes.md").write_text("x")
    opened(tmp_path / "in")
    assert caplog.text.count("1 of other kinds (1 .md) left out") == 1


# --- a cache that cannot be written, has no room, or is gone ----------------------------------------------------------


def line(n: int) -> dict[str, str]:
    """A record of both kinds; every second one has a system message."""
    asked = {"instruction": f"Question {n}. Say it.", "input": "", "other": f"other {n}"}
    answers = {"output": f"it\r\nis é {n}<|endoftext|>", "chosen": f"it\r\nis é {n}<|endoftext|>", "rejected": "no"}
    return {**asked, **answers, "system": f"system {n}" if n % 2 else ""}


TALK = {"messages": [{"role": role, "content": role[:2]} for role in ("user", "assistant", "user", "assistant")]}


def source(folder: Path, *more: Any) -> Path:
    file = folder / "records.jsonl"
    file.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in [*map(line, range(40)), *more]))
    os.utime(file, (OLD, OLD))
    return file


def built(kind: type[ConversationDataModule[Any]], path: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"context_length": 90, "template": SHORT, "batch_size": 4, "eval_batches": 2}
    settings |= {"max_dropped": 1.0, "max_cut": 1.0, "tokenizer": BYTES, "val_fraction": 0.1, "test_fraction": 0.1}
    made: Any = kind(path=str(path), **settings | options)
    made.build()
    return made


@contextmanager
def nothing_written(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(path: Any, *_: Any) -> Any:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        for module in (columns, snapshot, pool):
            for name in ("write_atomically", "locked"):
                patch.setattr(module, name, refuse, raising=False)
        yield


def test_a_cache_that_cannot_be_written_serves_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = source(tmp_path)
    before = everything(built(InstructionDataModule, file))
    os.utime(file, (OLD + 1, OLD + 1))  # its digest is not kept under the new time
    for kept in (tmp_path / "cache" / "records").glob("*.json"):
        kept.unlink()
    with nothing_written(monkeypatch):
        assert everything(built(InstructionDataModule, file)) == before
        with pytest.raises(OSError, match="Read-only") as caught:
            built(InstructionDataModule, file, max_length=20)
    assert str(tmp_path / "cache") in str(caught.value.filename), "the message names the cache"


@pytest.mark.parametrize("kind", [InstructionDataModule, PreferenceDataModule])
def test_a_disk_without_room_is_named_and_leaves_nothing(kind: Any, tmp_path: Path) -> None:
    file = source(tmp_path)
    for n_bytes in (0, 100, 1000, 3000):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
        try:
            with pytest.raises(OSError, match=r"^cannot write .*/cache/records/\S+: File too large \(.* make room, or"):
                built(kind, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not [file for file in (tmp_path / "cache").rglob("*") if file.name.endswith(".tmp")]
    assert len(built(kind, file).train_samples) == 32


def test_a_cache_that_is_removed_in_use_is_named(tmp_path: Path) -> None:
    data: Any = built(InstructionDataModule, source(tmp_path), packing=False)
    data.train_samples[0]
    shutil.rmtree(tmp_path / "cache")
    assert len(list(data.train_dataloader())) == 8, "what is open stays readable"
    data.records["val"][0]
    store = opened(source(tmp_path))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(OSError, match="records was removed while it was in use; run again"):
        store[0]


# --- settings ---------------------------------------------------------------------------------------------------------


def everything(data: Any) -> list[Any]:
    """All that a run sees of its data."""
    samples = [data.train_samples, *data.eval_samples.values(), *data.test_samples.values()]
    sequences = [
        [(one.token_ids.tolist(), one.label_mask.tolist()) for at in range(len(split)) for one in split[at].sequences]
        for split in samples
    ]
    texts = [[one._replace(record={}) for one in data.conversations_of(split)] for split in data.records]
    order = [[one.sample_id for one in batch] for batch in data.first_batches(100)]
    return [sequences, texts, order, data.data_digest, data.report(), data.quarantined]


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOTH: dict[str, dict[str, Any]] = {
    "nothing": {},
    "columns": {"columns": {"instruction": "other"}},
    "a column less": {"columns": {"system": None}},
    "template": {"template": "[{system}\n][{input}]Q{instruction}A{response}!"},
    "its system": {"template": "chatml"},
    "jinja": {"template": "DATED"},
    "date": {"template": "DATED", "template_date": "2025-02-03"},
    "tokenizer": {"tokenizer": build_tokenizer("gpt2")},
    "strip_eot": {"strip_eot": True},
    "newlines": {"newlines": "keep"},
    "encoding": {"encoding": "latin1"},
    "bad_records": {"bad_records": "quarantine"},
    "max_length": {"max_length": 48},
    "drop": {"max_length": 48, "too_long": "drop"},
    "cut_answer": {"max_length": 48, "too_long": "cut_answer"},
    "split": {"split": "order"},
    "seed of the split": {"split_seed": 1},
    "fractions": {"val_fraction": 0.2},
    "seed": {"seed": 5},
    "batches": {"batch_size": 3},
    "packing": {"packing": False},
    "no shuffle": {"shuffle": False},
    "no buckets": {"bucket": False},
}
OF_KIND: dict[Any, dict[str, dict[str, Any]]] = {
    InstructionDataModule: {
        "header": {"loss_on": "header"},
        "all": {"loss_on": "all"},
        "first": {"loss_on": "all", "eos_targets": "first"},
        "empty_output": {"empty_output": "skip"},
    },
    PreferenceDataModule: {
        "no end": {"score_eos": False},
        "header": {"score_header": True},
        "empty_answer": {"empty_answer": "skip"},
        "repeated_prompt": {"repeated_prompt": "keep"},
    },
}


def cases(kind: Any, folder: Path) -> dict[str, dict[str, Any]]:
    (folder / "dated.jinja").write_text(DATED)
    dated = {"template": str(folder / "dated.jinja")}
    every = BOTH | OF_KIND[kind]
    return {name: one | dated if one.get("template") == "DATED" else one for name, one in every.items()}


ALIKE = ("bad_records", "empty_output", "empty_answer", "repeated_prompt", "encoding")
"""Settings without effect on these records: they are UTF-8 beyond ASCII, and are read so whatever the encoding."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_KIND)
def test_no_setting_is_served_what_another_made(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = source(tmp_path, *[TALK] * (kind is InstructionDataModule)), dict[str, str]()
    for name, options in cases(kind, tmp_path).items():
        monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "shared"))
        shared = [everything(built(kind, file, **options)) for _ in range(2)]
        monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / f"alone {name}"))
        alone = everything(built(kind, file, **options))
        assert shared == [alone, alone], name
        assert name in ALIKE or repr(alone) not in seen, (name, "changes nothing, as does", seen[repr(alone)])
        seen[repr(alone)] = name
        shutil.rmtree(tmp_path / f"alone {name}")


def test_what_one_policy_leaves_out_another_refuses(tmp_path: Path) -> None:
    pair = {"instruction": "c", "chosen": "", "rejected": "c"}
    bad = [{"instruction": "a"}, {"instruction": "b", "output": ""}, pair]
    file = source(tmp_path, *bad)
    for kind, empty in ((InstructionDataModule, "empty_output"), (PreferenceDataModule, "empty_answer")):
        for _ in range(2):
            for policy in ("refuse", "skip"):
                with pytest.raises(ValueError, match="3 bad records" if policy == "refuse" else "bad record"):
                    built(kind, file, **{empty: policy})
            skipped = built(kind, file, bad_records="quarantine", **{empty: "skip"})
            whole = built(kind, file, bad_records="quarantine")
            assert (len(whole.quarantined), whole.report()["skipped"]) == (3, 0)
            assert len(skipped.quarantined) + skipped.report()["skipped"] == 3
            assert skipped.report()["skipped"] >= 1


def test_a_second_build_reads_and_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = source(tmp_path)
    for kind in OF_KIND:
        before = everything(built(kind, file))
        with monkeypatch.context() as patch:
            patch.setattr(columns, "_make", lambda *_: pytest.fail("everything is there"))
            patch.setattr(snapshot, "sha256_of", lambda *_: pytest.fail("nothing changed"))
            assert everything(built(kind, file)) == before
        assert everything(built(kind, file, verify=True)) == before


# --- processes and values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_samples_in_loader_processes(how: str, tmp_path: Path) -> None:
    """Some are cut, and those have a file of their own."""
    made = [built(kind, source(tmp_path), max_length=48, packing=False) for kind in OF_KIND]
    assert made[0].report()["prompts_cut"] > 0
    samples: Any = torch.utils.data.ConcatDataset([one.train_samples for one in made])
    loader = torch.utils.data.DataLoader(
        samples, batch_size=4, collate_fn=list, num_workers=2, multiprocessing_context=how
    )
    found = [one for batch in loader for one in batch]
    assert len(found) == len(samples) > 32
    for one, other in zip(found, (samples[index] for index in range(len(samples))), strict=True):
        assert one.sample_id == other.sample_id
        for ours, theirs in zip(one.sequences, other.sequences, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            assert ours.label_mask.tolist() == theirs.label_mask.tolist()


ODD = [*'\t\n\0\u2028\x85\ufeffé語👍"\\[{', "\r\n", "\\t", "</s>", " x ", "null"]


def test_texts_come_back_as_they_are(tmp_path: Path) -> None:
    rows = [{"instruction": f"a{odd}b", "input": odd, "output": f"c{odd}d", "group": odd} for odd in ODD]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), newline="")
    store = open_store(str(file), Reading(InstructionForm(), FileOptions(newlines="keep")))
    assert [one.turns for one in store] == [(Turn(row["instruction"], row["input"], row["output"]),) for row in rows]
    assert [one.record for one in store] == rows
    assert [one.place for one in store] == [f"{file}:{number}" for number in range(1, 1 + len(rows))]


def test_columns_of_parquet_that_json_has_no_form_for(tmp_path: Path) -> None:
    import datetime
    import decimal

    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    odd = {
        "when": datetime.datetime(2020, 1, 2, 3, 4, 5),
        "day": datetime.date(2020, 1, 2),
        "price": decimal.Decimal("1.50"),
        "picture": b"\xff\x00",
        "took": datetime.timedelta(seconds=3),
    }
    rows = [{"instruction": f"q{n}", "output": f"a{n}", **odd, "nested": {"inner": odd["picture"]}} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    store = opened(tmp_path / "a.parquet")
    assert outputs_of(store) == ["a0", "a1", "a2"]
    assert store[1].record["when"] == "2020-01-02 03:04:05"
    assert store[1].record["nested"] == {"inner": "2 bytes"}
