"""The launcher that started this process, and the place of this process among those of its run.

Reads environment variables only, and imports nothing heavy. All other code asks this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["none", "parent", "torchrun", "slurm", "submitit"]
"""`none`: nothing but a shell. `parent`: a process that set LOCAL_RANK, such as the first rank under Lightning's
launcher. `slurm`: a step of several tasks (srun). `submitit`: a local job of several tasks; on a cluster it is `slurm`.
"""
COMMANDS = {"torchrun": "torchrun", "slurm": "srun", "submitit": "submitit"}
"""How a message names a launcher that starts all processes itself."""
INTERACTIVE = ("bash", "interactive")
"""Names that SLURM gives to jobs in which a person types."""


@dataclass(frozen=True)
class Launched:
    """What a launcher told this process."""

    by: Launcher = "none"
    rank: int = 0
    """Among all processes of the run. A later node whose launcher tells no number of processes: any but 0."""
    local_rank: int = 0
    """Among those of this node."""
    node: int = 0
    per_node: tuple[int, ...] = ()
    """Number of processes on each node; empty if the launcher does not tell."""
    processes: int | None = None
    """Number of processes of the run, if the launcher tells."""
    attempt: int = 0
    """How often torchrun has started all processes again, or SLURM the job."""
    address: str | None = None
    """HOST:PORT where the processes meet, if the launcher tells both."""
    id: str | None = None
    """A name of the run that all processes share and that a restart or a requeued job has again."""

    @property
    def starts_all(self) -> bool:
        """Whether the launcher decides how many processes there are."""
        return self.by in COMMANDS

    @property
    def command(self) -> str:
        return COMMANDS[self.by]


def launched(environment: Mapping[str, str] | None = None) -> Launched:
    """The place of this process; `environment` is that of the process by default.

    Raises:
        ValueError: if a variable of the launcher is no number.
    """
    environment = os.environ if environment is None else environment
    for read in (_by_torchrun, _by_slurm, _by_submitit, _by_parent):
        found = read(environment)
        if found is not None:
            return found
    # A node of a run by hand: its first process starts the others.
    node = max(_number(environment, name, 0) for name in ("NODE_RANK", "GROUP_RANK", "RANK"))
    processes = _number(environment, "WORLD_SIZE", 0) or None
    attempt = _slurm_attempt(environment)
    return Launched(rank=node, node=node, processes=processes, attempt=attempt, id=_slurm_id(environment))


def is_main_process() -> bool:
    """Whether this is the first process of its run."""
    return launched().rank == 0


def is_one_of_several() -> bool:
    """Whether a launcher started this process among others."""
    here = launched()
    return here.rank != 0 or here.processes not in (None, 1)


def tasks_not_started(environment: Mapping[str, str] | None = None) -> int:
    """Number of tasks of the SLURM job that runs this process outside a step, so that srun has started none; else 0.

    Jobs in which a person types do not count.
    """
    environment = os.environ if environment is None else environment
    if launched(environment).by != "none" or environment.get("SLURM_JOB_NAME") in INTERACTIVE:
        return 0
    tasks = _number(environment, "SLURM_NTASKS", 1)
    return tasks if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in environment else 0


def is_batch_script(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process runs in a SLURM job outside a step, so that others may run after it in the same job."""
    environment = os.environ if environment is None else environment
    return "SLURM_JOB_ID" in environment and "SLURM_STEP_NUM_TASKS" not in environment


