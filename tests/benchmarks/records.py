"""Preparing instruction records against `datasets.map` with the same tokenizer: rate, and memory above the imports.

    python tests/benchmarks/records.py [--megabytes 100] [--repeats 3]

Ours does the whole job: reads and checks the JSON Lines, finds equal prompts, splits, renders the alpaca template,
encodes, marks the targets, measures lengths, hashes and flushes everything; `again` is its second start. `datasets`
loads the file and maps a function that renders the same template with string operations, encodes prompt and answer,
and gives ids and labels, in one process, its default; it checks, splits and measures nothing. Each run is a process of
its own with an empty cache, they take turns, and ratios within a round are compared. The text is made from
tinyshakespeare.txt in $LLM_LIGHTNING_DATA, or else from the embedded corpus. Results: outputs/benchmarks/records.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contest import RESULTS, peak_mib
from token_files import base_text, current_mib

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
END_OF_TEXT = 50256


def main() -> None:
    """Run the contenders in turn and report their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", nargs=3, metavar=("NAME", "FILE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, file, cache = options.contender
        print(json.dumps(CONTENDERS[name](Path(file), Path(cache))))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        write_records(file, options.megabytes * 10**6)
        rounds = [one_round(file, Path(folder) / str(number)) for number in range(options.repeats)]
    report(rounds, options.megabytes)


def write_records(path: Path, n_bytes: int) -> None:
    """Write records of instruction, input and output, of words of real text; no two are equal."""
    draw, words, written, number = random.Random(0), base_text().split(), 0, 0

    def some(n: int) -> str:
        at = draw.randrange(len(words) - n)
        return " ".join(words[at : at + n])

    with path.open("w", encoding="utf-8") as file:
        while written < n_bytes:
            record = {"instruction": f"{number} {some(draw.randint(8, 40))}", "input": "" if number % 3 else some(20)}
            written += file.write(json.dumps(record | {"output": some(draw.randint(20, 150))}) + "\n")
            number += 1


def one_round(file: Path, cache: Path) -> dict[str, Any]:
    """Every contender once; the second start of ours follows its first."""
    return {name: run(name, file, cache) for name in CONTENDERS}


def run(name: str, file: Path, cache: Path) -> dict[str, float]:
    """Run one contender in a process of its own."""
    command = [sys.executable, __file__, "--contender", name, str(file), str(cache)]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    print(f"  {name:9s} {result['records'] / result['seconds']:10.0f} records/s", file=sys.stderr, flush=True)
    return result


def ours(file: Path, cache: Path) -> dict[str, float]:
    """Build the data module; what is in the cache already is used."""
    os.environ["LLM_LIGHTNING_CACHE"] = str(cache / "ours")
    from llm_lightning.data.instruction import InstructionDataModule
    from llm_lightning.tokenizers.build import build_tokenizer

    tokenizer = build_tokenizer("gpt2")
    tokenizer.encode("warm")
    data = InstructionDataModule(
        tokenizer=tokenizer, context_length=1024, name=None, path=str(file), template="alpaca", batch_size=8
    )
    before, start = current_mib(), time.perf_counter()
    data.build()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "records": data.report()["records"], "mib_above_imports": peak_mib() - before}


def datasets_map(file: Path, cache: Path) -> dict[str, float]:
    """Load and map."""
    import datasets

    from llm_lightning.tokenizers.build import build_tokenizer

    datasets.disable_progress_bars()
    encode = build_tokenizer("gpt2").encode
    encode("warm")

    def encoded(record: dict[str, str]) -> dict[str, list[int]]:
        given = f"\n\n### Input:\n{record['input']}" if record["input"] else ""
        prompt = encode(f"{PREAMBLE}{record['instruction']}{given}\n\n### Response:\n")
        answer = [*encode(record["output"]), END_OF_TEXT]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    before, start = current_mib(), time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache / "datasets"))
    data = data.map(encoded, remove_columns=data.column_names)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "records": len(data), "mib_above_imports": peak_mib() - before}


CONTENDERS = {"ours": ours, "again": ours, "datasets": datasets_map}


def report(rounds: list[dict[str, Any]], megabytes: int) -> None:
    """Print the medians and the ratio, and write everything to a file."""
    n = rounds[0]["ours"]["records"]
    seconds = {name: statistics.median(one[name]["seconds"] for one in rounds) for name in CONTENDERS}
    memory = {name: max(one[name]["mib_above_imports"] for one in rounds) for name in CONTENDERS}
    times = statistics.median(one["datasets"]["seconds"] / one["ours"]["seconds"] for one in rounds)
    file = RESULTS / "records.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {"megabytes": megabytes, "records": n, "seconds": seconds, "mib_above_imports": memory, "times": times}
    file.write_text(json.dumps(result | {"rounds": rounds}, indent=1) + "\n")
    print(f"{n:,} records, {megabytes} MB, median of {len(rounds)}")
    print(f"ours         {n / seconds['ours']:8.0f} records/s, {memory['ours']:.0f} MiB above the imports")
    print(f"datasets.map {n / seconds['datasets']:8.0f} records/s, {memory['datasets']:.0f} MiB above the imports")
    print(f"times        {times:8.2f}   ({file})")
    print(f"second start {seconds['again']:8.2f} s, {memory['again']:.0f} MiB above the imports")


if __name__ == "__main__":
    main()
