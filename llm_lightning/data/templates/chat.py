"""Chat templates: Jinja programs, such as a model brings along, run as transformers runs them.

Data flow: a conversation -> messages, control tokens in them hidden -> renderings of the whole conversation and of its
beginnings -> segments -> token ids. The segments are cut by comparing renderings, so that they say what generation will
see: the prompt is a rendering with the generation prompt, and the answer is what the whole rendering has behind it. The
time grows with the square of the number of turns.

Of the kinds of segments, `header` is the generation prompt, such as `<|im_start|>assistant`; `response` is all that
generation writes before the end, thinking included; `end` goes up to the first control token that the template writes
after an answer, or is the tokenizer's end of text where it writes none; `prompt` is the rest.

A template may change earlier turns when a conversation goes on: Qwen3's removes their thinking. Then only the last
answer is marked as an answer, because no prompt led to the others as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date as day
from functools import cache, lru_cache
from typing import Any, NamedTuple

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.conversation import Conversation, Segment, Turn
from llm_lightning.data.templates.hiding import Controls, Hiding
from llm_lightning.data.templates.renderer import RENDERER, RenderError
from llm_lightning.tokenizers.base import Tokenizer

DATE = "2024-07-26"
"""The day that a template sees, never today's: the one that Llama 3.1's and 3.2's name themselves."""
Messages = list[dict[str, str]]
_LIKE_CONTROLS = re.compile(r"<\|\w+\|>")
_MARK = "\ue000"
"""Is in no template: a private character."""

log = logging.getLogger(__name__)


class Renderings(NamedTuple):
    """Of one conversation; control tokens in its messages are hidden."""

    begun: list[str]
    """Up to each question, with the generation prompt."""
    answered: list[str]
    """Up to each answer; without the last one where that is not known yet."""
    hiding: Hiding


class Shape(NamedTuple):
    """What a template writes around every answer."""

    header: str
    """The generation prompt, the last text before an answer."""
    footer: str
    """The text after the last answer."""
    end: tuple[str, int] | None
    """The first control token of the footer, by which an answer ends; None: there is none."""

    def fits(self, begun: str, answered: str) -> bool:
        """Whether a rendering is its prompt, an answer, and the footer."""
        n_around = len(begun) + len(self.footer)
        return answered.startswith(begun) and answered.endswith(self.footer) and len(answered) >= n_around

    def up_to_end(self, answered: str) -> str:
        """A rendering without what follows the end of its last answer."""
        before = len(answered) - len(self.footer)
        return answered[: before + (self.footer.index(self.end[0]) + len(self.end[0]) if self.end else 0)]

    def prompt_regions(self, begun: str, start: int) -> list[tuple[int, int, str]]:
        """(start, stop, kind) of the prompt and the header at the end of `begun`."""
        header = len(begun) - len(self.header) if begun.endswith(self.header) else len(begun)
        return [(start, header, "prompt"), (header, len(begun), "header")]


