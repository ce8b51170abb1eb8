"""Export a model as a folder with a GGUF file, for llama.cpp and what builds on it, and a Modelfile for Ollama.

The file is written under a hidden name, checked, and moved into place with the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_lightning.files.atomic import naming
from llm_lightning.models.gpt import GPT
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.gguf_vocabulary import PREFIX, vocabulary_to_gguf
from llm_lightning.weights.chat import Chat
from llm_lightning.weights.export_folder import (
    GGUF,
    REPORT,
    check_target,
    digests_of,
    publishing,
    write_json,
    write_text,
)
from llm_lightning.weights.gguf.checking import TEXT, check_file
from llm_lightning.weights.gguf.layout import architecture_of, parts
from llm_lightning.weights.gguf.modelfile import MODELFILE, modelfile
from llm_lightning.weights.gguf.writing import check_sizes, write_gguf


def export_gguf(
    model: GPT,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: str = "f16",
    chat: Chat | None = None,
    origin: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model.gguf`, `Modelfile` and `export_report.json`; the folder appears once they are complete and checked.

    Args:
        model: its adapters merged.
        dtype: of `writing.KINDS`.
        chat: how the model converses; the end of an answer becomes an end for llama.cpp, too.
        origin: plain texts that say where the weights come from; each becomes a key `llm_lightning.NAME`.
        overwrite: replace an earlier export.

    Returns:
        the content of the report.

    Raises:
        ValueError: if the folder is not empty, GGUF has no form for the model or the tokenizer, the dtype does not fit
            the weights, or the file computes something else.
        OSError: if the folder cannot be written.
    """
    architecture, folder = architecture_of(model.config), Path(folder).resolve()
    check_sizes(list(parts(model.config, architecture)), dtype)
    check_target(folder, overwrite)
    metadata = {
        "general.type": "model",
        "general.name": folder.name,
        **{f"llm_lightning.{key}": value for key, value in (origin or {}).items()},
        **vocabulary_to_gguf(tokenizer, model.config.vocab_size),
    }
    if chat is not None:
        metadata["tokenizer.chat_template"] = chat.jinja
        if chat.end_id not in (None, metadata.get(f"{PREFIX}eos_token_id")):
            metadata[f"{PREFIX}eot_token_id"] = chat.end_id
    with publishing(folder, overwrite=overwrite) as temporary:
        with naming(folder):
            write_gguf(temporary / GGUF, model.state_dict(), model.config, metadata, dtype=dtype)
        prompts = () if chat is None else chat.prompts
        checked = check_file(temporary / GGUF, model, tokenizer.encode(TEXT), dtype, prompts)
        with naming(folder):
            description = None if chat is None else chat.description
            text = modelfile(GGUF, description, _ends(tokenizer, chat), model.config.context_length)
            write_text(temporary / MODELFILE, text)
            report = {"architecture": architecture, "dtype": dtype, "notes": _notes(checked, len(prompts)), **checked}
            write_json(temporary / REPORT, report | {"sha256": digests_of(temporary)})
    return report


def _notes(checked: Mapping[str, Any], n_prompts: int) -> list[str]:
    if not (others := checked["llama_cpp_other_prompts"]):
        return []
    return [
        f"llama.cpp makes other tokens of {others} of {n_prompts} conversations: it runs the chat template otherwise, "
        "or with another date"
    ]


def _ends(tokenizer: Tokenizer, chat: Chat | None) -> list[str]:
    """The spelling of each token at which generation stops, the end of an answer first."""
    spelling = {index: word for word, index in tokenizer.controls.items()}
    ids = [*(() if chat is None else (chat.end_id,)), *tokenizer.stop_ids]
    return [spelling[index] for index in dict.fromkeys(ids) if index in spelling]
