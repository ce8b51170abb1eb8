"""TensorBoard's event files, checked record by record.

A record is the length of an event (8 bytes, little-endian), its checksum, the event, its checksum (4 bytes each): a
masked CRC-32C, as TensorFlow writes it. TensorBoard shows nothing behind the first damaged record of a file.
"""

from __future__ import annotations

import logging
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from llm_lightning.files.atomic import write_atomically

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

# TensorBoard looks for this module before it imports TensorFlow, which takes seconds and 580 MB where it is installed.
# Set here, it also holds for Lightning's own logger, and for a parent process that imports torch.utils.tensorboard.
sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))

log = logging.getLogger(__name__)

EVENTS = "events.out.tfevents.*"
"""The names of the files that a training process writes."""
HPARAMS = "_hparams_.tfevents"
"""Beside them: the line of a failed run in HParams; in the folder of a sweep, the columns of that table. TensorBoard
reads every file with "tfevents" in its name, in the order of names, and does not go back to an earlier one."""
_HEAD, _TAIL = 12, 4
_LONG = 2048  # bytes: longer events are few, and their checksums are computed one by one
_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    _TABLE = np.where(_TABLE & 1, (_TABLE >> 1) ^ np.uint32(0x82F63B78), _TABLE >> 1)  # Castagnoli's polynomial

Span = tuple[int, int]


def drop_events_from(folder: Path, step: int) -> None:
    """Remove the events of `step` and later, and an unfinished one that a killed process left.

    If a record is damaged, all others stay, and a copy of the damaged file is kept beside it, under a name that
    TensorBoard does not read. A warning says so.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(folder.glob(EVENTS)):
        content, kept = path.read_bytes(), []
        records, damaged = whole_records(content)
        for start, end in records:
            try:
                event = Event.FromString(content[start + _HEAD : end - _TAIL])
            except DecodeError:
                damaged.append((start, end))
                continue
            if event.step < step or event.file_version:
                kept.append(content[start:end])
        if damaged:
            backup = keep_damaged(path, content, path.name.replace("tfevents", "tf-events"))
            log.warning(
                "%s is damaged at byte %d: %d of its %d events are left out, the others stay; the file as it was is %s",
                *(path, min(damaged)[0], len(damaged), len(records) + len(damaged), backup),
            )
        if len(remaining := b"".join(kept)) < len(content):
            write_atomically(path, remaining)


def write_events(path: Path, summary: Summary) -> None:
    """Replace an event file by one that holds a summary alone, as an event of step 0.

    A file that holds it already stays as it is: a TensorBoard that is open has read it.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    if path.is_file() and summary.SerializeToString() in path.read_bytes():
        return
    now = time.time()
    events = [Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, summary=summary)]
    write_atomically(path, b"".join(_record(event.SerializeToString()) for event in events))


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    of_length, of_event = masked_crcs([length, event])
    return length + struct.pack("<I", of_length) + event + struct.pack("<I", of_event)


def keep_damaged(path: Path, content: bytes, name: str) -> Path:
    """Write `content` beside `path` under the first free name of `NAME.damaged`, `NAME.damaged.2` ...; return it."""
    number, backup = 1, path.with_name(f"{name}.damaged")
    while backup.exists() and backup.read_bytes() != content:
        number += 1
        backup = path.with_name(f"{name}.damaged.{number}")
    write_atomically(backup, content)
    return backup


def whole_records(content: bytes) -> tuple[list[Span], list[Span]]:
    """(start, end) of each record with correct checksums, and of each damaged span.

    An unfinished record at the end, left by a killed process, is neither.
    """
    good: list[Span] = []
    damaged: list[Span] = []
    start = 0
    while len(content) - start >= _HEAD:
        chain = _chain(content, start)
        heads = masked_crcs([content[begin : begin + 8] for begin, _ in chain])
        stated = [struct.unpack_from("<I", content, begin + 8)[0] for begin, _ in chain]
        right = next((i for i, (a, b) in enumerate(zip(heads, stated, strict=True)) if a != b), len(chain))
        complete = [span for span in chain[:right] if span[1] <= len(content)]
        bodies = masked_crcs([content[begin + _HEAD : end - _TAIL] for begin, end in complete])
        for span, crc in zip(complete, bodies, strict=True):
            (good if struct.unpack_from("<I", content, span[1] - _TAIL)[0] == crc else damaged).append(span)
        if right == len(chain):
            break  # the end of the file, or an unfinished record
        start = _next_head(content, chain[right][0] + 1)
        damaged.append((chain[right][0], start))
    return good, damaged


def masked_crcs(pieces: Sequence[bytes]) -> list[int]:
    """The checksum of each piece; short ones together, byte by byte over all of them."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    crcs = {index: int(masked_crc32c(piece)) for index, piece in enumerate(pieces) if len(piece) > _LONG}
    short = sorted((i for i, piece in enumerate(pieces) if i not in crcs), key=lambda i: -len(pieces[i]))
    for first in range(0, len(short), 1 << 12):
        batch = short[first : first + (1 << 12)]
        lengths = np.array([len(pieces[index]) for index in batch])
        padded = b"".join(pieces[index].ljust(int(lengths[0]), b"\0") for index in batch)
        rows = np.frombuffer(padded, dtype=np.uint8).reshape(len(batch), -1).T
        crcs |= dict(zip(batch, _masked(rows, lengths).tolist(), strict=True))
    return [crcs[index] for index in range(len(pieces))]


def _masked(columns: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Checksums of N texts, the longest first: (T, N) bytes and (N,) lengths -> (N,)."""
    crc = np.full(len(lengths), 0xFFFFFFFF, dtype=np.uint32)
    for position, column in enumerate(columns):
        n = int(np.count_nonzero(lengths > position))
        crc[:n] = _TABLE[(crc[:n] ^ column[:n]) & 0xFF] ^ (crc[:n] >> 8)
    crc ^= np.uint32(0xFFFFFFFF)
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def _chain(content: bytes, start: int) -> list[Span]:
    """Records from `start` on, by their lengths; the last one may end behind the file."""
    chain = []
    while len(content) - start >= _HEAD:
        end = start + _HEAD + struct.unpack_from("<Q", content, start)[0] + _TAIL
        chain.append((start, end))
        start = end
    return chain


def _next_head(content: bytes, start: int) -> int:
    """The position of the next length with a correct checksum, or the end."""
    data, step = np.frombuffer(content, dtype=np.uint8), 1 << 16
    for first in range(start, len(data) - _HEAD + 1, step):
        windows = np.lib.stride_tricks.sliding_window_view(data[first : first + step + _HEAD - 1], _HEAD)
        stated = np.ascontiguousarray(windows[:, 8:]).view("<u4")[:, 0]
        found = np.flatnonzero(_masked(windows[:, :8].T, np.full(len(windows), 8)) == stated)
        if len(found):
            return first + int(found[0])
    return len(data)
