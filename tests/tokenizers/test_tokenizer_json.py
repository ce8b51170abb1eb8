"""Tokenizers of models, beside the library `tokenizers` and transformers reading the same files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import CORPUS, CUTS, SPECIAL, byte_level, llama2
from odd_texts import random_text
from tokenizers import Tokenizer as Library

from llm_lightning.data.instruction import encode
from llm_lightning.data.preference import encode as encode_pair
from llm_lightning.data.templates.as_jinja import jinja_of
from llm_lightning.data.templates.chat import ChatTemplate
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.tokenizers import json_content, tokenizer_json
from llm_lightning.tokenizers.base import END_OF_TEXT
from llm_lightning.tokenizers.build import build_tokenizer, from_description
from llm_lightning.tokenizers.json_content import read_content
from llm_lightning.tokenizers.tiktoken_encodings import byte_of_character, gpt2_merges
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer, describe_folder, is_gpt2

LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
KINDS = [*CUTS, "llama2", "llama2-metaspace"]


def content_of(kind: str, **more: Any) -> dict[str, Any]:
    return byte_level(kind, **more) if kind in CUTS else llama2(legacy=kind == "llama2")


def tokenizer_of(content: dict[str, Any], **roles: Any) -> JsonTokenizer:
    return JsonTokenizer(json.dumps(content), **roles)


def write_folder(folder: Path, content: dict[str, Any], **settings: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def odd_texts(number: int, without: Any = ()) -> list[str]:
    rng = random.Random(number)
    texts = [random_text(rng) for _ in range(number)]
    return [text for text in texts if not any(word in text for word in without)]


# -- ids and texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_library(kind):
    content = content_of(kind, not_special=()) if kind in CUTS else content_of(kind)
    ours, library = tokenizer_of(content), Library.from_str(json.dumps(content))
    for text in [CORPUS[-9000:], "", " ", " two", "'\u017f ½² 12345", *odd_texts(250, without=ours.controls)]:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_becomes_an_added_token(kind):
    ours = tokenizer_of(content_of(kind))
    assert ours.controls.keys() >= ({"<think>", "word", *SPECIAL} if kind in CUTS else {"<s>", "</s>", "<unk>"})
    rng = random.Random(9)
    for text in [*ours.controls, CORPUS[-9000:], *odd_texts(60)]:
        ids = ours.encode(text + rng.choice([*ours.controls]) + text)
        assert not set(ids) & set(ours.controls.values())


def test_ids_of_controls_are_those_of_the_file_and_decode_to_their_spelling():
    ours = tokenizer_of(byte_level("qwen2", special_first=False))
    library = Library.from_str(json.dumps(byte_level("qwen2", special_first=False)))
    for word, index in ours.controls.items():
        assert library.token_to_id(word) == index
        assert ours.token_bytes(index) == word.encode()
    assert ours.decode([ours.controls["<think>"], *ours.encode("a b"), ours.controls["<|im_end|>"]]) == (
        "<think>a b<|im_end|>"
    )


def test_a_piece_that_is_a_token_is_not_merged_where_the_file_says_so():
    content = byte_level("llama-bpe", not_special=())
    content["model"]["merges"] = []  # tokens are reached as whole pieces only
    vocabulary = content["model"]["vocab"]
    assert tokenizer_of(content).encode("the the") == [vocabulary["the"], vocabulary["Ġthe"]]


def test_bytes_that_a_vocabulary_lacks_are_lost_and_keep_their_neighbours_apart():
    content = byte_level("gpt-2", not_special=())
    byte = next(character for character, value in byte_of_character().items() if value == 4)
    del content["model"]["vocab"][byte]
    dots = content["model"]["vocab"]["."]
    assert tokenizer_of(content).encode(".\x04.") == [dots, dots]
    assert len(tokenizer_of(content).encode("..")) == 1  # else nothing could be joined


def test_llama2_adds_one_space_and_drops_one():
    ours = tokenizer_of(llama2())
    assert ours.token_bytes(ours.encode("the")[0]) == b" the"
    assert ours.token_bytes(3 + 0x0A) == b"\n"
    for text in ("the", " the", "", "½\n中", "the  the "):
        assert ours.decode(ours.encode(text)) == text
    assert ours.split_point("two words. " * 100) == 0


@pytest.mark.parametrize("kind", ["llama2", "llama2-metaspace"])
def test_llama2_begins_no_answer_with_its_space(kind):
    template = ChatTemplate(
        "llama2",
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        special=(("bos_token", "<s>"), ("eos_token", "</s>")),
    )
    content = content_of(kind)
    ours, library = tokenizer_of(content, bos_id=1, eot_id=2), Library.from_str(json.dumps(content))
    conversation = Conversation((Turn("the value", "", "of the type"), Turn("so", "", "it is")))
    pieces = list(template.tokens(ours, template.segments(conversation, ours)))
    expected = library.encode(template.text_of(conversation), add_special_tokens=False).ids
    assert [index for ids, _ in pieces for index in ids.tolist()] == expected
    answer, _ = template.answer_ids(ours, conversation)
    assert library.decode(answer.tolist()) == "it is"
    assert [ids.tolist() for ids, kind in pieces if kind == "response"][-1] == answer.tolist()


@pytest.mark.parametrize("space", ["legacy", "always", "first", "never"])
@pytest.mark.parametrize("text", [LLAMA2_CHAT, "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"])
def test_conversations_have_the_spaces_of_transformers(text, space):
    """Behind text, no answer gets the space of a text's beginning; behind a control token, some do."""
    from transformers import PreTrainedTokenizerFast

    content = llama2(legacy=space == "legacy")
    if space != "legacy":
        content["pre_tokenizer"]["prepend_scheme"] = space
    ours, template = tokenizer_of(content, bos_id=1, eot_id=2), ChatTemplate("own", text)
    library = Library.from_str(json.dumps(content))
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>")
    pair = Conversation((Turn("What is it?", "", "the  answer"), Turn("we are", "", "of it")), rejected="it is")
    chosen, rejected = (
        theirs.apply_chat_template(_messages(turns), chat_template=text, return_dict=False)
        for turns in (pair.turns, (pair.turns[0], pair.turns[1]._replace(response="it is")))
    )
    assert encode(ours, template, pair).token_ids.tolist() == chosen
    found = encode_pair(ours, template, pair)
    assert [*found.prompt_ids, *found.chosen_ids] == chosen
    assert [*found.prompt_ids, *found.rejected_ids] == rejected
    slots = choose_template("Q: {instruction}\nA:\n{response}")
    prompt = theirs.apply_chat_template(
        _messages(pair.turns)[:-1], chat_template=jinja_of(slots, ours), add_generation_prompt=True, return_dict=False
    )
    assert slots.prompt_ids(ours, pair) == prompt


