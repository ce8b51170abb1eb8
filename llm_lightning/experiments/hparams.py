"""The HParams tab of TensorBoard: the settings that vary, a short list that people filter by, the best and the test.

    runs of a sweep -> the columns of the table, in the sweep's folder
    a failed run -> its line in the table, in the run's folder (a run that ends by itself writes its own)

`tensorboard --logdir SWEEP` shows these columns. Above several sweeps, TensorBoard shows the runs of all of them under
the columns of any one, which always has the short list. Without a sweep it shows every setting that a run has here:
the short list, and what was typed. Imports neither torch nor lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.callbacks.event_files import HPARAMS, write_events
from llm_lightning.callbacks.summaries import experiment, session
from llm_lightning.experiments.run_list import PLACES, differing
from llm_lightning.experiments.run_status import Run
from llm_lightning.experiments.settings.overrides import key_of

SHORT = ("task", "model.n_layer", "model.n_embd", "lora.rank", "optimizer.lr", "data.batch_size", "seed")
"""Settings that people filter by, where a run has them; `task` is the name of the task."""
TESTED = ("test/accuracy", "test/reward_accuracy", "test/exact_match", "test/perplexity")
"""Test metrics shown beside the tested counterpart of the monitored one."""
FAILED = ("failed", "died")


def best_tag(monitor: str) -> str:
    """`best/val_loss` for `val/loss`: the scalar that holds the monitored metric of the best checkpoint."""
    return f"best/{monitor.replace('/', '_')}"


def shown_settings(settings: Mapping[str, Any], task: str | None, words: Iterable[str]) -> dict[str, Any]:
    """The settings of a run in HParams: the short list, and what was typed.

    Args:
        settings: all of them, by dotted keys.
        words: the overrides; one that chooses a file (`optimizer=sgd`) shows the class that it names.
    """
    known = {**settings, "task": task}
    typed = (key if key in settings else f"{key}._target_" for key in map(key_of, words) if key != "task")
    return {key: known[key] for key in dict.fromkeys([*SHORT, *typed]) if key in known and key not in PLACES}


def write_hparams(
    folder: Path, runs: Sequence[Run], keys: Sequence[str] | None = None, metrics: Sequence[str] | None = None
) -> None:
    """Write the columns of a sweep, and the line of each run that failed; replace what an earlier call wrote.

    Nothing is written if no run logs to TensorBoard, or if the files say the same already.

    Args:
        folder: of the sweep.
        keys: settings that vary, by dotted keys; default: those in which the runs differ.
        metrics: test metrics (`test/accuracy`); default: the counterparts of the monitored ones, and `TESTED`. The
            best monitored metric has a column in any case.

    Raises:
        OSError: if a file cannot be written.
    """
    runs = [run for run in runs if _logs_to_tensorboard(run)]
    if not runs:
        return
    known = [{**run.settings, "task": run.facts["task"]} for run in runs]
    columns = dict.fromkeys([*(differing(runs) if keys is None else keys), *SHORT])
    values = {key: [settings.get(key) for settings in known] for key in columns if any(key in one for one in known)}
    write_events(folder / HPARAMS, experiment(values, _result_tags(runs, metrics)))
    for run, settings in zip(runs, known, strict=True):
        _mark(Path(run.facts["folder"]), run, {key: settings[key] for key in values if key in settings})


def _mark(path: Path, run: Run, settings: Mapping[str, Any]) -> None:
    """Write the line of a failed run; remove that of one that has not failed."""
    if run.facts["status"] in FAILED:
        write_events(path / HPARAMS, session(settings, "failure"))
    else:
        (path / HPARAMS).unlink(missing_ok=True)


def _result_tags(runs: Sequence[Run], metrics: Sequence[str] | None) -> list[str]:
    monitors = list(dict.fromkeys(run.facts["monitor"] for run in runs if run.facts["monitor"]))
    tested = [f"test/{name.rpartition('/')[2]}" for name in monitors] + list(TESTED) if metrics is None else metrics
    found = [name for name in dict.fromkeys(tested) if any(name in run.metrics for run in runs)]
    return [*map(best_tag, monitors), *found]


def _logs_to_tensorboard(run: Run) -> bool:
    targets = (value for key, value in run.settings.items() if key.startswith("logger.") and key.endswith("_target_"))
    return any("TensorBoard" in str(target) for target in targets)
