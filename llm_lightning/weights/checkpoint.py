"""Checkpoints: self-describing, written atomically, verified before anything in them is used.

A checkpoint is one file: PyTorch's zip archive with a digest in the archive's comment, so it can be copied, renamed
and linked without losing its proof. Inside, a plain-dict header (key `llm_lightning`) beside Lightning's keys says how
to rebuild the model and the tokenizer. It holds tensors and plain values only, and is loaded with `weights_only=True`
always. PyTorch itself does not check the archive's contents when it loads: a flipped bit becomes a wrong weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from llm_lightning.files.atomic import sync_folder
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights.checks.archive import check_archive, check_state
from llm_lightning.weights.checks.header import HEADER, TASKS, check_header, check_run
from llm_lightning.weights.checks.resume import check_resumable, compare_with_run
from llm_lightning.weights.checks.tensors import check_values, check_weights, n_parameters
from llm_lightning.weights.renamed import translated

FORMAT_VERSION = 1
_MARK = b"llm-lightning checkpoint sha256:"
_COMMENT_LENGTH = len(_MARK) + 64
_REMEDY = "use another checkpoint of the run, or train again"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, foreign, or does not fit."""


def save(path: str | Path, state: dict[str, Any]) -> str:
    """Write `state` to `path`, all or nothing, and return its digest.

    A temporary file beside the target is written, flushed to the disk and renamed: an earlier file stays intact
    whatever happens in between.

    Raises:
        OSError: if it cannot be written; names the path, the bytes needed and the bytes free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            digest = _write(file, state)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in _tensors(state))
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write checkpoint {path}: {error.strerror or error} ({needed:,} bytes needed, {free:,} free); "
            "earlier checkpoints are intact: make room and continue with resume=RUN_FOLDER"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def verify(path: str | Path) -> str:
    """Return the digest of the checkpoint at `path` after comparing it with every byte of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not one of ours, or was changed after it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _COMMENT_LENGTH))
        comment = file.read()
        if not comment.startswith(_MARK):
            raise CheckpointError(
                f"{path} is not a complete llm-lightning checkpoint (truncated, or written by another program); "
                f"{_REMEDY}. Published weights are read from .safetensors and .gguf files"
            )
        file.seek(0)
        actual = _digest(file, size - _COMMENT_LENGTH - 2)
    expected = comment[len(_MARK) :].decode("ascii", errors="replace")
    if actual != expected:
        raise CheckpointError(f"{path} is corrupt: its digest is {actual}, but it was written as {expected}; {_REMEDY}")
    return actual


class Opened(NamedTuple):
    """A checkpoint that was verified, and its header."""

    path: Path
    header: dict[str, Any]
    stamp: tuple[int, int, int]
    """Size, time and inode of the file that was verified: while they are the same, it is not hashed again."""


def load(
    path: str | Path, *, map_location: Any = "cpu", mmap: bool = False, opened: Opened | None = None
) -> dict[str, Any]:
    """Verify and load a checkpoint of ours; one that was `opened`, and did not change since, is not hashed again.

    Raises:
        CheckpointError: if it is corrupt, foreign, or of a newer format.
    """
    path = Path(path)
    is_same = opened is not None and opened.path == path and opened.stamp == _stamp(path)
    digest = opened.header["digest"] if opened is not None and is_same else verify(path)
    size = path.stat().st_size
    with refusing(path):
        try:
            check_archive(path)
            state = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
        except Exception as error:  # whatever a forged archive makes the unpickler raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"it cannot be loaded safely ({reason})") from error
        check_state(state, size)
        header = state[HEADER]
        if header["format"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {header['format']}, this version reads up to {FORMAT_VERSION}; update llm-lightning"
            )
        check_header(header)
        if "config" in header:
            header["config"] = translated(header["config"])
        if header["task"] in TASKS:  # another package's task may train more than our models
            check_weights(header, state.get("state_dict"), size)
    header["digest"] = digest
    return state