def _messages(turns):
    pairs = [(("user", turn.instruction), ("assistant", turn.response)) for turn in turns]
    return [{"role": role, "content": content} for pair in pairs for role, content in pair]


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "qwen2", "llama2", "llama2-metaspace"])
def test_long_texts_are_cut_without_changing_an_id(kind, monkeypatch):
    ours = tokenizer_of(content_of(kind))
    text = "▁ a ▁b" + "".join(odd_texts(300)) + " " * 500 + CORPUS[:5000]
    whole = ours.encode(text)
    monkeypatch.setattr(tokenizer_json, "_PIECE", 40)
    assert len(list(ours._pieces(text))) > 100
    assert ours.encode(text) == whole


def test_llama2_is_not_cut_where_a_token_has_a_space_inside(monkeypatch):
    content = llama2()
    model = content["model"]
    model["vocab"] |= {"e▁": 700, "e▁a": 701}
    model["merges"] = [["e", "▁"], ["e▁", "a"], *model["merges"]]
    ours = tokenizer_of(content)
    text = "we are " * 50
    whole = ours.encode(text)
    assert 701 in whole
    monkeypatch.setattr(tokenizer_json, "_PIECE", 40)
    assert ours.encode(text) == whole


def test_an_unknown_cut_is_never_split():
    content = byte_level("llama-bpe")
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"[a-z]+ ?[a-z]+|."
    assert tokenizer_of(content).split_point("two words and more") == 0
    assert tokenizer_of(byte_level("llama-bpe")).split_point("two words and more") == 13
    content = byte_level("llama-bpe") | {"normalizer": {"type": "Lowercase"}}
    assert tokenizer_of(content).split_point("two words and more") == 0


def test_ids_without_a_token_are_named_gaps_included():
    content = byte_level("smollm", not_special=())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": 803, "content": "<|far|>"}]
    ours = tokenizer_of(content)
    assert ours.vocab_size == 804
    assert ours.ids_without_token(806) == [800, 801, 802, 804, 805]
    assert ours.ids_without_token(802) == [800, 801]
    assert ours.token_bytes(801) == b""


# -- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("smollm", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}),
        ("llama-bpe", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
        ("qwen2", {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}, "add_bos_token": False}),
        ("smollm", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True}),
    ],
)
def test_a_folder_begins_texts_as_transformers_does(kind, settings, tmp_path):
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, byte_level(kind, not_special=()), tokenizer_class="TokenizersBackend", **settings)
    theirs, ours = AutoTokenizer.from_pretrained(folder), from_description(describe_folder(folder, eos_ids=()))
    for text in ["plain text", *odd_texts(50, without=ours.controls)]:
        begin = [] if ours.bos_id is None else [ours.bos_id]
        assert begin + ours.encode(text) == theirs(text)["input_ids"]
    assert ours.special_tokens["eos_token"] == theirs.eos_token
    assert ours.special_tokens.get("bos_token") == theirs.bos_token
    assert theirs.eos_token_id in ours.stop_ids


