"""Prompts for a judge, and the parsing of its answers."""

from __future__ import annotations

import re
from typing import NamedTuple

TIE = "tie"


class ScorePrompt(NamedTuple):
    """A prompt that asks for a score, and its scale."""

    text: str
    lowest: int
    highest: int


PROMPTS = {
    # Verbatim from the book.
    "book": ScorePrompt(
        "Given the input `{question}` and correct output `{output}`, score the model response `{response}` on a scale "
        "from 0 to 100, where 100 is the best score. Respond with the integer number only.",
        0,
        100,
    ),
    # Defines each score, like Prometheus (Kim et al. 2024).
    "rubric": ScorePrompt(
        "You grade a response to a task. You are given the task, a reference answer that deserves the score 5, the "
        "response, and a rubric. Grade by the rubric alone: whether the response is right and does what the task "
        "asks, not how long it is or whether it uses the words of the reference.\n\n"
        "[Task]\n{question}\n\n"
        "[Reference answer]\n{output}\n\n"
        "[Response]\n{response}\n\n"
        "[Rubric]\n"
        "1: does not answer the task, or nothing in it is right\n"
        "2: answers the task, but its main point is wrong or missing\n"
        "3: its main point is right, but something important is wrong or missing\n"
        "4: right and complete but for small slips of fact, form or wording\n"
        "5: right, complete and as good as the reference answer\n\n"
        "Respond with the integer only: 1, 2, 3, 4 or 5.",
        1,
        5,
    ),
}
PAIR_PROMPT = (
    "You compare two responses to a task. You are given the task, a reference answer, and the responses A and B. The "
    "better one is the one that is right and does what the task asks; neither its length, nor whether it stands first, "
    "nor whether it uses the words of the reference makes it better.\n\n"
    "[Task]\n{question}\n\n"
    "[Reference answer]\n{output}\n\n"
    "[Response A]\n{first}\n\n"
    "[Response B]\n{second}\n\n"
    "Respond with A if response A is better, with B if response B is better, or with tie if they are equally good. "
    "Respond with that one word only."
)


def parse_score(answer: str, lowest: int, highest: int) -> int | None:
    """The score, if the answer is only an integer on the scale; None for `85/100`, `85.` or `Score: 85`."""
    if not re.fullmatch("[0-9]{1,9}", answer.strip()):
        return None
    score = int(answer)
    return score if lowest <= score <= highest else None


def parse_choice(answer: str) -> str | None:
    """`A`, `B` or `tie`, in any case; None for anything else."""
    return {"a": "A", "b": "B", TIE: TIE}.get(answer.strip().casefold())
