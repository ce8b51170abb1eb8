"""What a tokenizer.json says, checked: its tokens, its added tokens, how it cuts and joins texts.

Two kinds are known. Byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen) writes each byte as a printable character. Llama 2's
BPE writes characters, the space as `▁`, and bytes such as `<0x0A>` for the characters that it lacks.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm_lightning.tokenizers.splitting import name_of

MOST_BYTES = 1 << 26  # Gemma's file has 33 MB
MOST_IDS = 1 << 22  # so that one lying id cannot take all memory
SPACE = "▁"
BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

FLAGS = ("lstrip", "rstrip", "single_word")
"""Of an added token; see `Tokenizer.control_flags`."""
_NO_CHANGE: dict[str, Any] = {"type": "Sequence", "normalizers": []}
_SPACE_INSIDE = re.compile(f"[^{SPACE}]{SPACE}")
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _SPACES]}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
_ADDS_TO_PARTS = ((_PREPENDED, None), (None, _METASPACE | {"prepend_scheme": "always"}))
_ADDS_ELSEWHERE = tuple((None, _METASPACE | {"prepend_scheme": scheme}) for scheme in ("first", "never"))
_UNKNOWN = "\0unknown"  # no byte-level character has the first code point, and no merge yields it
_DECODERS_OF_LLAMA2 = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


@dataclass(frozen=True)
class JsonContent:
    """A tokenizer.json whose text is decoded by `data`; build it with `read_content`."""

    data: dict[str, Any]
    tokens: dict[str, int]
    """The id of each token of the model, as the model spells it; added tokens may be among them."""
    added: dict[str, int]
    """The id of each added token, special or not."""
    special: frozenset[str]
    """The added tokens that the file calls special."""
    flags: dict[str, frozenset[str]]
    """Which of `FLAGS` an added token has, if any."""
    byte_level: bool
    strips_space: bool
    """Decoding drops one space at the beginning, because encoding adds one."""

    @cached_property
    def pre(self) -> str | None:
        """How texts are cut, if `splitting.py` knows it and nothing but NFC changes a text before."""
        known = self.data.get("normalizer") in (None, _NO_CHANGE, {"type": "NFC"})
        return name_of(self.data.get("pre_tokenizer")) if known and self.byte_level else None

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges by rank: "a b" in older files, ["a", "b"] in newer ones."""
        merges = self.data["model"].get("merges")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in _list(merges, "model.merges")]
        if not all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs):
            raise ValueError("model.merges must hold pairs of tokens; get it again")
        return [(left, right) for left, right in pairs]

    def spellings(self) -> list[str | None]:
        """Return the spelling of every id, None for an id without a token."""
        table: list[str | None] = [None] * self.unknown_id
        for token, index in [*self.tokens.items(), *self.added.items()]:
            table[index] = token
        return table

    @cached_property
    def unknown_id(self) -> int:
        """The id behind all others: what `without_added_tokens` yields for bytes that the vocabulary lacks."""
        return 1 + max([*self.tokens.values(), *self.added.values()])

    def without_added_tokens(self, **changes: Any) -> str:
        """Return the text of a tokenizer.json, with changes, that cannot yield an added token, nor anything at random.

        A byte without a token becomes `unknown_id`. Left to itself, the library drops it and joins its neighbours;
        llama.cpp keeps them apart.
        """
        tokens = {token: index for token, index in self.tokens.items() if token not in self.added}
        gone = self.added.keys() & self.tokens.keys()
        merges = [pair for pair in self.merges if not gone or not gone & {*pair, "".join(pair)}]
        tokens[_UNKNOWN] = self.unknown_id
        model = self.data["model"] | {"vocab": tokens, "merges": merges, "dropout": None, "unk_token": _UNKNOWN}
        plain: dict[str, Any] = {
            "added_tokens": [],
            "post_processor": None,
            "decoder": None,
            "truncation": None,
            "padding": None,
        }
        return json.dumps(self.data | plain | {"model": model} | changes)

    def without_first_space(self) -> str | None:
        """Return the text of a tokenizer.json of Llama 2's kind that adds no space; None: how it does is not known."""
        return self.without_added_tokens(normalizer=_SPACES, pre_tokenizer=None) if self._space_is_known else None

    @property
    def spaces_parts(self) -> bool:
        """Whether the space is also added behind each control token, not only before a whole text."""
        return self._changes in _ADDS_TO_PARTS

    @property
    def may_cut_at_spaces(self) -> bool:
        """Whether a text of Llama 2's kind, cut before a space, has the same ids: no token has one behind its first."""
        return self._space_is_known and not any(map(_SPACE_INSIDE.search, self.tokens))

    @property
    def _changes(self) -> tuple[Any, Any]:
        return self.data.get("normalizer"), self.data.get("pre_tokenizer")

    @property
    def _space_is_known(self) -> bool:
        return self._changes in (*_ADDS_TO_PARTS, *_ADDS_ELSEWHERE)

    def first_id(self) -> int | None:
        """Return the id that the post-processor puts before a text, such as Llama's `<|begin_of_text|>`, or None."""
        for processor in _processors(self.data.get("post_processor")):
            if processor.get("type") == "TemplateProcessing":
                try:
                    ids = _before_text(processor)
                except (LookupError, StopIteration, TypeError, ValueError):
                    raise ValueError("post_processor has no readable template; get it again") from None
                if len(ids) > 1:
                    raise ValueError(f"the post_processor begins a text with {len(ids)} tokens; one is implemented")
                return ids[0] if ids else None
        return None


