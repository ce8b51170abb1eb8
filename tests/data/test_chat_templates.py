"""Chat templates: renderings against transformers, masks by hand, control tokens, and programs that mean no good."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from llm_lightning.data.batches import Example
from llm_lightning.data.instruction import InstructionDataModule, Targets, encode
from llm_lightning.data.preference import PreferenceDataModule, Scoring
from llm_lightning.data.preference import encode as encode_pair
from llm_lightning.data.templates import renderer
from llm_lightning.data.templates.chat import ChatTemplate, _say_once
from llm_lightning.data.templates.choose import NAMED, choose_template, from_description
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer

CONTROLS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
NOT_SPECIAL = ["<think>", "</think>"]
LLAMA3 = (  # where Llama 3 cuts a text: line breaks stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
SMOLLM2 = (  # as the model's files have it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def library() -> Library:
    """Bytes, one merge (two line breaks), and control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ĊĊ"])}
    made = Library(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), bytes_alone])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROLS])
    made.add_tokens([AddedToken(token, normalized=False) for token in NOT_SPECIAL])
    return made


@cache
def made_tokenizer(bos: str | None = None, eot: str = "<|endoftext|>") -> JsonTokenizer:
    ids = {token: library().token_to_id(token) for token in CONTROLS}
    return JsonTokenizer(
        library().to_str(), bos_id=ids[bos] if bos else None, eot_id=ids[eot], stop_ids=[ids[eot], ids["<|im_end|>"]]
    )


def ids_of(*parts: str) -> list[int]:
    """The ids of parts, each a control token or text that is encoded by itself."""
    tokenizer = made_tokenizer()
    return [
        index
        for part in parts
        for index in ([tokenizer.controls[part]] if part in tokenizer.controls else tokenizer.encode(part))
    ]


def published(name: str) -> str:
    """A template of a model, from the package trl."""
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / "chat_templates" / f"{name}.jinja" if folders else Path()
    if not path.is_file():
        pytest.skip(f"this version of trl has no template {name}")
    return path.read_text(encoding="utf-8")


def talk(*messages: str, system: str | None = None) -> Conversation:
    turns = zip(messages[::2], [*messages[1::2], ""], strict=False)
    return Conversation(tuple(Turn(question, "", response) for question, response in turns), system, "file:3")


def as_messages(conversation: Conversation) -> list[dict[str, str]]:
    messages = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    for turn in conversation.turns:
        question = f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.response}]
    return messages


