"""Folders of columns: what is read is what was written; they are there complete or not at all; damage is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import ROOT

from llm_lightning.files import columns as module
from llm_lightning.files.atomic import sha256_of
from llm_lightning.files.columns import HELD, Columns, Writer, made_once, sealed, unsealed

TYPES = (np.uint8, np.int32, np.uint32, np.int64)


def a_folder(folder: Path, n: int = 1000, **options: Any) -> Columns:
    def write(writer: Writer) -> dict[str, Any]:
        writer.column("numbers", np.int64).extend(np.arange(n).tobytes())
        return {"n": n}

    return made_once(folder, write, **options)


@pytest.mark.parametrize("n", [0, 1, HELD // 8 - 1, HELD // 8, HELD // 8 + 1])
def test_every_column_comes_back_as_it_was_written(n: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(n)
    given = {np.dtype(kind).name: draw.integers(np.iinfo(kind).max, size=n).astype(kind) for kind in TYPES}
    rows = draw.integers(256, size=(n, 16)).astype(np.uint8)

    def write(writer: Writer) -> dict[str, Any]:
        for name, values in given.items():
            added, extended = writer.column(name, values.dtype), writer.column(f"{name} at once", values.dtype)
            both = writer.column(f"{name} both", values.dtype)
            for value in values.tolist():
                added.add(value)
            extended.extend(values.tobytes())
            for number in range(0, n, max(n // 3, 1)):
                both.add(int(values[number]))
                both.extend(values[number + 1 : number + max(n // 3, 1)].tobytes())
        table = writer.column("table", np.uint8, 16)
        for row in rows:
            table.extend(row.tobytes())
        return {"words": ["é", "\n", "\ud800"], "none": None}

    made = made_once(tmp_path / "folder", write)
    again = pickle.loads(pickle.dumps(made_once(tmp_path / "folder", lambda _: pytest.fail("it is there"))))
    for found in (made, again):
        assert found.facts == {"words": ["é", "\n", "\ud800"], "none": None}
        np.testing.assert_array_equal(found.mapped("table"), rows)
        for name, values in given.items():
            for column in (name, f"{name} at once", f"{name} both"):
                assert found.dtype(column) == found.mapped(column).dtype == values.dtype
                np.testing.assert_array_equal(found.mapped(column), values)
            first, last, size = n // 3, n // 2, values.itemsize
            assert found.read(name, first * size, last * size) == values[first:last].tobytes()


def test_a_manifest_names_the_digests(tmp_path: Path) -> None:
    a_folder(tmp_path / "a")
    about = json.loads((tmp_path / "a" / "manifest.json").read_text())["content"]["columns"]["numbers"]
    assert about["sha256"] == hashlib.sha256((tmp_path / "a" / "numbers").read_bytes()).hexdigest()
    assert about["n_bytes"] == 8000


def damage(how: str, folder: Path) -> None:
    file, manifest = folder / "numbers", folder / "manifest.json"
    before = file.stat()
    if how == "another size":
        file.write_bytes(b"x")
    elif how == "another byte":
        file.write_bytes(b"x" * before.st_size)
    elif how == "removed":
        file.unlink()
    elif how == "cut manifest":
        manifest.write_text(manifest.read_text()[:-9])
    elif how == "changed manifest":
        manifest.write_text(manifest.read_text().replace("8000", "8001"))
    elif how == "no JSON":
        manifest.write_bytes(b"\xff\x00")
    elif how == "empty manifest":
        manifest.write_text("")
    elif how == "no manifest":
        manifest.unlink()
    elif how == "in secret":
        file.write_bytes(b"x" * before.st_size)
        os.utime(file, ns=(before.st_mtime_ns, before.st_mtime_ns))


NOTICED = ["another size", "another byte", "removed", "cut manifest", "changed manifest", "no JSON", "empty manifest"]


@pytest.mark.parametrize("how", [*NOTICED, "no manifest", "in secret"])
def test_damage_is_noticed_and_said_once(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_folder(tmp_path / "a")
    damage(how, tmp_path / "a")
    if how == "in secret":
        assert a_folder(tmp_path / "a").mapped("numbers")[0] != 0, "size and time are as they were"
    assert a_folder(tmp_path / "a", verify=how == "in secret").mapped("numbers").tolist() == list(range(1000))
    assert caplog.text.count("making it again") == (how != "no manifest")
    assert sorted(file.name for file in tmp_path.iterdir()) in (["a"], ["a", "a.lock"])


def test_a_copy_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "a")
    os.utime(tmp_path / "a" / "numbers", (1, 1))
    hashed: list[Path] = []
    monkeypatch.setattr(module, "sha256_of", lambda file: hashed.append(file) or sha256_of(file))
    for _ in range(3):
        assert made_once(tmp_path / "a", lambda _: pytest.fail("it is not damaged")).facts == {"n": 1000}
    assert len(hashed) == 1


def test_a_folder_that_was_removed_or_cut_in_use_is_named(tmp_path: Path) -> None:
    found = a_folder(tmp_path / "a")
    (tmp_path / "a" / "numbers").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"a/numbers was removed while it was in use; run again") as caught:
        found.read("numbers", 0, 8)
    assert caught.value.errno is None
    found = a_folder(tmp_path / "a")
    assert found.read("numbers", 0, 8) == bytes(8)
    os.truncate(tmp_path / "a" / "numbers", 12)
    with pytest.raises(OSError, match=r"a/numbers was cut while it was in use; run again"):
        found.read("numbers", 8, 16)
    assert a_folder(tmp_path / "a").read("numbers", 8, 16) == (1).to_bytes(8, "little")


ERRORS = (ValueError("a bad record"), FileNotFoundError(2, "No such file", "source"), KeyboardInterrupt())


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_the_source_is_its_own_and_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def write(writer: Writer) -> dict[str, Any]:
        writer.column("numbers", np.int64).add(1)
        raise error

    with pytest.raises(type(error)) as caught:
        made_once(tmp_path / "a", write)
    assert caught.value is error
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == []


def test_sealed_values_know_their_digest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value, file = {"b": [1, None, "é\ud800", 0.1], "a": {}}, tmp_path / "file"
    assert unsealed(file) is None
    assert not caplog.text
    file.write_text(sealed(value))
    assert unsealed(file) == value
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert unsealed(file) in (None, value)  # a key may be spelt in another way: the values count
        file.write_bytes(whole[:at])
        assert unsealed(file) is None


SLOW = """
import sys, time
import numpy as np
from pathlib import Path
from llm_lightning.files.columns import made_once

