"""A multirun (`-m`, `sweep=`): Hydra composes the whole, and gives it to a sweeper, ours by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_lightning.experiments.sweep.attempt import Attempt


@dataclass(frozen=True)
class Multirun:
    """The function that Hydra calls for each job, and what the sweeper must know of the command line."""

    attempt: Attempt
    config_dir: Path
    """The folder of train.yaml."""
    own_config_dir: str | None
    """The folder of `--config-dir`."""

    def __call__(self, config: Any) -> float | None:
        return self.attempt(config)


def run_multirun(script: Path, own_config_dir: str | None, config_dir: Path) -> None:
    """Let Hydra read `sys.argv` and run the jobs of a multirun, or print what `--cfg` and similar options show.

    Args:
        script: the script that each job's process runs.
        own_config_dir: the folder of `--config-dir`, for every job.
        config_dir: the folder of train.yaml.

    Raises:
        ValueError: if the command line cannot be composed.
        ChildProcessError: if jobs failed, after all others have run.
    """
    import hydra
    from hydra.errors import HydraException

    options: Sequence[str] = [f"--config-dir={Path(own_config_dir).absolute()}"] if own_config_dir else []
    task = Multirun(Attempt(str(script), tuple(options)), config_dir, own_config_dir)
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(task)()
    except HydraException as error:
        raise ValueError(" ".join(str(error).split())) from None
