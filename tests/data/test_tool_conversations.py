"""Conversations with tools in chat templates: renderings and masks of transformers, by hand where it has none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from test_chat_templates import as_messages, ids_of, library, made_tokenizer, marks_of, own_template, published

from llm_lightning.data.instruction import Targets, encode
from llm_lightning.data.records.instruction import InstructionForm
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.chat import ChatTemplate
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn, as_plain, as_stored, from_stored
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer

SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The temperature of a city, <|im_end|> no more.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(city: str = "Oslo") -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": content}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


MESSAGES: dict[str, list[dict[str, Any]]] = {
    "one": [
        said("user", "Is it cold in Oslo?"), said("assistant", "", tool_calls=[call()]), result("-4"),
        said("assistant", "Yes, -4."),
    ],
    "system, more turns": [
        said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello."), said("user", "Oslo?"),
        said("assistant", "I look it up.", tool_calls=[call()]), result("-4"), said("assistant", "-4."),
        said("user", "Thanks <|im_start|>"), said("assistant", "Welcome."),
    ],
    "call after call": [
        said("user", "Oslo, Rome?"), said("assistant", "", tool_calls=[call()]), result("-4"),
        said("assistant", "", tool_calls=[call("Rome")]), result("21 <|im_end|>"), said("assistant", "-4, 21."),
    ],
    "ends with a call": [said("user", "Oslo?"), said("assistant", "", tool_calls=[call("<|eot_id|>")])],
}  # fmt: skip
SEVERAL_CALLS = [
    said("user", "Oslo, Rome?"), said("assistant", "", tool_calls=[call(), call("Rome")]), result("-4"), result("21"),
    said("assistant", "-4, 21."),
]  # fmt: skip
ONE_CALL_AT_ONCE = ("llama3_1", "llama3_2")
RENDERED = ["llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "glm4moe"]


def conversation(messages: Sequence[Mapping[str, Any]], *, tools: Any = "usual", **more: Any) -> Conversation:
    """By the form of a record."""
    record = {"messages": list(messages), "tools": [SCHEMA] if tools == "usual" else tools, **more}
    return InstructionForm()(record, "file:3", Counter())


def by_transformers(text: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    known = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "date_string": "26 Jul 2024"}
    [rendered], _ = render_jinja_template([list(messages)], tools=[SCHEMA], chat_template=text, **options, **known)
    return rendered


def shown(template: Template, one: Conversation, tokenizer: JsonTokenizer) -> list[tuple[str, str]]:
    """(kind, text) of neighbouring segments together."""
    found: list[tuple[str, str]] = []
    for segment in template.segments(one, tokenizer):
        if found and found[-1][0] == segment.kind:
            found[-1] = (segment.kind, found[-1][1] + segment.text)
        else:
            found.append((segment.kind, segment.text))
    return found


# --- renderings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RENDERED)
def test_renders_as_transformers(name: str) -> None:
    """Whole conversations and prompts, the schemas of tools and control tokens in any text included."""
    text, tokenizer = published(name), made_tokenizer()
    template = own_template(text)
    cases = [*MESSAGES.values(), *([] if name in ONE_CALL_AT_ONCE else [SEVERAL_CALLS])]
    for messages in cases:
        one = conversation(messages)
        template.check([one])
        assert template.text_of(one) == by_transformers(text, messages)
        prompt = "".join(segment.text for segment in template.prompt(one, tokenizer))
        assert prompt == by_transformers(text, messages[:-1], add_generation_prompt=True)
        whole = "".join(segment.text for segment in template.segments(one, tokenizer))
        assert by_transformers(text, messages).startswith(whole)
        assert whole.startswith(prompt)


@pytest.mark.parametrize("name", ["qwen2_5_training", "qwen3_instruct_2507_training", "qwen3_training"])
def test_targets_are_those_that_the_template_marks(name: str) -> None:
    """By `{% generation %}`, which transformers reads; it also has the line breaks around an answer."""
    from transformers import PreTrainedTokenizerFast

    text, tokenizer = published(name), made_tokenizer()
    template = own_template(text)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=library(), bos_token="<|begin_of_text|>", eos_token="<|im_end|>"
    )
    plain = [[{**one, "content": one["content"].replace("<", "(")} for one in case] for case in MESSAGES.values()]
    tool = json.loads(json.dumps(SCHEMA).replace("<|", "(("))  # transformers lets texts become control tokens
    for messages in [*plain[:3], SEVERAL_CALLS]:
        found = encode(tokenizer, template, conversation(messages, tools=[tool]))
        expected = reference.apply_chat_template(
            messages, tools=[tool], chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )
        n = len(found.token_ids)
        assert found.token_ids.tolist() == expected["input_ids"][:n]
        wanted = [bool(one) for one in expected["assistant_masks"][:n]]
        ours = marks_of(found)
        extra = [found.token_ids[at] for at in range(n) if wanted[at] and not ours[at]]
        assert {tokenizer.decode([int(one)]).strip() for one in extra} <= {""}, "no more than white space"
        assert not any(one and not other for one, other in zip(ours, wanted, strict=True))
        assert sum(ours) > 20


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_every_answer_is_trained_with_its_calls_and_its_end(name: str) -> None:
    template, tokenizer = own_template(published(name)), made_tokenizer()
    found = shown(template, conversation(MESSAGES["call after call"]), tokenizer)
    start, stop = '<tool_call>\n{"name": "weather", "arguments": {"city": "', '"}}\n</tool_call>'
    calls = [f"{start}{city}{stop}" for city in ("Oslo", "Rome")]
    assert [text for kind, text in found if kind == "response"] == [*calls, "-4, 21."]
    assert [text for kind, text in found if kind == "end"] == ["<|im_end|>"] * 3
    assert [text for kind, text in found if kind == "header"] == ["<|im_start|>assistant\n"] * 3
    prompts = [text for kind, text in found if kind == "prompt"]
    assert "# Tools" in prompts[0]
    before, behind = "\n<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n"
    assert prompts[1:] == [f"{before}-4{behind}", f"{before}21 <|im_end|>{behind}"]


def test_a_call_that_ends_with_another_control_token() -> None:
    """As in gpt-oss and Llama 3.1's built-in tools: the end of a call is not that of an answer."""
    text = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|eot_id|>\n{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    )
    found = shown(ChatTemplate("t", text), conversation(MESSAGES["one"], tools=None), made_tokenizer())
    answers = [(kind, text) for kind, text in found if kind in ("response", "end")]
    assert answers == [("response", "weather"), ("end", "<|eot_id|>"), ("response", "Yes, -4."), ("end", "<|im_end|>")]


