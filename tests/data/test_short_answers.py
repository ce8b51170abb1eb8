"""The embedded instructions: every answer that a rule can find is right, and no filling can leak across a split."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise
from typing import NamedTuple

import pytest

TEXT = (files("llm_lightning.data.embedded") / "short_answers.json").read_text(encoding="utf-8")
RECORDS: list[dict[str, str]] = json.loads(TEXT)

TYPES = {str: "string", int: "integer", float: "float", list: "list", tuple: "tuple", dict: "dictionary"}
NODES = {
    ast.Assign: "assign",
    ast.AugAssign: "assign",
    ast.Import: "import",
    ast.ImportFrom: "import",
    ast.Call: "call",
    ast.Compare: "compare",
}


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def plural(noun: str) -> str:
    if re.search(r"[^aeiou]y$", noun):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if re.search(r"(s|x|ch|sh)$", noun) else f"{noun}s"


def past(verb: str) -> str:
    if re.search(r"[^aeiou]y$", verb):
        return f"{verb[:-1]}ied"
    if re.fullmatch(r"[^aeiou]+[aeiou][^aeiouwxy]", verb):  # one short syllable: stop, stopped
        return f"{verb}{verb[-1]}ed"
    return f"{verb}d" if verb.endswith("e") else f"{verb}ed"


def opposite(word: str) -> str:
    return word.removeprefix("un") if word.startswith("un") else f"un{word}"


def number_of_noun(noun: str) -> str:
    """Singulars that end in s do so here in -ss or -as (class, alias); regular plurals never do."""
    return "plural" if re.search(r"[^as]s$", noun) else "singular"


def statement_kind(line: str) -> str:
    (node,) = ast.parse(line).body
    return NODES[type(node.value if isinstance(node, ast.Expr) else node)]


def vowel(yes: str, no: str) -> Callable[[str], str]:
    return lambda word: yes if word[0] in "aeiou" else no


Rule = Callable[[str], str] | frozenset[str]  # what the filling's answer is; where no rule can tell, what it may be
YES_NO = frozenset({"yes", "no"})

# category -> instruction, with the filling in parentheses where it stands in the instruction -> rule
QUESTIONS: dict[str, dict[str, Rule]] = {
    "parity": dict.fromkeys(
        (
            r"Is the number even or odd\?",
            r"Even or odd\?",
            r"Say whether this number is even or odd\.",
            r"Is (\d+) even or odd\?",
        ),
        lambda text: "odd" if int(text) % 2 else "even",
    ),
    "neighbour": {
        **dict.fromkeys(
            (
                r"Which number comes after this one\?",
                r"Add one to the number\.",
                r"Which number comes after (\d+)\?",
            ),
            lambda text: str(int(text) + 1),
        ),
        **dict.fromkeys(
            (
                r"Which number comes before this one\?",
                r"Take one from the number\.",
                r"Which number comes before (\d+)\?",
            ),
            lambda text: str(int(text) - 1),
        ),
    },
    "comparison": {
        **dict.fromkeys(
            (r"Which number is larger\?", r"Give the larger number\.", r"Which is larger, (\d+ or \d+)\?"),
            lambda text: str(max(numbers(text))),
        ),
        **dict.fromkeys(
            (r"Which number is smaller\?", r"Give the smaller number\.", r"Which is smaller, (\d+ or \d+)\?"),
            lambda text: str(min(numbers(text))),
        ),
    },
    "kind": {
        **dict.fromkeys(
            (
                r"Is it an animal, a food, a tool or a colour\?",
                r"Animal, food, tool or colour\?",
                r"Which kind of thing is it: animal, food, tool or colour\?",
            ),
            frozenset({"animal", "food", "tool", "colour"}),
        ),
        **dict.fromkeys((r"(?:Does this name|Is it) an animal\?", r"(?:Does this name|Is it) a food\?"), YES_NO),
    },
    "plural": {
        **dict.fromkeys(
            (r"Write the plural\.", r"Give the plural of the noun\.", r"What is the plural of (\w+)\?"), plural
        ),
        **dict.fromkeys((r"Is the noun singular or plural\?", r"Singular or plural\?"), number_of_noun),
    },
    "past": dict.fromkeys(
        (r"Write the past tense\.", r"Give the past tense of the verb\.", r"What is the past tense of (\w+)\?"), past
    ),
    "opposite": dict.fromkeys(
        (r"Write the opposite\.", r"Give the opposite of the word\.", r"What is the opposite of (\w+)\?"), opposite
    ),
    "capitals": {
        **dict.fromkeys((r"Write it in capital letters\.", r"Change to upper case\."), str.upper),
        **dict.fromkeys((r"Write it in small letters\.", r"Change to lower case\."), str.lower),
    },
    "letter": {
        **dict.fromkeys(
            (r"Which letter does the word begin with\?", r"Give the first letter of the word\."), lambda word: word[0]
        ),
        **dict.fromkeys(
            (r"Which letter does the word end with\?", r"Give the last letter of the word\."), lambda word: word[-1]
        ),
    },
    "vowel": {
        **dict.fromkeys(
            (r"Does the word begin with a vowel\?", r"Is the first letter of the word a vowel\?"), vowel("yes", "no")
        ),
        **dict.fromkeys(
            (r"Is the first letter a vowel or a consonant\?", r"First letter: vowel or consonant\?"),
            vowel("vowel", "consonant"),
        ),
    },
    "sentiment": dict.fromkeys(
        (
            r"Is the sentence positive or negative\?",
            r"Positive or negative\?",
            r"Is the feeling positive or negative\?",
        ),
        frozenset({"positive", "negative"}),
    ),
    "tense": dict.fromkeys(
        (
            r"Is the sentence in the past or the present tense\?",
            r"Past or present\?",
            r"Which tense is it, past or present\?",
        ),
        frozenset({"past", "present"}),
    ),
    "question": {
        **dict.fromkeys((r"Does the sentence ask a question\?", r"Is this sentence a question\?"), YES_NO),
        **dict.fromkeys(
            (r"Is this a question or a statement\?", r"Question or statement\?"), frozenset({"question", "statement"})
        ),
    },
    "count": dict.fromkeys(
        (r"How many words are there\?", r"Count the words\.", r"How many words does the text have\?"),
        lambda text: {2: "two", 3: "three", 4: "four", 5: "five"}[len(text.split())],
    ),
    "type": dict.fromkeys(
        (r"Which type has this Python value\?", r"Name the type of the Python value\.", r"What type is it\?"),
        lambda text: TYPES[type(ast.literal_eval(text))],
    ),
    "line": dict.fromkeys(
        (
            r"Does the Python line assign, call, compare or import\?",
            r"Assign, call, compare or import\?",
            r"What does this Python line do\?",
        ),
        statement_kind,
    ),
}


class Asked(NamedTuple):
    """A record as the test reads it."""

    category: str
    pattern: str
    filling: str
    output: str
    group: str


def asked(record: dict[str, str]) -> Asked:
    matches = [
        (category, pattern, found)
        for category, rules in QUESTIONS.items()
        for pattern in rules
        if (found := re.fullmatch(pattern, record["instruction"]))
    ]
    assert len(matches) == 1, record
    category, pattern, found = matches[0]
    named = found.groups()
    assert bool(named) == (record["input"] == ""), record
    return Asked(category, pattern, named[0] if named else record["input"], record["output"], record["group"])


ASKED = [asked(record) for record in RECORDS]


def of(category: str) -> list[Asked]:
    return [one for one in ASKED if one.category == category]


def same_filling(filling: str) -> str:
    """A name that spellings of one filling share: capitals do not count, nor does the order of two numbers."""
    pair = re.fullmatch(r"(\d+) (?:and|or) (\d+)", filling)
    return " ".join(sorted(pair.groups(), key=int)) if pair else filling.casefold()


def test_one_ascii_record_a_line() -> None:
    assert TEXT.isascii()
    first, *lines, last, after = TEXT.split("\n")
    assert (first, last, after) == ("[", "]", "")
    assert [json.loads(line.removesuffix(",")) for line in lines] == RECORDS
    assert 850 <= len(RECORDS) <= 1000


def test_keys_and_lengths_of_every_record() -> None:
    for record in RECORDS:
        assert list(record) == ["instruction", "input", "output", "group"]
        assert all(isinstance(value, str) and value == value.strip() for value in record.values()), record
        assert record["instruction"], record
        assert record["group"], record
        assert len(record["instruction"] + record["input"]) <= 100, record  # with a template, 128 tokens hold it
        assert re.fullmatch(r"[A-Za-z0-9]+( [A-Za-z0-9]+){0,3}", record["output"]), record


def test_answers_are_in_small_letters_unless_asked_for_capitals() -> None:
    assert {one.category for one in ASKED if one.output != one.output.lower()} == {"capitals"}


def test_no_prompt_comes_twice() -> None:
    prompts = Counter((record["instruction"], record["input"]) for record in RECORDS)
    assert max(prompts.values()) == 1


@pytest.mark.parametrize("category", QUESTIONS)
def test_every_answer_is_what_its_rule_says(category: str) -> None:
    for one in of(category):
        rule = QUESTIONS[category][one.pattern]
        if isinstance(rule, frozenset):
            assert one.output in rule, one
        else:
            assert one.output == rule(one.filling), one


def test_answers_on_one_filling_agree() -> None:
    """Kinds have no rule, but a phrase that is sorted as a food is a food when that is the question."""
    kinds = {one.filling: one.output for one in of("kind") if one.output not in YES_NO}
    twice = [one for one in of("kind") if one.output in YES_NO and one.filling in kinds]
    assert twice
    for one in twice:
        assert one.output == ("yes" if kinds[one.filling] in one.pattern else "no"), one


def test_every_wording_is_used_and_categories_are_of_like_size() -> None:
    assert 12 <= len(QUESTIONS) <= 16
    wordings = Counter((one.category, one.pattern) for one in ASKED)
    assert set(wordings) == {(category, pattern) for category, rules in QUESTIONS.items() for pattern in rules}
    assert min(wordings.values()) >= 5
    sizes = Counter(one.category for one in ASKED)
    assert min(sizes.values()) >= 30
    assert max(sizes.values()) <= 0.1 * len(ASKED)


def test_guessing_one_answer_is_never_worth_much() -> None:
    """Of all records at most 0.12, and among closed questions no more than its fair share."""
    assert max(Counter(one.output for one in ASKED).values()) <= 0.12 * len(ASKED)
    for category in ("parity", "sentiment", "tense", "count", "type", "line"):
        answers = Counter(one.output for one in of(category))
        assert max(answers.values()) == min(answers.values()), answers
    for category in ("kind", "vowel", "question"):
        yes_no = Counter(one.output for one in of(category) if one.output in YES_NO)
        named = Counter(one.output for one in of(category) if one.output not in YES_NO)
        for answers in (yes_no, named):
            assert max(answers.values()) == min(answers.values()), answers


def test_the_place_of_a_number_does_not_tell_which_is_larger() -> None:
    first = sum(one.output == str(numbers(one.filling)[0]) for one in of("comparison"))
    assert 0.4 <= first / len(of("comparison")) <= 0.6


def test_the_answer_depends_on_the_instruction() -> None:
    """Many an input has several answers, so that a model cannot do without the question."""
    answers = defaultdict(set)
    for record in RECORDS:
        if record["input"]:
            answers[record["input"]].add(record["output"])
    assert sum(len(different) >= 2 for different in answers.values()) >= 150


def test_groups_are_many_and_small() -> None:
    sizes = Counter(one.group for one in ASKED)
    assert len(sizes) >= 350
    assert max(sizes.values()) <= 4


def test_one_filling_has_one_group() -> None:
    groups = defaultdict(set)
    for one in ASKED:
        groups[same_filling(one.filling)].add(one.group)
    assert {filling: names for filling, names in groups.items() if len(names) > 1} == {}


def test_a_form_of_a_word_is_in_the_group_of_the_word() -> None:
    """Else a split could train on `happy -> unhappy` and test `unhappy -> happy`."""
    groups = {same_filling(one.filling): one.group for one in ASKED}
    for one in ASKED:
        if one.category in {"plural", "past", "opposite", "capitals"} and one.output not in {"singular", "plural"}:
            assert groups.get(same_filling(one.output), one.group) == one.group, one


def test_neighbours_in_the_file_are_of_different_categories() -> None:
    assert all(one.category != following.category for one, following in pairwise(ASKED))
