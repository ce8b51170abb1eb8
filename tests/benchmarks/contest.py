"""What every benchmark shares: contenders in processes of their own, in turn; medians; ratios; one JSON file.

Other work on the machine slows whatever runs at that moment, so contenders take turns, the first to run changes from
round to round, and ratios are taken within a round before their median. CPU time is reported beside wall time.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "outputs" / "benchmarks"
PACKAGES = ("torch", "lightning", "transformers", "trl", "peft", "llms-from-scratch")

Run = dict[str, float]


def run_rounds(
    script: str, contenders: Sequence[str], rounds: int, arguments: Sequence[str] = ()
) -> list[dict[str, Run]]:
    """Every contender once a round: `python script --contender NAME ARGUMENTS`, whose last line is its JSON result."""
    results = []
    for number in range(rounds):
        first = number % len(contenders)
        results.append(
            {name: run_child(script, name, arguments) for name in (*contenders[first:], *contenders[:first])}
        )
    return results


def run_child(script: str, name: str, arguments: Sequence[str]) -> Run:
    """Run one contender in a process of its own."""
    command = [sys.executable, script, "--contender", name, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise SystemExit(f"{name} failed:\n{child.stderr[-3000:]}")
    result: Run = json.loads(child.stdout.splitlines()[-1])
    print(f"  {name:24s} {result['tokens_per_second']:8.1f} tokens/s", file=sys.stderr, flush=True)
    return result


def timed(step: Callable[[], Any], repeats: int) -> Run:
    """Median wall time and mean CPU time of `step`."""
    wall, cpu = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        wall.append(time.perf_counter() - start)
    return {"seconds": statistics.median(wall), "cpu_seconds": (time.process_time() - cpu) / repeats}


def peak_mib() -> float:
    """The largest memory this process has had so far.

    On Linux not by getrusage, whose figure a new process inherits from the one that starts it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def medians(rounds: list[dict[str, Run]], name: str) -> Run:
    """The median of each figure of one contender."""
    return {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}


def ratio(rounds: list[dict[str, Run]], ours: str, theirs: str, key: str) -> float:
    """Median over rounds of ours / theirs."""
    return statistics.median(one[ours][key] / one[theirs][key] for one in rounds)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": models[0] if models else platform.processor(),
        "avx512_bf16": any(" avx512_bf16" in line for line in lines),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def write_results(name: str, settings: dict[str, Any], rounds: list[dict[str, Run]], ratios: dict[str, float]) -> None:
    """Print the ratios; write everything to `outputs/benchmarks/<name>.json`."""
    contenders = {contender: medians(rounds, contender) for contender in rounds[0]}
    result = {"machine": machine(), "settings": settings, "ratios": ratios, "medians": contenders, "rounds": rounds}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {settings}, median of {len(rounds)} rounds")
    for contender, figures in contenders.items():
        print(f"  {contender:24s}" + "".join(f"  {key} {value:.4g}" for key, value in figures.items()))
    for what, value in ratios.items():
        print(f"  {value:6.2f}  {what}")
    print(f"  ({path})")
