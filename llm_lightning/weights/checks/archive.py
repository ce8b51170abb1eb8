"""The archive of a checkpoint before PyTorch reads it, and its values after that."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from llm_lightning.weights.checks.header import HEADER
from llm_lightning.weights.checks.kinds import MOST, is_int, shape_of, word

_DEEPEST = 100  # levels of nesting; the settings of a run have six
_PLAIN = (str, int, float, bool, type(None))
_OTHER = (bytes, set, complex, torch.dtype, torch.device)
"""Other values that a callback may save."""
_ALLOCATES = re.compile(r"(__builtin__|builtins) bytearray|torch[\w.]* \w*Tensor")
"""Names in a pickle that allocate as much as a number beside them says."""


def check_archive(path: Path) -> None:
    """Refuse an archive that could grow in memory: compressed, or with calls that allocate."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise ValueError(f"{short(entry.filename)} in the archive is compressed, a checkpoint's never is")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its archive states more bytes than the file has")
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it is not an archive of PyTorch")
            calls = pickletools.genops(archive.read(pickles[0]))
            names = {str(argument) for opcode, argument, _ in calls if opcode.name == "GLOBAL"}
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"its archive is damaged: {error}") from error
    if wrong := sorted(name for name in names if _ALLOCATES.fullmatch(name)):
        raise ValueError(f"it calls {wrong[0]}, which no checkpoint does")


def check_state(state: Any, n_bytes: int) -> None:
    """Check the types of everything loaded from a checkpoint of `n_bytes`, and its format number."""
    if not isinstance(state, dict) or not isinstance(state.get(HEADER), dict):
        raise ValueError(f"it has no header {HEADER!r}: another program has written it")
    header = state[HEADER]
    _check_forms(header, HEADER, n_bytes, is_header=True)
    _check_forms({key: value for key, value in state.items() if key != HEADER}, "", n_bytes)
    if "format" not in header or not is_int(header["format"], 1):
        raise ValueError(f"{HEADER}.format={short(header.get('format'))} must be a whole number of at least 1")


def _check_forms(value: Any, key: str, n_bytes: int, *, is_header: bool = False) -> None:
    """Allow only plain values and dense real tensors, and no more than a file of `n_bytes` can hold."""
    left = [(value, key, 0)]
    number = 0
    while left:
        value, key, depth = left.pop()
        number += 1 + (len(value) if isinstance(value, (list, tuple)) else 0)
        if number > 2 * n_bytes:  # the same list in many places takes memory only where it is walked through
            raise ValueError(f"{key or 'it'} holds more values than {n_bytes:,} bytes can")
        if depth > _DEEPEST:
            raise ValueError(f"{key[:60]}... is nested more than {_DEEPEST} levels deep")
        if isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(name, str if is_header else (*_PLAIN, tuple)):
                    raise ValueError(f"{key}: the key {short(name)} is not a text")
                left.append((inner, f"{key}.{word(name)}" if key else word(name), depth + 1))
        elif type(value) in (list, tuple):
            if not all(type(inner) is str for inner in value):
                left.extend((inner, f"{key}.{index}", depth + 1) for index, inner in enumerate(value))
        elif isinstance(value, Tensor) and not is_header:
            _check_tensor(value, key)
        elif type(value) is int and is_header and not -MOST <= value < MOST:
            raise ValueError(f"{key} is a whole number of {value.bit_length()} bits")
        elif type(value) not in _PLAIN and (is_header or not isinstance(value, (*_OTHER, torch.Size))):
            raise ValueError(f"{key} is of the type {type(value).__name__}, which a checkpoint does not hold")


def _check_tensor(tensor: Tensor, key: str) -> None:
    """Allow only a plain tensor, of which every element has its own place in the file."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ValueError(f"{key} is a sparse, nested or quantized tensor, which a checkpoint does not hold")
    if tensor.is_meta:
        raise ValueError(f"{key} is a tensor without values (on the meta device)")
    if tensor.is_complex():
        raise ValueError(f"{key} is a tensor of complex numbers, which a checkpoint does not hold")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"{key} states {shape_of(tensor)}, but only {tensor.untyped_storage().nbytes():,} bytes stand")
