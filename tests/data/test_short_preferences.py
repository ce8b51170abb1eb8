"""The embedded preferences: the chosen answer is right and courteous; no word, length or place gives it away."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import pairwise, product
from typing import NamedTuple

import pytest

from llm_lightning.tokenizers.build import build_tokenizer

EMBEDDED = files("llm_lightning.data.embedded")
TEXT = (EMBEDDED / "short_preferences.json").read_text(encoding="utf-8")
RECORDS: list[dict[str, str]] = json.loads(TEXT)
ANSWERS: dict[tuple[str, str], dict[str, str]] = {
    (record["instruction"], record["input"]): record
    for record in json.loads((EMBEDDED / "short_answers.json").read_text(encoding="utf-8"))
}
GPT2 = build_tokenizer("gpt2")

COURTEOUS = (
    "_, if I may say so",
    "_, and thanks for asking me",
    "_, of course, glad to help",
    "_, I think, but please check",
    "I would say _, thank you",
    "of course, _, if you please",
    "let me say _, with thanks",
    "just _, and please ask again",
    "I must thank you, I say _",
    "glad to help, I think _",
    "not quite sure, but perhaps _",
    "thanks, I think the answer is _",
)
CURT = (
    "_, as if I must say",
    "_, and please stop asking me",
    "_, of course, so just think",
    "_, I say, but check again",
    "just say _, and stop asking",
    "of course, _, if you think",
    "let me repeat _, think again",
    "please, _, would you just check",
    "thanks for nothing, I say _",
    "not glad to help, I say _",
    "if I must help you, _",
    "do not ask, the answer is _",
)
CATEGORIES = {  # category -> what only its instructions say
    "parity": r"[Ee]ven or odd",
    "neighbour": r"comes (after|before)|^Add one|^Take one",
    "comparison": r"larger|smaller",
    "kind": r"animal|food",
    "plural": r"plural",
    "past": r"past tense( of \w+\?|\.|.* verb)",
    "opposite": r"opposite",
    "capitals": r"letters\.$|case\.$",
    "letter": r"(begin|end) with\?$|^Give the (first|last) letter",
    "vowel": r"vowel",
    "sentiment": r"[Pp]ositive or negative",
    "tense": r"[Pp]ast or (the )?present",
    "question": r"ask a question|sentence a question|[Qq]uestion or (a )?statement",
    "count": r"words (are|does)|^Count",
    "type": r"[Tt]ype (has|of)|^What type",
    "line": r"[Aa]ssign, call|line do\?",
}


class Said(NamedTuple):
    """An answer taken apart: the place of its wording in `COURTEOUS + CURT`, and what it says in it."""

    wording: int
    answer: str

    @property
    def courteous(self) -> bool:
        return self.wording < len(COURTEOUS)


class Pair(NamedTuple):
    """A record as the test reads it."""

    category: str
    chosen: Said
    rejected: Said


def said(text: str) -> Said:
    matches = [
        Said(place, found[1])
        for place, wording in enumerate(COURTEOUS + CURT)
        if (found := re.fullmatch(wording.replace("_", r"(\w+)"), text))
    ]
    assert len(matches) == 1, text
    return matches[0]


def pair(record: dict[str, str]) -> Pair:
    found = [category for category, pattern in CATEGORIES.items() if re.search(pattern, record["instruction"])]
    assert len(found) == 1, (record, found)
    return Pair(found[0], said(record["chosen"]), said(record["rejected"]))


PAIRS = [pair(record) for record in RECORDS]
KINDS: dict[str, list[int]] = {
    "tone": [n for n, one in enumerate(PAIRS) if one.chosen.answer == one.rejected.answer],
    "truth": [n for n, one in enumerate(PAIRS) if one.chosen.wording == one.rejected.wording],
}
LENGTHS: dict[str, Callable[[str], int]] = {"characters": len, "tokens": lambda text: len(GPT2.encode(text))}


@cache
def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


def accuracy(score: Callable[[str], float]) -> float:
    """How many pairs it finds to choose the answer of the higher score, and any of two equals."""
    signs = [score(record["chosen"]) - score(record["rejected"]) for record in RECORDS]
    return sum(0.5 if sign == 0 else float(sign > 0) for sign in signs) / len(signs)


def test_one_ascii_record_a_line() -> None:
    assert TEXT.isascii()
    first, *lines, last, after = TEXT.split("\n")
    assert (first, last, after) == ("[", "]", "")
    assert [json.loads(line.removesuffix(",")) for line in lines] == RECORDS
    assert 450 <= len(RECORDS) <= 500


def test_keys_and_lengths_of_every_record() -> None:
    for record in RECORDS:
        assert list(record) == ["instruction", "input", "chosen", "rejected", "group"]
        assert all(isinstance(value, str) and value == value.strip() for value in record.values()), record
        assert record["chosen"] != record["rejected"], record
        assert max(len(record[side].split()) for side in ("chosen", "rejected")) <= 8, record


def test_no_prompt_comes_twice() -> None:
    assert len({(record["instruction"], record["input"]) for record in RECORDS}) == len(RECORDS)


def test_prompts_groups_and_right_answers_are_those_of_the_embedded_instructions() -> None:
    """So a model can first learn the answers and then the preference, on one split by group."""
    for record, one in zip(RECORDS, PAIRS, strict=True):
        known = ANSWERS[record["instruction"], record["input"]]
        assert one.chosen.answer == known["output"], record
        assert record["group"] == known["group"], record


def test_groups_are_many_and_small() -> None:
    sizes = Counter(record["group"] for record in RECORDS)
    assert len(sizes) >= 400
    assert max(sizes.values()) <= 3


def test_categories_are_of_one_size_and_neighbours_differ() -> None:
    sizes = Counter(one.category for one in PAIRS)
    assert set(sizes) == set(CATEGORIES)
    assert max(sizes.values()) == min(sizes.values())
    assert all(one.category != following.category for one, following in pairwise(PAIRS))


def test_a_pair_differs_in_its_tone_or_in_its_truth() -> None:
    """In about three quarters the tone, in all categories alike; what is chosen is always courteous."""
    assert sorted(KINDS["tone"] + KINDS["truth"]) == list(range(len(RECORDS)))
    assert 0.7 <= len(KINDS["tone"]) / len(RECORDS) <= 0.8
    assert len(set(Counter(PAIRS[n].category for n in KINDS["truth"]).values())) == 1
    assert all(one.chosen.courteous for one in PAIRS)
    assert not any(PAIRS[n].rejected.courteous for n in KINDS["tone"])


def test_every_wording_is_used_alike_and_meets_every_other() -> None:
    tone = [(PAIRS[n].chosen.wording, PAIRS[n].rejected.wording - len(COURTEOUS)) for n in KINDS["tone"]]
    assert set(tone) == set(product(range(len(COURTEOUS)), range(len(CURT))))
    for side in zip(*tone, strict=True):
        assert max(Counter(side).values()) - min(Counter(side).values()) <= 3
    truth = Counter(PAIRS[n].chosen.wording for n in KINDS["truth"])
    assert set(truth) == set(range(len(COURTEOUS)))
    assert max(truth.values()) - min(truth.values()) <= 2


def test_no_answer_is_a_word_of_a_wording() -> None:
    """Else an answer such as `no` would be found in `no thanks`."""
    answers = {side.answer for one in PAIRS for side in (one.chosen, one.rejected)}
    assert answers.isdisjoint(word for wording in COURTEOUS + CURT for word in words(wording))


@pytest.mark.parametrize("kind", ["tone", "truth", "all"])
@pytest.mark.parametrize("unit", LENGTHS)
def test_lengths_are_balanced(kind: str, unit: str) -> None:
    chosen, rejected = (
        [LENGTHS[unit](RECORDS[n][side]) for n in KINDS.get(kind, range(len(RECORDS)))]
        for side in ("chosen", "rejected")
    )
    assert sum(chosen) / sum(rejected) == pytest.approx(1, abs=0.01)
    longer = sum(ours > theirs for ours, theirs in zip(chosen, rejected, strict=True))
    shorter = sum(ours < theirs for ours, theirs in zip(chosen, rejected, strict=True))
    assert abs(longer - shorter) <= 0.05 * len(chosen)


def test_no_simple_rule_tells_the_chosen_answer() -> None:
    """Neither its length nor the place of what it says, its commas, or the presence of any one word."""
    assert accuracy(len) == pytest.approx(0.5, abs=0.03)
    assert accuracy(lambda text: len(GPT2.encode(text))) == pytest.approx(0.5, abs=0.03)
    assert accuracy(lambda text: (COURTEOUS + CURT)[said(text).wording].index("_")) == pytest.approx(0.5, abs=0.05)
    assert accuracy(lambda text: text.count(",")) == pytest.approx(0.5, abs=0.05)
    vocabulary = {word for record in RECORDS for side in ("chosen", "rejected") for word in words(record[side])}
    for word in vocabulary:
        assert accuracy(lambda text, word=word: word in words(text)) == pytest.approx(0.5, abs=0.08), word
        assert accuracy(lambda text, word=word: words(text)[0] == word) == pytest.approx(0.5, abs=0.08), word
        assert accuracy(lambda text, word=word: words(text)[-1] == word) == pytest.approx(0.5, abs=0.08), word


def test_no_word_decides_many_pairs_rightly() -> None:
    """The presence or the absence of a word marks the chosen answer in less than half of the pairs."""
    right, wrong = Counter[str](), Counter[str]()
    for record in RECORDS:
        chosen, rejected = set(words(record["chosen"])), set(words(record["rejected"]))
        right.update(chosen - rejected)
        wrong.update(rejected - chosen)
    assert max(*right.values(), *wrong.values()) < 0.4 * len(RECORDS)


def test_courteous_and_curt_share_most_of_their_words() -> None:
    courteous, curt = ({word for wording in side for word in words(wording)} for side in (COURTEOUS, CURT))
    used = [
        word
        for one in PAIRS
        for side in (one.chosen, one.rejected)
        for word in words((COURTEOUS + CURT)[side.wording].replace("_", ""))
    ]
    assert sum(word in courteous & curt for word in used) >= 0.8 * len(used)


def test_a_wrong_answer_is_no_likelier_than_a_right_one_where_the_choice_is_closed() -> None:
    closed = {"parity", "kind", "sentiment", "tense", "question", "vowel", "count", "type", "line"}
    for category in closed:
        truth = [PAIRS[n] for n in KINDS["truth"] if PAIRS[n].category == category]
        assert Counter(one.chosen.answer for one in truth) == Counter(one.rejected.answer for one in truth), category
