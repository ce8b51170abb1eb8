"""The forms in which people have conversations: each as the messages that it means, or refused in one line.

From TRL where it converts the same form.
"""

from __future__ import annotations

import copy
import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.of_checkpoint import conversations_of
from llm_lightning.data.preference import PreferenceDataModule
from llm_lightning.data.records.instruction import InstructionForm, read_instructions
from llm_lightning.data.records.messages import NAMES
from llm_lightning.data.records.placed import has_text, placed_records, text_of
from llm_lightning.data.records.preference import PreferenceForm, read_preferences
from llm_lightning.data.records.rows import SkippedError, lines_of
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.tokenizers.build import build_tokenizer

Record = dict[str, Any]


def said(*pairs: tuple[str, Any]) -> list[Record]:
    return [{"role": role, "content": content} for role, content in pairs]


def talk(*contents: str) -> list[Record]:
    return said(*((("user", "assistant")[number % 2], content) for number, content in enumerate(contents)))


def read(record: Record, **settings: Any) -> tuple[Conversation, dict[str, int]]:
    counts = Counter[str]()
    return InstructionForm(**settings)(record, "file:1", counts), dict(counts)


def paired(record: Record, **settings: Any) -> tuple[Conversation, dict[str, int]]:
    counts = Counter[str]()
    return PreferenceForm(**settings)(record, "file:1", counts), dict(counts)


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


TWO = (Turn("a", "", "b"), Turn("c", "", "d"))

# --- one conversation in many forms -----------------------------------------------------------------------------------

SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
FORMS: dict[str, Record] = {
    "messages": {"messages": talk("a", "b", "c", "d")},
    "sharegpt": {"conversations": [*SHAREGPT, {"from": "gpt", "value": "d"}]},
    "sharegpt under messages": {"messages": [*SHAREGPT, {"from": "gpt", "value": "d"}]},
    "roles under conversations": {"conversations": talk("a", "b", "c", "d")},
    "prompt and completion": {"prompt": talk("a", "b", "c"), "completion": said(("assistant", "d"))},
    "prompt in messages, completion in text": {"prompt": talk("a", "b", "c"), "completion": "d"},
    "prompt in text, completion in messages": {
        "prompt": "a", "completion": said(("assistant", "b"), ("user", "c"), ("assistant", "d"))
    },
    "history": {"instruction": "c", "output": "d", "history": [["a", "b"]]},
    "json in a cell": {"messages": json.dumps(talk("a", "b", "c", "d"))},
    "json in two cells": {"prompt": json.dumps(talk("a", "b", "c")), "completion": json.dumps(talk("", "d")[1:])},
    "parts": {"messages": [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in talk(*"abcd")]},
    "other names": {"messages": said(("Human", "a"), ("bot", "b"), ("prompter", "c"), ("ChatGPT", "d"))},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_conversation(form: str) -> None:
    assert read(FORMS[form])[0].turns == TWO


@pytest.mark.parametrize("form", ["sharegpt", "roles under conversations"])
def test_sharegpt_is_what_trl_makes_of_it(form: str) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    converted = data_utils.maybe_convert_to_chatml(copy.deepcopy(FORMS[form]))
    assert data_utils.is_conversational(converted)
    assert read(converted)[0].turns == read(FORMS[form])[0].turns


def test_a_record_that_was_read_before_is_read_alike() -> None:
    """Where instruction and output are there, other fields do not take their place."""
    alpaca = {"instruction": "a", "input": "b", "output": "c"}
    for more in ({"conversations": talk("x", "y")}, {"prompt": "x", "completion": "y"}, {"text": "x"}):
        assert read({**alpaca, **more})[0].turns == (Turn("a", "b", "c"),)
    assert read({**alpaca, "messages": talk("x", "y")})[0].turns == (Turn("x", "", "y"),)


def test_a_form_is_plain_values() -> None:
    form = PreferenceForm({"chosen": "better"}, roles={"x": "user"}, irregular="mend")
    assert PreferenceForm(**json.loads(json.dumps(asdict(form)))) == form
    assert PreferenceForm.version == InstructionForm.version == 1


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_usual_names_of_roles(name: str) -> None:
    messages = {
        "system": said((name, "S"), *[("user", "q"), ("assistant", "a")]),
        "user": said((name, "q"), ("assistant", "a")),
        "assistant": said(("user", "q"), (name, "a")),
        "tool": said(("user", "q"), ("assistant", "x"), (name, "r"), ("assistant", "a")),
    }[NAMES[name]]
    one, _ = read({"messages": messages})
    assert one.turns[-1].response == "a"
    assert one.system == ("S" if NAMES[name] == "system" else None)
    assert bool(one.turns[-1].before) == (NAMES[name] == "tool")


def test_other_names_by_a_map() -> None:
    messages = said(("narrator", "q"), ("Sam", "a"), ("human", "r"), ("gpt", "b"))
    roles = {"narrator": "user", "Sam": "assistant", "gpt": "assistant"}
    assert [turn.response for turn in read({"messages": messages}, roles=roles)[0].turns] == ["a", "b"]
    with pytest.raises(ValueError, match=r"^data.roles.Sam='bot' must be one of system, user, assistant, tool$"):
        InstructionForm(roles={"Sam": "bot"})


def test_an_unknown_role_is_one_line(tmp_path: Path) -> None:
    records = [
        {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "Sam", "value": "a"}]} for n in range(30)
    ]
    with pytest.raises(
        ValueError, match=r"x.jsonl: all 30 records are bad, the first: line 1: message 2 has "
    ) as error:
        read_instructions(write(tmp_path / "x.jsonl", records))
    said = str(error.value)
    assert "the role 'Sam', which is none of system, user, assistant, tool, human," in said
    assert said.count("data.roles.Sam=user") == 1
    assert "\n" not in said
    good = {"messages": talk("a", "b")}
    with pytest.raises(
        ValueError, match=r"30 bad records \(one of each kind is shown\): line 2: message 2 has"
    ) as error:
        read_instructions(write(tmp_path / "x.jsonl", [good, *records]))
    assert str(error.value).count("Sam") == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*SHAREGPT[:1], *said(("assistant", "b"))], r"message 2 must be an object with 'from' and 'value'"),
        ([*talk("a"), {"from": "gpt", "value": "b"}], r"message 2 must be an object with 'role' and 'content'"),
        ("[{'role': 'user'}]", r"field 'messages' is text that begins with '\[', but not JSON: .* as json.dumps does"),
        ('[{"role": "user", "role": "user"}]', r"field 'role' occurs twice"),
        ('["\\ud800"]', r"field 'messages' holds half a surrogate pair"),
        ({"role": "user"}, r"field 'messages' must be a list of messages"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({"messages": messages})


def test_a_wrong_column_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": f"{n}", "answer": "a"} for n in range(30)])
    with pytest.raises(ValueError, match=r"x.jsonl: all 30 records are bad, the first: line 1: no field 'instruction'"):
        read_instructions(path)


# --- parts ------------------------------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


def test_texts_of_parts_are_joined_as_templates_join_them() -> None:
    from test_chat_templates import by_transformers, own_template, published

    parts = [{"type": "text", "text": "Look "}, {"type": "text", "text": "here."}]
    messages = [{"role": "user", "content": parts}, *said(("assistant", "Yes."))]
    template = own_template(published("qwen2_5_vl"))
    assert template.text_of(read({"messages": messages})[0]) == by_transformers(template.text, messages)


def test_other_parts_are_refused_or_dropped_and_counted() -> None:
    content = [IMAGE, {"type": "text", "text": "What?"}, IMAGE, {"type": "input_audio", "input_audio": {}}]
    record = {"messages": said(("user", content), ("assistant", "A cat."))}
    with pytest.raises(ValueError, match=r"message 1 has a part 'image_url', which is no text; data.other_parts=drop"):
        read(record)
    one, counts = read(record, other_parts="drop")
    assert one.turns == (Turn("What?", "", "A cat."),)
    dropped = {"image_url": 2, "input_audio": 1}
    assert counts == {f"a part {kind!r} of a message, left out": n for kind, n in dropped.items()}
    with pytest.raises(ValueError, match="the instruction is empty"):
        read({"messages": said(("user", [IMAGE]), ("assistant", "b"))}, other_parts="drop")
    with pytest.raises(ValueError, match=r"data.other_parts='keep' must be one of refuse, drop"):
        InstructionForm(other_parts="keep")


# --- tools and null ---------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("null", [{"content": None}, {}, {"content": ""}])
def test_a_content_of_null_is_empty_beside_tool_calls(null: Record) -> None:
    called = {"role": "assistant", "tool_calls": [CALL], **null}
    record = {"messages": [*talk("a"), called, *said(("tool", "r"), ("assistant", "b"))]}
    assert read(record)[0].turns[0] == Turn("a", "", "", calls=(CALL,))
    with pytest.raises(ValueError, match=r"^the output is empty; data.empty_output=skip leaves such records out"):
        read({"messages": [*talk("a"), {"role": "assistant", **null}]})
    with pytest.raises(ValueError, match=r"message 1 has no text under 'content'|the instruction is empty"):
        read({"messages": [{"role": "user", **null}, *said(("assistant", "b"))]})


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]', ['{"name": "f"}']])
def test_schemas_of_tools_also_as_json_text(tools: Any) -> None:
    assert read({"messages": talk("a", "b"), "tools": tools})[0].tools == ({"name": "f"},)


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools: Any) -> None:
    assert read({"messages": talk("a", "b"), "tools": tools})[0].tools == ()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": talk("a", "b"), "tools": "weather"}, r"field 'tools' must be a list of JSON schemas of tools"),
        ({"messages": talk("a", "b"), "tools": [1]}, r"field 'tools' must be a list of JSON schemas of tools"),
        ({"messages": [*talk("a"), {"role": "assistant", "tool_calls": [{}]}]}, r"message 2: 'tool_calls' must be a"),
        ({"messages": said(("user", "a"), ("tool", "r"), ("assistant", "b"))}, r"message 2, of a tool, follows the us"),
    ],
)  # fmt: skip
def test_tools_that_are_none(record: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(record)


# --- order ------------------------------------------------------------------------------------------------------------

IRREGULAR: dict[str, tuple[list[Record], tuple[Turn, ...], str | None, dict[str, int]]] = {
    "begins with the assistant": (
        said(("assistant", "Hello"), *[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]),
        TWO, None, {"a message of the assistant before the first question, left out": 1},
    ),
    "ends with the user": (
        [*talk("a", "b", "c", "d", "e")], TWO, None, {"a message of the user behind the last answer, left out": 1},
    ),
    "has two messages of the user in a row": (
        said(("user", "a"), ("user", "b"), ("assistant", "c")), (Turn("a\n\nb", "", "c"),), None,
        {"a message of the user, joined to the one before it": 1},
    ),
    "has two messages of the assistant in a row": (
        said(("user", "a"), ("assistant", "b"), ("assistant", "c"), ("assistant", "d")),
        (Turn("a", "", "b\n\nc\n\nd"),), None, {"a message of the assistant, joined to the one before it": 2},
    ),
    "has a system message behind the first message": (
        said(("system", "S"), ("user", "a"), ("assistant", "b"), ("system", "T"), ("user", "c"), ("assistant", "d")),
        TWO, "S\n\nT", {"a system message behind the first message, joined to the beginning": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", IRREGULAR)
def test_irregular_conversations_are_refused_or_mended_and_counted(kind: str) -> None:
    messages, turns, system, counts = IRREGULAR[kind]
    with pytest.raises(ValueError, match=rf"^the conversation {kind}; data.irregular=mend leaves out"):
        read({"messages": messages})
    one, found = read({"messages": messages}, irregular="mend")
    assert (one.turns, one.system, found) == (turns, system, counts)


def test_the_kinds_of_irregular_conversations_are_counted_in_one_line(tmp_path: Path) -> None:
    wanted = {"begins with the assistant": 3, "ends with the user": 2, "has two messages of the user in a row": 4}
    records = [{"messages": IRREGULAR[kind][0]} for kind, n in wanted.items() for _ in range(n)]
    both = {"messages": said(("assistant", "x"), *[("user", "a"), ("assistant", "b"), ("user", "c")])}
    path = write(tmp_path / "x.jsonl", [{"messages": talk("a", "b")}, *records, both])
    with pytest.raises(ValueError, match=r"10 bad records \(one of each kind is shown\)") as error:
        read_instructions(path)
    said_once = str(error.value)
    for kind, n in wanted.items():
        assert f"{kind} ({n + (kind != 'has two messages of the user in a row')})" in said_once
    assert said_once.count("data.irregular=mend") == 1
    assert [place in said_once for place in ("line 2:", "line 3:", "line 5:", "line 7:", "line 11:")] == [
        True, False, True, True, False,
    ]  # fmt: skip
    assert len(read_instructions(path, irregular="mend")[0]) == 11


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            said(("system", "S"), ("assistant", "b")),
            r"has no question with an answer: its roles are system, assistant$",
        ),
        (said(("assistant", "b"), ("user", "a")), r"the conversation has no question with an answer behind it"),
        (
            [*talk("a", "b"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            r"two messages of the assistant in a row, of which one calls a tool, cannot be joined",
        ),
        (
            [*talk("a", "b"), {"role": "assistant", "content": "c", "weight": 0}],
            r"two messages of the assistant in a row, one with weight 0 and one without",
        ),
    ],
)
def test_what_cannot_be_mended(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({"messages": messages}, irregular="mend")


def test_regular_conversations_are_not_mended() -> None:
    for record in FORMS.values():
        assert read(record, irregular="mend") == read(record)
    with pytest.raises(ValueError, match=r"data.irregular='skip' must be one of refuse, mend"):
        InstructionForm(irregular="skip")


# --- weights ----------------------------------------------------------------------------------------------------------


def weighted(*weights: Any) -> Record:
    messages = talk(*"abcdef"[: 2 * len(weights)])
    for message, weight in zip(messages[1::2], weights, strict=True):
        message["weight"] = weight
    return {"messages": messages}


@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (0, None), (1, 1), (0.0, 1.0)])
def test_weights_say_which_answers_have_a_loss(weights: tuple[Any, ...]) -> None:
    assert [turn.is_trained for turn in read(weighted(*weights))[0].turns] == [weight != 0 for weight in weights]
    every = read(weighted(*weights), columns={"weight": None})
    assert all(turn.is_trained for turn in every[0].turns)
    assert every[1] == {"not read: 'weight' of messages": 1}


def test_weights_of_no_use() -> None:
    for weight in (0.5, 2, "0", [0]):
        with pytest.raises(ValueError, match=r"message 2 has weight=.*; it must be 0 \(no loss on it\) or 1"):
            read(weighted(weight))
    with pytest.raises(ValueError, match=r"no answer has a loss: all have weight 0; data.empty_output=skip leaves"):
        read(weighted(0, 0))
    with pytest.raises(SkippedError):
        read(weighted(0, 0), empty_output="skip")
    assert not read(weighted(0), empty_output="keep")[0].turns[0].is_trained
    empty = weighted(0, 1)
    empty["messages"][1]["content"] = ""
    assert read(empty)[0].turns[0].response == "", "it has no loss, so that it teaches nothing"


def test_a_run_takes_no_loss_on_answers_of_weight_0(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [weighted(0, 1)] * 20)
    data = InstructionDataModule(
        tokenizer=build_tokenizer("byte"), context_length=64, path=str(path), template="Q{instruction}A{response}|",
        split="order", val_fraction=0.1, test_fraction=0.1, batch_size=4,
    )  # fmt: skip
    data.build()
    assert data.preview(1).splitlines()[1].rstrip("\u00b7") == "QaAb<|endoftext|>|QcA>>d<|endoftext|><<"


# --- what is not read -------------------------------------------------------------------------------------------------


def test_fields_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    records = [{**FORMS["sharegpt"], "id": f"{n}", "history": "x", "lang": None, "tags": []} for n in range(5)]
    records += [{"messages": [{**one, "name": "Sam"} for one in talk("a", "b")], "id": "z", "conversations": talk("c")}]
    read_instructions(write(tmp_path / "x.jsonl", records))
    [line] = [record.message for record in caplog.records if "not read" in record.message]
    assert line.endswith(
        "x.jsonl: not read: 'id' (6 records), 'history' (5 records), 'name' of messages (1 record), "
        "'conversations' (1 record)"
    )


def test_lines_of_counts() -> None:
    counts = Counter({"a thing, left out": 1200, "skipped": 3, "not read: 'b'": 1, "not read: 'a'": 2})
    assert list(lines_of(counts)) == ["a thing, left out: 1,200", "not read: 'a' (2 records), 'b' (1 record)"]


@pytest.mark.parametrize("history", ["Hi", [], None, [["a", "b"], ["c"]], [{"role": "user"}], {"a": "b"}])
def test_a_history_that_is_no_list_of_pairs_is_not_read(history: Any) -> None:
    one, counts = read({"instruction": "c", "output": "d", "history": history})
    assert one.turns == (Turn("c", "", "d"),)
    assert counts == ({"not read: 'history'": 1} if history else {})


def test_a_history_of_pairs_is_earlier_turns_unless_it_is_not_wanted() -> None:
    record = {"instruction": "c", "input": "i", "output": "d", "history": [["a", "b"], ["x", "y"]]}
    assert read(record)[0].turns == (Turn("a", "", "b"), Turn("x", "", "y"), Turn("c", "i", "d"))
    one, counts = read(record, columns={"history": None})
    assert (one.turns, counts) == ((Turn("c", "i", "d"),), {"not read: 'history'": 1})


# --- other data -------------------------------------------------------------------------------------------------------

KTO = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("record", "of_sft", "of_dpo"),
    [
        (
            KTO,
            r"this is a completion with a label, as for KTO; of good",
            r"this is unpaired preference data, as for KTO \(",
        ),
        ({"prompt": "a", "completion": "b"}, None, r"this is instruction data .*task=sft learns from it"),
        ({"text": "<|user|>a"}, r"this is pre-rendered text \(text\); give the", r"this is pre-rendered text \(text\)"),
        ({"text": "a", "label": 1}, r"this is classification data .*task=class", r"this is classification data"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"this is preference data .*task=dpo learns", None),
    ],
)
def test_data_of_another_kind_is_refused_by_name_and_once(
    record: Record, of_sft: str | None, of_dpo: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", [record] * 20)
    for reader, message in ((read_instructions, of_sft), (read_preferences, of_dpo)):
        if message is None:
            assert len(reader(path)[0]) == 20
            continue
        with pytest.raises(
            ValueError, match=rf"x.jsonl: all 20 records are bad, the first: line 1: {message}"
        ) as error:
            reader(path)
        assert str(error.value).count("this is") == 1


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_ultrafeedback() -> None:
    """Its prompt is told three times: in `prompt`, and in both answers."""
    record = {
        "prompt": "a", "prompt_id": "1f", "messages": talk("a", "good"), "score_chosen": 8.5, "score_rejected": 3.0,
        "chosen": talk("a", "good"), "rejected": talk("a", "bad"),
    }  # fmt: skip
    one, counts = paired(record)
    assert (one.turns, one.rejected) == ((Turn("a", "", "good"),), "bad")
    assert counts == {
        f"not read: {name!r}": 1 for name in ("prompt", "prompt_id", "messages", "score_chosen", "score_rejected")
    }
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = data_utils.maybe_extract_prompt({name: record[name] for name in ("prompt", "chosen", "rejected")})
    assert paired(theirs)[0][:1] == one[:1]


HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def test_transcripts_of_hh() -> None:
    asked = f"{HUMAN}Hi there{ASSISTANT}Hello.\nAssistant: is my name.{HUMAN}What is 2 + 2?"
    chosen, rejected = f"{asked}{ASSISTANT}It is 4.", f"{asked}{ASSISTANT}5, says Human: me\n"
    one, counts = paired({"chosen": chosen, "rejected": rejected})
    assert one.turns == (
        Turn("Hi there", "", "Hello.\nAssistant: is my name."), Turn("What is 2 + 2?", "", "It is 4."),
    )  # fmt: skip
    assert one.rejected == "5, says Human: me\n"
    assert counts == {"pair of transcripts of Human and Assistant, read as messages": 1}
    again = "".join(f"{HUMAN}{turn.instruction}{ASSISTANT}{turn.response}" for turn in one.turns)
    assert again == chosen, "nothing is lost"
    with pytest.raises(ValueError, match="chosen and rejected must be alike up to their last message"):
        paired({"chosen": chosen, "rejected": rejected.replace("2 + 2", "2 + 3")})
    with pytest.raises(ValueError, match="the messages of rejected must end with assistant, not with user"):
        paired({"chosen": chosen, "rejected": f"{rejected}{HUMAN}And?"})
    assert paired({"prompt": "a", "chosen": chosen, "rejected": rejected})[0].turns == (Turn("a", "", chosen),)


def test_a_prompt_that_both_answers_repeat_is_stripped_and_counted() -> None:
    prompt = "Question: what is 2 + 2?\nAnswer:"
    record = {"prompt": prompt, "chosen": f"{prompt} 4", "rejected": f"{prompt} 5"}
    one, counts = paired(record)
    assert (one.turns, one.rejected) == ((Turn(prompt, "", " 4"),), " 5")
    assert counts == {"pairs whose answers both began with the prompt, which is stripped from them": 1}
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = data_utils.extract_prompt({"chosen": record["chosen"], "rejected": record["rejected"]})
    assert (theirs["prompt"], theirs["chosen"], theirs["rejected"]) == (prompt, " 4", " 5")
    kept, counts = paired(record, repeated_prompt="keep")
    assert (kept.turns[0].response, counts) == (f"{prompt} 4", {})
    other = {**record, "rejected": "5"}
    assert paired(other)[0].turns[0].response == f"{prompt} 4", "one of them says it for another reason"
    hello = {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello."}
    assert paired(hello)[0].turns[0].response == "Hello! How are you?", "too short to be more than a greeting"
    with pytest.raises(ValueError, match=r"data.repeated_prompt='cut' must be one of strip, keep"):
        PreferenceForm(repeated_prompt="cut")


def test_the_preference_format_of_openai() -> None:
    record = {
        "input": {"messages": said(("system", "S"), ("user", "a")), "tools": [], "parallel_tool_calls": True},
        "preferred_output": said(("assistant", "good")), "non_preferred_output": said(("assistant", "bad")), "id": 1,
    }  # fmt: skip
    one, counts = paired(record)
    assert (one.turns, one.system, one.rejected) == ((Turn("a", "", "good"),), "S", "bad")
    assert counts == {"not read: 'id'": 1}
    assert one.record == record


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "d"}, "rejected": {"from": "gpt", "value": "r"}},
        {"prompt": "a", "chosen": talk("", "b", "c", "d")[1:], "rejected": talk("", "b", "c", "r")[1:]},
        {"chosen": json.dumps(talk("a", "b", "c", "d")), "rejected": json.dumps(talk("a", "b", "c", "r"))},
        {"instruction": "c", "history": [["a", "b"]], "chosen": "d", "rejected": "r"},
        {"prompt": json.dumps(talk("a", "b", "c")), "chosen": "d", "rejected": "r"},
    ],
)
def test_other_forms_of_pairs(record: Record) -> None:
    one, counts = paired(record)
    assert (one.turns, one.rejected) == (TWO, "r")
    assert not [name for name in counts if name.startswith("not read")]


