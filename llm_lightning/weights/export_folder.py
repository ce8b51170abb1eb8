"""Exported folders: each appears complete, replaces an earlier export in one step, and states the sha256 of its files.

A folder is written under a hidden name beside its target, flushed to disk and renamed. An earlier export is swapped in
one system call, where the system has it, so the target always exists, old or new.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_lightning.files.atomic import commit, sha256_of

REPORT = "export_report.json"
"""A report of the export; its `sha256` lists every other file of the folder."""
NOTE = "llm_lightning.json"
"""Our file in an exported model: describes the tokenizer, of any kind."""
ADAPTER = "adapter_config.json"
"""PEFT's file in an exported adapter."""
GGUF = "model.gguf"
"""The file in an export for llama.cpp."""

_HOST = re.sub(r"\W", "-", platform.node()) or "host"


# --- reading -------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ValueError: if the file contains anything else; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); get it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}; get it again")
    return content


class Stated:
    """The digests stated in the report of an exported folder; none for any other folder.

    Raises:
        ValueError: if the report is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._report = folder / REPORT
        self._digests: dict[str, str] = {}
        if not self._report.is_file():
            return
        try:
            digests = json.loads(self._report.read_text(encoding="utf-8"))["sha256"]
            self._digests = {str(name): digest.lower() for name, digest in digests.items()}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._report} is damaged ({type(error).__name__}); export again, or delete it if that was meant"
            ) from None

    def digest_of(self, path: Path) -> str:
        """The sha256 of a file about to be read, checked against the report.

        Raises:
            ValueError: if the file was changed since the export.
        """
        actual = sha256_of(path)
        expected = self._digests.get(path.name, actual)
        if actual != expected:
            raise ValueError(
                f"{path} is not what was exported: its sha256 is {actual[:12]}..., {self._report.name} states "
                f"{expected[:12]!r}...; export again, or delete {self._report} if the change was meant"
            )
        return actual


# --- writing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publishing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder to fill; at the end of the block it replaces `folder`.

    First, leftovers of a killed export are removed, and an earlier export that it had moved away is restored.

    Raises:
        ValueError: if `folder` is not empty and may not be overwritten, or is not an earlier export.
        OSError: if it cannot be written.
    """
    check_target(folder, overwrite)
    temporary = _beside(folder, "tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that an export may not replace; remove the leftovers of a killed export.

    Raises:
        ValueError: with the reason.
    """
    _sweep(folder)
    if not folder.exists() or _is_empty(folder):
        return
    if not overwrite:
        raise ValueError(f"{folder} is not empty; choose another folder, or allow overwriting")
    is_other = (folder / REPORT).is_file() and any((folder / name).is_file() for name in (ADAPTER, GGUF))
    if not is_other and not (folder / NOTE).is_file():
        raise ValueError(f"{folder} is not an earlier export (it has no {NOTE}), so it is not replaced; choose another")
    if added := _added_to(folder):
        raise ValueError(
            f"{folder} holds {added[0]}, which is not of the export that would be replaced and would be lost; move it "
            "elsewhere, or choose another folder"
        )


def _added_to(folder: Path) -> list[str]:
    """What is in an exported folder that its report does not list; nothing if there is no readable report."""
    try:
        listed = {REPORT, *json.loads((folder / REPORT).read_text(encoding="utf-8"))["sha256"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in listed)


def digests_of(folder: Path) -> dict[str, str]:
    """File name -> sha256, as in a report."""
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir())}


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    write_text(path, json.dumps(content, indent=indent))


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _put_in_place(finished: Path, folder: Path) -> None:
    for file in finished.iterdir():
        with file.open("r+b") as flushed:
            os.fsync(flushed.fileno())
    if not folder.exists() or _is_empty(folder):
        commit(finished, folder)
    elif not _swap(finished, folder):
        _replace_in_two_steps(finished, folder)


def _replace_in_two_steps(finished: Path, folder: Path) -> None:
    """For systems without a swap: between the two steps the earlier export has only a hidden name."""
    old = _beside(folder, "old")
    folder.rename(old)
    try:
        commit(finished, folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False if the system or file system cannot."""
    names: dict[str, tuple[str, Callable[..., tuple[Any, ...]]]] = {
        "linux": ("renameat2", lambda a, b: (-100, a, -100, b, 2)),  # AT_FDCWD, RENAME_EXCHANGE
        "darwin": ("renamex_np", lambda a, b: (a, b, 2)),  # RENAME_SWAP
    }
    if sys.platform not in names:
        return False
    name, arguments = names[sys.platform]
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return False
    if function(*arguments(os.fsencode(one), os.fsencode(other))) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{_HOST}.{os.getpid()}.{kind}")


def _sweep(folder: Path) -> None:
    """Remove the leftovers of killed exports to `folder`; restore an export that one had moved away."""
    if not folder.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(?:{re.escape(_HOST)}\.)?(\d+)\.(tmp|old)")
    left = [(path, match) for path in folder.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    for path, match in sorted(left):
        if _is_alive(int(match[1])):
            continue
        if match[2] == "old" and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # on Windows os.kill would end the process
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
