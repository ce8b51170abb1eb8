"""A folder of weights as transformers writes it, or one file of safetensors: config, tensors, and what is beside them.

The family of `config.json` converts names and layouts (`families/`). Tensors are read one by one, so that the file's
and ours are never in memory together. `hf_export.py` writes such folders.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lightning.malloc import trim_malloc
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.tokenizers.build import from_description
from llm_lightning.weights import chat_templates, folder_tokenizer, generation_config
from llm_lightning.weights.chat_templates import read_chat_template
from llm_lightning.weights.contents import Pretrained
from llm_lightning.weights.export_folder import NOTE, Stated, read_json
from llm_lightning.weights.families.choose import family_of, family_of_json
from llm_lightning.weights.families.gpt2 import infer_config
from llm_lightning.weights.folder_tokenizer import tokenizer_of
from llm_lightning.weights.generation_config import read_generation
from llm_lightning.weights.safetensors_files import StoredTensors, weight_files

log = logging.getLogger(__name__)

CONFIG = "config.json"


def load_folder(path: Path, digests: Mapping[str, str] | None = None) -> Pretrained:
    """Load a folder, or one `.safetensors` file with what is beside it.

    Without a `config.json`, weights are taken for a GPT-2 with heads of width 64.

    Args:
        digests: the sha256 of files by their names, as far as they are known already.

    Raises:
        FileNotFoundError: if there are no weights, or a shard is missing.
        ValueError: if a file is damaged, or of a model that we do not implement.
    """
    files = [path] if path.is_file() else weight_files(path)
    folder = path if path.is_dir() else path.parent
    stated, known = Stated(folder), digests or {}
    of_files = [known.get(file.name) or stated.digest_of(file) for file in files]
    for name in {CONFIG, generation_config.FILE, *folder_tokenizer.FILES, *chat_templates.FILES}:
        if (folder / name).is_file():
            stated.digest_of(folder / name)
    with naming(path):
        stored = StoredTensors(files)
        config_json = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
        config = _inferred(stored, folder) if config_json is None else config_of(config_json)
    generation = read_generation(folder, config_json or {}, config.vocab_size)
    tokenizer = tokenizer_of(folder, config, generation.get("eos_token_id", ()))
    if tokenizer is not None:
        from_description(tokenizer)  # before the weights are read: building it needs memory, most of it for a moment
        trim_malloc()
    with naming(path):
        state = convert(stored, config)
        _refuse_non_finite(state)
    digest = of_files[0] if len(files) == 1 else hashlib.sha256("\n".join(of_files).encode()).hexdigest()
    info = info_of(str(path), digest, state)
    return Pretrained(config, state, tokenizer, info, template_of(folder), generation or None)


def template_of(folder: Path) -> dict[str, Any] | None:
    """The description of a folder's template: ours if we wrote the folder, else that of its chat template."""
    own = read_json(folder / NOTE).get("template") if (folder / NOTE).is_file() else None
    return own if isinstance(own, dict) else read_chat_template(folder)


def config_of(config_json: Mapping[str, Any]) -> GPTConfig:
    """The architecture that a `config.json` describes.

    Raises:
        ValueError: if it is of a family or a kind that we do not implement.
    """
    return family_of_json(config_json).config_from_hf(config_json)


def convert(stored: StoredTensors, config: GPTConfig) -> dict[str, Tensor]:
    """The tensors of files by our names, contiguous, each read once; a tied head is the token embedding itself."""
    state = family_of(config).from_hf(stored, config)
    names = list(state)
    if config.tied_head:
        state.pop("lm_head.weight")
    owned = {name: state.pop(name).contiguous() for name in list(state)}  # one by one: a transposed one is copied
    return {name: owned.get(name, owned["token_embedding.weight"]) for name in names}


def info_of(source: str, digest: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    dtype = str(state["token_embedding.weight"].dtype).removeprefix("torch.")
    return {"source": source, "digest": digest, "dtype": dtype}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefix an error message with the path of the file."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from None


def _inferred(stored: StoredTensors, folder: Path) -> GPTConfig:
    config = infer_config(stored)
    log.info("no config.json in %s: n_head=%d, because GPT-2's heads are 64 wide", folder, config.n_head)
    return config


def _refuse_non_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both minimum and maximum
            raise ValueError(f"{name} has values that are not finite; get it again, or export an earlier checkpoint")
