"""Write a GGUF file, tensor by tensor: one converted tensor is in memory at a time, beside the model.

`layout.py` says which architecture a model is, and names its tensors; `exporting.py` publishes and checks the file.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.models.gpt import GPTConfig
from llm_lightning.weights.gguf.layout import (
    ROPE_FACTORS,
    Part,
    architecture_of,
    keys_of,
    pairs_from_halves,
    parts,
)
from llm_lightning.weights.gguf.package import gguf_package
from llm_lightning.weights.gguf.rope_factors import factors_of

_BLOCK = 32
"""Values of a row that share a scale in q8_0."""


class Kind(NamedTuple):
    """A type of the matrices; norms, biases and positions are float32 always, as llama.cpp's converter has them."""

    ggml: str
    file_type: int
    """Llama.cpp's number for a file with mostly this type."""
    convert: Callable[[Tensor], np.ndarray]
    """float32 (rows, columns) -> what is written, one row of bytes or numbers for each."""


def _q8_0(matrix: Tensor) -> np.ndarray:
    gguf = gguf_package()
    converted: np.ndarray = gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q8_0)
    return converted


KINDS = {
    "f32": Kind("F32", 0, lambda matrix: matrix.numpy()),
    "f16": Kind("F16", 1, lambda matrix: matrix.half().numpy()),
    "bf16": Kind("BF16", 32, lambda matrix: matrix.bfloat16().view(torch.int16).numpy()),
    "q8_0": Kind("Q8_0", 7, _q8_0),
}


def write_gguf(
    path: Path, state: Mapping[str, Tensor], config: GPTConfig, metadata: Mapping[str, Any], *, dtype: str
) -> None:
    """Write a model, its adapters merged, with our names, in any floating type.

    Args:
        metadata: keys beside those of the architecture: `general.*`, the tokenizer's. A whole number becomes uint32,
            another number float32; lists hold texts, or numbers, which become int32 or float32.
        dtype: of `KINDS`.

    Raises:
        ValueError: if no architecture fits the config, the dtype does not fit its sizes, or a value is not finite in
            it.
        OSError: if the file cannot be written; names the path, the bytes needed and the bytes free.
    """
    gguf = gguf_package()
    architecture = architecture_of(config)
    places = list(parts(config, architecture))
    check_sizes(places, dtype)
    writer = gguf.GGUFWriter(path, architecture)
    keys = {"general.file_type": KINDS[dtype].file_type, "general.quantization_version": gguf.GGML_QUANT_VERSION}
    for key, value in {**keys, **keys_of(config, architecture), **metadata}.items():
        _add(writer, key, value)
    contents = _Contents(config, state, dtype)
    for name, shape, kind in contents.infos(places):
        number = gguf.GGMLQuantizationType[kind]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[number]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // per_block * block_bytes, number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in contents.arrays(places):
            writer.write_tensor_data(content)
    except OSError as error:
        needed = sum(prod(place.shape) for place in places) * 4
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror or error} (up to {needed:,} bytes needed, {free:,} free)"
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        writer.close()


def check_sizes(places: list[Part], dtype: str) -> None:
    """Refuse a type whose blocks do not fit the rows.

    Raises:
        ValueError: names the tensor.
    """
    if dtype not in KINDS:
        raise ValueError(f"dtype={dtype!r} must be {', '.join(KINDS)}")
    for place in places:
        if dtype == "q8_0" and _is_converted(place) and place.shape[-1] % _BLOCK:
            raise ValueError(
                f"q8_0 stores rows in blocks of {_BLOCK}, and {place.parameter} has rows of {place.shape[-1]}; "
                "choose f16, bf16 or f32"
            )


def _is_converted(place: Part) -> bool:
    return len(place.shape) > 1 and not place.parameter.startswith("position_embedding")


class _Contents:
    """The tensors of the file in their order: first what they are, then what they hold."""

    def __init__(self, config: GPTConfig, state: Mapping[str, Tensor], dtype: str) -> None:
        self.state, self.dtype = state, dtype
        self.factors = None
        if config.rope_scaling is not None:
            self.factors = factors_of(config.head_width, config.rope_theta, config.rope_scaling)

    def infos(self, places: list[Part]) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and type."""
        for place in places:
            yield place.name, place.shape, KINDS[self.dtype if _is_converted(place) else "f32"].ggml
        if self.factors is not None:
            yield ROPE_FACTORS, tuple(self.factors.shape), "F32"

    def arrays(self, places: list[Part]) -> Iterator[np.ndarray]:
        for place in places:
            yield self._array(place)
        if self.factors is not None:
            yield self.factors.numpy()

    def _array(self, place: Part) -> np.ndarray:
        if place.parameter not in self.state:  # a bias that GPT-2's files must have
            return np.zeros(place.shape, dtype=np.float32)
        rows = self.state[place.parameter][place.rows].detach().float().cpu()
        if place.heads_in_pairs:
            rows = pairs_from_halves(rows, place.heads_in_pairs)
        converted = rows.half() if self.dtype == "f16" and _is_converted(place) else rows
        if not torch.stack(converted.aminmax()).isfinite().all():  # NaN is both minimum and maximum
            raise ValueError(f"{place.parameter} has values that are not finite in {self.dtype}; choose bf16 or f32")
        return KINDS[self.dtype if _is_converted(place) else "f32"].convert(rows.contiguous())


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