def load_weights(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """`load`, for a model to be built: whatever the task, the weights are those of a model of ours, and finite."""
    state = load(path, mmap=mmap)
    with refusing(path):
        check_weights(state[HEADER], state.get("state_dict"), Path(path).stat().st_size)
        check_values(state["state_dict"], state[HEADER])
    return state


def load_to_resume(
    path: str | Path, *, map_location: Any = "cpu", mmap: bool = False, opened: Opened | None = None
) -> dict[str, Any]:
    """Load a checkpoint that a run continues from; `opened`: see `load`.

    Raises:
        CheckpointError: as `load`, or if weights are not finite, or what a run needs beside the weights is damaged.
    """
    state = load(path, map_location=map_location, mmap=mmap, opened=opened)
    with refusing(path):
        check_resumable(state)
        if state[HEADER]["task"] in TASKS:
            check_values(state["state_dict"], state[HEADER])
    return state


def check_fits(path: str | Path, state: Mapping[str, Any], module: torch.nn.Module, trained: torch.nn.Module) -> None:
    """Compare a loaded checkpoint with the module that resumes from it, of which `trained` is optimized.

    Raises:
        CheckpointError: if a tensor of the weights or the optimizer is missing, unknown or of another shape.
    """
    parameters = {name: tensor for name, tensor in trained.named_parameters() if tensor.requires_grad}
    with refusing(path):
        compare_with_run(state, module.state_dict(), parameters)


@contextlib.contextmanager
def refusing(path: str | Path) -> Iterator[None]:
    """Turn a ValueError about the content of a file into a CheckpointError with the file and the remedy."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; {_REMEDY}") from error


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a checkpoint: task, step, model, tokenizer, config, lineage."""
    return load(path, mmap=True)[HEADER]


def examine(path: str | Path) -> tuple[dict[str, Any], int]:
    """The header of a checkpoint, after reading every value, and the model's number of parameters.

    Raises:
        CheckpointError: as `load`, or if weights are not finite.
    """
    state = load_weights(path, mmap=True)
    return state[HEADER], n_parameters(state[HEADER], state["state_dict"])


def newest_valid(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in `folder` that passes `verify`, with a warning for each damaged one.

    Raises:
        CheckpointError: if all are damaged.
    """
    newest = _newest(folder)
    return newest.path if newest else None


def open_newest(folder: str | Path) -> Opened | None:
    """`newest_valid`, hashed once, with its header: what a run continues from.

    Raises:
        CheckpointError: as `load`; if all are damaged; or if the header lacks the run's step, settings or data.
    """
    newest = _newest(folder)
    if newest is None:
        return None
    header = load(newest.path, mmap=True, opened=newest)[HEADER]
    with refusing(newest.path):
        check_run(header)
    return newest._replace(header=header)


def _newest(folder: str | Path) -> Opened | None:
    """The newest valid file, of its header the digest alone."""
    damaged: list[str] = []
    for path in sorted(Path(folder).glob("step_*.ckpt"), reverse=True):
        stamp = _stamp(path)
        try:
            digest = verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            log.warning("%s. Falling back to %s", message, path)
        return Opened(path, {"digest": digest}, stamp)
    if damaged:
        raise CheckpointError(damaged[0])
    return None


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def link(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, atomically (a copy where the file system has no hard links)."""
    if target.is_file() and target.samefile(source):
        return  # renaming a file to another of its own names does nothing and would leave the temporary name
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
    sync_folder(target.parent)


def describe(*, task: str, model_config: GPTConfig, tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """The header of a checkpoint. `more`: plain values (step, resolved config, lineage, metrics)."""
    return {
        "format": FORMAT_VERSION,
        "task": task,
        "model": asdict(model_config),
        "tokenizer": tokenizer.describe(),
        **more,
    }


class _Writer:
    """Passes bytes on and keeps the first OSError, which torch.save hides behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(file: BinaryIO, state: dict[str, Any]) -> str:
    writer = _Writer(file)
    try:
        torch.save(state, writer)  # type: ignore[arg-type]
    except Exception:
        if writer.error is not None:
            raise writer.error from None
        raise
    # torch.save ends with a bare end-of-archive record: 22 bytes, the last two are the length of the comment, 0.
    # The digest covers everything before those two.
    length = file.tell() - 2
    file.seek(length - 20)
    assert file.read(4) == b"PK\x05\x06", "torch.save no longer ends with a bare end-of-archive record"
    file.seek(0)
    digest = _digest(file, length)
    file.seek(length)
    file.write(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK + digest.encode())
    return digest


def _digest(file: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    while length > 0 and (chunk := file.read(min(length, 1 << 22))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
