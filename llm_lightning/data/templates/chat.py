"""Chat templates: Jinja programs, such as a model brings along, run as transformers runs them.

Data flow: a conversation -> messages, control tokens in them hidden -> renderings of the whole conversation and of its
beginnings -> segments -> token ids. The segments are cut by comparing renderings, so that they say what generation will
see: the prompt is a rendering with the generation prompt, and the answer is what the whole rendering has behind it. The
time grows with the square of the number of turns.

Messages with tool calls, results of tools and the schemas of tools reach the program as they are; an answer is whatever
it writes for a message of the assistant, tool calls included.

Of the kinds of segments, `header` is the generation prompt, such as `<|im_start|>assistant`; `response` is all that
generation writes before the end, thinking included; `end` goes up to the first control token that the template writes
after an answer, or is the tokenizer's end of text where it writes none; `prompt` is the rest.

A template may change earlier turns when a conversation goes on: Qwen3's removes their thinking. Then only the last
answer is marked as an answer, because no prompt led to the others as they are.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date as day
from functools import cache, lru_cache
from itertools import product
from typing import Any, NamedTuple

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.chat_messages import Chat, chat_of, cuts_of, hidden
from llm_lightning.data.templates.conversation import Conversation, Segment, Turn, more_than_text, untrained
from llm_lightning.data.templates.hiding import Controls, Hiding
from llm_lightning.data.templates.renderer import RENDERER, RenderError
from llm_lightning.data.templates.shape import Region, Shape
from llm_lightning.tokenizers.base import Tokenizer

DATE = "2024-07-26"
"""The day that a template sees, never today's: the one that Llama 3.1's and 3.2's name themselves."""
_LIKE_CONTROLS = re.compile(r"<\|\w+\|>")
_MARK = "\ue000"
"""Is in no template: a private character."""

_CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
"""For probing; the id has as many characters as Mistral's."""

log = logging.getLogger(__name__)


