"""Records before a judge: scores, and which of two responses is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.data.templates.slots import TEMPLATES
from llm_lightning.metrics.answers import answer_of, without_thinking
from llm_lightning.metrics.judge.client import Judge, Verdict
from llm_lightning.metrics.judge.prompts import PAIR_PROMPT, PROMPTS, ScorePrompt, parse_choice, parse_score
from llm_lightning.metrics.judge.summaries import Comparison, compared


def score_responses(
    judge: Judge, records: Sequence[Mapping[str, str]], column: str, prompt: ScorePrompt = PROMPTS["book"]
) -> list[Verdict]:
    """Let a judge score one column of responses.

    Args:
        records: with `instruction`, `output`, the column and, if there is one, `input`.
    """
    prompts = []
    for record in records:
        response = without_thinking(record[column])
        texts = {"question": question(record), "output": answer_of(record["output"]), "response": response}
        prompts.append(prompt.text.format(**texts))
    return judge.ask(prompts, lambda answer: parse_score(answer, prompt.lowest, prompt.highest))


def question(record: Mapping[str, str]) -> str:
    """The task in the book's form: Alpaca's preamble, the instruction, and the input, if any."""
    turn = Turn(record["instruction"], record.get("input") or "", "")
    return TEMPLATES["alpaca"].question(Conversation((turn,)))


def compare_responses(
    judge: Judge, records: Sequence[Mapping[str, str]], column_a: str, column_b: str
) -> list[Comparison]:
    """Let a judge say which of two responses is better, in both orders."""
    prompts = []
    for record in records:
        for first, second in ((column_a, column_b), (column_b, column_a)):
            shown = {"first": without_thinking(record[first]), "second": without_thinking(record[second])}
            shown |= {"question": question(record), "output": answer_of(record["output"])}
            prompts.append(PAIR_PROMPT.format(**shown))
    verdicts = judge.ask(prompts, parse_choice)
    return [compared(*orders) for orders in zip(verdicts[::2], verdicts[1::2], strict=True)]
