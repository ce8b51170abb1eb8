"""Write safetensors files: one, or shards with an index, as transformers names them.

One tensor at a time is cast, made contiguous and written, so that an export needs no second copy of the model. The
format: 8 bytes, the length of a JSON header; the header, filled up with spaces to a multiple of 8; the tensors.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from llm_lightning.weights.export_folder import write_json

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SHARD_BYTES = 5 * 10**9
"""As in transformers 4."""


def write_weights(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write one file.

    Args:
        dtype: of the written tensors; default: their own.

    Raises:
        ValueError: if a value is not finite in `dtype`.
        OSError: if it cannot be written; names the path, the bytes needed and the bytes free.
    """
    try:
        with path.open("wb") as file:
            _write(file, weights, dtype)
    except OSError as error:
        needed = sum(_size(tensor, dtype) for tensor in weights.values())
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror or error} ({needed:,} bytes needed, {free:,} free)"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


def write_shards(
    folder: Path, name: str, weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write `name`, such as model.safetensors; if that exceeds `shard_bytes`, shards and the index `name.index.json`.

    Raises:
        ValueError, OSError: as `write_weights`.
    """
    shards = list(_shards(weights, dtype, shard_bytes))
    if len(shards) == 1:
        write_weights(folder / name, weights, dtype)
        return
    stem, _, suffix = name.rpartition(".")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write_weights(folder / file, {tensor: weights[tensor] for tensor in names}, dtype)
        weight_map |= dict.fromkeys(names, file)
    total = sum(_size(tensor, dtype) for tensor in weights.values())
    write_json(folder / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(weights: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> Iterable[list[str]]:
    """The names in each file: as many in their order as fit, at least one."""
    names: list[str] = []
    left = shard_bytes
    for name, tensor in weights.items():
        size = _size(tensor, dtype)
        if names and size > left:
            yield names
            names, left = [], shard_bytes
        names.append(name)
        left -= size
    yield names


def _write(file: BinaryIO, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in weights.items():
        size = _size(tensor, dtype)
        kind = _DTYPES[dtype or tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in weights.items():
        ready = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if ready.numel() and not torch.stack(ready.aminmax()).isfinite().all():  # NaN is both minimum and maximum
            kind = str(ready.dtype).removeprefix("torch.")
            raise ValueError(f"{name} has values that are not finite in {kind}; export an earlier checkpoint")
        file.write(ready.reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
    os.fsync(file.fileno())


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize
