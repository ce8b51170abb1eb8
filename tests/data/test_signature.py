"""Signatures of files: equal while nothing changed, and not kept while a change could go unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llm_lightning.data.files.signature import is_settled, signature_of


def test_what_a_signature_sees(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(0, 1_000_000_000_000_000_001))
    first = signature_of([file])
    assert first == [[str(file), 3, 1_000_000_000_000_000_001, file.stat().st_ino]]
    assert json.loads(json.dumps(first)) == signature_of([file])
    os.utime(file, ns=(0, 1_000_000_000_000_000_002))
    assert signature_of([file]) != first
    other = tmp_path / "b.txt"
    other.write_text("two")
    other.replace(file)  # another inode, with the same name, size and time
    os.utime(file, ns=(0, 1_000_000_000_000_000_001))
    assert signature_of([file]) != first


def test_a_folder_gives_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b", "a", "inner/c"):
        (tmp_path / name).write_text(name)
    assert [entry[0] for entry in signature_of([tmp_path])] == [str(tmp_path / name) for name in ("a", "b", "inner/c")]


def test_files_of_the_last_two_seconds_are_not_settled(tmp_path: Path) -> None:
    for name, changed in (("old", 100.0), ("new", 200.0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed, changed))
    both = signature_of([tmp_path])
    assert is_settled(both, now=202.5)
    assert not is_settled(both, now=201.5)
    assert not is_settled(both, now=150.0)  # the clock of another machine is ahead
    assert is_settled([])