def read_content(text: str) -> JsonContent:
    """Parse and check the text of a tokenizer.json.

    Raises:
        ValueError: if it is damaged, too large, or of a kind that is not implemented.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text)} characters are more than a tokenizer.json has (at most {MOST_BYTES})")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error}); get it again") from None
    model = data.get("model") if isinstance(data, dict) else None
    if not isinstance(model, dict):
        raise ValueError("it has no model; get it again")
    _check_model(model)
    tokens = _ids(model.get("vocab"), "model.vocab")
    entries = [_added_token(entry) for entry in _list(data.get("added_tokens") or [], "added_tokens")]
    added = _ids({content: index for content, index, _ in entries}, "added_tokens")
    named = ((content, frozenset(flags & {*FLAGS})) for content, _, flags in entries)
    if len(added) < len(entries):
        raise ValueError("added_tokens has a token twice; get it again")
    _check_together(tokens, added)
    special = frozenset(content for content, _, flags in entries if "special" in flags)
    byte_level, strips_space = _kind(data, tokens)
    return JsonContent(data, tokens, added, special, dict(one for one in named if one[1]), byte_level, strips_space)


def _check_model(model: dict[str, Any]) -> None:
    kind = model.get("type", "BPE")  # old files do not name it
    if kind != "BPE":
        raise ValueError(f"its model is {kind}; only BPE is implemented")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"model.{key}={model[key]!r} is not implemented")


def _ids(ids: Any, where: str) -> dict[str, int]:
    if not isinstance(ids, dict):
        raise ValueError(f"{where} must map tokens to ids; get it again")
    for token, index in ids.items():
        if type(index) is not int or not 0 <= index < MOST_IDS:
            raise ValueError(f"{where}: {token!r} has the id {index!r}; it must be from 0 to {MOST_IDS - 1}")
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"{where} has one id for two tokens; get it again")
    return ids


def _added_token(entry: Any) -> tuple[str, int, set[str]]:
    """Content, id, and the flags that are true."""
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str):
        raise ValueError(f"added_tokens has an entry without content: {str(entry)[:100]}; get it again")
    return content, entry.get("id"), {key for key, value in entry.items() if value is True}


def _check_together(tokens: dict[str, int], added: dict[str, int]) -> None:
    """Each id has one spelling, and each spelling one id."""
    if not tokens:
        raise ValueError("model.vocab is empty; get it again")
    by_id = {index: token for token, index in tokens.items()}
    for content, index in added.items():
        if by_id.get(index, content) != content or tokens.get(content, index) != index:
            raise ValueError(
                f"the added token {content!r} has the id {index}, but model.vocab contradicts; get it again"
            )


def _kind(data: dict[str, Any], tokens: dict[str, int]) -> tuple[bool, bool]:
    """Whether it is byte-level, and whether decoding drops a space at the beginning."""
    decoders = _flat(data.get("decoder"), "decoders")
    kinds = [decoder.get("type") for decoder in decoders]
    if kinds == ["ByteLevel"]:
        for part in _flat(data.get("pre_tokenizer"), "pretokenizers"):
            if part.get("type") == "ByteLevel" and part.get("add_prefix_space", True):
                raise ValueError("add_prefix_space=true of a byte-level BPE is not implemented")
        return True, False
    if kinds and _DECODERS_OF_LLAMA2.issuperset(kinds) and data["model"].get("byte_fallback"):
        if missing := [byte for byte in BYTES if byte not in tokens]:
            raise ValueError(f"byte_fallback needs the token {missing[0]}, which model.vocab lacks; get it again")
        return False, any(map(_strips, decoders))
    raise ValueError(
        f"its decoder is {' + '.join(map(str, kinds)) or 'missing'}; implemented are ByteLevel (GPT-2, Llama 3, Qwen) "
        "and Llama 2's with byte_fallback"
    )


def _strips(decoder: dict[str, Any]) -> bool:
    if decoder.get("type") == "Metaspace":
        return decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space", True)
    return decoder.get("type") == "Strip" and decoder.get("start") == 1


def _processors(node: Any) -> list[dict[str, Any]]:
    parts = _flat(node, "processors")
    if unknown := [part.get("type") for part in parts if part.get("type") not in ("ByteLevel", "TemplateProcessing")]:
        raise ValueError(f"the post_processor {unknown[0]} is not implemented")
    return parts


def _before_text(template: dict[str, Any]) -> list[int]:
    """The ids that a template writes before the text."""
    parts = template["single"]
    place = next(place for place, part in enumerate(parts) if "Sequence" in part)
    tokens = [part["SpecialToken"]["id"] for part in parts[:place]]
    return [index for token in tokens for index in template["special_tokens"][token]["ids"]]


def _flat(node: Any, key: str) -> list[dict[str, Any]]:
    """The parts of a sequence, or the one part itself."""
    if node is None:
        return []
    parts = node.get(key) if isinstance(node, dict) and node.get("type") == "Sequence" else [node]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"its {key} are no list of objects; get it again")
    return parts


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list; get it again")
    return value
