"""Read a GGUF file, llama.cpp's format: header -> config and tokenizer, then the tensors one by one, dequantised.

`header.py` reads and checks the header, `layout.py` knows the names, `checking.py` compares with llama.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_lightning.files.atomic import sha256_of
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tokenizers.gguf_vocabulary import PREFIX, description_from_gguf
from llm_lightning.weights.chat_templates import describe_chat_template
from llm_lightning.weights.contents import Pretrained
from llm_lightning.weights.gguf.header import Header, StoredTensor, read_header, shown
from llm_lightning.weights.gguf.layout import (
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    Part,
    architecture_in,
    config_from,
    halves_from_pairs,
    parts,
)
from llm_lightning.weights.gguf.package import gguf_package
from llm_lightning.weights.gguf.rope_factors import scaling_of

_IDS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}
"""Names in a `generation_config.json` -> keys."""


def read_gguf(path: str | Path) -> Pretrained:
    """Read a model of one of `layout.ARCHITECTURES`; every type that the package `gguf` dequantises becomes float32.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the file is damaged or of another architecture, or the package `gguf` is missing.
    """
    path = Path(path)
    header = read_header(path)
    try:
        tokenizer = description_from_gguf(header.metadata)
        with path.open("rb") as file:
            config = _config(file, header)
            state = dict(_state(file, _places(header, config)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config.tied_head:
        state["lm_head.weight"] = state["token_embedding.weight"]
    kinds = Counter(stored.kind for stored in header.tensors.values() if len(stored.shape) > 1)
    kind = kinds.most_common(1)[0][0]
    info = {"source": str(path), "digest": sha256_of(path), "dtype": "float32", "kind": kind}
    template = _template(header.metadata, tokenizer)
    return Pretrained(config, state, tokenizer, info, template, _generation(header.metadata, tokenizer))


# --- the model -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A tensor of the model, and where it is in the file."""

    part: Part
    stored: StoredTensor


def _config(file: BinaryIO, header: Header) -> GPTConfig:
    if (n := header.metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"it is one of {shown(n)} files of a model; merge them with llama-gguf-split --merge")
    architecture = architecture_in(header.metadata)
    if EMBEDDING not in header.tensors:
        raise ValueError(f"the tensor {EMBEDDING!r} is missing")
    shape = header.tensors[EMBEDDING].shape
    config = config_from(header.metadata, shape, tied_head=HEAD not in header.tensors)
    if architecture != "llama" or ROPE_FACTORS not in header.tensors:
        return config
    factors = _read(file, ROPE_FACTORS, header.tensors[ROPE_FACTORS])
    return replace(config, rope_scaling=scaling_of(factors, config.head_width, config.rope_theta))


def _places(header: Header, config: GPTConfig) -> list[_Place]:
    """All tensors of the model, after comparing names, shapes and types.

    Raises:
        ValueError: if one is missing, unknown, of another shape, or of a type that is not dequantised.
    """
    architecture, left, places = architecture_in(header.metadata), dict(header.tensors), []
    for part in parts(config, architecture):
        stored = left.pop(part.name, None)
        if stored is None:
            raise ValueError(f"the tensor {part.name!r} is missing, which {architecture} needs")
        if stored.shape != part.shape:
            raise ValueError(f"the tensor {part.name!r} has the shape {stored.shape}, by its keys it is {part.shape}")
        places.append(_Place(part, stored))
    if config.rope_scaling is not None or architecture == "llama":
        left.pop(ROPE_FACTORS, None)
    if left:
        raise ValueError(f"the tensor {shown(next(iter(left)))} has no place in {architecture}")
    for kind in {place.stored.kind for place in places}:
        _refuse_unreadable(kind)
    return places


def _refuse_unreadable(kind: str) -> None:
    """Try a type on one block of zeros."""
    gguf = gguf_package()
    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8), number)
    except NotImplementedError:
        raise ValueError(f"its tensors have the type {kind}, which the package gguf does not dequantise") from None


def _state(file: BinaryIO, places: list[_Place]) -> Iterator[tuple[str, Tensor]]:
    """The parameters, float32, one after another; queries, keys and values are joined."""
    for parameter, group in groupby(places, key=lambda place: place.part.parameter):
        rows = [_rows(file, place) for place in group]
        yield parameter, rows[0] if len(rows) == 1 else torch.cat(rows)


def _rows(file: BinaryIO, place: _Place) -> Tensor:
    rows, heads = _read(file, place.part.name, place.stored), place.part.heads_in_pairs
    return halves_from_pairs(rows, heads) if heads else rows


def _read(file: BinaryIO, name: str, stored: StoredTensor) -> Tensor:
    """Read and dequantise one tensor."""
    gguf = gguf_package()
    file.seek(stored.start)
    content = np.fromfile(file, dtype=np.uint8, count=stored.n_bytes)
    if content.size != stored.n_bytes:
        raise ValueError(f"it ends inside {name!r}; get it again")
    n_rows = torch.Size(stored.shape[:-1]).numel()
    values = gguf.dequantize(content.reshape(n_rows, -1), gguf.GGMLQuantizationType[stored.kind])
    tensor = torch.from_numpy(values).view(stored.shape)
    if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both minimum and maximum
        raise ValueError(f"{name!r} has values that are not finite; get it again")
    return tensor


# --- beside the model ----------------------------------------------------------------------------------------------


def _template(metadata: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The description of the model's own template."""
    text = metadata.get("tokenizer.chat_template")
    if not isinstance(text, str) or not text:
        return None
    return describe_chat_template(text, tokenizer.get("special_tokens", {}))


def _generation(metadata: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Ids as in a `generation_config.json`."""
    ids = {name: metadata.get(f"{PREFIX}{key}") for name, key in _IDS.items()}
    known = {name: index for name, index in ids.items() if index is not None}
    eos_id = metadata.get(f"{PREFIX}eos_token_id")
    stop_ids = tokenizer.get("stop_ids", [] if eos_id is None else [eos_id])  # the description of gpt2 has none
    return {"eos_token_id": list(stop_ids), **known}
