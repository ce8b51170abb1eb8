"""A `tokenizer.json`, run by the library `tokenizers`: the tokenizers of Llama, SmolLM2, Qwen and their like.

The library encodes with a copy of the file that lacks every added token, so that no text becomes one (its own
`encode_special_tokens` still finds those that are not special, such as Qwen's `<think>`); templates write their ids.
The post-processor does not run either: `bos_id` says what begins a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer, last_start, without_surrogates
from llm_lightning.tokenizers.json_content import BYTES, FLAGS, MOST_BYTES, SPACE, JsonContent, read_content
from llm_lightning.tokenizers.tiktoken_encodings import PIECE_END, byte_of_character, gpt2_merges

NAME = "tokenizer_json"
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""What families write between documents, where they have it."""

_SPACE_BEHIND = re.compile(f"(?<=[^ {SPACE}]) ")
_PIECE = 1 << 18  # characters; the library needs about 150 bytes for each
_ADDED = {
    "content": None, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
}  # fmt: skip
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class JsonTokenizer(Tokenizer):
    """A byte-level BPE, or Llama 2's, from a `tokenizer.json`.

    Bytes that a vocabulary lacks are lost, such as six control characters in SmolLM2's. Llama 2's kind adds a space
    before a text, and decoding drops it.

    Args:
        text: the content of tokenizer.json.
        special_tokens: the spelling of `bos_token`, `eos_token`, `pad_token` and `unk_token`, as far as they exist.

    Raises:
        ValueError: if the text is damaged or of another kind, or an id has no token.
    """

    def __init__(
        self,
        text: str,
        *,
        bos_id: int | None = None,
        eot_id: int | None = None,
        stop_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        try:
            content = read_content(text)
            self._library = _library(content.without_added_tokens())
        except ValueError as error:
            raise ValueError(f"tokenizer.json: {error}") from None
        self._text = text
        self._spellings = content.spellings()
        self._controls, self._added = content.added, frozenset(content.added.values())
        self._flags = content.flags
        self._byte_level, self._strips_space = content.byte_level, content.strips_space
        self._spaces_parts, self._may_cut_at_spaces = content.spaces_parts, content.may_cut_at_spaces
        self._is_cut, self._unknown_id = content.pre is not None, content.unknown_id
        self.vocab_size = len(self._spellings)
        self.special_tokens = dict(special_tokens or {})
        self.bos_id, self.eot_id = self._known("bos_id", bos_id), self._known("eot_id", eot_id)
        self._stop_ids = tuple(dict.fromkeys(index for index in stop_ids if self._known("stop_ids", index) is not None))

    def _known(self, key: str, index: Any) -> int | None:
        """The id, which must have a token, or None."""
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < self.vocab_size or self._spellings[index] is None:
            raise ValueError(f"{key}={index!r} has no token in tokenizer.json, which has {self.vocab_size} ids")
        return index

    @property
    def content(self) -> JsonContent:
        """What the file says, read again: kept, it would take as much memory as a layer of the model."""
        return read_content(self._text)

    @property
    def controls(self) -> Mapping[str, int]:
        return self._controls

    @property
    def control_flags(self) -> Mapping[str, frozenset[str]]:
        return self._flags

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    def encode_array(self, text: str) -> np.ndarray:
        return self._encode_in_pieces(self._library, text)

    def encode_inside(self, text: str, *, after_control: bool) -> np.ndarray:
        has_space = self._byte_level or (after_control and self._spaces_parts)
        return self._encode_in_pieces(self._library if has_space else self._inside, text)

    def _encode_in_pieces(self, library: Any, text: str) -> np.ndarray:
        """Encode with one library up to the first cut; what follows is inside a text."""
        first, *rest = self._pieces(without_surrogates(text))
        ids = self._encode(library, first)
        return np.concatenate([ids, *(self._encode(self._inside, piece) for piece in rest)]) if rest else ids

    @cached_property
    def _inside(self) -> Any:
        """What encodes a text that does not begin where it is cut."""
        text = None if self._byte_level else self.content.without_first_space()
        return self._library if text is None else _library(text)

    def _encode(self, library: Any, text: str) -> np.ndarray:
        try:  # as a batch, because only that releases the GIL
            (encoding,) = library.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"the library tokenizers gave up on a text of {len(text)} characters: {error}") from None
        ids = np.array(encoding.ids, dtype=np.uint32)
        return ids[ids != self._unknown_id].astype(self.dtype)

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a long text where that changes no id: memory stays small."""
        start, size = 0, _PIECE
        while len(text) - start > size:
            if cut := self._inner_cut(text[start : start + size]):
                yield text[start : start + cut]
                start, size = start + cut, _PIECE
            else:
                size *= 2
        yield text[start:]

    def _inner_cut(self, text: str) -> int:
        if self._byte_level:
            return self.split_point(text)
        return last_start(_SPACE_BEHIND, text) if self._may_cut_at_spaces else 0

    def token_bytes(self, token_id: int) -> bytes:
        index = self._checked(token_id)
        token = self._spellings[index]
        if token is None:
            return b""
        if index in self._added:
            return token.encode()
        return _byte_level_bytes(token) if self._byte_level else _fallback_bytes(token)

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._strips_space else text

    def ids_without_token(self, n_rows: int) -> list[int]:
        gaps = [index for index, token in enumerate(self._spellings[:n_rows]) if token is None]
        return [*gaps, *super().ids_without_token(n_rows)]

    def split_point(self, text: str) -> int:
        """Return a safe cut for the known ways of cutting, else 0: Llama 2's kind begins each text with a space."""
        return last_start(PIECE_END, text) if self._is_cut else 0

    def describe(self) -> dict[str, Any]:
        return {
            "name": NAME,
            "json": self._text,
            "bos_id": self.bos_id,
            "eot_id": self.eot_id,
            "stop_ids": list(self._stop_ids),
            "special_tokens": dict(self.special_tokens),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> JsonTokenizer:
        text, stop_ids = description.get("json"), description.get("stop_ids", [])
        named = description.get("special_tokens", {})
        if not isinstance(text, str) or not isinstance(stop_ids, list) or not _are_strings(named):
            raise ValueError(f"the description of tokenizer {NAME} is damaged: it needs json, stop_ids, special_tokens")
        bos_id, eot_id = description.get("bos_id"), description.get("eot_id")
        return cls(text, bos_id=bos_id, eot_id=eot_id, stop_ids=stop_ids, special_tokens=named)


def _library(text: str) -> Any:
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_str(text)
    except Exception as error:  # the library raises no type of its own
        raise ValueError(f"the library tokenizers cannot read it ({error}); get it again") from None


def _are_strings(named: Any) -> bool:
    return isinstance(named, dict) and all(isinstance(word, str) for item in named.items() for word in item)


def _byte_level_bytes(token: str) -> bytes:
    byte_of = byte_of_character()
    try:
        return bytes([byte_of[character] for character in token])
    except KeyError:  # a token that no text yields
        return token.encode()


def _fallback_bytes(token: str) -> bytes:
    return BYTES[token] if token in BYTES else token.replace(SPACE, " ").encode()


# -- from a folder -------------------------------------------------------------------------------------------


def describe_folder(folder: Path, *, eos_ids: Iterable[int] = ()) -> dict[str, Any] | None:
    """Describe the tokenizer of a folder with a tokenizer.json; None without one.

    Reads tokenizer_config.json and special_tokens_map.json beside it. GPT-2's own becomes `{"name": "gpt2"}`.

    Args:
        eos_ids: where generation stops, from generation_config.json or config.json.

    Raises:
        ValueError: if a file is damaged, or the tokenizer is of a kind that is not implemented.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    settings = _json_object(folder / "special_tokens_map.json") | _json_object(folder / "tokenizer_config.json")
    try:
        content = read_content(_read(path))
        return {"name": "gpt2"} if is_gpt2(content) else _with_settings(content, settings, eos_ids).describe()
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('tokenizer.json: ')}") from None


def _with_settings(content: JsonContent, settings: Mapping[str, Any], eos_ids: Iterable[int]) -> JsonTokenizer:
    """Build the tokenizer with the roles that tokenizer_config.json gives to its tokens."""
    data = content.data | {"added_tokens": _all_added(content, settings.get("added_tokens_decoder"))}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))  # half of an indented file
    added = {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    ids = content.tokens | added
    named = _named(settings, ids)
    eos = [ids[named["eos_token"]]] if "eos_token" in named else []
    ends = [added[word] for word in END_OF_DOCUMENT if word in added]
    stops = [*eos_ids, *eos, *ends[:1]]
    return JsonTokenizer(
        text,
        bos_id=content.first_id(),  # add_bos_token of the settings has no effect in transformers 5 either
        eot_id=next(iter([*ends, *eos, *stops]), None),
        stop_ids=stops,
        special_tokens=named,
    )


def _named(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    """The named tokens; one that the vocabulary lacks is left out, unless it begins or ends texts."""
    named = {key: word for key in _NAMED if (word := _spelling(settings.get(key))) is not None}
    for key in ("bos_token", "eos_token"):
        if key in named and named[key] not in ids:
            raise ValueError(f"it has no token {named[key]!r}, the {key} of tokenizer_config.json; get both again")
    return {key: word for key, word in named.items() if word in ids}


def _all_added(content: JsonContent, decoder: Any) -> list[dict[str, Any]]:
    """The added tokens, also those that only `added_tokens_decoder` of tokenizer_config.json names; its flags win."""
    entries = {} if decoder is None else decoder
    known = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
    known = known and all(isinstance(entry.get("content"), str) for entry in entries.values())
    if not known or not all(index.isdecimal() and len(index) < 10 for index in entries):
        raise ValueError("added_tokens_decoder of tokenizer_config.json must map ids to tokens; get it again")
    more = [
        {"id": int(index)} | {key: entry.get(key, value) for key, value in _ADDED.items()}
        for index, entry in entries.items()
        if entry["content"] not in content.added
    ]
    flags = {entry["content"]: {key: entry[key] for key in FLAGS if key in entry} for entry in entries.values()}
    return [*(entry | flags.get(entry["content"], {}) for entry in content.data.get("added_tokens") or []), *more]


def _spelling(token: Any) -> str | None:
    """A named token is written as a string, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def is_gpt2(content: JsonContent) -> bool:
    """Whether it is GPT-2's own: the same tokens, merges and cut, and no added token but the end of text."""
    if content.pre != "gpt-2" or content.data.get("normalizer") or content.added != {END_OF_TEXT: 50256}:
        return False
    merges = gpt2_merges()
    tokens = [*byte_of_character(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    return content.spellings() == tokens and [" ".join(pair) for pair in content.merges] == merges


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); get it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}; get it again")
    return content


def _read(path: Path) -> str:
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{size} bytes are more than such a file has (at most {MOST_BYTES})")
    return path.read_text(encoding="utf-8")
