"""Damaged and lying GGUF files: each is one clear line, whatever the byte, and takes no memory beyond the file's."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_gguf import CONFIGS, random_model

from llm_lightning.weights.gguf.header import read_header
from llm_lightning.weights.gguf.reading import read_gguf
from llm_lightning.weights.gguf.writing import write_gguf

KEYS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|endoftext|>", *(f"[PAD{index}]" for index in range(4))],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 5, 5, 5, 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.chat_template": "{{ messages }}",
}
FIRST_KEY = 24  # after magic, version, two counts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A Llama of one block, with scaled positions and a vocabulary of 8."""
    config = replace(CONFIGS["llama 3"], vocab_size=8, n_layer=1, ffn_width=32)
    file = tmp_path_factory.mktemp("good") / "model.gguf"
    write_gguf(file, random_model(config).state_dict(), config, KEYS, dtype="q8_0")
    assert torch.isfinite(read_gguf(file).state["lm_head.weight"]).all()
    return file.read_bytes()


def header_end(content: bytes) -> int:
    """Where the last tensor is described: its name, one dimension, type and offset."""
    name = b"rope_freqs.weight"
    return content.rindex(name) + len(name) + 4 + 8 + 4 + 8


def refused(path: Path, content: bytes) -> str | None:
    """The message of the refusal; None if the file is read."""
    path.write_bytes(content)
    try:
        read_gguf(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{path}"), message
        assert "\n" not in message
        assert len(message) < 600
        return message
    return None


def test_a_file_cut_anywhere_is_refused(good: bytes, tmp_path: Path) -> None:
    cuts = [*range(0, header_end(good), 13), *range(header_end(good), len(good), 20_000), len(good) - 33]
    for cut in cuts:
        message = refused(tmp_path / "cut.gguf", good[:cut])
        assert message is not None, cut
        assert "is damaged, or not a GGUF file" in message


@pytest.mark.parametrize("value", [0x00, 0xFF])
def test_any_byte_of_the_header_may_be_wrong(value: int, good: bytes, tmp_path: Path) -> None:
    """Another value may be one that a file may have, such as another letter of a name; anything else is refused."""
    messages = []
    for at in range(value % 17, header_end(good), 17):
        messages.append(refused(tmp_path / "wrong.gguf", good[:at] + bytes([value]) + good[at + 1 :]))
    assert sum(message is not None for message in messages) > len(messages) / 3


def at_length_of(key: bytes) -> Callable[[bytes], int]:
    """Where the length of a text or list is: after the key and the types."""
    return lambda content: content.index(key) + len(key) + 4


def at_tensor(field: int) -> Callable[[bytes], int]:
    """Where a field of the description of the token embedding is."""
    return lambda content: content.index(b"token_embd.weight") + len(b"token_embd.weight") + field


@pytest.mark.parametrize(
    ("place", "code", "value", "message"),
    [
        (lambda _: 0, "4s", b"GGML", "it begins with b'GGML', not with b'GGUF'"),
        (lambda _: 4, "I", 1, "it has version 1; versions 2 and 3 are read"),
        (lambda _: 4, "I", 3 << 24, "its numbers are big-endian"),
        (lambda _: 8, "Q", 2**60, "a list of 1,152,921,504,606,846,976 tensors needs"),
        (lambda _: 16, "Q", 2**60, "metadata of 1,152,921,504,606,846,976 keys needs"),
        (lambda _: FIRST_KEY, "Q", 2**62, "the name of a key needs"),
        (at_length_of(b"general.architecture"), "Q", 2**63, "'general.architecture' needs"),
        (lambda content: at_length_of(b"ggml.tokens")(content) + 4, "Q", 2**61, "'tokenizer.ggml.tokens' needs"),
        (
            lambda content: at_length_of(b"ggml.token_type")(content) + 4,
            "Q",
            2**61,
            "'tokenizer.ggml.token_type' needs",
        ),
        (lambda content: at_length_of(b"general.architecture")(content) - 4, "I", 99, "has the unknown type 99"),
        (at_length_of(b"ggml.tokens"), "I", 9, "is a list of the unknown type 9"),
        (at_tensor(0), "I", 0, "has 0 dimensions; there are 1 to 4"),
        (at_tensor(0), "I", 2**31, "has 2147483648 dimensions"),
        (at_tensor(4), "Q", 0, "which holds nothing"),
        (at_tensor(4), "Q", 2**63, "ends at byte"),
        (at_tensor(12), "Q", 2**63, "ends at byte"),
        (at_tensor(4), "Q", 31, "has rows of 31 values, not of whole 32"),
        (at_tensor(20), "I", 77, "has the unknown type 77"),
        (at_tensor(24), "Q", 2**40, "ends at byte"),
        (at_tensor(24), "Q", 32, "overlap"),
        (at_tensor(24), "Q", 7, "is not a multiple of 32"),
        (lambda content: content.index(b"output_norm"), "11s", b"output.norm", "'output_norm.weight' is missing"),
        (lambda content: content.index(b"token_embd.weight"), "4s", b"\xff\xfe\xfd\xfc", "is not UTF-8"),
        (lambda content: content.index(b"llama.block_count"), "17s", b"llama.vocab_size!", "block_count is missing"),
    ],
)
def test_a_lying_header_is_refused_before_memory_is_taken(
    place: Callable[[bytes], int], code: str, value: int | bytes, message: str, good: bytes, tmp_path: Path
) -> None:
    at = place(good)
    written = struct.pack(f"<{code}", value)
    path = tmp_path / "lying.gguf"
    refused(path, good)  # everything is imported
    tracemalloc.start()
    try:
        found = refused(path, good[:at] + written + good[at + len(written) :])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found is not None
    assert message in found
    assert peak < 2 * len(good) + 1_000_000  # the test's own copies of the file among them


def test_names_must_be_unique(good: bytes, tmp_path: Path) -> None:
    twice = good.replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight")
    assert "has the tensor 'blk.0.attn_v.weight' twice" in str(refused(tmp_path / "tensor.gguf", twice))
    twice = good.replace(b"llama.block_count", b"llama.vocab_size\0").replace(
        b"llama.vocab_size\0", b"general.file_type"
    )
    assert "has the key 'general.file_type' twice" in str(refused(tmp_path / "key.gguf", twice))


def test_alignment_must_be_a_power_of_two(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    key = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 24)
    (tmp_path / "model.gguf").write_bytes(header + key)
    with pytest.raises(ValueError, match=r"general\.alignment=24 must be a power of two"):
        read_header(tmp_path / "model.gguf")


def test_many_blocks_are_not_built_before_their_tensors_are_found(good: bytes, tmp_path: Path) -> None:
    at = good.index(b"llama.block_count") + len(b"llama.block_count") + 4
    message = refused(tmp_path / "deep.gguf", good[:at] + struct.pack("<I", 2**32 - 1) + good[at + 4 :])
    assert "the tensor 'blk.1.attn_norm.weight' is missing" in str(message)
