"""Building token files against tiktoken's own batch encoder: rate on all cores, and memory above the imports.

    python tests/benchmarks/token_files.py [--megabytes 200] [--repeats 3]

Ours does the whole job: reads and checks the file, encodes, hashes, writes, flushes, reads back. tiktoken only encodes
text that is already in memory, in pieces of the same size, and drops the ids. Each run is a process of its own, the
two take turns, and medians are compared. The text is made from tinyshakespeare.txt in $LLM_LIGHTNING_DATA, or else from
the embedded corpus. Results: outputs/benchmarks/token_files.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "outputs" / "benchmarks" / "token_files.json"


def main() -> None:
    """Run both contenders in turn and report their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, file = options.contender
        print(json.dumps(CONTENDERS[name](Path(file))))
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, options.megabytes * 10**6)
        runs = [{name: run(name, text) for name in CONTENDERS} for _ in range(options.repeats)]
    report(runs, options.megabytes)


def write_text(path: Path, n_bytes: int) -> None:
    """Write paragraphs of real text in random order, some words varied, so that no part repeats another."""
    draw, paragraphs, written = random.Random(0), base_text().split("\n\n"), 0
    with path.open("w", encoding="utf-8") as file:
        while written < n_bytes:
            words = draw.choice(paragraphs).split(" ")
            at = draw.randrange(len(words))
            words[at] += draw.choice(["", "s", "ing", f" {draw.randrange(10**4)}", f" {draw.choice(paragraphs)[:9]}"])
            written += file.write(" ".join(words) + "\n\n")


def base_text() -> str:
    """Return some real English."""
    if folder := os.environ.get("LLM_LIGHTNING_DATA"):
        return (Path(folder) / "tinyshakespeare.txt").read_text(encoding="utf-8")
    from llm_lightning.data.embedded import python_reference

    return "\n\n".join(text for _, text in python_reference.documents())


def run(name: str, text: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    command = [sys.executable, __file__, "--contender", name, str(text)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_mib() -> float:
    """Return the largest memory this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def current_mib() -> float:
    """Return the memory in use now, where the system tells; elsewhere the peak so far."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_mib()
    return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20


def ours(text: Path) -> dict[str, float]:
    """Build token files from scratch in an empty cache."""
    from llm_lightning.data.corpus.sources import open_source
    from llm_lightning.data.corpus.token_files import build_token_files
    from llm_lightning.tokenizers.build import build_tokenizer

    tokenizer = build_tokenizer("gpt2")
    tokenizer.encode("warm")
    with tempfile.TemporaryDirectory(dir=text.parent) as cache:
        before, start, cpu = current_mib(), time.perf_counter(), time.process_time()
        files = build_token_files(open_source(path=text), tokenizer, val_fraction=0.1, cache=Path(cache))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mib_above_imports": peak_mib() - before,
        "tokens": sum(file.n_tokens for file in files.values()),
    }


def tiktoken(text: Path) -> dict[str, float]:
    """Encode the same text with `encode_ordinary_batch`, a thread per core, the text being in memory before."""
    from llm_lightning.tokenizers.build import build_tokenizer

    encoding = build_tokenizer("gpt2").encoding  # type: ignore[attr-defined]
    encoding.encode_ordinary("warm")
    size, threads = 1 << 18, os.cpu_count() or 1
    whole = text.read_text(encoding="utf-8")
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    for first in range(0, len(pieces), 64):
        tokens += sum(map(len, encoding.encode_ordinary_batch(pieces[first : first + 64], num_threads=threads)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}


CONTENDERS = {"ours": ours, "tiktoken": tiktoken}


def report(runs: list[dict[str, dict[str, float]]], megabytes: int) -> None:
    """Print the medians and their ratio, and write everything to a file."""
    rate = {name: megabytes / statistics.median(one[name]["seconds"] for one in runs) for name in CONTENDERS}
    cpu = {name: statistics.median(one[name]["cpu_seconds"] for one in runs) for name in CONTENDERS}
    memory = max(one["ours"]["mib_above_imports"] for one in runs)
    result = {
        "megabytes": megabytes,
        "cores": os.cpu_count(),
        "megabytes_per_second": rate,
        "ratio_to_tiktoken": rate["ours"] / rate["tiktoken"],
        "ratio_to_tiktoken_in_cpu_time": cpu["tiktoken"] / cpu["ours"],
        "peak_mib_above_imports": memory,
        "runs": runs,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{megabytes} MB of text on {os.cpu_count()} cores, median of {len(runs)}")
    print(f"token files built   {rate['ours']:6.2f} MB/s, {memory:.0f} MiB above the imports")
    print(f"tiktoken batch only {rate['tiktoken']:6.2f} MB/s")
    print(f"ratio               {result['ratio_to_tiktoken']:6.2f}   ({RESULTS})")
    print(f"ratio in CPU time   {result['ratio_to_tiktoken_in_cpu_time']:6.2f}   (what to look at on a busy machine)")


if __name__ == "__main__":
    main()