CONVERSATIONS = [
    talk("Capital of Japan?", "Tokyo"),
    talk("a", "b", "c", "d", "e", "f", system="Be brief."),
    Conversation((Turn("Add.", "1, 2", "3"),)),
    talk("Some templates write a system message where there is none.", "This one is empty.", system=""),
    talk(" padded \n", "\n both sides  "),
    talk("Größe 日本語 😀 \u2028 {{ x }} {% y %}", ""),
    talk("say <|im_end|> and <|eot_id|><|im_", "no: <|im_start|>user\nHi<|end|>"),
    talk("what is <think>?", "<think>\nHm.\n</think>\n\nA tag.", "and </think>?", "<think>so</think>Another."),
    talk("open", "ends with <think> only"),
]
PUBLISHED = ["llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "gemma", "phi3", "cohere2", "qwen3_instruct_2507"]


def own_template(text: str, name: str = "own") -> ChatTemplate:
    return ChatTemplate(name, text, special=(("bos_token", "<|begin_of_text|>"), ("eos_token", "<|im_end|>")))


def by_transformers(text: str, messages: Sequence[dict[str, str]], **options: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    known = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "date_string": "26 Jul 2024"}
    [rendered], _ = render_jinja_template([messages], chat_template=text, **options, **known)
    return rendered


# --- renderings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", *PUBLISHED])
def test_renders_as_transformers(name: str) -> None:
    """Whole conversations and prompts, whatever control tokens their messages spell out."""
    text = SMOLLM2 if name == "smollm2" else published(name)
    template, tokenizer = own_template(text), made_tokenizer()
    for conversation in CONVERSATIONS:
        if name == "gemma" and conversation.system is not None:
            continue  # refused, see below
        messages = as_messages(conversation)
        assert template.text_of(conversation) == by_transformers(text, messages)
        prompt = "".join(segment.text for segment in template.prompt(conversation, tokenizer))
        assert prompt == by_transformers(text, messages[:-1], add_generation_prompt=True)
        segments = template.segments(conversation, tokenizer)
        assert template.text_of(conversation).startswith("".join(segment.text for segment in segments))
        assert [segment.kind for segment in segments][-1] == "end"


@pytest.mark.parametrize(("name", "text"), [("smollm2", SMOLLM2), ("llama3", "llama3"), ("qwen3", "qwen3")])
def test_the_named_ones_are_the_published_ones(name: str, text: str) -> None:
    named, other = choose_template(name), own_template(text if name == "smollm2" else published(text))
    for conversation in CONVERSATIONS:
        assert named.text_of(conversation) == other.text_of(conversation)
        for tokenizer in (made_tokenizer(), made_tokenizer(bos="<|begin_of_text|>")):
            assert named.segments(conversation, tokenizer) == other.segments(conversation, tokenizer)


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2_5", "qwen3"])
def test_prompts_have_the_ids_of_transformers(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    text = SMOLLM2 if name == "smollm2" else published(name)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=library(), bos_token="<|begin_of_text|>", eos_token="<|im_end|>"
    )
    for conversation in CONVERSATIONS[:6]:
        messages = as_messages(conversation)[:-1]
        expected = reference.apply_chat_template(
            messages, chat_template=text, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert own_template(text).prompt_ids(made_tokenizer(), conversation) == expected


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_space_belongs_to_a_control_token_where_its_file_says_so(flag: str) -> None:
    from transformers import PreTrainedTokenizerFast

    content = json.loads(library().to_str())
    for entry in content["added_tokens"]:
        entry[flag] = entry["content"].startswith("<|im_")
    tokenizer = JsonTokenizer(json.dumps(content), eot_id=content["added_tokens"][0]["id"])
    reference = PreTrainedTokenizerFast(tokenizer_object=Library.from_str(json.dumps(content)))
    template = own_template(
        SMOLLM2.replace("'\n' + message", "'\n ' + message").replace("'<|im_end|>'", "'! <|im_end|>'")
    )
    for conversation in CONVERSATIONS[:5]:
        messages = as_messages(conversation)[:-1]
        rendered = template.prompt_ids(tokenizer, conversation)
        assert rendered == reference.encode(by_transformers(template.text, messages, add_generation_prompt=True))
        assert rendered != template.prompt_ids(made_tokenizer(), conversation)


def test_markers_of_generations_loops_and_dates() -> None:
    text = (
        "{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}[{{ m.content }}]{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}{{ strftime_now('%d.%m.%Y') }} {{ date_string }} {{ {'a': '<é>'} | tojson }}"
    )
    template = ChatTemplate("dated", text, date="2025-02-03")
    assert template.text_of(talk("a", "b", system="S")) == 'a[b]03.02.2025 03 Feb 2025 {"a": "<é>"}'
    assert "26.07.2024 26 Jul 2024" in ChatTemplate("dated", text).text_of(talk("a", "b")), "never today"


# --- masks ------------------------------------------------------------------------------------------------------------

TWO_TURNS = talk("Hi", "Yo", "Bye", "Ciao", system="S")
NEW = "\n"


def smollm2_pieces(*, with_answer: bool = True) -> list[tuple[list[int], str]]:
    header = ids_of("<|im_start|>", "assistant\n")
    first = ids_of("<|im_start|>", "system\nS", "<|im_end|>", NEW, "<|im_start|>", "user\nHi", "<|im_end|>", NEW)
    pieces = [
        (first, "prompt"),
        (header, "header"),
        (ids_of("Yo"), "response"),
        (ids_of("<|im_end|>"), "end"),
        (ids_of(NEW, "<|im_start|>", "user\nBye", "<|im_end|>", NEW), "prompt"),
        (header, "header"),
    ]
    return [*pieces, (ids_of("Ciao"), "response"), (ids_of("<|im_end|>"), "end")] if with_answer else pieces


def llama3_pieces() -> list[tuple[list[int], str]]:
    def said(role: str) -> list[int]:
        return ids_of("<|start_header_id|>", role, "<|end_header_id|>", "\n\n")

    end = ids_of("<|eot_id|>")
    begin = ids_of("<|begin_of_text|>")
    return [
        ([*begin, *said("system"), *ids_of("S"), *end, *said("user"), *ids_of("Hi"), *end], "prompt"),
        (said("assistant"), "header"),
        (ids_of("Yo"), "response"),
        (end, "end"),
        ([*said("user"), *ids_of("Bye"), *end], "prompt"),
        (said("assistant"), "header"),
        (ids_of("Ciao"), "response"),
        (end, "end"),
    ]


def masked(pieces: list[tuple[list[int], str]], kinds: set[str]) -> tuple[list[int], list[bool]]:
    return (
        [index for ids, _ in pieces for index in ids],
        [kind in kinds for ids, kind in pieces for _ in ids],
    )


@pytest.mark.parametrize("bos", [None, "<|begin_of_text|>"])
@pytest.mark.parametrize(("name", "by_hand"), [("smollm2", smollm2_pieces()), ("llama3", llama3_pieces())])
def test_pieces_of_two_turns_by_hand(name: str, by_hand: list[tuple[list[int], str]], bos: str | None) -> None:
    """The beginning of a text comes exactly once, whether the template writes it, the tokenizer adds it, or both."""
    template, tokenizer = choose_template(name), made_tokenizer(bos=bos)
    found = [(ids.tolist(), kind) for ids, kind in template.tokens(tokenizer, template.segments(TWO_TURNS, tokenizer))]
    if bos and name == "smollm2":
        by_hand = [(ids_of("<|begin_of_text|>") + by_hand[0][0], "prompt"), *by_hand[1:]]
    assert found == by_hand
    prompt = [index for ids, _ in by_hand[:-2] for index in ids]
    assert template.prompt_ids(tokenizer, TWO_TURNS) == prompt
    assert [part.tolist() for part in template.answer_ids(tokenizer, TWO_TURNS)] == [by_hand[-2][0], by_hand[-1][0]]


def marks_of(example: Example) -> list[bool]:
    assert example.is_target is not None
    marks: list[bool] = example.is_target.tolist()
    return marks


@pytest.mark.parametrize(
    ("loss_on", "kinds"),
    [
        ("response", {"response", "end"}),
        ("header", {"header", "response", "end"}),
        ("all", {"prompt", "header", "response", "end"}),
    ],
)
@pytest.mark.parametrize(("name", "by_hand"), [("smollm2", smollm2_pieces()), ("llama3", llama3_pieces())])
def test_targets_by_hand(name: str, by_hand: list[tuple[list[int], str]], loss_on: str, kinds: set[str]) -> None:
    found = encode(made_tokenizer(), choose_template(name), TWO_TURNS, Targets(loss_on))
    ids, targets = masked(by_hand, kinds)
    assert (found.token_ids.tolist(), marks_of(found)) == (ids, targets)
    first = encode(made_tokenizer(), choose_template(name), TWO_TURNS, Targets(loss_on, "first"))
    assert marks_of(first) == [*targets[:-1], False]


@pytest.mark.parametrize("data_of", [InstructionDataModule, PreferenceDataModule])
def test_a_prompt_that_is_cut_keeps_the_beginning_of_a_text(data_of: type, tmp_path: Path) -> None:
    records = [{"instruction": "word " * n, "output": f"{n}", "chosen": f"{n}", "rejected": "?"} for n in range(30, 39)]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    bos = "<|begin_of_text|>"
    data = data_of(
        tokenizer=made_tokenizer(bos=bos), context_length=12, name=None, path=str(path),
        template="Q: {instruction}\nA: {response}", split="order",
        val_fraction=0.2, test_fraction=0.2, batch_size=2, max_cut=1,
    )  # fmt: skip
    data.build()
    assert data.report()["prompts_cut"] == 9
    for sample in data.all_samples():
        for one in sample.sequences:
            assert len(one.token_ids) <= 13
            text = data.tokenizer.decode(one.token_ids.tolist())
            assert text.startswith(f"{bos}Q: d \nA: "), "the end of the last word, and all that the template writes"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("eot", ["<|endoftext|>", "<|im_end|>"])
def test_batches_have_the_masks_by_hand(tmp_path: Path, packing: bool, eot: str) -> None:
    """Also where the end of an answer has the id of the padding, as in SmolLM2."""
    records = [{"messages": as_messages(TWO_TURNS), "group": f"{n}"} for n in range(9)]
    records += [{"instruction": f"Say {n}", "output": str(n)} for n in range(9)]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    data = InstructionDataModule(
        tokenizer=made_tokenizer(eot=eot), context_length=160, name=None, path=str(path), template="smollm2",
        split="order", val_fraction=0.2, test_fraction=0.2, packing=packing, batch_size=18, shuffle=False, bucket=False,
    )  # fmt: skip
    data.build()
    batch = next(iter(data.train_dataloader()))
    ids, targets = masked(smollm2_pieces(), {"response", "end"})
    trained = [index for index, is_target in zip(ids, targets, strict=True) if is_target]
    labels = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    answers = [index for n in range(9) for index in ids_of(str(n), "<|im_end|>")]
    n_train = len(data.conversations_of("train"))
    assert labels == (trained * 9 + answers)[: len(trained) * min(n_train, 9) + 2 * max(n_train - 9, 0)]
    assert batch.n_targets == len(labels)


@pytest.mark.parametrize("name", ["llama3_training", "qwen3_training", "gemma3_training", "phi3_training"])
def test_targets_are_those_that_the_template_marks(name: str) -> None:
    """By `{% generation %}`, which transformers reads; it also has what the template writes behind an end."""
    from transformers import PreTrainedTokenizerFast

    text, tokenizer = published(name), made_tokenizer()
    template = own_template(text)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=library(), bos_token="<|begin_of_text|>", eos_token="<|im_end|>"
    )
    for conversation in [*CONVERSATIONS[:4], CONVERSATIONS[5]]:
        found = encode(tokenizer, template, conversation)
        expected = reference.apply_chat_template(
            as_messages(conversation), chat_template=text, return_dict=True, return_assistant_tokens_mask=True
        )
        n, end = len(found.token_ids), template.end_id(tokenizer)
        assert found.token_ids.tolist() == expected["input_ids"][:n]
        marked = [bool(one) for one in expected["assistant_masks"][:n]]
        follows_end = [False, *(index == end for index in found.token_ids[:-1].tolist())]
        wanted = [one and not behind for one, behind in zip(marked, follows_end, strict=True)]
        assert marks_of(found) == wanted
        assert sum(wanted) >= len(conversation.turns)


def test_an_answer_is_encoded_by_itself() -> None:
    """Its line break is not joined to that of the prompt, which generation will see alone."""
    found = encode(made_tokenizer(), choose_template("smollm2"), talk("a", "\nb", system="S"))
    assert found.token_ids[marks_of(found).index(True) - 1 :].tolist() == ids_of(NEW, NEW, "b", "<|im_end|>")


def test_pairs_share_the_prompt_and_end_with_the_template() -> None:
    pair = TWO_TURNS._replace(rejected="No!")
    found = encode_pair(made_tokenizer(), choose_template("smollm2"), pair, Scoring(score_header=True))
    assert found.prompt_ids.tolist() == masked(smollm2_pieces(with_answer=False), set())[0]
    assert found.chosen_ids.tolist() == ids_of("Ciao", "<|im_end|>")
    assert found.rejected_ids.tolist() == ids_of("No!", "<|im_end|>")
    assert found.n_header == len(ids_of("<|im_start|>", "assistant\n"))
    without = encode_pair(made_tokenizer(), choose_template("smollm2"), pair, Scoring(score_eos=False))
    assert without.rejected_ids.tolist() == ids_of("No!")


def test_an_answer_without_a_control_token_behind_it_ends_with_the_end_of_text() -> None:
    template = ChatTemplate("plain", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                     "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    tokenizer = made_tokenizer()
    found = [(ids.tolist(), kind) for ids, kind in template.tokens(tokenizer, template.segments(TWO_TURNS, tokenizer))]
    end = ids_of("<|endoftext|>")
    assert found == [
        (ids_of("system: S\nuser: Hi\n"), "prompt"), (ids_of("assistant: "), "header"), (ids_of("Yo"), "response"),
        (end, "end"), (ids_of("\nuser: Bye\n"), "prompt"), (ids_of("assistant: "), "header"),
        (ids_of("Ciao"), "response"), (end, "end"),
    ]  # fmt: skip
    assert template.stop_ids(tokenizer) == (*end, *ids_of("<|im_end|>"))


def test_stops_at_the_end_of_the_template_and_at_those_of_the_tokenizer() -> None:
    expected = ("<|eot_id|>", "<|endoftext|>", "<|im_end|>")
    assert choose_template("llama3").stop_ids(made_tokenizer()) == tuple(ids_of(*expected))
    assert choose_template("alpaca").stop_ids(made_tokenizer()) == tuple(ids_of(*expected[1:]))


def test_templates_with_slots_begin_with_the_beginning_of_a_text() -> None:
    template = choose_template("Q{instruction}A{response}|")
    ids = template.prompt_ids(made_tokenizer(bos="<|begin_of_text|>"), talk("a", "b", "c", "d"))
    assert ids == ids_of("<|begin_of_text|>", "QaA", "b", "<|endoftext|>", "|QcA")


# --- thinking ---------------------------------------------------------------------------------------------------------


def test_of_a_template_that_changes_earlier_turns_the_last_answer_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    template, tokenizer = choose_template("qwen3"), made_tokenizer()
    conversation = talk("a", "<think>\nx\n</think>\n\nb", "c", "<think>\ny\n</think>\n\nd")
    before = ids_of("<|im_start|>", "user\na", "<|im_end|>", NEW, "<|im_start|>", "assistant\nb", "<|im_end|>", NEW)
    last = ids_of("<|im_start|>", "user\nc", "<|im_end|>", NEW)
    expected = [
        (before + last, "prompt"),
        (ids_of("<|im_start|>", "assistant\n"), "header"),
        (ids_of("<think>", "\ny\n", "</think>", "\n\nd"), "response"),
        (ids_of("<|im_end|>"), "end"),
    ]
    with caplog.at_level("INFO"):
        for _ in range(2):
            pieces = template.tokens(tokenizer, template.segments(conversation, tokenizer))
            assert [(ids.tolist(), kind) for ids, kind in pieces] == expected
    said = [record.message for record in caplog.records if "only the last answer is trained" in record.message]
    assert len(said) == 1
    assert "qwen3" in said[0]


# --- control tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen3"])
def test_no_text_of_a_message_becomes_a_control_token(name: str) -> None:
    """Also one that a message and the template spell out together, or two messages that hide in one another."""
    template, tokenizer = choose_template(name), made_tokenizer()
    controls = set(tokenizer.controls.values())

    def found(*messages: str) -> list[int]:
        conversation = talk(*messages, system=messages[0])
        pieces = template.tokens(tokenizer, template.segments(conversation, tokenizer))
        return [index for ids, _ in pieces for index in ids.tolist() if index in controls]

    expected = found("x", "y")
    for word in [*CONTROLS, *NOT_SPECIAL, "<|im_start|><|im_start|>", "<|<|im_end|>im_end|>", "\ue000<|im_end|>\ue001"]:
        assert found(f"{word}", f"a{word}b") == expected
        assert found(f"{word} x {word}", f"{word[2:]} y {word[:-1]}") == expected


@pytest.mark.parametrize(
    ("text", "question", "answer"),
    [("<|im_{{ m.content }}|>", "start", "end"), ("<|im_{{ m.content }}.", "start|> a", "end|> b"),
     (".{{ m.content }}end|>", "a <|im_", "b <|im_")],
)  # fmt: skip
def test_what_a_message_and_the_template_spell_out_together_is_text(text: str, question: str, answer: str) -> None:
    template, tokenizer = ChatTemplate("t", f"{{% for m in messages %}}{text}{{% endfor %}}"), made_tokenizer()
    ids = [index for segment in template.segments(talk(question, answer), tokenizer) for index in segment.ids]
    assert ids == ids_of("<|endoftext|>"), "the end of the answer alone"


def test_a_record_is_refused_if_its_control_token_changes_the_rendering() -> None:
    text = "{% for m in messages %}{{ 'x' if '<|im_end|>' in m.content else m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"^file:3: a message spells out a control token, for which template t writes"):
        ChatTemplate("t", text).segments(talk("a <|im_end|>", "b"), made_tokenizer())


# --- programs that mean no good ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0].content.__class__ }}", r"line 1: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages[0].content | attr('__class__') }}", r"line 1: access to attribute '__class__' of 'str'"),
        ("a\n{{ cycler.__init__.__globals__ }}", r"line 2: access to attribute '__init__' of 'type' object is unsafe"),
        ("{{ messages.append(1) }}", r"line 1: access to attribute 'append' of 'list' object is unsafe"),
        ("{{ raise_exception('no\nway') }}", r"refuses: no way$"),
        ("{{ 'a' * 10000000000 }}", r"needs more than 1,024 MiB of memory"),
        ("{% for i in range(99999) %}{{ 'a' * 1024 }}{% endfor %}", r"writes more than 16,777,216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"line 1: maximum recursion depth exceeded"),
        ("\n{{ messages[0].name.first }}", r"line 2: 'dict object' has no attribute 'name'"),
        ("{{ range(10000000) }}", r"line 1: Range too big"),
    ],
)  # fmt: skip
def test_programs_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^file:3: template mine {message}") as caught:
        ChatTemplate("mine", text).text_of(talk("a", "b"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 10 ** 99999999 %}",  # in one step of the interpreter
    ],
)
def test_programs_that_never_end(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"template mine computes for more than 0.2 seconds: it loops$"):
        ChatTemplate("mine", text).text_of(talk("a", "b"))
    assert choose_template("smollm2").text_of(talk("a", "b")).endswith("b<|im_end|>\n"), "another process takes over"