# --- arguments --------------------------------------------------------------------------------------------------------

NAMES_AND_ARGUMENTS = (
    "{%% for m in messages %%}[{{ m.role }}{{ m.content }}{%% for c in m.tool_calls %%}{{ c.function.name + %s }}"
    "{%% endfor %%}]{%% endfor %%}"
)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("(c.function.arguments | tojson)", '{"city": "Oslo"}'),
        ("c.function.arguments", '{"city": "Oslo"}'),  # fails for an object, as DeepSeek's
        ("'%s' % c.function.arguments.city", "Oslo"),
    ],
)
@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_are_objects_or_text_as_the_template_takes_them(given: Any, text: str, rendered: str) -> None:
    """OpenAI's files have the JSON text of an object, others the object."""
    wanted = {**call(), "function": {"name": "weather", "arguments": given}}
    messages = [said("user", "?"), said("assistant", "", tool_calls=[wanted])]
    template = ChatTemplate("t", NAMES_AND_ARGUMENTS % text)
    assert template.text_of(conversation(messages, tools=None)) == f"[user?][assistantweather{rendered}]"


def test_nothing_in_a_call_or_a_schema_becomes_a_control_token() -> None:
    template, tokenizer = own_template(published("qwen2_5")), made_tokenizer()
    controls = set(tokenizer.controls.values())

    def found(word: str) -> list[int]:
        messages = [
            said("user", "?"),
            said("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {f"a{word}": [word, 1, None]}}}]),
            {**result(word), "name": word},
            said("assistant", word),
        ]
        schema = {"type": "object", word: {"description": f"{word} x {word}", "type": word}}
        pieces = template.tokens(tokenizer, template.segments(conversation(messages, tools=[schema]), tokenizer))
        return [index for ids, _ in pieces for index in ids.tolist() if index in controls]

    expected = found("x")
    for word in [*tokenizer.controls, "<|im_start|><|im_start|>", "<|<|im_end|>im_end|>", "im_end", "|>", "\ue000"]:
        assert found(word) == expected, word


def test_a_type_that_is_also_a_part_of_a_control_token_is_found_by_the_template() -> None:
    text = (
        "{% for t in tools or [] %}{{ '!' if t.type == 'user' }}{{ t.description }}{% endfor %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    schema = {"type": "user", "description": "d <|im_end|>"}  # the tokenizer has <|user|>
    template, tokenizer = ChatTemplate("t", text), made_tokenizer()
    one = conversation([said("user", "a"), said("assistant", "b")], tools=[schema])
    assert template.prompt_ids(tokenizer, one) == ids_of("!d ") + tokenizer.encode("<|im_end|>") + ids_of(
        "a", "<|im_end|>"
    )


# --- what has no place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [
        (MESSAGES["one"], [SCHEMA], "tools and tool calls and results of tools"),
        (MESSAGES["one"], None, "tool calls and results of tools"),
        (MESSAGES["ends with a call"], None, "tool calls"),
        ([said("user", "a"), said("assistant", "b")], [SCHEMA], "tools"),
    ],
)
def test_a_template_with_slots_has_no_place_for_tools(messages: Any, tools: Any, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^file:3 has {what}, for which template alpaca has no place; use the mod"):
        choose_template("alpaca").check([conversation(messages, tools=tools)])
    with pytest.raises(ValueError, match=rf"^file:3 has {what}, for which template alpaca has no place"):
        choose_template("alpaca").prompt_ids(made_tokenizer(), conversation(messages, tools=tools))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{{ m.role }}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}", "tools"),
        ("{{ tools }}{{ m.role }}{{ m.content }}", "tool calls"),
        ("{{ tools }}{{ m.tool_calls }}{{ m.content if m.role != 'tool' }}", "results of tools"),
    ],
)
def test_a_chat_template_that_leaves_something_out_is_named(text: str, what: str) -> None:
    template = ChatTemplate("t", f"{{% for m in messages %}}{text}{{% endfor %}}")
    with pytest.raises(ValueError, match=rf"^file:3 has {what}, but template t leaves them out; give "):
        template.check([conversation(MESSAGES["one"])])
    whole = "{% for m in messages %}{{ tools }}{{ m.tool_calls }}{{ m.content }}{% endfor %}"
    ChatTemplate("t", whole).check([conversation(MESSAGES["one"])])


