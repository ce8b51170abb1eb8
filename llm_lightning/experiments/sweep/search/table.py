"""The trials of a search for the terminal: a table, and the best with the command that repeats it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from llm_lightning.experiments.run_table import rows_of, terminal_width
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.experiments.summary import shown_from
from llm_lightning.experiments.sweep.attempt import Attempt
from llm_lightning.experiments.sweep.search.plan import Plan
from llm_lightning.terminal import counted, one_line

NAMES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "open",
}


def trial_lines(trials: Sequence[FrozenTrial], monitor: str) -> list[str]:
    """A table of the trials, the reasons of those that have no value, and how many ended how."""
    if not trials:
        return ["0 trials"]
    records = [_record(trial, monitor) for trial in trials]
    columns = ["name", "status", "best_value", "seeds", *dict.fromkeys(key for trial in trials for key in trial.params)]
    reasons = [f"trial {one.number}: {one_line(one.user_attrs['reason'])}" for one in trials if _has_failed(one)]
    of_state = Counter(record["status"] for record in records)
    parts = [f"{of_state[name]:,} {name}" for name in NAMES.values() if of_state[name]]
    counts = f"{counted(len(trials), 'trial')}: {', '.join(parts)}"
    return [*rows_of(records, columns, terminal_width()), *reasons, counts]


def _has_failed(trial: FrozenTrial) -> bool:
    return trial.state is TrialState.FAIL and "reason" in trial.user_attrs


def _record(trial: FrozenTrial, monitor: str) -> dict[str, Any]:
    """A trial as a record of `run_table`; of a pruned one, the value is the last that was judged."""
    shown = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in trial.params.items()}
    facts = {
        "name": f"trial {trial.number}",
        "status": NAMES.get(trial.state, "open"),
        "monitor": monitor,
        "best_value": trial.value,
        "seeds": len(trial.user_attrs.get("jobs", ())),
    }
    return shown | facts


def best_lines(best: FrozenTrial | None, plan: Plan, attempt: Attempt) -> list[str]:
    """The best trial, and the command that runs it again."""
    if best is None:
        return []
    assert best.value is not None
    n_seeds = len(plan.seeds)
    words = [word for word in plan.words(best.params, plan.seeds[0]) if key_of(word) != "run_name"]
    if n_seeds > 1:
        words = ["-m", *words[:-1], f"seed={','.join(map(str, plan.seeds))}"]
    script = str(shown_from(Path.cwd(), Path(attempt.script)))
    mean = f", the mean of {n_seeds} seeds" if n_seeds > 1 else ""
    return [
        f"Best: trial {best.number}, {plan.monitor} {best.value:.4f}{mean}. To repeat it:",
        f"  {shlex.join(['python', script, *attempt.options, *words])}",
    ]