def test_ends_of_documents_and_of_answers(tmp_path):
    folder = write_folder(tmp_path, byte_level("smollm"), eos_token="<|im_end|>")
    ours = from_description(describe_folder(folder, eos_ids=[2, 1]))
    assert (ours.eot_id, ours.stop_ids) == (0, (2, 1, 0))
    content = json.loads(json.dumps(byte_level("smollm")).replace(END_OF_TEXT, "<|other|>"))
    ours = from_description(describe_folder(write_folder(tmp_path, content, eos_token="<|im_end|>"), eos_ids=()))
    assert (ours.eot_id, ours.stop_ids) == (2, (2,))
    ours = from_description(describe_folder(write_folder(tmp_path, llama2(), eos_token="</s>"), eos_ids=[2]))
    assert (ours.eot_id, ours.stop_ids, ours.bos_id) == (2, (2,), 1)


def test_tokens_that_only_the_settings_name_are_added(tmp_path):
    more = {"0": {"content": END_OF_TEXT, "rstrip": True}, "802": {"content": "<tool>", "special": False}}
    folder = write_folder(tmp_path, byte_level("smollm", not_special=("<a>", "<b>")), added_tokens_decoder=more)
    ours = from_description(describe_folder(folder, eos_ids=()))
    assert ours.controls["<tool>"] == 802
    assert ours.content.special == set(SPECIAL)
    assert ours.control_flags == {END_OF_TEXT: {"rstrip"}}  # as in transformers, the settings win


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "llama2"])
def test_a_written_description_comes_back(kind, tmp_path):
    content = content_of(kind)
    named = {"eos_token": content["added_tokens"][2]["content"], "unk_token": content["added_tokens"][0]["content"]}
    description = describe_folder(write_folder(tmp_path, content, **named), eos_ids=[1, 2])
    write_folder(tmp_path, json.loads(description["json"]), **description["special_tokens"])
    assert describe_folder(tmp_path, eos_ids=description["stop_ids"]) == description


def test_a_folder_without_the_file_has_no_description(tmp_path):
    assert describe_folder(tmp_path, eos_ids=()) is None