@dataclass(frozen=True)
class ChatTemplate(Template):
    """A Jinja template.

    Args:
        name: for messages.
        text: the program.
        date: the day that it sees, YYYY-MM-DD.
        special: name and spelling of the special tokens that the program may name, such as `bos_token`.
        controls: control tokens without which a tokenizer is refused.

    Raises:
        ValueError: if the text is no Jinja program; names the line.
    """

    name: str
    text: str
    date: str = DATE
    special: tuple[tuple[str, str], ...] = ()
    controls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            day.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ValueError(f"data.template_date={self.date!r} must be a date such as {DATE}") from None
        self._looked_for()

    def segments(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        return self._segments(conversation, tokenizer, is_answered=True)

    def prompt(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        return self._segments(conversation, tokenizer, is_answered=False)

    def text_of(self, conversation: Conversation) -> str:
        messages = _messages(conversation)
        return self._render(conversation.place, messages, [(len(messages), False)], None)[0]

    def question(self, conversation: Conversation) -> str:
        return _messages(conversation)[-2]["content"]

    def check(self, records: Sequence[Conversation]) -> None:
        first = next((one for one in records if one.system), None)
        if first is None:
            return
        probe = _messages(Conversation((Turn("a", "", "b"),), system=_MARK))
        if _MARK not in self._render(first.place, probe, [(len(probe), False)], None)[0]:
            raise ValueError(f"{first.place} has a system message, but template {self.name} leaves it out")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        missing = [text for text in self.controls if text not in tokenizer.controls]
        if missing:
            raise ValueError(
                f"template {self.name} writes {', '.join(missing)}, which this tokenizer has no control token for; "
                "choose another one, such as data.template=alpaca"
            )
        shape = _shape(self, tokenizer)
        if plain := set(_LIKE_CONTROLS.findall(shape.header + shape.footer)) - tokenizer.controls.keys():
            log.warning("template %s writes %s, for this tokenizer plain text", self.name, ", ".join(sorted(plain)))
        if self.end_id(tokenizer) is None:
            raise ValueError(
                f"template {self.name} ends an answer with no control token of this tokenizer, which has no "
                "end-of-text token either; use another one"
            )

    def end_id(self, tokenizer: Tokenizer) -> int | None:
        end = _shape(self, tokenizer).end
        return end[1] if end else tokenizer.eot_id

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "jinja",
            "name": self.name,
            "text": self.text,
            "date": self.date,
            "tokens": dict(self.special),
            "controls": list(self.controls),
        }

    def digest_values(self) -> list[Any]:
        return [self.text, self.date, [list(pair) for pair in self.special]]

    # --- renderings ------------------------------------------------------------------------------------------------

    def _segments(self, conversation: Conversation, tokenizer: Tokenizer, *, is_answered: bool) -> list[Segment]:
        shape, controls = _shape(self, tokenizer), _controls(tokenizer)
        done = self._renderings(conversation, tokenizer, is_answered)
        whole = done.answered[-1] if is_answered else done.begun[-1]
        end = Segment("", "end", () if tokenizer.eot_id is None else (tokenizer.eot_id,))
        segments: list[Segment] = []
        regions = self._regions(done, whole, shape, conversation.place)
        parts = controls.split(whole, [stop for _, stop, _ in regions])
        for (_, _, kind), pieces in zip(regions, parts, strict=True):
            segments += [Segment(done.hiding.reveal(t), kind, () if i is None else (i,)) for t, i in pieces]
            if kind == "end" and shape.end is None:
                segments.append(end)
        return segments

    def _regions(self, done: Renderings, whole: str, shape: Shape, place: str) -> list[tuple[int, int, str]]:
        """(start, stop, kind) of the parts of `whole`; nothing follows the end of a last answer."""
        turns = list(zip(done.begun, done.answered, strict=False))
        is_answered = len(done.answered) == len(done.begun)
        if is_answered and not shape.fits(*turns[-1]):
            raise ValueError(
                f"{place}: in template {self.name} an answer does not begin where the generation prompt ends, so what "
                "is trained would not be generated; give another one, data.template=FILE.jinja"
            )
        if not all(shape.fits(*turn) and whole.startswith(shape.up_to_end(turn[1])) for turn in turns):
            _say_once(
                f"template {self.name} changes earlier turns of a conversation when it goes on: of each conversation "
                "only the last answer is trained"
            )
            turns = turns[-1:] if is_answered else []
        regions: list[tuple[int, int, str]] = []
        position = 0
        for begun, answered in turns:
            begin, stop, end = len(begun), len(answered) - len(shape.footer), len(shape.up_to_end(answered))
            regions += [*shape.prompt_regions(begun, position), (begin, stop, "response"), (stop, end, "end")]
            position = end
        return regions if is_answered else [*regions, *shape.prompt_regions(whole, position)]

    def _renderings(self, conversation: Conversation, tokenizer: Tokenizer, is_answered: bool) -> Renderings:
        """Render with the control tokens in messages hidden, and compare with the rendering of the messages themselves.

        A template may look for control tokens in an answer and write them itself, as Qwen3's does with `</think>`: then
        those that it looks for are not hidden in answers.
        """
        messages = _messages(conversation)[: None if is_answered else -1]
        roles, n_questions = [message["role"] for message in messages], len(conversation.turns)
        cuts = [(n, True) for n, role in enumerate(roles, start=1) if role == "user"]
        cuts += [(n, False) for n, role in enumerate(roles, start=1) if role == "assistant"]
        hiding = Hiding([self.text, *(message["content"] for message in messages)])
        direct = None
        for kept in ((), self._looked_for()):
            hidden = [_hidden(message, hiding, _controls(tokenizer), kept) for message in messages]
            texts = self._render(conversation.place, hidden, cuts, tokenizer)
            if hidden != messages:
                direct = direct or self._render(conversation.place, messages, cuts, tokenizer)
            if hidden == messages or list(map(hiding.reveal, texts)) == direct:
                return Renderings(texts[:n_questions], texts[n_questions:], hiding)
        raise ValueError(
            f"{conversation.place}: a message spells out a control token, for which template {self.name} writes "
            "something else; leave the record out, or give another template"
        )

    def _render(
        self, place: str, messages: Messages, cuts: Sequence[tuple[int, bool]], tokenizer: Tokenizer | None
    ) -> list[str]:
        try:
            return RENDERER.render(self.text, self.date, messages, cuts, _variables(self, tokenizer))
        except RenderError as error:
            raise ValueError(f"{f'{place}: ' if place else ''}template {self.name} {error}") from None

    def _looked_for(self) -> tuple[str, ...]:
        """The texts that the program compares messages with, or splits them at."""
        try:
            return _strings_looked_for(self.text)
        except RenderError as error:
            raise ValueError(f"template {self.name} {error}") from None


def _hidden(message: dict[str, str], hiding: Hiding, controls: Controls, kept: Collection[str]) -> dict[str, str]:
    content = message["content"]
    positions = controls.spelled_in(content, kept if message["role"] == "assistant" else ())
    return {**message, "content": hiding.hide(content, positions)} if positions else message


def _messages(conversation: Conversation) -> Messages:
    """A message for each role and turn; the input of a question is on the lines after the instruction."""
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    turns = [
        {"role": role, "content": content}
        for turn in conversation.turns
        for role, content in (
            ("user", f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction),
            ("assistant", turn.response),
        )
    ]
    return [*system, *turns]


@lru_cache(maxsize=16)
def _shape(template: ChatTemplate, tokenizer: Tokenizer) -> Shape:
    """What a template writes around the answer of a conversation of one turn."""
    messages = _messages(Conversation((Turn("a", "", _MARK),)))
    asked, begun, answered = template._render("", messages, [(1, False), (1, True), (2, False)], tokenizer)
    if _MARK not in answered:
        raise ValueError(f"template {template.name} leaves answers out; give another one")
    footer = answered.rpartition(_MARK)[2]
    (pieces,) = _controls(tokenizer).split(footer, [len(footer)])
    ends = ((text, index) for text, index in pieces if index is not None)
    return Shape(begun[len(asked) :] if begun.startswith(asked) else "", footer, next(ends, None))


@lru_cache(maxsize=16)
def _variables(template: ChatTemplate, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What a program may name beside the messages: special tokens, and Llama's `date_string`."""
    tokens = {"bos_token": "", "eos_token": ""}
    if tokenizer is not None:
        spelling: dict[int | None, str] = {index: text for text, index in tokenizer.controls.items()}
        tokens |= {"bos_token": spelling.get(tokenizer.bos_id, ""), "eos_token": spelling.get(tokenizer.eot_id, "")}
        tokens |= getattr(tokenizer, "special_tokens", {})
    date_string = day.fromisoformat(template.date).strftime("%d %b %Y")
    return {**tokens, **dict(template.special), "date_string": date_string}


@lru_cache(maxsize=16)
def _controls(tokenizer: Tokenizer) -> Controls:
    return Controls(tokenizer.controls, tokenizer.control_flags)


@cache
def _strings_looked_for(text: str) -> tuple[str, ...]:
    return tuple(RENDERER.strings_looked_for(text))


@cache
def _say_once(message: str) -> None:
    log.info(message)
