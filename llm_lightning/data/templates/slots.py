"""Templates with slots, for models that were trained on no template: alpaca, phi3, chatml, and your own text.

A template is one string with slots. The alpaca template, for example, is

    [{system}\\n\\n]### Instruction:\\n{instruction}[\\n\\n### Input:\\n{input}]\\n\\n### Response:\\n{response}\\n\\n

`{instruction}` and `{response}` are required, `{input}` and `{system}` optional. A section in `[...]` is left out where
a slot in it is empty; it cannot begin or end with a bracket. `[[`, `]]`, `{{`, `}}` are the signs themselves, a
backslash and n is a line break. Text after `{response}` is written between two turns, not after the last. Each answer
ends with the end-of-text token.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.conversation import Conversation, Segment, more_than_text, untrained
from llm_lightning.nearest import did_you_mean
from llm_lightning.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

SLOTS = ("system", "instruction", "input", "response")
_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{(\w*)\}|[\[\]{}]")


class Part(NamedTuple):
    """Fixed text, a slot, or an optional section of parts."""

    text: str = ""
    slot: str = ""
    section: tuple[Part, ...] = ()


@dataclass(frozen=True)
class SlotTemplate(Template):
    """A parsed template.

    Args:
        name: for messages.
        text: see the top of this file.
        system: fills `{system}` where a record has no system message.

    Raises:
        ValueError: for an unknown or missing slot, or brackets that do not match.
    """

    name: str
    text: str
    system: str = ""

    def __post_init__(self) -> None:
        self._parts  # noqa: B018 (parsed now, so that a mistake is reported before any data is read)

    @property
    def slots(self) -> set[str]:
        """The names of its slots."""
        inner = [part for outer in self._parts for part in (outer, *outer.section)]
        return {part.slot for part in inner if part.slot}

    def segments(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        end = self.end_id(tokenizer)
        ids = () if end is None else (end,)
        # As the exported program does: behind a control token, Llama 2's kind may add no space.
        begin = [] if tokenizer.bos_id is None else [Segment("", "prompt", (tokenizer.bos_id,))]
        return [*begin, *self._segments(conversation, ids)]

    def prompt(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        answer = 2 if conversation.turns[-1].response else 1
        return self.segments(conversation, tokenizer)[:-answer]

    def text_of(self, conversation: Conversation) -> str:
        return "".join(segment.text for segment in self._segments(conversation))

    def question(self, conversation: Conversation) -> str:
        return self._question(conversation, len(conversation.turns) - 1)[0].text

    def check(self, records: Sequence[Conversation]) -> None:
        for one in records:
            self._refuse_tools(one)
            if "system" not in self.slots and one.system:
                raise ValueError(f"{one.place} has a system message, but template {self.name} has no {{system}} slot")
            if "input" not in self.slots and any(turn.input for turn in one.turns):
                raise ValueError(f"{one.place} has an input, but template {self.name} has no {{input}} slot")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eot_id is None:
            raise ValueError("this tokenizer has no end-of-text token, with which an answer ends; use another one")
        if spelled := sorted(text for text in tokenizer.controls if text in self.text):
            log.warning(
                "template %s writes %s as plain text, not as this tokenizer's control tokens: a .jinja file, or the "
                "model's own template, writes those",
                self.name, ", ".join(spelled),
            )  # fmt: skip

    def end_id(self, tokenizer: Tokenizer) -> int | None:
        return tokenizer.eot_id

    def describe(self) -> dict[str, Any]:
        return {"kind": "slots", "name": self.name, "text": self.text, "system": self.system}

    def digest_values(self) -> list[Any]:
        return [self.text, self.system]

    def _segments(self, conversation: Conversation, end: tuple[int, ...] = ()) -> list[Segment]:
        self._refuse_tools(conversation)
        segments: list[Segment] = []
        for number, turn in enumerate(conversation.turns):
            asked = [Segment(self._after, "prompt")] if number else []
            asked += self._question(conversation, number)
            answer = [Segment(turn.response, "response")] if turn.response else []
            pieces = [*(piece for piece in asked if piece.text), *answer, Segment("", "end", end)]
            segments += pieces if turn.is_trained else map(untrained, pieces)
        return segments

    def _refuse_tools(self, conversation: Conversation) -> None:
        has = [what for what, is_there in more_than_text(conversation).items() if is_there]
        if has:
            raise ValueError(
                f"{conversation.place} has {' and '.join(has)}, for which template {self.name} has no place; use the "
                "model's own chat template (data.template=null with init_from), or a Jinja file, "
                "data.template=FILE.jinja"
            )

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        return _parse(self.name, self.text.replace("\\n", "\n"))

    @property
    def _after(self) -> str:
        return "".join(part.text for part in self._parts[self._answer_at + 1 :])

    @property
    def _answer_at(self) -> int:
        return next(index for index, part in enumerate(self._parts) if part.slot == "response")

    @property
    def pieces(self) -> tuple[Sequence[Part], str, str]:
        """The parts of a question, the fixed text before an answer, and the fixed text between two turns."""
        before = self._parts[: self._answer_at]
        header = before[-1].text if before and not before[-1].slot and not before[-1].section else ""
        return before[:-1] if header else before, header, self._after

    def _question(self, conversation: Conversation, number: int) -> list[Segment]:
        turn = conversation.turns[number]
        # Only at the beginning.
        system = (conversation.system or self.system) if number == 0 else ""
        values = {"system": system, "instruction": turn.instruction, "input": turn.input}
        parts, header, _ = self.pieces
        return [Segment(_render(parts, values), "prompt"), *([Segment(header, "header")] if header else [])]


def _render(parts: Sequence[Part], values: Mapping[str, str]) -> str:
    pieces = []
    for part in parts:
        if part.section:
            wanted = [inner.slot for inner in part.section if inner.slot]
            if all(values[slot] for slot in wanted):
                pieces.append(_render(part.section, values))
        else:
            pieces.append(values[part.slot] if part.slot else part.text)
    return "".join(pieces)


def _parse(name: str, text: str) -> tuple[Part, ...]:
    """Raises ValueError with the reason."""
    parts: list[Part] = []
    section: list[Part] | None = None
    end = 0
    for match in [*_TOKEN.finditer(text), None]:
        here = parts if section is None else section
        literal = text[end : match.start() if match else len(text)]
        if literal:
            here.append(Part(text=literal))
        if match is None:
            break
        sign, end = match[0], match.end()
        if sign in ("{{", "}}", "[[", "]]"):
            here.append(Part(text=sign[0]))
        elif match[1] is not None:
            here.append(Part(slot=_known_slot(name, match[1])))
        elif sign == "[" and section is None:
            section = []
        elif sign == "]" and section is not None:
            if not any(part.slot for part in section):
                raise ValueError(
                    f"template {name}: the section {_shown(text, end)} has no slot; write [[ for a bracket"
                )
            parts.append(Part(section=tuple(_joined(section))))
            section = None
        else:
            raise ValueError(
                f"template {name}: {sign!r} without its partner {_shown(text, end)}; write {sign}{sign} for the sign"
            )
    if section is not None:
        raise ValueError(f"template {name}: a section '[' never ends; write [[ for the sign")
    return _checked(name, tuple(_joined(parts)))


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring pieces of fixed text as one."""
    joined: list[Part] = []
    for is_text, run in groupby(parts, key=lambda part: bool(part.text)):
        pieces = list(run)
        joined += [Part(text="".join(part.text for part in pieces))] if is_text else pieces
    return joined


