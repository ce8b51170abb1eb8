"""Runs in jobs of a SLURM of one node: its time limit and preemption save, requeue and end bitwise as one whole run.

    python tests/slurm/one_node.py              all trials, about 10 minutes; a table at the end
    python tests/slurm/one_node.py scancel      some of them

As root, with SLURM and munge installed (it says what is missing). `--minutes=4` gives a job longer until its time
limit where the machine is slow: a job must have made some steps by then. `--folder` keeps what the jobs wrote.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "slurm"), str(ROOT / "tests" / "scenarios"), str(ROOT / "tests"), str(ROOT)]

from cluster import CPUS, Cluster, missing, said  # noqa: E402

STEPS_PER_MINUTE = 80
"""Of a job's time limit, which a run cannot do while each step takes a second."""
SETTINGS = [
    "tokenizer=byte",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    "model.context_length=32",
    "model.dropout=0.2",
    "data.batch_size=4",
    "trainer.max_epochs=-1",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.val_check_interval=40",
    "trainer.limit_val_batches=4",
    "callbacks.checkpoints.every_n_steps=10",
    "callbacks.samples=null",
    "callbacks.plots=null",
    "allow_targets=[faulty]",
]
ONE, TWO = ["accelerator=cpu"], ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
GIVE_UP_SECONDS = 3600.0


@dataclass(frozen=True)
class Trial:
    name: str
    options: tuple[str, ...]
    """Of sbatch."""
    launch: str = "srun"
    """What the batch script puts before `python train.py`."""
    two: bool = False
    does: str = "waits"
    """`waits` for the time limit, `preempts` or `cancels` the job once it trains, or makes `no step` at all."""


LIMIT = "--time={minutes}"
TRIALS = (
    Trial("limit, USR1", (LIMIT, "--signal=USR1@30")),
    Trial("limit, TERM", (LIMIT,)),
    Trial("limit, no srun", (LIMIT,), launch="exec"),
    Trial("two tasks, -n", (LIMIT, "--signal=USR1@30", "-n2"), two=True),
    Trial("two tasks per node", (LIMIT, "--signal=USR1@30", "--ntasks-per-node=2"), two=True),
    Trial("no step", ("--time=1",), does="no step"),
    Trial("scancel", ("--time=60",), does="cancels"),
    Trial("preempted at once", ("--time=60", "--partition=main"), does="preempts"),
    Trial("preempted, 30 s", ("--time=60", "--partition=graced"), does="preempts"),
)


@dataclass
class Job:
    """One trial under way: each call of `step` looks, and does the next thing when it is time."""

    trial: Trial
    folder: Path
    minutes: int
    number: str = ""
    result: str = ""
    states: list[str] = field(default_factory=list)

    def submit(self) -> None:
        self.slow.parent.mkdir(parents=True, exist_ok=True)
        self.slow.touch()
        options = [option.format(minutes=self.minutes) for option in self.trial.options]
        script = self.folder / f"{self.name}.sh"
        script.write_text(f"#!/bin/sh\n{self.trial.launch} {' '.join(self.command)}\n")
        own = ["--parsable", "--open-mode=append", f"--output={self.log}", f"--chdir={self.folder}"]
        command = ["sbatch", *own, *options, str(script)]
        self.number = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    @property
    def name(self) -> str:
        return "".join(char if char.isalnum() else "_" for char in self.trial.name)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.out"

    @property
    def slow(self) -> Path:
        return self.folder / "slow" / self.name

    @property
    def command(self) -> list[str]:
        callback = "Waits" if self.trial.does == "no step" else "Slow"
        words = settings(self.folder / self.name, self.slow, self.minutes, two=self.trial.two, callback=callback)
        return [sys.executable, str(ROOT / "train.py"), *(f"'{word}'" for word in words)]

    def step(self) -> None:
        shown = dict(word.partition("=")[::2] for word in said("scontrol", "show", "job", self.number).split())
        state = shown.get("JobState", "")
        if not self.states or self.states[-1] != state:
            self.states.append(state)
        if state == "RUNNING" and self.slow.exists() and self.trains():
            self._interrupt()
        if state == "PENDING" and int(shown.get("Restarts", "0")) and self.slow.exists():
            self.slow.unlink()
            said("scontrol", "update", f"JobId={self.number}", "StartTime=now")  # SLURM would wait for two minutes
        if state in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"):
            self.result = self._ended(state, shown.get("Restarts", "0"))

    def trains(self) -> bool:
        return any((self.folder / self.name / "checkpoints").glob("step_*.ckpt"))

    def _interrupt(self) -> None:
        if self.trial.does == "cancels":
            said("scancel", self.number)
        elif self.trial.does == "preempts" and not said("squeue", "-h", "--name=high"):
            said("sbatch", "--job-name=high", "--partition=high", f"-n{CPUS}", "--output=/dev/null", "--wrap=true")

    def _ended(self, state: str, restarts: str) -> str:
        words, wanted = self.log.read_text(), {"cancels": "CANCELLED", "no step": "FAILED TIMEOUT"}
        if self.trial.does in wanted:
            why = "it was cancelled" if self.trial.does == "cancels" else "it made no step since its start"
            is_right = state in wanted[self.trial.does] and restarts == "0" and f"not requeued: {why}" in words
            return f"stays {state}" if is_right else f"WRONG: {state}, {restarts} restarts: {words[-600:]}"
        if state != "COMPLETED" or restarts == "0":
            return f"WRONG: {state}, {restarts} restarts: {words[-600:]}"
        return self._compared()

    def _compared(self) -> str:
        from test_kill import assert_same_end

        strays = [path.name for path in (self.folder / self.name).rglob("hpc_ckpt*")]
        if strays:
            return f"WRONG: {strays}"
        whole, steps = self.folder / ("whole_2" if self.trial.two else "whole_1"), STEPS_PER_MINUTE * self.minutes
        try:
            assert_same_end(whole, self.folder / self.name, steps)
        except AssertionError as error:
            return f"WRONG: differs: {str(error)[:200]}"
        return "bitwise equal"

    def row(self) -> str:
        said_at_end = [line for line in self.log.read_text().splitlines() if line.startswith("stopped by")]
        reason = said_at_end[0].partition("; SLURM ")[2] if said_at_end else "no word of its end"
        return f"{self.trial.name:20} {' '.join(self.states):60} {self.result}\n{'':20} {reason}"


