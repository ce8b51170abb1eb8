"""Two runs at the same time on the cores of one: how fast they are, and what they say. For an idle machine.

    python tests/benchmarks/side_by_side.py [--seconds 45] [--tree FOLDER]

In turn: one run alone; two as they start by themselves; two whose idle threads sleep; two as the advice says, with
their part of the cores each; and two processes of one run (DDP). `--tree` is another checkout, as of an earlier
commit. It takes about seven times SECONDS, and prints tokens/s of each run and the line that it said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from llm_lightning.cores import cores  # noqa: E402
from llm_lightning.files.metrics_csv import read_metrics  # noqa: E402

PART = {"OMP_NUM_THREADS": str(max(1, cores() // 2))}
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
DDP = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
TRIALS: dict[str, tuple[int, dict[str, str], list[str]]] = {
    "one run alone": (1, {}, ["accelerator=cpu"]),
    "two": (2, {}, ["accelerator=cpu"]),
    "two, PASSIVE": (2, ASLEEP, ["accelerator=cpu"]),
    "two, as advised": (2, PART | ASLEEP, ["accelerator=cpu"]),
    "two ranks of one run": (1, {}, DDP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=45, help="of training, more than the 30 of the first look")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose train.py runs")
    options = parser.parse_args()
    print(f"{cores()} cores, load {os.getloadavg()[0]:.1f}")
    for name, (n, environment, words) in TRIALS.items():
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder, str(number)) for number in range(n)]
            clock = f"+trainer.max_time=00:00:00:{options.seconds:02.0f}"
            runs = [start(options.tree, [*words, clock, f"hydra.run.dir={place}"], environment) for place in places]
            outputs = [run.communicate()[0] for run in runs]
            if any(run.returncode for run in runs):
                raise SystemExit("\n".join(outputs))
            rates = [rate(place) for place in places]
        said = {line for output in outputs for line in output.splitlines() if "waited for a core" in line}
        shown = " + ".join(f"{one:,.0f}" for one in rates)
        print(f"{name:22s} {sum(rates):8,.0f} tokens/s ({shown}) {' | '.join(said)}", flush=True)


def start(tree: Path, words: list[str], extra: dict[str, str]) -> subprocess.Popen[str]:
    """One run of nano; each run of a trial prepares its data by itself, before its clock starts."""
    free = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    options = [
        "trainer.max_epochs=10000", "trainer.enable_progress_bar=false", "callbacks.samples=null",
        "callbacks.plots=null", "data.eval_batches=0", "trainer.limit_val_batches=1",
    ]  # fmt: skip
    environment = {**free, **extra, "PYTHONPATH": str(tree)}
    return subprocess.Popen(
        [sys.executable, str(tree / "train.py"), *options, *words],
        env=environment, cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def rate(run: Path) -> float:
    """The mean of the rates that the run logged, without the first fifth, in which the other one may still start."""
    found = [value for _, value in read_metrics(run / "metrics.csv").get("train/tokens_per_second", [])]
    steady = found[len(found) // 5 :]
    return sum(steady) / max(1, len(steady))


if __name__ == "__main__":
    main()
