"""Templates for other programs: a template with slots as a Jinja program; one that is Jinja already as it came.

The program renders messages of `system`, `user` and `assistant` as our template renders the conversation. It spells out
the end-of-text token where ours has its id, and the id with which the tokenizer begins a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import date as day

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.chat import ChatTemplate
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.data.templates.slots import Part, SlotTemplate
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights.chat import Chat, Message, Prompt

_TURNS = ("What is 2 + 3?", "5"), ("Why?", "Because."), ("Say it\n\nin two lines, with ½ and ©.", "")
_SYSTEM = "You answer in one word."


def chat_of(template: Template, tokenizer: Tokenizer) -> Chat:
    """Describe a template for the files of an export.

    Raises:
        ValueError: if the tokenizer has not what the template needs.
    """
    template.check_tokenizer(tokenizer)
    tokens: dict[str, str] = {}
    variables: dict[str, str] = {}
    if isinstance(template, ChatTemplate):
        jinja, tokens = template.text, dict(template.special)
        variables = {"date_string": day.fromisoformat(template.date).strftime("%d %b %Y")}
    else:
        assert isinstance(template, SlotTemplate)
        jinja = jinja_of(template, tokenizer)
    prompts = tuple(_prompts(template, tokenizer))
    return Chat(template.describe(), jinja, template.end_id(tokenizer), tokens, variables, prompts)


def jinja_of(template: SlotTemplate, tokenizer: Tokenizer) -> str:
    """The Jinja program of a template with slots; `{input}` is empty, because a message is one text."""
    spelling = {index: text for text, index in tokenizer.controls.items()}
    begin = "" if tokenizer.bos_id is None else spelling[tokenizer.bos_id]
    end_id = template.end_id(tokenizer)
    end = "" if end_id is None else spelling[end_id]
    question, header, after = template.pieces
    lines = [
        f"{{%- set system = {_quoted(template.system)} %}}",
        "{%- if messages[0]['role'] == 'system' %}",
        "{%- set system = messages[0]['content'] or system %}",
        "{%- set messages = messages[1:] %}",
        "{%- endif %}",
        *_written(begin),
        "{%- for message in messages %}",
        "{%- if message['role'] == 'user' %}",
        *(["{%- if not loop.first %}", *_written(after), "{%- endif %}"] if after else []),
        *itertools.chain.from_iterable(map(_rendered, question)),
        "{%- elif message['role'] == 'assistant' %}",
        *_written(header),
        "{{- message['content'] }}",
        *_written(end),
        "{%- else %}",
        "{{- raise_exception('this template has no place for the role ' + message['role']) }}",
        "{%- endif %}",
        "{%- endfor %}",
        *(["{%- if add_generation_prompt %}", *_written(header), "{%- endif %}"] if header else []),
    ]
    return "\n".join(lines)


def _rendered(part: Part) -> Iterator[str]:
    """The lines that write a part of a question."""
    if part.section:
        wanted = [inner.slot for inner in part.section if inner.slot]
        if "input" not in wanted:
            yield f"{{%- if {' and '.join(map(_value, wanted))} %}}"
            yield from itertools.chain.from_iterable(map(_rendered, part.section))
            yield "{%- endif %}"
    elif part.text:
        yield from _written(part.text)
    elif part.slot != "input":
        yield f"{{{{- {_value(part.slot)} }}}}"


def _value(slot: str) -> str:
    """The expression of a slot; the system message is only at the beginning."""
    return {"system": "(system if loop.first else '')", "instruction": "message['content']"}[slot]


def _written(text: str) -> list[str]:
    return [f"{{{{- {_quoted(text)} }}}}"] if text else []


def _quoted(text: str) -> str:
    r"""A literal of Jinja, which knows Python's escapes: one that is read alike by programs that know only `\n`."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _prompts(template: Template, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Conversations of one and of several turns, with a system message where the template takes one."""
    for system, n_turns in itertools.product((None, _SYSTEM), (1, len(_TURNS))):
        turns = [Turn(question, "", answer) for question, answer in _TURNS[:n_turns]]
        conversation = Conversation((*turns[:-1], turns[-1]._replace(response="")), system, "the export's example")
        try:
            template.check([conversation])
            ids = template.prompt_ids(tokenizer, conversation)
        except ValueError:  # it has no place for one of the roles
            continue
        yield Prompt(_messages(system, turns), ids)


def _messages(system: str | None, turns: Sequence[Turn]) -> list[Message]:
    pairs = [pair for turn in turns for pair in (("user", turn.instruction), ("assistant", turn.response))]
    told = [("system", system)] if system else []
    return [{"role": role, "content": content} for role, content in [*told, *pairs[:-1]]]
