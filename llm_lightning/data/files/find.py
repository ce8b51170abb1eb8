"""The files that `data.path` names: a file, a folder, a glob, or several of them."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_lightning.data.files.columnar import is_saved_dataset
from llm_lightning.data.files.compression import COMPRESSIONS
from llm_lightning.data.files.form import FORMS, SUFFIXES, named_form
from llm_lightning.files.atomic import cache_dir
from llm_lightning.terminal import counted

PathWords = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Files in a fixed order, and what they were asked for by; a folder among them was saved by `datasets`."""

    label: str
    files: list[Path]


def find_files(path: PathWords, forms: Collection[str] = FORMS) -> Found:
    """The files of `data.path`.

    Args:
        path: a file, folder or glob, or several as a list or with commas. A folder gives the files whose names say one
            of `forms`, compressed ones and those of subfolders too, in the order of their paths; hidden ones are left
            out. A file that occurs twice is taken once.

    Raises:
        FileNotFoundError: no such file, or a folder or glob without files.
        ValueError: if nothing is named.
    """
    entries = words(path)
    files = [file for word in entries for file in _files_of(word, forms)]
    if not files:
        raise ValueError(f"data.path={path!r} names no file; give a file, a folder or a glob")
    return Found(", ".join(entries), list({file.resolve(): file for file in files}.values()))


def words(path: PathWords, folder: str | os.PathLike[str] = "") -> list[str]:
    """The entries of a list or of a string with commas; a path that exists is one entry, commas and all."""
    if isinstance(path, (str, os.PathLike)):
        whole = os.fspath(path)
        exists = os.path.exists(os.path.join(folder, whole))  # noqa: PTH110, PTH118 (Path.exists raises where a list is too long for a file name)
        return [whole] if exists else [word.strip() for word in whole.split(",") if word.strip()]
    return [os.fspath(word) for word in path]


def absolute_paths(path: PathWords, folder: str | os.PathLike[str] = "") -> str | list[str]:
    """`data.path`, typed in `folder` (default: here), as absolute paths."""
    absolute = [str((folder / Path(word).expanduser()).absolute()) for word in words(path, folder)]
    return absolute[0] if len(absolute) == 1 else absolute


def _files_of(word: str, forms: Collection[str]) -> list[Path]:
    found = Path(word).expanduser()
    if found.is_dir():
        return [found] if is_saved_dataset(found) else _files_in(found, word, forms)
    if found.exists():
        if not found.is_file():
            raise ValueError(
                f"{word} is not a regular file, and data are read more than once; write it to a file first"
            )
        return [found]
    if glob.has_magic(word):
        matches = map(Path, glob.glob(str(found), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if files := sorted(match for match in matches if match.is_file()):
            return files
        raise FileNotFoundError(f"no file matches {word} (looked from {Path.cwd()})")
    raise FileNotFoundError(f"{word} does not exist (looked from {Path.cwd()}); check the path (of a run: data.path)")


def _files_in(folder: Path, word: str, forms: Collection[str]) -> list[Path]:
    files, n_hidden, others, cache = [], 0, Counter[str](), cache_dir().absolute()
    for file in sorted(_regular_files(folder), key=lambda file: file.relative_to(folder).as_posix()):
        if any(part.startswith(".") for part in file.relative_to(folder).parts) or cache in file.absolute().parents:
            n_hidden += 1  # what is made of the data is not data
        elif named_form(file) in forms:
            files.append(file)
        else:
            others[file.suffix.lower() or "without a suffix"] += 1
    if not files:
        kinds = ", ".join(suffix for suffix, form in SUFFIXES.items() if form in forms)
        packed = ", ".join(f".{name}" for name in COMPRESSIONS)
        raise FileNotFoundError(
            f"the folder {word} holds no {kinds} file, nor one compressed as {packed}; for others give a glob, as "
            f"{word}/**/*.py"
        )
    if n_hidden or others:
        left = [f"{n_hidden} hidden"] * bool(n_hidden)
        if others:
            named = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common())
            left.append(f"{others.total()} of other kinds ({named})")
        log.info("%s: %s read, %s left out", word, counted(len(files), "file"), " and ".join(left))
    return files


def _regular_files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())
