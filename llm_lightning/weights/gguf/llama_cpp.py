"""What llama.cpp computes from a GGUF file, by `xllamacpp`, in a process of its own: it ends the process of a bad file.

As a program it reads a question from standard input and answers on standard output; both are JSON.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.terminal import reply, say

TOP = 10
_SECONDS = 1800  # reading a file of many gigabytes from a slow disk


class Prediction(NamedTuple):
    """The next token after some tokens: natural logarithms of probabilities."""

    at: int
    """Index of the token that follows."""
    actual: float
    """Of the token that follows."""
    top: dict[int, float]
    """Of the `TOP` likeliest, likeliest first."""


class Computed(NamedTuple):
    tokens: list[int]
    """Of the text, which begins with none that the tokenizer adds."""
    predictions: list[Prediction]
    chats: list[list[int] | None]
    """Of each conversation, by the file's chat template; None where llama.cpp cannot run it."""


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def compute(
    file: Path,
    text: str,
    ids: Sequence[int],
    first: int,
    *,
    chats: Sequence[Sequence[Mapping[str, str]]] = (),
    threads: int = 1,
    exact: bool = True,
) -> Computed:
    """Encode `text`; predict `ids[first]` from those before it, then `ids[first + 1]`, and so on to the last.

    Tokens that are a part of a character are left out: llama.cpp's server states nothing before the character is whole.

    Args:
        chats: conversations that wait for an answer, as messages of `role` and `content`.
        exact: no flash attention, and a cache in float32. Llama.cpp's own settings (a cache in float16) differ from
            exact ones by hundredths.

    Raises:
        ValueError: if llama.cpp does not read the file; with the last line that it writes.
    """
    settings = {"threads": threads, "exact": exact}
    question = {"file": str(file), "text": text, "ids": list(ids), "first": first, "chats": list(chats), **settings}
    command = [sys.executable, "-m", "llm_lightning.weights.gguf.llama_cpp"]
    done = subprocess.run(
        command, input=json.dumps(question), capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it wrote nothing"]
        wrong = [line for line in lines if " E " in line] or lines
        raise ValueError(f"llama.cpp does not read {file} (exit code {done.returncode}): {wrong[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    predictions = [Prediction(at, actual, dict(top)) for at, actual, top in answer["predictions"]]
    return Computed(answer["tokens"], predictions, answer["chats"])


def _server(file: str, n_ids: int, threads: int, exact: bool) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = n_ids + 1, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    if exact:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def _predictions(server: Any, ids: list[int], at: int) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    """One completion of one token, because there are no probabilities of a prompt's tokens.

    A bias makes it the token that follows; the probabilities stated are those without the bias.
    """
    request = {
        "prompt": ids[:at],
        "n_predict": 1,
        "n_probs": TOP,
        "logit_bias": [[ids[at], 1e4]],
        "temperature": 0.0,
        "cache_prompt": True,
    }
    stated = server.handle_completions(request)["choices"][0]["logprobs"]
    for token in stated["content"] if stated else ():
        assert token["id"] == ids[at], "the bias does not choose the token"
        yield at, token["logprob"], [(top["id"], top["logprob"]) for top in token["top_logprobs"]]


def _tokens(server: Any, text: str, *, is_prompt: bool = False) -> list[int]:
    """Ids of a text; of a prompt with its control tokens, and what begins it."""
    found = _post(server, "tokenize", content=text, add_special=is_prompt, parse_special=is_prompt)
    tokens: list[int] = found["tokens"]
    return tokens


def _chat(server: Any, messages: list[dict[str, str]]) -> list[int] | None:
    try:
        return _tokens(server, _post(server, "apply-template", messages=messages)["prompt"], is_prompt=True)
    except urllib.error.HTTPError:
        return None


def _post(server: Any, verb: str, **content: Any) -> dict[str, Any]:
    body, kind = json.dumps(content).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/{verb}", body, kind)) as response:
        reply: dict[str, Any] = json.load(response)
    return reply


def _main() -> None:
    question = json.load(sys.stdin)
    ids = question["ids"]
    server = _server(question["file"], len(ids), question["threads"], question["exact"])
    found = [one for at in range(question["first"], len(ids)) for one in _predictions(server, ids, at)]
    tokens, chats = _tokens(server, question["text"]), [_chat(server, messages) for messages in question["chats"]]
    say(flush=True)  # after what llama.cpp may have left on the line
    reply({"tokens": tokens, "predictions": found, "chats": chats})


if __name__ == "__main__":
    _main()