@pytest.fixture(scope="module")
def gpt2_content() -> dict[str, Any]:
    gpt2 = build_tokenizer("gpt2")
    character_of = {byte: character for character, byte in byte_of_character().items()}
    tokens = ["".join(character_of[byte] for byte in gpt2.token_bytes(index)) for index in range(50256)]
    content = byte_level("gpt-2", not_special=())
    content["model"] |= {"vocab": {token: index for index, token in enumerate([*tokens, END_OF_TEXT])}}
    content["model"]["merges"] = gpt2_merges()
    content["added_tokens"] = [content["added_tokens"][0] | {"id": 50256}]
    for part, key in [("pre_tokenizer", "use_regex"), ("model", "type"), ("model", "ignore_merges")]:
        del content[part][key]  # the published file is older
    content["model"] |= {"unk_token": "", "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return content


def test_the_folder_of_gpt2_gives_gpt2(gpt2_content, tmp_path):
    assert describe_folder(write_folder(tmp_path, gpt2_content), eos_ids=[50256]) == {"name": "gpt2"}


def test_what_differs_from_gpt2_is_not_gpt2(gpt2_content):
    content = read_content(json.dumps(gpt2_content))
    assert is_gpt2(content)
    for other in ({"pre_tokenizer": byte_level("smollm")["pre_tokenizer"]}, {"normalizer": {"type": "NFC"}}):
        assert not is_gpt2(replace(content, data=content.data | other))
    assert not is_gpt2(replace(content, added=content.added | {"<|im_end|>": 50257}))
    swapped = content.tokens | {"!": 1, '"': 0}
    assert not is_gpt2(replace(content, tokens=swapped))


# -- bad input -----------------------------------------------------------------------------------------------


def changed(**values: Any) -> dict[str, Any]:
    return byte_level("smollm") | values


def changed_model(**values: Any) -> dict[str, Any]:
    content = byte_level("smollm")
    return content | {"model": content["model"] | values}


def begins_with(ids: list[Any]) -> dict[str, Any]:
    template = llama2()["post_processor"]
    return template | {"special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it has no model"),
        ({}, "it has no model"),
        (changed_model(type="Unigram"), "its model is Unigram; only BPE is implemented"),
        (changed_model(vocab=None), "model.vocab must map tokens to ids"),
        (changed_model(vocab={}), "model.vocab is empty"),
        (changed_model(vocab={"a": -1}), "'a' has the id -1"),
        (changed_model(vocab={"a": 2**40}), f"'a' has the id {2**40}"),
        (changed_model(vocab={"a": True}), "'a' has the id True"),
        (changed_model(vocab={"a": 3, "b": 3}), "one id for two tokens"),
        (changed_model(vocab={"a": 0, "b": 3}), "the added token '<|endoftext|>' has the id 0, but model.vocab"),
        (changed_model(merges=None), "model.merges must be a list"),
        (changed_model(merges=["a b c"]), "model.merges must hold pairs of tokens"),
        (changed_model(merges=["qqq zzz"]), "the library tokenizers cannot read it .*qqq.* out of vocabulary"),
        (changed_model(continuing_subword_prefix="##"), "continuing_subword_prefix='##' is not implemented"),
        (changed(added_tokens=7), "added_tokens must be a list"),
        (changed(added_tokens=[{"id": 1}]), "an entry without content"),
        (changed(added_tokens=[{"content": "a"}]), "'a' has the id None"),
        (changed(added_tokens=[{"id": 1, "content": "<x>"}] * 2), "a token twice"),
        (changed(decoder=None), "its decoder is missing; implemented are"),
        (changed(decoder={"type": "WordPiece"}), "its decoder is WordPiece"),
        (changed(pre_tokenizer={"type": "ByteLevel"}), "add_prefix_space=true"),
        (changed(pre_tokenizer={"type": "Nonsense"}), "the library tokenizers cannot read it"),
        (changed(post_processor={"type": "BertProcessing"}), "the post_processor BertProcessing is not implemented"),
        (changed(post_processor={"type": "TemplateProcessing"}), "post_processor has no readable template"),
        (changed(post_processor=begins_with(ids=[1, 2])), "the post_processor begins a text with 2 tokens; one is"),
        (changed(post_processor=begins_with(ids=3)), "post_processor has no readable template"),
        (changed(post_processor=begins_with(ids=[99999])), "bos_id=99999 has no token"),
        (changed(post_processor=begins_with(ids=["1"])), "bos_id='1' has no token"),
        (llama2() | {"model": llama2()["model"] | {"byte_fallback": False}}, "its decoder is Replace"),
    ],
)
def test_damaged_and_foreign_files_are_one_line_that_names_the_file(content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        describe_folder(write_folder(tmp_path, content), eos_ids=())
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, byte_level("smollm"))
    size = (folder / "tokenizer.json").stat().st_size
    monkeypatch.setattr(tokenizer_json, "MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {size} bytes are more than such a file has"):
        describe_folder(folder, eos_ids=())
    monkeypatch.setattr(json_content, "MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match=r"characters are more than a tokenizer\.json has"):
        JsonTokenizer((folder / "tokenizer.json").read_text() + " ")


def test_where_the_library_gives_up_there_is_one_line(monkeypatch):
    class PanicException(BaseException):  # as pyo3 names it
        pass

    class Library:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> None:
            raise PanicException("retry-limit-in-match over")

    ours = tokenizer_of(byte_level("qwen2"))
    monkeypatch.setattr(ours, "_library", Library())
    with pytest.raises(ValueError, match="gave up on a text of 4 characters: retry-limit-in-match over"):
        ours.encode("text")


def test_a_damaged_text_is_refused(tmp_path):
    for text in ("", "{", "[" * 100_000, "\ud800"):
        with pytest.raises(ValueError, match="tokenizer"):
            JsonTokenizer(text)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*codec"):
        describe_folder(tmp_path, eos_ids=())


def test_settings_that_name_no_token_are_refused(tmp_path):
    folder = write_folder(tmp_path, byte_level("smollm"), eos_token="<|nothing|>")
    with pytest.raises(ValueError, match=r"no token '<\|nothing\|>', the eos_token of tokenizer_config\.json"):
        describe_folder(folder, eos_ids=())
    with pytest.raises(ValueError, match="stop_ids=9000 has no token"):
        describe_folder(write_folder(tmp_path, byte_level("smollm")), eos_ids=[9000])
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object, not list"):
        describe_folder(folder, eos_ids=())
    write_folder(folder, byte_level("smollm"), added_tokens_decoder={"x": {"content": "<x>"}})
    with pytest.raises(ValueError, match=r"added_tokens_decoder of tokenizer_config\.json must map ids"):
        describe_folder(folder, eos_ids=())


@pytest.mark.parametrize(
    "damage",
    [
        {"json": None}, {"json": "{}"}, {"stop_ids": 3}, {"stop_ids": ["0"]}, {"bos_id": 10**6}, {"eot_id": -1},
        {"special_tokens": {"eos_token": 3}},
    ],
)  # fmt: skip
def test_damaged_descriptions_of_a_model_are_refused(damage):
    description = tokenizer_of(byte_level("smollm"), eot_id=0, stop_ids=[0]).describe()
    with pytest.raises(ValueError, match="tokenizer"):
        from_description(description | damage)
