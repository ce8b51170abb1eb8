"""A tokenizer as the metadata of a GGUF file, in and out: byte-level BPE cut in one of four known ways.

In: the keys `tokenizer.ggml.*` become the text of a tokenizer.json, so that one class encodes all of them. Out: the
same keys from any byte-level BPE here. What llama.cpp would read as another text is refused by name.

llama.cpp differs from our `encode` in two points: it finds added tokens that are not special in every text, and it
knows no normalizer, so that Qwen's tokenizer.json alone composes accents (NFC).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer
from llm_lightning.tokenizers.json_content import MOST_IDS, read_content
from llm_lightning.tokenizers.splitting import KNOWN, pre_tokenizer_of
from llm_lightning.tokenizers.tiktoken_encodings import TiktokenTokenizer, byte_of_character, gpt2_merges
from llm_lightning.tokenizers.tokenizer_json import END_OF_DOCUMENT, JsonTokenizer, is_gpt2

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_WHOLE_WORDS_FIRST = "llama-bpe"
"""With this cut, a piece that is a token is not merged: `ignore_merges` in tokenizer.json."""
_ENDS = (*END_OF_DOCUMENT, "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
"""llama.cpp stops at control tokens of these names, whatever the keys say."""


# -- in ------------------------------------------------------------------------------------------------------


def description_from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the tokenizer of a GGUF file by its metadata: each key with its Python value.

    Raises:
        ValueError: if the vocabulary is of a kind whose cut is not known here, or damaged.
    """
    _check_kind(metadata)
    tokens, types, merges = _vocabulary(metadata)
    text = _tokenizer_json(metadata, tokens, types, merges)
    if metadata[f"{PREFIX}pre"] == "gpt-2" and is_gpt2(read_content(text)):
        return {"name": "gpt2"}
    ids = {key: _role(metadata, key, tokens, types) for key in ("bos", "eos", "eot", "eom", "padding", "unknown")}
    ends = [tokens.index(word) for word in _ENDS if word in tokens and types[tokens.index(word)] == CONTROL]
    documents = [index for index in ends if tokens[index] in END_OF_DOCUMENT]
    stops = [index for index in (ids["eos"], ids["eot"], ids["eom"], *ends) if index is not None]
    named = {"bos_token": ids["bos"], "eos_token": ids["eos"], "pad_token": ids["padding"], "unk_token": ids["unknown"]}
    tokenizer = JsonTokenizer(
        text,
        bos_id=ids["bos"] if _adds_bos(metadata) else None,
        eot_id=next(iter([*documents, *stops]), None),
        stop_ids=stops,
        special_tokens={key: tokens[index] for key, index in named.items() if index is not None},
    )
    return tokenizer.describe()


