"""A multirun (`-m`, `sweep=`): Hydra lists the jobs, and each runs in a fresh process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.command_line import ONE_RUN
from llm_lightning.experiments.processes import start, wait_for
from llm_lightning.experiments.run_records import read_summary
from llm_lightning.experiments.settings.overrides import key_of, run_dir_override


def run_jobs(script: Path, options: Sequence[str], config_dir: Path) -> None:
    """Hand `sys.argv` to Hydra, which runs the jobs of a multirun, or shows what `--cfg` and its like ask for.

    A job that fails does not stop the others.

    Args:
        script: what a job's process runs.
        options: of the command line, for every job: `--config-dir`.
        config_dir: the folder of train.yaml.

    Raises:
        ChildProcessError: if jobs failed, naming their folders.
    """
    import hydra

    failures: list[str] = []

    def job(_: Any) -> float | None:
        return _run_job([sys.executable, str(script), *options], failures)

    hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(job)()
    if failures:
        raise ChildProcessError(f"{len(failures)} of the runs failed: {'; '.join(failures)}")


def _run_job(command: Sequence[str], failures: list[str]) -> float | None:
    """Run one job in a fresh process: nothing (devices, seeds, process groups) leaks into the next."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    words = [*hydra_config.overrides.task, *one_run(hydra_config), run_dir_override(run_dir)]
    code = wait_for(start([*command, *words]))
    if code:
        failures.append(f"{run_dir} (exit code {code})")
        return None
    return read_summary(run_dir).get("best_value")


def one_run(hydra_config: Any) -> list[str]:
    """Words that make a command line one run, even if its files (`experiment=`) ask for many.

    `hydra_config`: Hydra's part of the multirun that the run is a job of. Its callbacks have been called there.
    """
    added = [key_of(word) for word in hydra_config.overrides.hydra if word.startswith("+")]  # and not in any file
    prefixes = [f"hydra.callbacks.{name}" for name in hydra_config.callbacks or ()]
    return [
        ONE_RUN,
        *(f"~{prefix}" for prefix in prefixes if not any(f"{key}.".startswith(f"{prefix}.") for key in added)),
    ]


def is_of_one_run(word: str) -> bool:
    """Whether `one_run` added the word: it is no setting of the run."""
    return word == ONE_RUN or word.startswith("~hydra.callbacks.")
