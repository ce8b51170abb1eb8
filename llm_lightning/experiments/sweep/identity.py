"""What a job of a sweep *is*: its resolved settings, with the content of its data and first weights.

Names and places do not count, nor settings that change no result (`MAY_CHANGE`) unless the sweep varies them. So a
job is recognised in whatever folder it lies, and however its command was typed.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_lightning.data.files.find import words
from llm_lightning.experiments.settings.changes import MAY_CHANGE
from llm_lightning.files.data_paths import data_path_of, flat_data_paths, without_paths
from llm_lightning.weights.renamed import MOVED, RENAMED, REPLACED

EXTENDS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "callbacks.early_stopping*")
"""Settings of `MAY_CHANGE` with which a finished job may go on."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Identity:
    """The settings that tell jobs apart."""

    settings: Mapping[str, Any]
    """Dotted key -> resolved value, of every setting."""
    content: Mapping[str, str]
    """Setting that names files (`files_of`) -> digest of what it names; without those whose files are not there."""
    swept: Sequence[str]
    """Keys that the sweep varies."""
    is_recorded: bool = True
    """Whether it was recorded before the run; else it is what a run says of itself, with open settings filled in."""

    @property
    def is_resolved(self) -> bool:
        """Whether `settings` have a value where today's are open until the run: null, auto."""
        return not self.is_recorded or any(key in self.settings for key in REPLACED)

    def digest(self, swept: Iterable[str] = ()) -> str:
        """The digest of all that counts, for comparison with a job of a sweep over the keys `swept`."""
        counting = self._counting({*self.swept, *swept}) | {key: self._content(key) for key in self._files}
        return hashlib.sha256(json.dumps(counting, sort_keys=True).encode()).hexdigest()

    def is_same(self, other: Identity, default: Callable[[str], Any], *, with_content: bool = True) -> bool:
        """Whether `other`, of an earlier start of the sweep, is the same job.

        What is gone, or was missing then, counts by the name that was typed.

        Args:
            default: gives the default of a key that `other`, made by an earlier version, does not have.
            with_content: whether the content of the files must be the same.
        """
        swept = {*self.swept, *other.swept}
        mine, theirs = self._counting(swept), other._counting(swept)
        if any(value is not None for key, value in theirs.items() if key not in mine):
            return False
        named = dict.fromkeys([*self._files, *other._files])
        if not all(self._has_same(key, other) for key in named if with_content or not self._typed_alike(key, other)):
            return False
        return all(
            value == (theirs[key] if key in theirs else _normal(default(key)))
            or (other.is_resolved and value in (None, "auto"))
            for key, value in mine.items()
        )

    def knows_as_much_as(self, other: Identity) -> bool:
        """Whether both have the same keys and digests, so that comparing `digest` is enough."""
        return (
            other.is_recorded
            and set(other.settings) == set(self.settings)
            and set(other.content) == set(self.content)
            and set(other.swept) <= set(self.swept)
        )

    def _counting(self, swept: Iterable[str]) -> dict[str, Any]:
        named = {key: value for key, value in self.settings.items() if key not in self._files and key not in REPLACED}
        values = {RENAMED.get(key, key): _normal(without_paths(value)) for key, value in named.items()}
        return {key: value for key, value in values.items() if key in swept or not _may_change(key)}

    @cached_property
    def _files(self) -> dict[str, Any]:
        return files_of(self.settings)

    def _content(self, key: str) -> Any:
        return self.content.get(key, self._files[key])

    def _typed_alike(self, key: str, other: Identity) -> bool:
        return bool(self._files.get(key) == other._files.get(key))

    def _has_same(self, key: str, other: Identity) -> bool:
        if key in self.content and key in other.content:
            return self.content[key] == other.content[key]
        return self._typed_alike(key, other)


def files_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that names files, which counts by what is in them; `data.path` and `init_from` also without any.

    Args:
        settings: by dotted keys.
    """
    first = {key: settings.get(key) for key in ("data.path", "init_from")}
    return first | flat_data_paths(settings)


def names_files(key: str) -> bool:
    """Whether a setting names files, or has some inside its value."""
    return key in ("init_from", "data.mixture", "data.val_sets") or data_path_of(key) is not None


def content_of(settings: Mapping[str, Any], known: dict[str, str]) -> dict[str, str]:
    """The digests of what the settings of `files_of` name.

    Args:
        known: digests of this sweep's other jobs, by the text of the setting; it is added to.
    """
    digests = {}
    for key, value in files_of(settings).items():
        texts = _texts(key, value)
        text = json.dumps(texts)
        if text not in known:
            files = [file for one in texts for file in _files(one, is_weights=key == "init_from")]
            known[text] = _digest(files) if files else ""
        if known[text]:
            digests[key] = known[text]
    return digests


def changed_limits(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The keys of `EXTENDS` that differ, so that a finished job may go on."""
    keys = sorted({key for key in (*now, *before) if any(fnmatchcase(key, pattern) for pattern in EXTENDS)})
    return [key for key in keys if now.get(key) != before.get(key)]


def _texts(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if key == "init_from":
        return [str(value)]
    return words(list(map(str, value)) if isinstance(value, list) else str(value))


def _may_change(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _normal(value: Any) -> Any:
    """Numbers as floats: `optimizer.lr=1` is `1.0`; classes by their names of today."""
    if isinstance(value, list):
        return [_normal(one) for one in value]
    if isinstance(value, Mapping):
        return {key: _normal(one) for key, one in value.items()}
    if isinstance(value, str):
        return MOVED.get(value, value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _files(text: str, *, is_weights: bool) -> list[Path]:
    """The files that a path, a folder or a glob names; of a run folder, the weights that a run starts from."""
    path = Path(text).expanduser()
    if path.is_dir():
        kept = (path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
        first = next((file for file in kept if file.is_file()), None) if is_weights else None
        return [first] if first else sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file():
        return [path]
    matches = glob.glob(str(path), recursive=True) if glob.has_magic(text) else []  # noqa: PTH207 (absolute patterns)
    return sorted(file for file in map(Path, matches) if file.is_file())


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(b"%d:" % file.stat().st_size)
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
