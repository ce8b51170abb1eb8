"""The files of a tokenizer and a chat template in transformers' form, beside exported weights and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer
from llm_lightning.tokenizers.tiktoken_encodings import gpt2_merges
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer
from llm_lightning.weights.chat import Chat
from llm_lightning.weights.export_folder import NOTE, write_json, write_text

_KNOWN_THERE = ("gpt2", "bpe", "tokenizer_json")


def is_known_there(tokenizer: Tokenizer) -> bool:
    """Whether transformers has a form for it; `byte`, `word` and the other encodings of tiktoken have none."""
    return tokenizer.describe()["name"] in _KNOWN_THERE


def write_tokenizer(folder: Path, tokenizer: Tokenizer, chat: Chat | None, context_length: int) -> None:
    """Write our own note, from which we rebuild tokenizer and template, and what transformers reads."""
    description = {key: value for key, value in tokenizer.describe().items() if key != "json"}  # tokenizer.json has it
    note: dict[str, Any] = {"format": 1, "tokenizer": description}
    write_json(folder / NOTE, note if chat is None else note | {"template": dict(chat.description)})
    if not is_known_there(tokenizer):
        return
    own = _write_json_tokenizer if isinstance(tokenizer, JsonTokenizer) else _write_gpt2_tokenizer
    settings = own(folder, tokenizer, chat) | {"model_max_length": context_length}
    if chat is not None:
        write_text(folder / "chat_template.jinja", chat.jinja)
        settings["chat_template"] = chat.jinja  # readers before transformers 4.43 know this place only
    write_json(folder / "tokenizer_config.json", settings)


def _write_json_tokenizer(folder: Path, tokenizer: Tokenizer, chat: Chat | None) -> dict[str, Any]:
    """Write tokenizer.json as it came; return what tokenizer_config.json says beside it."""
    assert isinstance(tokenizer, JsonTokenizer)
    write_text(folder / "tokenizer.json", tokenizer.describe()["json"])
    spelling = {index: text for text, index in tokenizer.controls.items()}
    end_id = tokenizer.eot_id if chat is None else chat.end_id
    known = {} if end_id is None or end_id not in spelling else {"eos_token": spelling[end_id]}
    named = known | tokenizer.special_tokens | (dict(chat.tokens) if chat else {})
    write_json(folder / "special_tokens_map.json", named)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}


def _write_gpt2_tokenizer(folder: Path, tokenizer: Tokenizer, chat: Chat | None) -> dict[str, Any]:
    """Write `gpt2` and `bpe`, which share a pattern, in GPT-2's own format."""
    from tokenizers.pre_tokenizers import ByteLevel

    description = tokenizer.describe()
    merges = gpt2_merges() if description["name"] == "gpt2" else description["merges"]
    # Order of ids: the 256 bytes, sorted by the characters that represent them; the merges; the end of text.
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)}, indent=None)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