def settings(run: Path, slow: Path, minutes: int, *, two: bool, callback: str = "Slow") -> list[str]:
    """Words of `train.py`: the callback acts while the file `slow` exists."""
    own = [f"+callbacks.slow._target_=faulty.{callback}", f"+callbacks.slow.path={slow}", f"hydra.run.dir={run}"]
    if callback == "Slow":
        own.append("+callbacks.slow.seconds=1.0")
    steps = f"trainer.max_steps={STEPS_PER_MINUTE * minutes}"
    return [*SETTINGS, *(TWO if two else ONE), steps, f"data.path={run.parent}/corpus.txt", *own]


def make_whole(folder: Path, minutes: int, *, two: bool) -> None:
    """The run that nobody interrupts, without SLURM."""
    run = folder / f"whole_{2 if two else 1}"
    command = [sys.executable, str(ROOT / "train.py"), *settings(run, folder / "slow" / "none", minutes, two=two)]
    with run.with_suffix(".out").open("w") as output:
        code = subprocess.run(command, cwd=folder, stdout=output, stderr=output, check=False).returncode
    if code:
        raise SystemExit(f"the run without SLURM fails: {run.with_suffix('.out')}")


def run_trials(trials: list[Trial], folder: Path, minutes: int, show: Callable[[str], None]) -> list[Job]:
    """Run trials at once, those that preempt after the others, which a job that preempts would disturb as well."""
    from tiny_run import write_corpus

    os.environ |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    write_corpus(folder / "corpus.txt", 4000)
    jobs = [Job(trial, folder, minutes) for trial in trials]
    with Cluster(folder / "slurm"):
        for preempts in (False, True):
            together = [job for job in jobs if (job.trial.does == "preempts") is preempts]
            for job in together:
                job.submit()
            for two in {job.trial.two for job in together}:
                if not (folder / f"whole_{2 if two else 1}").exists():
                    make_whole(folder, minutes, two=two)
            deadline = time.monotonic() + GIVE_UP_SECONDS
            while any(not job.result for job in together) and time.monotonic() < deadline:
                time.sleep(2)
                for job in together:
                    if not job.result:
                        job.step()
            for job in together:
                job.result = job.result or "WRONG: it did not end"
                show(job.row())
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", help=f"of: {', '.join(trial.name for trial in TRIALS)}")
    parser.add_argument("--minutes", type=int, default=2, help="until the time limit of a job")
    parser.add_argument("--folder", type=Path, help="keep what the jobs write here")
    arguments = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    unknown = set(arguments.trials) - {trial.name for trial in TRIALS}
    if unknown:
        parser.error(f"no such trial: {', '.join(sorted(unknown))}")
    chosen = [trial for trial in TRIALS if trial.name in arguments.trials or not arguments.trials]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = run_trials(chosen, folder, arguments.minutes, lambda row: print(row, flush=True))
    wrong = sum(job.result.startswith("WRONG") for job in jobs)
    print(f"{len(jobs) - wrong} of {len(jobs)} as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
