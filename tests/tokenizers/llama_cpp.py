"""llama.cpp's own tokenizer, through the wheel `xllamacpp`: the reference for vocabularies in GGUF files."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
