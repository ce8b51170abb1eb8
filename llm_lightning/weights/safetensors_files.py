"""Files of safetensors: which of a folder hold its weights, and their tensors, read when they are asked for.

Pickled weights (`.bin`, `.pt`, `.pth`) can run code and are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from llm_lightning.weights.export_folder import read_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLED = (".bin", ".pt", ".pth", ".h5", ".msgpack")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MOST_HEADER = 1 << 24  # bytes; GPT-2 xl has about 60,000


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: the one, or the shards in its index.

    Raises:
        FileNotFoundError: if there are none, or a shard is missing.
        ValueError: if the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has {without_weights(file.name for file in folder.iterdir())}")
    names = shards_in(index)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{index} lists {missing[0]}, which does not exist; get it as well")
    return [folder / name for name in names]


def without_weights(names: Iterable[str]) -> str:
    """What to say of files without weights that are read."""
    names = list(names)
    others = sorted((name for name in names if name.endswith(PICKLED)), key=lambda name: (name.count("/"), name))
    if others:
        return f"no {WEIGHTS}; {others[0]} is not read, because pickled weights can run code; save it as safetensors"
    of_llama_cpp = sorted(name for name in names if name.endswith(".gguf"))
    return f"no {WEIGHTS}" + (f"; give {of_llama_cpp[0]} itself, as a file" if of_llama_cpp else "")


def shards_in(index: Path) -> list[str]:
    """The names of the files that an index lists, all of its own folder."""
    shards = read_json(index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name files of this folder; get it again")
    return names


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name: each is read into memory of its own at every access.

    The headers are read and compared with the lengths of the files at once, before memory is allocated. The library
    checks them; the tensors are read here, because it maps the whole file, whose pages count in addition to the copies.

    Raises:
        ValueError: if one is not a safetensors file, or damaged, or a tensor is in two of them.
        OSError: if one cannot be read.
    """

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for path in files:
            for name, entry in _entries(path).items():
                if name in self._entries:
                    raise ValueError(f"{path} holds {name}, and so does {self._entries[name].path}; get them again")
                self._entries[name] = entry

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        with entry.path.open("rb") as file:
            return entry.read(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one file; see `StoredTensors`."""
    return dict(StoredTensors([path]))


class _Entry(NamedTuple):
    """Where a tensor is."""

    path: Path
    start: int
    n_bytes: int
    dtype: torch.dtype
    shape: list[int]

    def read(self, file: BinaryIO) -> Tensor:
        content = torch.empty(self.n_bytes, dtype=torch.uint8)
        file.seek(self.start)
        buffer: Any = content.numpy()
        if self.n_bytes and file.readinto(buffer) != self.n_bytes:  # type: ignore[attr-defined]
            raise ValueError(f"{self.path} ends inside a tensor; get it again")
        return content.view(self.dtype).view(self.shape)


def _entries(path: Path) -> dict[str, _Entry]:
    """The tensors that the header of a file lists, after the library has checked them."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; pickled weights (.bin, .pt, .pth) can run code and are never read: "
            "load them where you trust them, and save them with safetensors"
        )
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    rest = path.stat().st_size - 8
    if not 0 < header <= min(rest, _MOST_HEADER):
        raise ValueError(
            f"{path} is not a complete safetensors file: it states a header of {header} bytes; get it again"
        )
    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            file.seek(8)
            facts = json.loads(file.read(header))
        facts.pop("__metadata__", None)
    except OSError:
        raise
    except Exception as error:  # the library raises many types for a damaged file
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); get it again") from error
    return {name: _entry(path, name, 8 + header, **fact) for name, fact in facts.items()}


def _entry(path: Path, name: str, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> _Entry:
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} is of type {dtype}; quantised weights are read from GGUF files alone")
    return _Entry(path, start + data_offsets[0], data_offsets[1] - data_offsets[0], _DTYPES[dtype], shape)
