"""The sweeper of `-m` as Hydra finds it: Hydra builds plugins only from the package `hydra_plugins`.

`experiments/settings/compose.py` puts the folder above on the path. Hydra imports this file for every command line, so
it imports nothing heavy. It executes the file before Python knows its module, so annotations cannot be strings.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class SweeperConf:
    """`hydra.sweeper`; a file in conf/sweep sets `params` and `jobs`."""

    _target_: str = "hydra_plugins.llm_lightning_sweeper.ResumableSweeper"
    _recursive_: bool = False
    """Hydra must not read `params` and `jobs`: `KEY: ???` there is a value that the command line has to give."""
    params: Any = field(default_factory=dict)
    """KEY: VALUE of every job, or KEY: VALUE,VALUE,... for one job each."""
    jobs: Any = field(default_factory=dict)
    """NAME: {KEY: VALUE, ...} of jobs that are listed one by one."""
    only: Any = None
    """Names of listed jobs to run, with * and ?; null runs all."""
    max_jobs: int = 1000
    """A sweep of more jobs is refused before anything is composed."""
    retry_failed: bool = False
    """Also run jobs again that failed of themselves: an error, a loss that is not finite."""
    jobs_per_gpu: int = 1
    """Number of jobs that may share a GPU."""


ConfigStore.instance().store(group="hydra/sweeper", name="resumable", node=SweeperConf, provider="llm_lightning")


class ResumableSweeper(Sweeper):
    """Run each job of a sweep once, whatever happens in between (`experiments/sweep/sweeper.py`)."""

    def __init__(self, **options: Any) -> None:
        plain = {key: OmegaConf.to_container(one) if OmegaConf.is_config(one) else one for key, one in options.items()}
        self.options = plain

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        from llm_lightning.experiments.sweep.sweeper import run_sweep

        return run_sweep(self.options, arguments, self.config, self.hydra_context, self.task_function)
