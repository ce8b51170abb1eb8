"""What is read takes time in proportion to its size: operations are counted, not seconds; the slow test compares sizes.

`benchmarks/scaling.py` measures every reader and tool.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_lightning.cli.judge import _output_files
from llm_lightning.data.files.strict_json import unique_fields
from llm_lightning.data.instruction import encode
from llm_lightning.data.leaks import leaked_texts
from llm_lightning.data.order import _interleave
from llm_lightning.data.splits import MOST_MARKS, normalized
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.data.text_keys import TextKeys
from llm_lightning.metrics.answers import rouge_l
from llm_lightning.metrics.class_report import best_threshold
from llm_lightning.tokenizers.byte import ByteTokenizer

SCALING = Path(__file__).parents[1] / "benchmarks" / "scaling.py"
N = 300
PER_ITEM = 40
"""Operations for each item that are allowed; with one for each pair of items it would be hundreds."""


class Counts:
    """How often the special things below were used."""

    n = 0


class CountedText(str):
    def __eq__(self, other: object) -> bool:
        Counts.n += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


class CountedArray(np.ndarray):
    """Counts the elements that are compared or picked."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        Counts.n += self.size
        plain = [one.view(np.ndarray) if isinstance(one, CountedArray) else one for one in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        Counts.n += np.size(found)
        return found


class CountedPath(type(Path())):  # type: ignore[misc]
    def __eq__(self, other: object) -> bool:
        Counts.n += 1
        return super().__eq__(other)

    __hash__ = Path.__hash__


class CountedIds(np.ndarray):
    def __len__(self) -> int:
        Counts.n += 1
        return self.shape[0]


class CountingTokenizer(ByteTokenizer):
    def encode_array(self, text: str) -> np.ndarray:
        return super().encode_array(text).view(CountedIds)


def fields() -> None:
    pairs = [(CountedText(f"field {index}"), 1) for index in [*range(N), N - 1]]
    with pytest.raises(ValueError, match=f"'field {N - 1}' occurs twice"):
        unique_fields(pairs)


def turns() -> None:
    one = Conversation(tuple(Turn("say", "", "yes") for _ in range(N)))
    encoded = encode(CountingTokenizer(), choose_template("alpaca"), one)
    assert encoded.n_targets == 4 * N, "each answer and its end"


def classes() -> None:
    keys = TextKeys.of(f"text {chr(300 + index)}" for index in range(N))
    counted = TextKeys(*(one.view(CountedArray) for one in keys))
    found = leaked_texts(counted, counted, np.arange(N).view(CountedArray), [f"class {index}" for index in range(N)])
    assert found["exact"] == found["classes"]["class 7"]["of"] * N == N


def files() -> None:
    paths = [CountedPath(f"{index}.json") for index in range(N)]
    outputs = _output_files(argparse.Namespace(output=None, files=paths, pairwise=False, lexical=True))
    assert outputs[7] == Path("7.lexical.json")


def test_operations_grow_with_the_input_and_not_with_its_square() -> None:
    found = {}
    for action in (fields, turns, classes, files):
        Counts.n = 0
        action()
        found[action.__name__] = Counts.n / N
    assert all(each < PER_ITEM for each in found.values()), found


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [made.numel() for made in torch.utils._pytree.tree_leaves(result) if isinstance(made, Tensor)]
        self.size = max([self.size, *sizes])
        return result


def test_a_threshold_is_found_without_a_table_of_all_thresholds_and_texts() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(N, generator=draw), torch.randint(2, (N,), generator=draw)
    with Largest() as largest:
        found = best_threshold(scores, labels)
    assert largest.size <= 2 * N
    right = [int(((scores.double() >= t) == labels.bool()).sum()) for t in [found, *scores.tolist(), 2.0]]
    assert right[0] == max(right)


def test_classes_are_interleaved_as_one_by_one() -> None:
    draw = np.random.default_rng(0)
    for n, n_classes in ((0, 1), (1, 1), (50, 1), (300, 2), (300, 7), (300, 300)):
        kind, rank_by = draw.integers(0, n_classes, n), draw.integers(0, 9, n)
        place = np.empty(n)
        for one in range(n_classes):
            members = np.flatnonzero(kind == one)
            ranks = np.argsort(np.argsort(rank_by[members], kind="stable"), kind="stable")
            place[members] = (ranks + 0.5) / max(len(members), 1)
        assert np.array_equal(_interleave(kind, rank_by), np.argsort(place, kind="stable")), (n, n_classes)


def test_the_longest_common_subsequence_is_that_of_the_table() -> None:
    draw = random.Random(0)
    for _ in range(300):
        words = "abcdefgh"[: draw.choice([1, 2, 3, 8])]
        one, other = ([draw.choice(words) for _ in range(draw.randint(1, 90))] for _ in range(2))
        above = [0] * (len(other) + 1)
        for word in one:
            row = [0]
            for column, second in enumerate(other):
                row.append(above[column] + 1 if word == second else max(above[column + 1], row[column]))
            above = row
        wanted = 2 * above[-1] / (len(one) + len(other))
        assert rouge_l([" ".join(one)], [" ".join(other)]) == [wanted]


def test_marks_beyond_what_any_script_has_are_not_compared() -> None:
    acute, below = "\u0301", "\u0316"
    assert normalized("a" + acute * MOST_MARKS) == normalized("a" + acute * (MOST_MARKS + 9)) != normalized("a")
    word = f"{'e' + acute}" * MOST_MARKS
    assert normalized(word) == "\u00e9" * MOST_MARKS
    assert normalized("a" + acute + below) == normalized("a" + below + acute)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="its timer is a signal")
def test_ten_times_as_much_takes_about_ten_times_as_long() -> None:
    """CPU time, by its ratio: linear is 10 to 20 with all caches full, quadratic 100."""
    failures = grown([])
    again = grown([name for name, *_ in failures]) if failures else []  # another load on the machine may pass
    assert not again


def grown(names: list[str]) -> list[tuple[str, float, float]]:
    done = subprocess.run(
        [sys.executable, str(SCALING), "--json", *names], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 80 or names
    return [(name, one, ten) for name, one, ten in rows if ten > 0.2 and ten > 40 * one]
