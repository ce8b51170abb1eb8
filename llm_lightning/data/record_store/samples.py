"""The samples of a split: which of its records fit into the context, and which were cut to it. Made once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from llm_lightning.data.cutting import shortened
from llm_lightning.data.record_store.pool import Part, TokenPool, integers
from llm_lightning.data.record_store.records import FORMAT
from llm_lightning.data.record_store.tokens import Pieces, TokenStore, TokenWriter
from llm_lightning.data.templates.base import Piece, Template
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.columns import Columns, Writer, as_reference, from_reference, key_of, made_once
from llm_lightning.tokenizers.base import Tokenizer

Sample = TypeVar("Sample")
Make = Callable[[int, Pieces], Any]
"""(number, pieces) -> sample, or None if nothing of it would be trained on. A module-level function, for processes."""


class Samples(Dataset, Generic[Sample]):
    """Samples of a split, read from the cache when they are asked for.

    Attributes:
        lengths: (n,) `n_tokens` of each.
        counts: numbers of `prompts_cut`, `answers_cut` and `dropped`.
        facts: about the split.
    """

    def __init__(self, part: Part, tokens: TokenPool, columns: Columns, make: Make) -> None:
        self._rows, self._tokens, self._make = part.rows, tokens, make
        self._columns = columns
        self._cut = TokenStore(columns)
        self.lengths = columns.mapped("n_tokens")
        self._numbers, self._cut_numbers = columns.mapped("numbers"), columns.mapped("cut_numbers")
        self.counts, self.facts = Counter[str](columns.facts["counts"]), columns.facts["facts"]

    @property
    def key(self) -> str:
        """Names what is in it."""
        return self._columns.folder.name

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64: the number of each in the pool."""
        return self._rows[self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        sample: Sample = self._made(int(self._numbers[index]))
        return sample

    def __getstate__(self) -> dict[str, Any]:
        """Mapped files as their paths: a loader process that is not forked would be sent all of their content."""
        return {name: as_reference(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {name: from_reference(value) for name, value in state.items()}

    def most_cut(self, n: int) -> list[tuple[int, int, Sample]]:
        """(number of the record in the split, its tokens, its sample) of those that lost most."""
        whole = self._tokens.longest(self._rows[self._cut_numbers]) if len(self._cut_numbers) else np.zeros(0)
        worst = np.argsort(-whole, kind="stable")[:n]
        return [(int(self._cut_numbers[at]), int(whole[at]), self._made(int(self._cut_numbers[at]))) for at in worst]

    def _made(self, number: int) -> Any:
        at = int(np.searchsorted(self._cut_numbers, number)) if len(self._cut_numbers) else 0
        if at < len(self._cut_numbers) and self._cut_numbers[at] == number:
            return self._make(number, self._cut.pieces(at))
        return self._make(number, self._tokens.pieces(int(self._rows[number])))


@dataclass(frozen=True)
class SampleKind(ABC):
    """How pieces become samples of one kind; a subclass has settings as fields."""

    @staticmethod
    @abstractmethod
    def encode(tokenizer: Tokenizer, template: Template, record: Conversation) -> Iterable[Piece]:
        """Make the pieces of a record."""

    @abstractmethod
    def sample(self, number: int, pieces: Pieces) -> Any:
        """Return the sample, or None if nothing of it would be trained on."""

    @abstractmethod
    def length(self, pieces: Pieces) -> int:
        """Return the tokens of the longest sequence."""

    @abstractmethod
    def n_answer(self, pieces: Pieces) -> int:
        """Return the tokens of answers that a model learns to give."""

    @abstractmethod
    def with_cut_answers(self, pieces: Pieces, most: int) -> Pieces:
        """Return what is left of sequences of at most `most` tokens, cut from the right."""

    @abstractmethod
    def measures(self, sample: Any) -> tuple[int, ...]:
        """Return numbers that `facts` needs of each sample."""

    @abstractmethod
    def facts(self, whole: np.ndarray, measures: np.ndarray) -> dict[str, Any]:
        """Return facts about a split.

        Args:
            whole: (records,) lengths before anything is cut.
            measures: (samples, m).
        """


@dataclass(frozen=True)
class Fitting:
    """How records are fitted into the context.

    Args:
        kind: of the samples.
        limit: longest input in tokens; one more is only a label.
        too_long: `cut_prompt`, `cut_answer` or `drop`.
    """

    kind: SampleKind
    limit: int
    too_long: str
    tokenizer: Tokenizer
    template: Template

    def describe(self) -> list[Any]:
        """Plain values that decide on the samples, beside the tokens."""
        return [type(self.kind).__name__, asdict(self.kind), self.limit, self.too_long]

    def samples(self, part: Part, tokens: TokenPool, *, verify: bool = False) -> Samples[Any]:
        """The samples of a split; made now, or as they were made before."""
        spec = [FORMAT, part.key, tokens.key, self.describe()]

        def write(writer: Writer) -> dict[str, Any]:
            return self._write(writer, part, tokens)

        columns = made_once(cache_dir() / "records" / f"fitted-{key_of(spec)}", write, verify=verify)
        return Samples(part, tokens, columns, self.kind.sample)

    def _write(self, writer: Writer, part: Part, tokens: TokenPool) -> dict[str, Any]:
        cut, counts = TokenWriter(writer, self.tokenizer), Counter[str]()
        lengths, numbers = writer.column("n_tokens", np.uint32), writer.column("numbers", np.int64)
        cut_numbers = writer.column("cut_numbers", np.int64)
        whole, measures = array("I"), array("I")
        shown = tqdm(integers(part.rows), desc="fitting", unit=" records", disable=None, delay=1, total=len(part))
        for number, row in enumerate(shown):
            pieces = tokens.pieces(row)
            whole.append(self.kind.length(pieces))
            fitted = self._fitted(part, number, pieces, whole[-1])
            sample = None if fitted is None else self.kind.sample(number, fitted)
            if fitted is None or sample is None:
                counts["dropped"] += 1
                continue
            if fitted is not pieces:
                lost = self.kind.n_answer(fitted) < self.kind.n_answer(pieces)
                counts["answers_cut" if lost else "prompts_cut"] += 1
                cut.add(fitted.parts())
                cut_numbers.add(number)
            numbers.add(number)
            lengths.add(sample.n_tokens)
            measures.extend(self.kind.measures(sample))
        cut.flush()
        n_samples = len(whole) - counts["dropped"]
        table = np.frombuffer(measures, np.uint32).reshape(n_samples, -1) if n_samples else np.zeros((0, 1), np.uint32)
        facts = self.kind.facts(np.frombuffer(whole, np.uint32), table) if n_samples else {}
        return {"counts": dict(counts), "facts": facts}

    def _fitted(self, part: Part, number: int, pieces: Pieces, length: int) -> Pieces | None:
        """`pieces` within the limit; None if the record is dropped."""
        most = self.limit + 1
        if length <= most:
            return pieces
        if self.too_long == "drop":
            return None
        if self.too_long == "cut_answer":
            return self.kind.with_cut_answers(pieces, most)
        cut = shortened(part[number], lambda one: self.kind.length(self._pieces(one)) <= most)
        return None if cut is None else self._pieces(cut)

    def _pieces(self, record: Conversation) -> Pieces:
        return Pieces.of(type(self.kind).encode(self.tokenizer, self.template, record))