def uses_agent_store(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the agent of torchrun has a store at the address where the processes meet, which restarts keep."""
    environment = os.environ if environment is None else environment
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# --- one launcher each -----------------------------------------------------------------------------------------------


def _by_torchrun(environment: Mapping[str, str]) -> Launched | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    local = _number(environment, "LOCAL_WORLD_SIZE", 1)
    nodes, processes = _number(environment, "GROUP_WORLD_SIZE", 1), _number(environment, "WORLD_SIZE", local)
    even = local * nodes == processes
    run_id = environment["TORCHELASTIC_RUN_ID"]
    return Launched(
        "torchrun",
        rank=_number(environment, "RANK", 0),
        local_rank=_number(environment, "LOCAL_RANK", 0),
        node=_number(environment, "GROUP_RANK", 0),
        per_node=(local,) * nodes if even else (local, processes - local),
        processes=processes,
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        address=_address(environment),
        id=None if run_id in ("", "none") else f"torchrun_{_word(run_id)}",
    )


def _by_slurm(environment: Mapping[str, str]) -> Launched | None:
    """A task of a step; `SLURM_NTASKS` may be that of the job, `SLURM_STEP_*` is what srun was asked for."""
    if "SLURM_STEP_NUM_TASKS" not in environment or _number(environment, "SLURM_STEP_NUM_TASKS", 1) == 1:
        return None
    tasks, nodes = _number(environment, "SLURM_STEP_NUM_TASKS", 1), _number(environment, "SLURM_STEP_NUM_NODES", 1)
    told = environment.get("SLURM_STEP_TASKS_PER_NODE") or f"{tasks // nodes}(x{nodes})"
    return Launched(
        "slurm",
        rank=_number(environment, "SLURM_PROCID", 0),
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        node=_number(environment, "SLURM_NODEID", 0),
        per_node=tasks_per_node(told),
        processes=tasks,
        attempt=_slurm_attempt(environment),
        address=f"{_slurm_host(environment, nodes)}:{_slurm_port(environment)}",
        id=_slurm_id(environment),
    )


def _by_submitit(environment: Mapping[str, str]) -> Launched | None:
    """A task of a local job; submitit leaves the variables of its own in processes that a task starts."""
    tasks = _number(environment, "SUBMITIT_LOCAL_NTASKS", 1)
    if environment.get("SUBMITIT_EXECUTOR") != "local" or tasks == 1:
        return None
    rank = _number(environment, "SUBMITIT_LOCAL_GLOBALID", 0)
    job = _number(environment, "SUBMITIT_LOCAL_JOB_ID", 0)
    return Launched(
        "submitit",
        rank=rank,
        local_rank=_number(environment, "SUBMITIT_LOCAL_LOCALID", rank),
        per_node=(tasks,),
        processes=tasks,
        address=f"127.0.0.1:{_port_of(job)}",
        id=f"submitit_{job}",
    )


def _by_parent(environment: Mapping[str, str]) -> Launched | None:
    if "LOCAL_RANK" not in environment:
        return None
    local_rank = _number(environment, "LOCAL_RANK", 0)
    node = max(_number(environment, name, 0) for name in ("NODE_RANK", "GROUP_RANK"))
    local = _number(environment, "LOCAL_WORLD_SIZE", 0)
    rank = _number(environment, "RANK", node * max(local, 1) + local_rank)
    processes = _number(environment, "WORLD_SIZE", 0)
    return Launched(
        "parent",
        rank,
        local_rank,
        node,
        per_node=(local,) * (processes // local) if local else (),
        processes=processes or None,
        attempt=_slurm_attempt(environment),
        address=_address(environment),
        id=_slurm_id(environment),
    )


# --- variables -------------------------------------------------------------------------------------------------------


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"the environment variable {name}={text} is no number; unset it, or start with its launcher")
    return int(text)


def _address(environment: Mapping[str, str]) -> str | None:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    return f"{host}:{port}" if host and port else None


def tasks_per_node(text: str) -> tuple[int, ...]:
    """SLURM's `2(x3),1` as (2, 2, 2, 1)."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(tasks) for tasks, times in parts for _ in range(int(times or 1)))


def _slurm_host(environment: Mapping[str, str], nodes: int) -> str:
    """The step's first node: `gpu-01` of `gpu-[01-04],gpu-11`."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if nodes == 1 or not listed:
        return "127.0.0.1"
    first = re.match(r"[^,\[]*(?:\[[^\]]*\])?[^,\[]*", listed)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else listed)


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks compute, another for each of eight steps of a job and for 2,000 jobs in turn."""
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT", 0)
    return _port_of(8 * _number(environment, "SLURM_JOB_ID", 0) + _slurm_step(environment))


def _port_of(number: int) -> int:
    """The port for a number: below those that Linux gives to clients, which begin at 32768."""
    return 15000 + number % 16000


def _slurm_step(environment: Mapping[str, str]) -> int:
    step = environment.get("SLURM_STEP_ID", "0")
    return int(step) if step.isdigit() else 0


def _slurm_id(environment: Mapping[str, str]) -> str | None:
    """The job, and the step unless it is the first; a requeued job has both again. None where a person types."""
    if "SLURM_JOB_ID" not in environment or environment.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment.get('SLURM_ARRAY_JOB_ID', job)}_{environment['SLURM_ARRAY_TASK_ID']}"
    step = _slurm_step(environment)
    return f"slurm_{_word(job)}" + (f"_step_{step}" if step else "")


def _slurm_attempt(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_RESTART_COUNT", 0)


def _word(text: str) -> str:
    """As the name of a folder."""
    return re.sub(r"[^\w.-]", "-", text)
