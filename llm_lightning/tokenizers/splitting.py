"""How a byte-level BPE cuts a text before it merges bytes: the four ways that GGUF files and this project know by name.

A tokenizer.json describes its cut as a `pre_tokenizer`, llama.cpp has a word for each (`tokenizer.ggml.pre`), and a
wrong one stays silent: the ids are valid, and the model reads them as another text.
"""

from __future__ import annotations

from typing import Any

_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_CONTRACTIONS_OF_LLAMA_CPP = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
"""The same but for the long s, which equals s where case is ignored."""
_DIGITS = {"llama-bpe": "{1,3}", "qwen2": ""}

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = _BYTES | {"use_regex": True}


def pre_tokenizer_of(pre: str) -> dict[str, Any] | None:
    """Return the `pre_tokenizer` of a tokenizer.json that cuts as llama.cpp does; None for an unknown name.

    Args:
        pre: the value of `tokenizer.ggml.pre`: gpt-2, smollm, llama-bpe or qwen2.
    """
    if pre == "gpt-2":
        return _GPT2
    if pre == "smollm":
        return _sequence({"type": "Digits", "individual_digits": True}, _GPT2)
    if pre in _DIGITS:
        return _by_pattern(_CONTRACTIONS_OF_LLAMA_CPP + _REST % _DIGITS[pre])
    return None


def name_of(pre_tokenizer: Any) -> str | None:
    """Return the name of the cut that a tokenizer.json describes, or None if it is none of the four."""
    stated = _essence(pre_tokenizer)
    return next((pre for pre, known in _known() if _essence(known) == stated), None)


KNOWN = ("gpt-2", "smollm", *_DIGITS)


def _known() -> list[tuple[str, dict[str, Any] | None]]:
    theirs = [(pre, _by_pattern(_CONTRACTIONS + _REST % digits)) for pre, digits in _DIGITS.items()]
    return [*((pre, pre_tokenizer_of(pre)) for pre in KNOWN), *theirs]


def _essence(node: Any) -> Any:
    """Without `trim_offsets`, which concerns offsets alone; old files leave out a `use_regex` that is true."""
    if isinstance(node, dict):
        node = {"use_regex": True} | node if node.get("type") == "ByteLevel" else node
        return {key: _essence(value) for key, value in node.items() if key != "trim_offsets"}
    return [_essence(item) for item in node] if isinstance(node, list) else node


def _by_pattern(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(cut, _BYTES)


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}