def _check_kind(metadata: Mapping[str, Any]) -> None:
    model, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre")
    if model != "gpt2":
        raise ValueError(
            f"{PREFIX}model={model!r} is not implemented; only gpt2 is, a byte-level BPE (llama is Llama 2's "
            "SentencePiece: take the model's folder of safetensors and tokenizer.json instead)"
        )
    if pre not in KNOWN:
        raise ValueError(
            f"{PREFIX}pre={pre!r} is not implemented; known are {', '.join(KNOWN)}. Another cut would give other ids: "
            "take the model's folder of safetensors and tokenizer.json instead"
        )


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types, and merges, checked."""
    tokens = _list_of(str, metadata, "tokens")
    types = _list_of(int, metadata, "token_type") if f"{PREFIX}token_type" in metadata else [NORMAL] * len(tokens)
    if not 0 < len(tokens) <= MOST_IDS or len(types) != len(tokens):
        raise ValueError(f"{PREFIX}tokens has {len(tokens)} entries, token_type {len(types)}; get the file again")
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    if len(set(used)) < len(used):
        raise ValueError(f"{PREFIX}tokens has a token twice; get the file again")
    if unknown := sorted(set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}):
        raise ValueError(f"{PREFIX}token_type has the type {unknown[0]}, which a byte-level BPE does not have")
    return tokens, types, _list_of(str, metadata, "merges")


def _list_of(kind: type, metadata: Mapping[str, Any], key: str) -> list[Any]:
    values = metadata.get(PREFIX + key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"{PREFIX}{key} must be a list of {kind.__name__}; get the file again")
    return values


def _tokenizer_json(metadata: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[str]) -> str:
    """The text of a tokenizer.json that encodes as llama.cpp does with this vocabulary."""
    pre = metadata[f"{PREFIX}pre"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": tokens[index], **flags, "special": kind != USER_DEFINED}
        for index, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": pre == _WHOLE_WORDS_FIRST,
        "vocab": {tokens[index]: index for index, kind in enumerate(types) if kind != UNUSED},
        "merges": merges,
    }  # fmt: skip
    bos_id = _role(metadata, "bos", tokens, types) if _adds_bos(metadata) else None
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_of(pre),
        "post_processor": None if bos_id is None else _begin_with(tokens[bos_id], bos_id),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get(f"{PREFIX}add_bos_token", metadata[f"{PREFIX}pre"] == "llama-bpe"))


def _begin_with(token: str, index: int) -> dict[str, Any]:
    """A post-processor by which transformers begins each text with this token."""
    begin, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _role(metadata: Mapping[str, Any], role: str, tokens: list[str], types: list[int]) -> int | None:
    """The id of a role such as eos, or None."""
    key = f"{PREFIX}{role}_token_id"
    index = metadata.get(key)
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens) or types[index] == UNUSED:
        raise ValueError(f"{key}={index!r} is no token of the {len(tokens)} in {PREFIX}tokens; get the file again")
    return index


# -- out -----------------------------------------------------------------------------------------------------


def vocabulary_to_gguf(tokenizer: Tokenizer, n_rows: int) -> dict[str, Any]:
    """Return the metadata `tokenizer.ggml.*` for a model with `n_rows` rows of embeddings.

    Lists are lists of str or int; ids are int, flags bool.

    Raises:
        ValueError: if llama.cpp cannot encode as this tokenizer does, or a token has no row.
    """
    if tokenizer.vocab_size > n_rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {n_rows} rows of embeddings")
    pre, merges = _cut_and_merges(tokenizer)
    named, types = _tokens(tokenizer)
    tokens = [named.get(index, f"[PAD{index}]") for index in range(n_rows)]
    if len(set(tokens)) < n_rows:
        raise ValueError("the tokenizer has a token named like a row without a token, such as [PAD5]; rename it")
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [types.get(index, UNUSED) for index in range(n_rows)],
        "merges": merges,
        "add_bos_token": tokenizer.bos_id is not None,
        **_roles(tokenizer),
    }
    return {PREFIX + key: value for key, value in metadata.items()}


def _cut_and_merges(tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """The name of the cut, and the merges "a b" by rank."""
    if isinstance(tokenizer, JsonTokenizer):
        return _cut_of_json(tokenizer), [" ".join(pair) for pair in tokenizer.content.merges]
    description = tokenizer.describe()
    if description["name"] == "gpt2":
        return "gpt-2", gpt2_merges()
    if description["name"] == "bpe":
        return "gpt-2", description["merges"]
    raise ValueError(
        f"GGUF has no form for tokenizer={description['name']}; it has one for gpt2, bpe and a model's tokenizer.json"
    )


def _cut_of_json(tokenizer: JsonTokenizer) -> str:
    content = tokenizer.content
    if not content.byte_level:
        raise ValueError(
            "GGUF has no form for Llama 2's tokenizer.json: it needs the scores of the SentencePiece model; export a "
            "folder (HF) instead"
        )
    if content.pre is None:
        raise ValueError(
            f"GGUF has no name for the way in which this tokenizer.json cuts texts; known are {', '.join(KNOWN)}: "
            "export a folder (HF) instead"
        )
    if bool(content.data["model"].get("ignore_merges")) != (content.pre == _WHOLE_WORDS_FIRST):
        raise ValueError(
            f"llama.cpp sets ignore_merges={content.pre == _WHOLE_WORDS_FIRST} for pre={content.pre}, this "
            "tokenizer.json the reverse: export a folder (HF) instead"
        )
    return content.pre


def _tokens(tokenizer: Tokenizer) -> tuple[dict[int, str], dict[int, int]]:
    """Spelling and type of each id that has a token."""
    if isinstance(tokenizer, JsonTokenizer):
        named = {index: token for index, token in enumerate(tokenizer.content.spellings()) if token is not None}
        special = {tokenizer.controls[token] for token in tokenizer.content.special}
    else:
        named = _tokens_of_tiktoken(tokenizer)
        special = set(tokenizer.controls.values())
    types = dict.fromkeys(named, NORMAL)
    types |= {index: CONTROL if index in special else USER_DEFINED for index in tokenizer.controls.values()}
    return named, types


def _tokens_of_tiktoken(tokenizer: Tokenizer) -> dict[int, str]:
    assert isinstance(tokenizer, TiktokenTokenizer)
    character_of = {byte: character for character, byte in byte_of_character().items()}
    spelled = {
        index: "".join(character_of[byte] for byte in tokenizer.token_bytes(index))
        for index in range(tokenizer.vocab_size)
    }
    return spelled | {index: word for word, index in tokenizer.controls.items()}


def _roles(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of begin, end, end of turn and padding, as far as they exist."""
    if isinstance(tokenizer, JsonTokenizer):
        ids = tokenizer.content.tokens | tokenizer.content.added
        named = {key: ids[word] for key, word in tokenizer.special_tokens.items() if word in ids}
    else:
        named = dict.fromkeys(("bos_token", "eos_token"), tokenizer.controls[END_OF_TEXT])
    eos = named.get("eos_token", next(iter(tokenizer.stop_ids), None))
    roles = {
        "bos_token_id": named.get("bos_token") if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_token_id": eos,
        "eot_token_id": next((index for index in tokenizer.stop_ids if index != eos), None),
        "padding_token_id": named.get("pad_token"),
        "unknown_token_id": named.get("unk_token"),
    }
    return {key: index for key, index in roles.items() if index is not None}