def _checked(name: str, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    inner = [part.slot for outer in parts for part in outer.section]
    top = [part.slot for part in parts]
    for slot in ("instruction", "response"):
        if slot not in top + inner:
            raise ValueError(f"template {name} has no {{{slot}}} slot; it needs {{instruction}} and {{response}}")
    if "response" in inner or top.count("response") > 1:
        raise ValueError(f"template {name}: {{response}} must occur once, outside of [...]")
    if any(not part.text for part in parts[top.index("response") + 1 :]):
        raise ValueError(f"template {name}: only fixed text may follow {{response}}")
    return parts


def _known_slot(name: str, slot: str) -> str:
    if slot in SLOTS:
        return slot
    hint = did_you_mean(slot, SLOTS, "{{{}}}")
    raise ValueError(
        f"template {name}: unknown placeholder {{{slot}}}; {hint}there are "
        f"{', '.join(f'{{{one}}}' for one in SLOTS)}, and {{{{ for the sign"
    )


def _shown(text: str, end: int) -> str:
    return f"at {text[max(0, end - 20) : end]!r}"


ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)  # fmt: skip
TEMPLATES = {
    # Taori et al. 2023, in the book's form: one preamble, with and without input.
    "alpaca": SlotTemplate(
        "alpaca",
        "[{system}\n\n]### Instruction:\n{instruction}[\n\n### Input:\n{input}]\n\n### Response:\n{response}\n\n",
        ALPACA_SYSTEM,
    ),
    # The book's exercise 7.1, shorter by half.
    "phi3": SlotTemplate(
        "phi3", "[<|system|>\n{system}\n]<|user|>\n{instruction}[\n{input}]\n<|assistant|>:\n{response}\n"
    ),
    # OpenAI's markup as plain text: an answer ends with the end-of-text token, that of smollm2 with <|im_end|>.
    "chatml": SlotTemplate(
        "chatml",
        "[<|im_start|>system\n{system}<|im_end|>\n]<|im_start|>user\n{instruction}[\n{input}]<|im_end|>\n"
        "<|im_start|>assistant\n{response}<|im_end|>\n",
    ),
}
