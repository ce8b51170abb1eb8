"""What a sweep costs: start-up of a job by fork server, os.fork and fresh process; joblib beside one job after another.

    python tests/benchmarks/sweeps.py overhead          # 8 tiny jobs, three ways, and how finished ones are skipped
    python tests/benchmarks/sweeps.py parallel          # 8 jobs of 20 s or more: serial and joblib with 2 workers
    python tests/benchmarks/sweeps.py parallel --steps 4    # the same on tiny jobs

For an idle machine. OMP_NUM_THREADS stays as it is: unset, serial jobs use all cores, and workers share them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["tokenizer=byte", "accelerator=cpu", "trainer.precision=32-true", "trainer.enable_progress_bar=false",
         "callbacks.plots=null"]  # fmt: skip
TINY = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.context_length=16", "trainer.max_steps=4"]
MAIN = (
    "import sys; sys.argv[0] = {script!r}; from pathlib import Path; "
    "from llm_lightning.experiments.launch import main; main(Path({script!r}))"
)
FRESH = "from llm_lightning.experiments.sweep import attempt; attempt.can_fork = lambda *_, **__: False; "
OS_FORK = (
    "import llm_lightning.experiments.sweep.preloaded; from llm_lightning.experiments.sweep import attempt; "
    "from forked import Forked; "
    "attempt.start_child = lambda orders, *_: Forked(orders.argv[1:], orders.folder, pipes=False); "
)
WAYS = {"fork server": "", "os.fork": OS_FORK, "fresh process": FRESH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "parallel"))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600, help="of each job of `parallel`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.txt")
        corpus.write_text("to be or not to be, that is the question. " * 5000)
        words = ["-m", *SMALL, f"data.path={corpus}", f"seed={','.join(str(n + 1) for n in range(options.jobs))}"]
        if options.what == "overhead":
            overhead([*words, *TINY], Path(folder), options.jobs)
        else:
            parallel([*words, f"trainer.max_steps={options.steps}"], Path(folder))


def overhead(words: list[str], folder: Path, jobs: int) -> None:
    """Print the seconds of a job for each way of starting it."""
    first: dict[str, float] = {}
    for way, patch in WAYS.items():
        name = way.replace(" ", "_")
        whole = swept([*words, f"run_name={name}"], folder, patch)
        seconds = sorted(attempts(folder, name).values())
        first[way] = statistics.median(seconds)
        print(f"{way:14} {first[way]:6.2f} s a job (median; longest {seconds[-1]:.2f}), whole sweep {whole:6.2f} s")
    ratio = first["fork server"] / first["fresh process"]
    print(f"fork server / fresh process: {ratio:.2f}; os.fork / fresh: {first['os.fork'] / first['fresh process']:.2f}")
    again = swept([*words, "run_name=fork_server"], folder)
    print(f"{jobs} finished jobs are skipped in {again:.2f} s, {again / jobs:.2f} s each with the start of the sweep")


def parallel(words: list[str], folder: Path) -> None:
    """Print how long the jobs take one after the other, and by two workers of joblib."""
    serial = swept([*words, "run_name=serial"], folder)
    joblib = swept([*words, "run_name=joblib", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], folder)
    for name, seconds in (("serial", serial), ("joblib", joblib)):
        print(f"{name:8} {seconds:7.1f} s, a job {statistics.median(attempts(folder, name).values()):6.1f} s (median)")
    print(f"joblib / serial: {joblib / serial:.2f}")


def swept(words: list[str], folder: Path, patch: str = "") -> float:
    """Run a sweep; its seconds."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    began = time.perf_counter()
    command = [sys.executable, "-c", patch + MAIN.format(script=str(ROOT / "train.py")), *words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stdout[-2000:] + result.stderr[-2000:])
    return time.perf_counter() - began


def attempts(folder: Path, name: str) -> dict[str, float]:
    """Job -> seconds of its last attempt."""
    files = (folder / "outputs" / "sweeps" / name).glob("*/attempt.json")
    return {file.parent.name: json.loads(file.read_text())["seconds"] for file in files}


if __name__ == "__main__":
    main()