class Renderings(NamedTuple):
    """Of one conversation; control tokens in its messages are hidden."""

    begun: list[str]
    """Up to each question, with the generation prompt."""
    answered: list[str]
    """Up to each answer; without the last one where that is not known yet."""
    hiding: Hiding


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
        chat = self._chat(conversation)
        return self._render(conversation.place, chat, [(len(chat.messages), False)], None)[0]

    def question(self, conversation: Conversation) -> str:
        return str(self._chat(conversation).messages[-2]["content"])

    def check(self, records: Sequence[Conversation]) -> None:
        first: dict[str, Conversation] = {}
        for one in records:
            for what, is_there in {"a system message": bool(one.system), **more_than_text(one)}.items():
                if is_there:
                    first.setdefault(what, one)
        for what, one in first.items():
            if self._leaves_out(what, one):
                left_out = _LEFT_OUT.get(what, "them out; give another one, data.template=FILE.jinja")
                raise ValueError(f"{one.place} has {what}, but template {self.name} leaves {left_out}")

    def _leaves_out(self, what: str, one: Conversation) -> bool:
        """Whether a rendering is the same without it; a system message may be moved, so that is probed by itself."""
        if what == "a system message":
            probe = chat_of(Conversation((Turn("a", "", "b"),), system=_MARK))
            return _MARK not in self._render(one.place, probe, [(len(probe.messages), False)], None)[0]
        if what == "results of tools":
            return _MARK not in self.text_of(_with_marked_results(one))
        text, turns = self.text_of(one), tuple(turn._replace(calls=()) for turn in one.turns)
        without = one._replace(tools=()) if what == "tools" else one._replace(turns=turns)
        try:
            return text == self.text_of(without)
        except ValueError:  # it looks for calls before results
            return False

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
        controls = _controls(tokenizer)
        done = self._renderings(conversation, tokenizer, is_answered)
        whole = done.answered[-1] if is_answered else done.begun[-1]
        eot = Segment("", "end", () if tokenizer.eot_id is None else (tokenizer.eot_id,))
        segments: list[Segment] = []
        regions = self._regions(done, whole, conversation, tokenizer)
        parts = controls.split(whole, [region.stop for region in regions])
        for region, pieces in zip(regions, parts, strict=True):
            found = [Segment(done.hiding.reveal(t), region.kind, () if i is None else (i,)) for t, i in pieces]
            if region.kind == "end" and not pieces:
                found = [eot]
            segments += found if region.is_trained else map(untrained, found)
        return segments

    def _regions(self, done: Renderings, whole: str, conversation: Conversation, tokenizer: Tokenizer) -> list[Region]:
        """The parts of `whole`; nothing follows the end of a last answer."""
        shape, controls = _shape(self, tokenizer), _controls(tokenizer)
        is_answered = len(done.answered) == len(done.begun)
        turns = [
            (shape.of_calls(begun, answered, controls) if turn.calls else shape, begun, answered, turn.is_trained)
            for turn, begun, answered in zip(conversation.turns, done.begun, done.answered, strict=False)
        ]
        if is_answered and not turns[-1][0].fits(*turns[-1][1:3]):
            raise ValueError(
                f"{conversation.place}: in template {self.name} an answer does not begin where the generation prompt "
                "ends, so what is trained would not be generated; give another one, data.template=FILE.jinja"
            )
        if not all(own.is_in(whole, begun, answered) for own, begun, answered, _ in turns):
            _say_once(
                f"template {self.name} changes earlier turns of a conversation when it goes on: of each conversation "
                "only the last answer is trained"
            )
            turns = turns[-1:] if is_answered else []
        regions: list[Region] = []
        position = 0
        for own, begun, answered, is_trained in turns:
            begin, stop, end = len(begun), len(answered) - len(own.footer), len(own.up_to_end(answered))
            found = [*own.prompt_regions(begun, position), Region(begin, stop, "response"), Region(stop, end, "end")]
            regions += [region._replace(is_trained=is_trained) for region in found]
            position = end
        return regions if is_answered else [*regions, *shape.prompt_regions(whole, position)]

    def _renderings(self, conversation: Conversation, tokenizer: Tokenizer, is_answered: bool) -> Renderings:
        """Render with the control tokens in messages hidden, and compare with the rendering of the messages themselves.

        A template may look for control tokens in an answer and write them itself, as Qwen3's does with `</think>`: then
        those that it looks for are not hidden in answers.
        """
        chat = self._chat(conversation)
        begun, answered = cuts_of(conversation)
        cuts = begun + (answered if is_answered else answered[:-1])
        if not is_answered:
            chat = chat._replace(messages=chat.messages[:-1])
        hiding = Hiding([self.text, json.dumps(chat, ensure_ascii=False)])
        direct = None
        for whole_only, kept in product((False, True) if chat.is_structured else (False,), ((), self._looked_for())):
            masked = hidden(chat, hiding, _controls(tokenizer), kept, whole_only=whole_only)
            texts = self._render(conversation.place, masked, cuts, tokenizer)
            if masked != chat:
                direct = direct or self._render(conversation.place, chat, cuts, tokenizer)
            if masked == chat or list(map(hiding.reveal, texts)) == direct:
                return Renderings(texts[: len(begun)], texts[len(begun) :], hiding)
        raise ValueError(
            f"{conversation.place}: a message spells out a control token, for which template {self.name} writes "
            "something else; leave the record out, or give another template"
        )

    def _chat(self, conversation: Conversation) -> Chat:
        has_calls = any(turn.calls for turn in conversation.turns)
        return chat_of(conversation, takes_objects=not has_calls or _takes_objects(self))

    def _render(
        self, place: str, chat: Chat, cuts: Sequence[tuple[int, bool]], tokenizer: Tokenizer | None
    ) -> list[str]:
        try:
            return RENDERER.render(
                self.text, self.date, chat.messages, cuts, _variables(self, tokenizer), tools=chat.tools
            )
        except RenderError as error:
            raise ValueError(f"{f'{place}: ' if place else ''}template {self.name} {error}") from None

    def _looked_for(self) -> tuple[str, ...]:
        """The texts that the program compares messages with, or splits them at."""
        try:
            return _strings_looked_for(self.text)
        except RenderError as error:
            raise ValueError(f"template {self.name} {error}") from None


_LEFT_OUT = {
    "a system message": "it out",
    "tools": "them out; give one that shows them, data.template=FILE.jinja, or set data.columns.tools=null",
}


def _with_marked_results(conversation: Conversation) -> Conversation:
    turns = []
    for turn in conversation.turns:
        marked = ({**one, "content": _MARK} if one["role"] == "tool" else one for one in turn.before)
        turns.append(turn._replace(before=tuple(marked)))
    return conversation._replace(turns=tuple(turns))


@lru_cache(maxsize=16)
def _shape(template: ChatTemplate, tokenizer: Tokenizer) -> Shape:
    """What a template writes around the answer of a conversation of one turn."""
    chat = chat_of(Conversation((Turn("a", "", _MARK),)))
    asked, begun, answered = template._render("", chat, [(1, False), (1, True), (2, False)], tokenizer)
    if _MARK not in answered:
        raise ValueError(f"template {template.name} leaves answers out; give another one")
    footer = answered.rpartition(_MARK)[2]
    (pieces,) = _controls(tokenizer).split(footer, [len(footer)])
    ends = ((text, index) for text, index in pieces if index is not None)
    return Shape(begun[len(asked) :] if begun.startswith(asked) else "", footer, next(ends, None))


@lru_cache(maxsize=16)
def _takes_objects(template: ChatTemplate) -> bool:
    """Whether a template writes arguments of tool calls that are objects; DeepSeek's takes their JSON text alone."""
    for takes_objects in (True, False):
        probe = chat_of(Conversation((Turn("a", "", "", calls=(_CALL,)),)), takes_objects=takes_objects)
        try:
            template._render("", probe, [(len(probe.messages), False)], None)
        except ValueError:
            continue
        return takes_objects
    return True  # rendering a record says what is wrong


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
