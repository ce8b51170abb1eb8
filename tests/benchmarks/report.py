"""How long a report takes: 504 made runs with curves of 300 rows; 8 learning rates, 7 widths, 9 seeds.

python tests/benchmarks/report.py [FOLDER]
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_sweeps import make_job, write_sweep

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WIDTHS = (16, 32, 48, 64, 96, 128, 192)


def make(folder: Path) -> int:
    """Make the runs; one in fifty failed."""
    write_sweep(folder, "optimizer.lr=1e-5,3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2", "model.n_embd=16,32,48,64,96,128,192")
    cases = list(product(RATES, WIDTHS, range(1, 10)))
    for number, (rate, width, seed) in enumerate(cases):
        loss = 2 + abs(RATES.index(rate) - 4) / 4 - width / 400 + random.Random(number).gauss(0, 0.05)
        status = "failed" if number % 50 == 49 else "finished"
        changes = {"optimizer__lr": rate, "model__n_embd": width, "seed": seed}
        make_job(folder / f"lr_{rate:g}-n_embd_{width}-seed_{seed}", status, loss, rows=300, **changes)
    return len(cases)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary, "study")
        n = make(folder)
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "llm_lightning", "report", str(folder)], check=True)
            size = (folder / "report.html").stat().st_size / 1e6
            print(f"{n} runs: {time.perf_counter() - started:.1f} s, a page of {size:.1f} MB")


if __name__ == "__main__":
    main()
