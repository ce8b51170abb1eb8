"""What is cut of a conversation that exceeds the context: nothing that need not be, in the order that is promised."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from llm_lightning.data.cutting import shortened
from llm_lightning.data.instruction import encode
from llm_lightning.data.preference import encode as encode_pair
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.tokenizers.build import build_tokenizer

BYTES = build_tokenizer("byte")
JINJA = (
    "{% for m in messages %}{% if m.role == 'tool' and (loop.first or messages[loop.index0 - 1].role == 'user') %}"
    "{{ raise_exception('a result without a call') }}{% endif %}"
    "<{{ m.role }}>{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDS = (". ", "! ", "? ", '." ', "\n\n", "\u3002", "\uff1f\u300d")
TEMPLATES = ("alpaca", "chatml", "jinja")


class Text:
    """A text made of sentences, of words, so that its borders are known without looking for them."""

    def __init__(self, draw: random.Random, most: int) -> None:
        sentences = [[self._word(draw) for _ in range(draw.randint(1, 3))] for _ in range(draw.randint(1, most))]
        pieces = [f"{' '.join(words)}{draw.choice(ENDS)}" for words in sentences]
        self.text = "".join(pieces).rstrip()
        self.sentences = [at for at in (0, *accumulate(map(len, pieces))) if at < len(self.text)]
        self.words = [at for at in range(len(self.text)) if at == 0 or self.text[at - 1].isspace()]
        self.words = [at for at in self.words if not self.text[at].isspace()]

    @staticmethod
    def _word(draw: random.Random) -> str:
        return "".join(draw.choices("abcé語", k=draw.choice((1, 2, 3, 12))))

    def ends(self, *borders: str) -> Iterator[str]:
        """What may be left of it, the longest first; with characters the whole text is out of the question."""
        of = {"sentences": self.sentences, "words": self.words, "characters": range(1, len(self.text))}
        return (self.text[at:] for name in borders for at in of[name])


def a_template(name: str, folder: Path) -> Template:
    if name == "jinja":
        (folder / "own.jinja").write_text(JINJA)
        return choose_template(str(folder / "own.jinja"))
    return choose_template(name)


def remainders(record: Conversation, texts: dict[str, Text]) -> Iterator[Conversation]:
    """Everything that may be left of a conversation, what is preferred first."""
    yield from (record._replace(turns=record.turns[n:]) for n in range(1, len(record.turns)))
    last = record.turns[-1]
    every = ("sentences", "words", "characters")
    if last.input:
        for text in (*texts["input"].ends(*every), ""):
            yield record._replace(turns=(last._replace(input=text),))
    last = last._replace(input="")
    for text in texts["instruction"].ends("sentences"):
        yield record._replace(turns=(last._replace(instruction=text),))
    sentence = texts["instruction"].text[texts["instruction"].sentences[-1] :]
    if record.system:
        for text in texts["system"].ends(*every):
            yield Conversation((last._replace(instruction=sentence),), system=text)
        yield Conversation((last._replace(instruction=sentence),))
    for text in texts["instruction"].ends("words", "characters"):
        yield Conversation((last._replace(instruction=text),))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(6))
def test_the_first_of_all_remainders_that_fits_is_kept(name: str, seed: int, tmp_path: Path) -> None:
    draw, template = random.Random(seed), a_template(name, tmp_path)
    texts = {part: Text(draw, 4) for part in ("system", "instruction", "input")}
    earlier = [Turn("an earlier question", "", "and its answer")] * (seed % 3)
    last = Turn(texts["instruction"].text, texts["input"].text if seed % 2 else "", "the answer")
    record = Conversation((*earlier, last), system=texts["system"].text if seed % 3 else None)

    def length(one: Conversation) -> int:
        return encode(BYTES, template, one).n_tokens

    whole = length(record)
    candidates = [(one, length(one)) for one in remainders(record, texts)]
    for limit in range(len("the answer"), whole):
        wanted = next((one for one, n in candidates if n <= limit), None)
        assert shortened(record, lambda one, limit=limit: length(one) <= limit) == wanted, limit  # type: ignore[misc]


def test_a_pair_is_cut_alike_for_both_answers(tmp_path: Path) -> None:
    template = a_template("chatml", tmp_path)
    record = Conversation((Turn("One two. Three four.", "", "short"),), rejected="an answer that is much longer")

    def length(one: Conversation) -> int:
        pair = encode_pair(BYTES, template, one)
        return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))

    limit = length(record) - 1
    assert shortened(record, lambda one: length(one) <= limit) == Conversation(
        (Turn("Three four.", "", "short"),), rejected="an answer that is much longer"
    )


CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
WITH_TOOL = (
    Turn("An old question.", "", "old"),
    Turn("Long ago. Now?", "", "", calls=(CALL,)),
    Turn("found", "", "the answer", before=({"role": "tool", "content": "found"},)),
)


@pytest.mark.parametrize("question", ["Long ago. Now?", "Now?", "w?"])
def test_a_result_of_a_tool_stays_with_its_call(question: str, tmp_path: Path) -> None:
    template, record = a_template("jinja", tmp_path), Conversation(WITH_TOOL)
    wanted = record._replace(turns=(WITH_TOOL[1]._replace(instruction=question), WITH_TOOL[2]))
    limit = encode(BYTES, template, wanted).n_tokens
    assert shortened(record, lambda one: encode(BYTES, template, one).n_tokens <= limit) == wanted
    assert shortened(record, lambda one: encode(BYTES, template, one).n_tokens <= 10) is None


LONG = {"sentences": "Some words. " * 80_000, "words": "word " * 200_000, "one word": "x" * 1_000_000}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_question_of_a_megabyte_is_cut_in_seconds(text: str, tmp_path: Path) -> None:
    template, n = a_template("jinja", tmp_path), [0]

    def fits(one: Conversation) -> bool:
        n[0] += 1
        return encode(BYTES, template, one).n_tokens <= 256

    begin = time.monotonic()
    kept = shortened(Conversation((Turn(text, "", "the answer"),)), fits)
    assert kept is not None
    assert text.endswith(kept.turns[0].instruction)
    assert n[0] <= 70
    assert time.monotonic() - begin < 20
