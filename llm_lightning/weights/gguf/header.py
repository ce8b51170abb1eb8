"""The header of a GGUF file: metadata, and where each tensor lies. Every length is compared with the file before use.

A file is: magic, version, numbers of tensors and of keys; the keys with their values; the tensors' names, shapes, types
and offsets; padding; the data. Llama.cpp's `docs/gguf.md` specifies it. The reader of the package `gguf` trusts the
header, and needs seconds for the vocabulary.
"""

from __future__ import annotations

import os
import reprlib
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llm_lightning.weights.gguf.package import gguf_package

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # the same layout
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # llama.cpp's GGML_MAX_DIMS
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes: with an empty name, and without dimensions


_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = _QUOTED.maxlong = 80


class StoredTensor(NamedTuple):
    """Where a tensor lies in the file."""

    kind: str
    """The name of its type, such as `F32` or `Q4_1`."""
    shape: tuple[int, ...]
    """As in PyTorch: rows first, (out, in) for a linear layer."""
    start: int
    """Byte of the file."""
    n_bytes: int


class Header(NamedTuple):
    metadata: dict[str, Any]
    """Numbers, texts, booleans, and lists of one of them."""
    tensors: dict[str, StoredTensor]


def shown(value: Any) -> str:
    """A value of a file as a message quotes it: a few words of it at most."""
    return f"a list of {len(value)}" if isinstance(value, list) else _QUOTED.repr(value)


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        ValueError: if it is not one, or damaged; names the file and the place.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        try:
            return _header(_Cursor(file))
        except ValueError as error:
            raise ValueError(f"{path} is damaged, or not a GGUF file: {error}; get it again") from None


class _Cursor:
    """Reads values from a file in turn, none beyond its end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def take(self, n: int, what: str) -> bytes:
        """The next `n` bytes."""
        self.require(n, 1, what)
        self.at += n
        content = self.file.read(n)
        if len(content) != n:
            raise ValueError(f"it ends inside {what}")
        return content

    def require(self, n: int, least: int, what: str) -> None:
        """Refuse a count of items, of at least so many bytes each, for which the rest of the file has no room."""
        if n * least > self.size - self.at:
            raise ValueError(f"{what} needs {n * least:,} bytes, and {self.size - self.at:,} are left")

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def text(self, what: str) -> str:
        content = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        """A value of a key: a number, a text or a list."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise ValueError(f"{what} has the unknown type {kind}")
        kind, n = self.number("I", what), self.number("Q", f"the length of {what}")
        if kind == _STRING:
            self.require(n, 8, what)
            return [self.text(what) for _ in range(n)]
        if kind not in _SCALARS:
            raise ValueError(f"{what} is a list of the unknown type {kind}")
        content = self.items(n, struct.calcsize(_SCALARS[kind]), what)
        return list(struct.unpack(f"<{n}{_SCALARS[kind]}", content))

    def items(self, n: int, size: int, what: str) -> bytes:
        """The next `n` items of `size` bytes."""
        self.require(n, size, what)
        return self.take(n * size, what)


def _header(cursor: _Cursor) -> Header:
    if (magic := cursor.take(4, "the magic number")) != _MAGIC:
        raise ValueError(f"it begins with {magic!r}, not with {_MAGIC!r}")
    version = cursor.number("I", "the version")
    if version.to_bytes(4, "big")[0] and not version & 0xFFFF:
        raise ValueError("its numbers are big-endian; only little-endian files are read")
    if version not in _VERSIONS:
        raise ValueError(f"it has version {version}; versions {' and '.join(map(str, _VERSIONS))} are read")
    n_tensors, n_keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    cursor.require(n_keys, _LEAST_KEY, f"metadata of {n_keys:,} keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text("the name of a key")
        if key in metadata:
            raise ValueError(f"it has the key {shown(key)} twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {shown(key)}"), shown(key))
    cursor.require(n_tensors, _LEAST_TENSOR, f"a list of {n_tensors:,} tensors")
    found = [_tensor(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={shown(alignment)} must be a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in found:
        if name in tensors:
            raise ValueError(f"it has the tensor {shown(name)} twice")
        if tensor.start % alignment:
            raise ValueError(f"the offset {tensor.start} of {shown(name)} is not a multiple of {alignment}")
        tensors[name] = tensor._replace(start=start + tensor.start)
    _check_places(tensors, cursor.size)
    return Header(metadata, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, StoredTensor]:
    """A tensor's name and place; its start is still relative to the data."""
    name = cursor.text("the name of a tensor")
    n_dimensions = cursor.number("I", f"the dimensions of {shown(name)}")
    if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{shown(name)} has {n_dimensions} dimensions; there are 1 to {_MOST_DIMENSIONS}")
    shape = tuple(cursor.number("Q", f"the shape of {shown(name)}") for _ in range(n_dimensions))[::-1]
    if 0 in shape:
        raise ValueError(f"{shown(name)} has the shape {shape}, which holds nothing")
    kind, n_bytes = _size(name, shape, cursor.number("I", f"the type of {shown(name)}"))
    return name, StoredTensor(kind, shape, cursor.number("Q", f"the offset of {shown(name)}"), n_bytes)


def _size(name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """The name of a tensor's type, and its bytes: types store blocks of values in so many bytes each."""
    constants = gguf_package().constants
    try:
        known = constants.GGMLQuantizationType(kind)
        per_block, block_bytes = constants.GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise ValueError(f"{shown(name)} has the unknown type {kind}") from None
    if shape[-1] % per_block:
        raise ValueError(f"{shown(name)} of type {known.name} has rows of {shape[-1]} values, not of whole {per_block}")
    return known.name, prod(shape) // per_block * block_bytes


def _check_places(tensors: dict[str, StoredTensor], size: int) -> None:
    """Refuse tensors beyond the end of the file, or over each other: read out, they would exceed the file."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ValueError(f"the tensors {shown(before)} and {shown(name)} overlap")
        end, before = tensor.start + tensor.n_bytes, name
        if end > size:
            raise ValueError(f"{shown(name)} ends at byte {end:,}, and the file has {size:,}")