def test_an_answer_that_calls_a_tool_is_no_pair() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    with pytest.raises(ValueError, match="the chosen answer calls a tool; pairs are of answers in words"):
        paired({"prompt": "a", "chosen": [called], "rejected": said(("assistant", "b"))})


def test_pairs_with_tools_before_them_train(tmp_path: Path) -> None:
    from test_chat_templates import made_tokenizer

    asked = [
        *talk("a"),
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        *said(("tool", "r")),
    ]
    text = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}{{ m.tool_calls }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(text)
    path = write(tmp_path / "x.jsonl", [{"messages": asked, "chosen": f"{n}", "rejected": "no"} for n in range(20)])
    data = PreferenceDataModule(
        tokenizer=made_tokenizer(), context_length=256, path=str(path), template=str(tmp_path / "t.jinja"),
        split="order", val_fraction=0.1, test_fraction=0.1, batch_size=4,
    )  # fmt: skip
    data.build()
    assert len(data.conversations_of("train")) == 16


# --- runs of before ---


@pytest.mark.parametrize(
    ("task", "make", "record"),
    [
        (
            "sft",
            InstructionDataModule,
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "tools": [{"a": 1}]},
        ),
        ("sft", InstructionDataModule, {**weighted(0, 1)}),
        ("dpo", PreferenceDataModule, {"prompt": "p" * 20, "chosen": "p" * 20 + "c", "rejected": "p" * 20 + "r"}),
    ],
)
def test_data_of_a_run_from_before_these_settings_is_read_as_it_was(
    task: str, make: Any, record: Record, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", [record] * 20)
    settings = {
        "path": str(path),
        "split": "order",
        "template": "alpaca",
        "columns": {"group": "group"},
        "batch_size": 4,
    }
    before = {"columns": dict.fromkeys(("history", "tools"))} if task == "dpo" else {
        "columns": dict.fromkeys(("history", "tools", "weight"))
    }  # fmt: skip
    before |= {"repeated_prompt": "keep"} if task == "dpo" else {}
    data = make(**settings | before, newlines="keep", tokenizer=build_tokenizer("byte"), context_length=256)
    data.read()
    header = {"task": task, "config": {"data": settings}, "lineage": {"data": data.data_digest}}
    loaded: Any = SimpleNamespace(header=header, path=None, tokenizer=build_tokenizer("byte"), longest_input=256)
    found = conversations_of(loaded, instead="", texts_only=True)
    assert found.data_digest == data.data_digest
    today = make(**settings, newlines="keep", tokenizer=build_tokenizer("byte"), context_length=256)
    if "tools" not in record:
        today.read()
        assert today.data_digest != data.data_digest, "read with the settings of today, it is other data"


# --- tables -----------------------------------------------------------------------------------------------------------


def test_messages_in_the_cells_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], *([json.dumps(talk(f"q, {n}", '"a"'))] for n in range(5))])
    found, _ = read_instructions(path)
    assert [one.turns for one in found] == [(Turn(f"q, {n}", "", '"a"'),) for n in range(5)]
    path.write_text("messages\n\"[{'role': 'user', 'content': 'a'}]\"\nb\n")
    with pytest.raises(
        ValueError, match=r"x.csv: 2 bad records: line 2: field 'messages' is text that .* not JSON"
    ) as e:
        read_instructions(path)
    assert "line 3: field 'messages' must be a list of messages" in str(e.value)


# --- tools that look at any record ------------------------------------------------------------------------------------


def test_texts_of_any_conversation(tmp_path: Path) -> None:
    forms = [form for name, form in FORMS.items() if name != "history"]
    for record in placed_records(write(tmp_path / "x.jsonl", forms)):
        assert all(has_text(record, key) for key in ("instruction", "output", "user", "assistant"))
        assert (text_of(record, "instruction"), text_of(record, "assistant")) == ("a\nc", "b\nd")
    [texts] = placed_records(write(tmp_path / "y.jsonl", [{"prompt": "a", "completion": "b"}]))
    keys = ("prompt", "completion", "instruction", "output", "system")
    assert [text_of(texts, key) for key in keys] == ["a", "b", "a", "b", ""]