def test_a_mistake_in_a_program_is_reported_before_any_data(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(ValueError, match=r"^template mine.jinja line 2: unexpected '}'"):
        choose_template(str(path))


def test_system_messages_that_have_no_place() -> None:
    gemma = own_template(published("gemma"), "gemma")
    asked = [talk("a", "b"), talk("a", "b", system="S")]
    gemma.check(asked[:1])
    with pytest.raises(ValueError, match=r"^file:3: template gemma refuses: System role not supported$"):
        gemma.check(asked)
    deaf = ChatTemplate("deaf", "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"^file:3 has a system message, but template deaf leaves it out$"):
        deaf.check(asked)


def test_templates_whose_answers_cannot_be_trained() -> None:
    mute = ChatTemplate("mute", "{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"^template mute leaves answers out"):
        mute.segments(talk("a", "b"), made_tokenizer())
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    with pytest.raises(ValueError, match=r"^file:3: in template t an answer does not begin where the"):
        ChatTemplate("t", text).segments(talk("a", "b"), made_tokenizer())
    assert ChatTemplate("t", text).prompt_ids(made_tokenizer(), talk("a")) == ids_of("[a]", "<think>")


def test_renders_in_threads_and_after_a_fork() -> None:
    template, seen = choose_template("smollm2"), []
    conversations = [talk(f"{number}", "b") for number in range(8)]
    expected = [template.text_of(one) for one in conversations]
    threads = [threading.Thread(target=lambda one=one: seen.append(template.text_of(one))) for one in conversations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == expected
    if (child := os.fork()) == 0:
        os._exit(0 if template.text_of(conversations[3]) == expected[3] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.text_of(conversations[5]) == expected[5]


# --- choosing ---------------------------------------------------------------------------------------------------------

OWN = {"kind": "jinja", "name": "own", "text": "own {{ bos_token }}", "tokens": {"bos_token": "<s>"},
       "others": {"rag": "rag {{ bos_token }}"}}  # fmt: skip


def test_the_own_template_is_the_default_and_its_others_have_names() -> None:
    assert choose_template(None).name == "alpaca"
    own = choose_template(None, own=OWN, template_date="2025-01-02")
    assert isinstance(own, ChatTemplate)
    assert (own.name, own.date, own.text_of(talk("a"))) == ("own", "2025-01-02", "own <s>")
    assert choose_template("rag", own=OWN).text_of(talk("a")) == "rag <s>"
    assert choose_template("alpaca", own=OWN) is choose_template("alpaca")


@pytest.mark.parametrize("name", ["alpaca", "chatml", *NAMED, "Q{instruction}A{response}"])
def test_a_description_is_plain_and_gives_the_template_back(name: str) -> None:
    template = choose_template(name, template_date="2025-01-02")
    described = json.loads(json.dumps(template.describe()))
    assert from_description(described) == template
    assert from_description(described).digest_values() == template.digest_values()


def test_a_tokenizer_without_the_control_tokens_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    gpt2 = build_tokenizer("byte")
    with pytest.raises(ValueError, match=r"^template smollm2 writes <\|im_start\|>, <\|im_end\|>, which this"):
        choose_template("smollm2").check_tokenizer(gpt2)
    own_template(SMOLLM2).check_tokenizer(gpt2)
    assert "template own writes <|im_end|>, <|im_start|>, for this tokenizer plain text" in caplog.text
    caplog.clear()
    own_template(SMOLLM2).check_tokenizer(made_tokenizer())
    assert not caplog.text


def test_a_template_with_slots_whose_control_tokens_are_text_says_so(caplog: pytest.LogCaptureFixture) -> None:
    choose_template("alpaca").check_tokenizer(made_tokenizer())
    choose_template("chatml").check_tokenizer(build_tokenizer("gpt2"))
    assert not caplog.text
    choose_template("chatml").check_tokenizer(made_tokenizer())
    assert "template chatml writes <|im_end|>, <|im_start|> as plain text" in caplog.text


@pytest.mark.parametrize("date", ["today", "26.07.2024", "2024-13-01"])
def test_a_date_that_is_none(date: str) -> None:
    with pytest.raises(ValueError, match=rf"^data.template_date='{date}' must be a date such as 2024-07-26$"):
        choose_template("llama3", template_date=date)


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.template=.*missing.jinja: No such file"):
        choose_template(str(tmp_path / "missing.jinja"))
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bytes.jinja is not UTF-8 at byte 0"):
        choose_template(str(tmp_path / "bytes.jinja"))


def test_ids_are_those_of_the_tokenizer() -> None:
    """What the other tests compare with: one id for two line breaks, control tokens behind the bytes."""
    assert ids_of("\n\n") == [256]
    assert np.diff(ids_of(*CONTROLS)).tolist() == [1] * (len(CONTROLS) - 1)
    assert made_tokenizer().decode(ids_of("é", "<think>", "x")) == "é<think>x"
