"""llama.cpp's own tokenizer, through the wheel `xllamacpp`: the reference for vocabularies in GGUF files."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class LlamaCpp:
    """A loaded GGUF file that tokenizes."""

    def __init__(self, address: str) -> None:
        self._address = address

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        return self._post("tokenize", content=text, parse_special=parse_special, add_special=add_special)["tokens"]

    def decode(self, ids: list[int]) -> str:
        return self._post("detokenize", tokens=ids)["content"]

    def _post(self, verb: str, **content: object) -> dict:
        body = json.dumps(content).encode()
        request = urllib.request.Request(f"{self._address}/{verb}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def loaded(path: Path) -> Iterator[LlamaCpp]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server


def write_tiny_model(path: Path, vocabulary: dict[str, Any]) -> None:
    """Write a GGUF file of a random llama of one block with this vocabulary (`tokenizer.ggml.*`)."""
    import gguf

    width, rows = 32, len(vocabulary["tokenizer.ggml.tokens"])
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 256, "embedding_length": width, "block_count": 1, "feed_forward_length": 32,
                       "attention.head_count": 2, "vocab_size": rows}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in vocabulary.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    rng = np.random.default_rng(0)
    names = {"token_embd": (rows, width), "output_norm": (width,), "output": (rows, width)}
    names |= {f"blk.0.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    names |= {f"blk.0.{name}": (width, width) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    names |= {f"blk.0.{name}_norm": (width,) for name in ("attn", "ffn")}
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
