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
    """Let Hydra read `sys.argv` and run the jobs of a multirun, or print what `--cfg` and similar options show.

    A job that fails does not stop the others.

    Args:
        script: the script that each job's process runs.
        options: command-line options for every job: `--config-dir`.
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
    """Run one job in a fresh process, so that no devices, seeds or process groups leak into the next."""
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
    """Words that make a command line one run, even if its files (`experiment=`) set a multirun.

    `hydra_config`: Hydra's part of the multirun's config. The multirun has already called its callbacks.
    """
    added = [key_of(word) for word in hydra_config.overrides.hydra if word.startswith("+")]  # so in no file
    prefixes = [f"hydra.callbacks.{name}" for name in hydra_config.callbacks or ()]
    return [
        ONE_RUN,
        *(f"~{prefix}" for prefix in prefixes if not any(f"{key}.".startswith(f"{prefix}.") for key in added)),
    ]


def is_of_one_run(word: str) -> bool:
    """Whether `one_run` added the word, which then is not a setting of the run."""
    return word == ONE_RUN or word.startswith("~hydra.callbacks.")
