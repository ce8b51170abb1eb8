"""Templates with slots as Jinja programs, run by transformers' `apply_chat_template`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llm_lightning.data.templates.as_jinja import chat_of, jinja_of
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.data.templates.slots import SlotTemplate
from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.tokenizer_files import write_tokenizer

GPT2 = build_tokenizer("gpt2")
ODD = SlotTemplate(
    "odd",
    "{{% if %}} '\"\\\\n[[x]]ü😀\r[({system}|{instruction})]{instruction}[{input}!]\nA\\tB: {response}\n{{{{ y }}}}\t",
    "it's",
)
TEMPLATES = {name: choose_template(name) for name in ("alpaca", "phi3", "chatml")} | {
    "odd": ODD,
    "bare": SlotTemplate("bare", "{system}{input}{instruction}{response}"),
    "no_system": SlotTemplate("no_system", "Q: {instruction}\nA: {response}\n\n"),
}
TURNS = (
    Turn("What is 2 + 3?", "", "5"),
    Turn("  Why?\n", "", "Because {{ it }}\n is '\\n'."),
    Turn("½ {% of %} 日本語", "", ""),
)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' own reading of GPT-2's tokenizer, as an export writes it."""
    transformers = pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(folder, GPT2, None, 1024)
    return transformers.AutoTokenizer.from_pretrained(folder)


def messages_of(conversation: Conversation) -> list[dict[str, str]]:
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    pairs = [pair for turn in conversation.turns for pair in (("user", turn.instruction), ("assistant", turn.response))]
    return system + [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_program_writes_what_the_template_writes(theirs: Any, name: str) -> None:
    template = TEMPLATES[name]
    program, compared = jinja_of(template, GPT2), 0
    for system, n_turns in itertools.product(("", "Be brief: 'yes'."), (1, 2, 3)):
        conversation = Conversation(TURNS[:n_turns], system)
        if system and "system" not in template.slots:
            continue
        messages = messages_of(conversation)
        pieces = [piece.text or END_OF_TEXT for piece in template.segments(conversation, GPT2)]
        assert theirs.apply_chat_template(messages, chat_template=program, tokenize=False) == "".join(pieces)
        options = {"chat_template": program, "add_generation_prompt": True}
        asked = theirs.apply_chat_template(messages[:-1], tokenize=False, **options)
        assert GPT2.decode(template.prompt_ids(GPT2, conversation)) == asked
        # An answer is encoded by itself here: "A: " and "5" are other tokens than "A: 5".
        if n_turns == 1 or name in ("alpaca", "phi3", "chatml"):
            ids = theirs.apply_chat_template(messages[:-1], return_dict=False, **options)
            assert ids == template.prompt_ids(GPT2, conversation)
        compared += 1
    assert compared >= 3
    with pytest.raises(Exception, match="no place for the role tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=program)


class Beginning(type(GPT2)):  # type: ignore[misc]
    """GPT-2's tokenizer as if every text began with its end of text."""

    bos_id = GPT2.eot_id


def test_the_first_token_is_written_once(theirs: Any) -> None:
    tokenizer: Tokenizer = Beginning.from_description(GPT2.describe())
    template = TEMPLATES["alpaca"]
    conversation = Conversation(TURNS[:2])
    asked = theirs.apply_chat_template(
        messages_of(conversation)[:-1],
        chat_template=jinja_of(template, tokenizer),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert asked == template.prompt_ids(tokenizer, conversation)
    assert asked.count(50256) == 2  # and the end of the first answer


def test_what_an_export_is_checked_with(theirs: Any) -> None:
    """Conversations of one and three turns, with a system message only where the template takes one."""
    chat = chat_of(TEMPLATES["alpaca"], GPT2)
    assert chat.description == TEMPLATES["alpaca"].describe()
    assert [len(prompt.messages) for prompt in chat.prompts] == [1, 5, 2, 6]
    assert chat.end_id == 50256
    for messages, ids in chat.prompts:
        options = {"chat_template": chat.jinja, "add_generation_prompt": True, "return_dict": False}
        assert theirs.apply_chat_template(messages, **options) == ids
    assert [len(prompt.messages) for prompt in chat_of(TEMPLATES["no_system"], GPT2).prompts] == [1, 5]