def write(writer):
    print("begun", flush=True)
    for name in "abcdefgh":
        column = writer.column(name, np.int64)
        for start in range(0, 400_000, 100_000):
            column.extend(np.arange(start, start + 100_000).tobytes())
            time.sleep(0.002)
    return {"n": 400_000}

found = made_once(Path(sys.argv[1]), write)
assert all((found.mapped(name) == np.arange(400_000)).all() for name in "abcdefgh")
print("done", flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, folder], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_maker_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    draw, folder, n_unfinished = random.Random(0), tmp_path / "a", 0
    for _ in range(6):
        process = start(folder)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        n_unfinished += (folder.with_name("a.tmp")).is_dir()
        if folder.is_dir():
            found = made_once(folder, lambda _: pytest.fail("a folder under its name is whole"), verify=True)
            assert all(found.mapped(name).tolist() == list(range(400_000)) for name in "abcdefgh")
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert n_unfinished, "the kills came too late"
    last = start(folder)
    assert last.communicate()[0] == "begun\ndone\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "a.lock"]


@pytest.mark.slow
def test_several_processes_at_once_make_it_once(tmp_path: Path) -> None:
    processes = [start(tmp_path / "a") for _ in range(3)]
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said == ["begun\ndone\n", "done\n", "done\n"]
