"""Control tokens that data spell out are counted, warned of, and made documents or stripped by choice."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path

import pytest

from llm_lightning.data.control_words import WORDS, WordCount, described, documents_between, without_end
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.tokenizers.base import END_OF_TEXT
from llm_lightning.tokenizers.byte import ByteTokenizer


def chunks_of(text: str, draw: random.Random) -> list[str]:
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(12)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_words_are_counted_and_documents_cut_wherever_the_chunks_are() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices([*WORDS, "a", " \n", "<", "<|end", "|>"], k=draw.randrange(1, 30)))
        chunks, count = chunks_of(text, draw), WordCount()
        for chunk in chunks:
            count.add(chunk)
        assert count.found == Counter({word: text.count(word) for word in WORDS if word in text})
        assert list(documents_between(chunks, END_OF_TEXT)) == [one for one in text.split(END_OF_TEXT) if one.strip()]


def test_a_word_does_not_cross_the_bound_of_two_texts() -> None:
    count = WordCount()
    for text in ("<|endof", "text|></s>", "</s>"):
        count.add(text)
        count.end()
    assert described(count.found) == "</s> 2 times"


@pytest.mark.parametrize(
    ("answer", "stripped"),
    [("yes<|im_end|>", "yes"), ("yes </s>\n<|endoftext|> ", "yes"), ("a</s>b", "a</s>b"), ("plain \n", "plain \n")],
)
def test_the_end_of_an_answer(answer: str, stripped: str) -> None:
    assert without_end(answer) == stripped


def test_stories_become_documents_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("".join(f"Story {n} of a fox.\n<|endoftext|>\n" for n in range(60)))
    options = {"tokenizer": ByteTokenizer(), "context_length": 16, "path": str(file), "batch_size": 4}
    with caplog.at_level(logging.WARNING):
        plain = PretrainingDataModule(**options)
        plain.build()
    assert "<|endoftext|> 60 times; data.split_on_eot=true makes documents" in caplog.text
    caplog.clear()
    split = PretrainingDataModule(**options, split_on_eot=True)
    split.build()
    assert "1 document" in plain.describe()
    assert "60 documents" in split.describe()
    assert not caplog.text


def test_ends_of_answers_are_stripped_if_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.jsonl"
    rows = [{"instruction": f"q{n}", "output": f"yes {n}<|endoftext|>"} for n in range(30)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": ByteTokenizer(), "context_length": 256, "path": str(file), "batch_size": 4}
    with caplog.at_level(logging.WARNING):
        plain = InstructionDataModule(**options)
        plain.read()
    assert "<|endoftext|> 30 times; data.strip_eot=true strips them" in caplog.text
    caplog.clear()
    stripped = InstructionDataModule(**options, strip_eot=True)
    stripped.read()
    assert not caplog.text
    assert {one.turns[0].response for one in stripped.records["train"]} <= {f"yes {n}" for n in range(30)}
    assert plain.data_digest != stripped.data_digest
