"""Records beyond memory: 50 MB are prepared in bounded memory, and a second start reads none of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = """
import json, sys, time
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.tokenizers.build import build_tokenizer
tokenizer = build_tokenizer("gpt2")
tokenizer.encode("warm")

def memory():
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file)
    return [int(found[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")]

data = InstructionDataModule(
    tokenizer=tokenizer, context_length=512, name=None, path=sys.argv[1], template="alpaca", batch_size=8
)
before, start = memory()[0], time.perf_counter()
data.build()
seconds = time.perf_counter() - start
first = [one.tolist() for one in next(iter(data.train_dataloader()))[:2]]
print(json.dumps({
    "seconds": seconds, "mib": memory()[1] - before, "records": data.report()["records"], "digest": data.data_digest,
    "report": data.report(), "first": first,
}))
"""


def prepared(file: Path, cache: Path) -> dict:
    command = [sys.executable, "-c", PREPARE, str(file)]
    child = subprocess.run(
        command, env={**os.environ, "LLM_LIGHTNING_CACHE": str(cache)}, capture_output=True, text=True, check=True
    )
    found: dict = json.loads(child.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_50_mb_are_prepared_in_bounded_memory_and_once(tmp_path: Path) -> None:
    draw = random.Random(3)
    words = [f"{draw.choice('bcdfgklmnprst')}{draw.choice('aeiou')}{draw.choice('lnrst')}" for _ in range(500)]
    file, written, n = tmp_path / "records.jsonl", 0, 0
    with file.open("w", encoding="utf-8") as out:
        while written < 50e6:
            question, answer = (" ".join(draw.choices(words, k=draw.randint(10, 160))) for _ in range(2))
            written += out.write(json.dumps({"instruction": f"{n}: {question}", "output": answer}) + "\n")
            n += 1
    first = prepared(file, tmp_path / "cache")
    print(f"{n / first['seconds']:.0f} records/s, {first['mib']:.0f} MiB above the imports")
    assert first["records"] == n
    # 14 MiB were measured; the records as objects would take more than the file.
    assert first["mib"] < 60
    again = prepared(file, tmp_path / "cache")
    assert {key: again[key] for key in ("digest", "report", "first")} == {
        key: first[key] for key in ("digest", "report", "first")
    }
    assert again["seconds"] < 3  # measured: 0.02; reading and hashing alone would take as long as this
    file.write_bytes(b"{}" + file.read_bytes()[2:])  # of the same size
    with pytest.raises(subprocess.CalledProcessError):
        prepared(file, tmp_path / "cache")
