"""The sweeper of `-m` as Hydra finds it: Hydra builds plugins only from the package `hydra_plugins`.

`experiments/settings/compose.py` puts the folder above on the path. Hydra imports this file for every command line, so
it imports nothing heavy. It executes the file before Python knows its module, so annotations cannot be strings.
"""

import importlib.util
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
    sampler: Any = None
    """tpe, random or grid search the values with Optuna, as hydra/sweeper=optuna does; null runs every combination."""
    n_trials: Any = None
    """Search: trials in all, those of earlier starts, pruned and failed ones included."""
    timeout: Any = None
    """Search: seconds after which this start begins no further trial."""
    seeds: int = 1
    """Search: runs of each trial, with seed, seed + 1 ...; their mean counts."""
    pruner: Any = None
    """Search: median stops a trial whose best is worse than the median of the others at the same validation."""
    pruner_startup: int = 5
    """Search: complete trials before the first is pruned."""
    pruner_warmup: int = 1
    """Search: first validations of a trial after which it is never pruned."""
    seed: int = 1
    """Search: seeds the suggestions, each by its trial's number."""
    n_jobs: Any = None
    """Search: trials at a time; null takes as many as hydra/launcher=joblib or submitit_local runs at a time."""


@dataclass
class OptunaConf(SweeperConf):
    """`hydra/sweeper=optuna`: the same, with a search."""

    sampler: Any = "tpe"


for _name, _node in (("resumable", SweeperConf), ("optuna", OptunaConf)):
    ConfigStore.instance().store(group="hydra/sweeper", name=_name, node=_node, provider="llm_lightning")


class ResumableSweeper(Sweeper):
    """Run each job of a sweep once, whatever happens in between (`experiments/sweep/sweeper.py`), or search."""

    def __init__(self, **options: Any) -> None:
        plain = {key: OmegaConf.to_container(one) if OmegaConf.is_config(one) else one for key, one in options.items()}
        self.options = plain

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        if self.options["sampler"] is None:
            from llm_lightning.experiments.sweep.sweeper import run_sweep as run
        else:
            if importlib.util.find_spec("optuna") is None:
                raise ValueError("hydra/sweeper=optuna needs Optuna: pip install 'llm-lightning[sweep]'")
            from llm_lightning.experiments.sweep.search.searcher import run_search as run
        return run(self.options, arguments, self.config, self.hydra_context, self.task_function)
