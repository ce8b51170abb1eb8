"""Run the side-by-side benchmarks and write their results to outputs/benchmarks/.

pip install -e ".[bench]"
python tests/benchmarks/run.py [NAME|all] [--quick]          the names are in BENCHMARKS
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = {  # name -> arguments that make it quick
    "training": ["--quick"],
    "generation": ["--quick"],
    "token_files": ["--megabytes", "20", "--repeats", "1"],
    "records": ["--megabytes", "10", "--repeats", "1"],
    "classification": ["--quick"],
    "lora": ["--quick"],
    "sft": ["--quick"],
    "dpo": ["--quick"],
    "responses": ["--quick"],
    "real": ["--quick"],
}


def main() -> int:
    """Run one benchmark or all, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--quick", action="store_true", help="a minute or two each; the ratios are rougher")
    options = parser.parse_args()
    chosen = list(BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    codes = []
    for name in chosen:
        script = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, str(script), *(BENCHMARKS[name] if options.quick else [])]
        codes.append(subprocess.run(command, check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