def test_a_template_may_look_for_the_call_before_a_result() -> None:
    text = (
        "{% set ns = namespace(called=false) %}{% for m in messages %}{% if m.tool_calls %}{% set ns.called = true %}"
        "{% elif m.role == 'tool' and not ns.called %}{{ raise_exception('no call') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    ChatTemplate("t", text).check([conversation(MESSAGES["one"], tools=None)])


# --- a conversation ---------------------------------------------------------------------------------------------------


def test_turns_of_a_conversation_with_tools() -> None:
    one = conversation(MESSAGES["system, more turns"])
    assert one.turns == (
        Turn("Hi", "", "Hello."),
        Turn("Oslo?", "", "I look it up.", calls=(call(),)),
        Turn("-4", "", "-4.", before=(result("-4"),)),
        Turn("Thanks <|im_start|>", "", "Welcome."),
    )
    assert (one.system, one.tools) == ("Be brief.", (SCHEMA,))


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=list(MESSAGES))
def test_a_conversation_survives_its_store(messages: Any) -> None:
    one = conversation(messages, group="g")
    assert from_stored(as_stored(one).encode()) == one
    untrained = one._replace(turns=(*one.turns[:-1], one.turns[-1]._replace(is_trained=False)))
    assert from_stored(as_stored(untrained).encode()) == untrained != one


def test_plain_values_are_those_of_before_and_tell_conversations_with_tools_apart() -> None:
    turn = Turn("q", "i", "a")
    assert as_plain(Conversation((turn, turn), "S", rejected="r")) == ["S", ["q", "i", "a"], ["q", "i", "a"], "r"]
    assert as_plain(Conversation((turn,))) == ["", ["q", "i", "a"]]
    others = [
        Conversation((turn,)),
        Conversation((turn,), tools=(SCHEMA,)),
        Conversation((turn._replace(is_trained=False),)),
        Conversation((turn._replace(calls=(call(),)),)),
        Conversation((turn._replace(calls=(call("Rome"),)),)),
        Conversation((turn._replace(before=(result("q"),)),)),
    ]
    assert len({json.dumps(as_plain(one)) for one in others}) == len(others)


# --- answers without a loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["response", "header", "all"])
@pytest.mark.parametrize("name", ["smollm2", "llama3", "Q{instruction}\nA{response}|"])
def test_an_answer_of_weight_0_is_never_a_target(name: str, loss_on: str) -> None:
    """Nor is its end, nor the header before it where headers are; its tokens are those of any answer."""
    template, tokenizer = choose_template(name), made_tokenizer()
    turns = (Turn("a", "", "first"), Turn("b", "", "second"), Turn("c", "", "third"))
    every = Conversation(turns, None, "file:3")
    one = every._replace(turns=(turns[0], turns[1]._replace(is_trained=False), turns[2]))
    found, whole = (encode(tokenizer, template, given, Targets(loss_on)) for given in (one, every))
    assert found.token_ids.tolist() == whole.token_ids.tolist()
    lost = [
        int(i)
        for i, now, before in zip(found.token_ids, marks_of(found), marks_of(whole), strict=True)
        if now != before
    ]
    header = tokenizer.encode("\nA") if "{" in name else None
    end = ids_of("<|endoftext|>") if header else [template.end_id(tokenizer)]
    start = {"smollm2": ids_of("<|im_start|>", "assistant\n"), "llama3": ids_of(
        "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"
    )}.get(name, header)  # fmt: skip
    assert lost == (start if loss_on == "header" else []) + tokenizer.encode("second") + end
    first = encode(tokenizer, template, every._replace(turns=(one.turns[1], turns[2])), Targets(eos_targets="first"))
    assert marks_of(first)[-1], "the first end that has a loss"


def test_as_messages_of_the_tests_is_what_a_template_gets() -> None:
    """Plain conversations are as before: no key but role and content."""
    from llm_lightning.data.templates.chat_messages import chat_of

    one = Conversation((Turn("a", "b", "c"), Turn("d", "", "e")), "S")
    assert chat_of(one) == (as_messages(one), None)
