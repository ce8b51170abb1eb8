"""What Lightning must know of the launcher, as its cluster environments."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment

from llm_lightning.experiments.ranks.launcher import launched


def environments() -> list[ClusterEnvironment]:
    """The environment of this process, as a list for `Trainer(plugins=...)`; empty if Lightning finds it itself."""
    here = launched()
    if here.by == "slurm":
        return [SlurmStep()]
    if here.by == "submitit":
        return [LocalTasks()]
    # Lightning takes any process of a SLURM job for one of several tasks, and then starts none itself.
    return [LightningEnvironment()] if here.by in ("none", "parent") and "SLURM_NTASKS" in os.environ else []


class _AsLaunched(ClusterEnvironment):
    """Where the processes meet, and which one this is, as `launched` says."""

    @property
    def main_address(self) -> str:
        return _address()[0]

    @property
    def main_port(self) -> int:
        return int(_address()[1])

    def local_rank(self) -> int:
        return launched().local_rank


class SlurmStep(_AsLaunched, SLURMEnvironment):
    """A step of several tasks, however they were asked for.

    Lightning's own environment wants `--ntasks-per-node`, and compares the numbers of the job, not of the step; ours
    were compared before (`counts`).
    """

    @staticmethod
    def _validate_srun_used() -> None:
        pass

    @staticmethod
    def _validate_srun_variables() -> None:
        pass

    def world_size(self) -> int:
        return launched().processes or 1

    def global_rank(self) -> int:
        return launched().rank

    def node_rank(self) -> int:
        return launched().node

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        assert num_devices * num_nodes == self.world_size()


class LocalTasks(_AsLaunched, LightningEnvironment):
    """The tasks of one local job of submitit."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


def _address() -> tuple[str, str]:
    host, _, port = (launched().address or "").rpartition(":")
    return host, port
