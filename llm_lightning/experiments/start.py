"""Start one run in this process: `train`, the Python form of `python train.py`."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from llm_lightning.experiments.command_line import is_of_one_run, rewritten
from llm_lightning.experiments.errors import recording
from llm_lightning.experiments.run_records import Start, read_summary, refuse_links
from llm_lightning.experiments.settings.checks import Checked, checked
from llm_lightning.experiments.settings.ignored import ignored_settings
from llm_lightning.experiments.settings.nodes import plain
from llm_lightning.experiments.settings.overrides import key_of, parse_arguments

CONF = Path(__file__).parents[2] / "conf"
"""The configuration of the project."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainedRun:
    """The result of `train`."""

    folder: Path
    """The run folder; `load_model(folder)` loads the best checkpoint."""
    best_value: float | None
    """The best value of the monitored metric."""
    summary: dict[str, Any]
    """`summary.json`: metrics, steps, parents; empty if the run wrote none (`debug=fast_dev_run`, `data.preview`)."""


def train(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> TrainedRun:
    """Train one model in this process, as `python train.py OVERRIDES` does, and return its run.

    The defaults, checks, run folder and logs are those of the command line; a finished run is not trained again. The
    global random generators are seeded. A multirun, a sweep, a pipeline and distributed training start processes:
    use `python train.py`.

    Args:
        overrides: words of the command line: `["task=sft", "init_from=outputs/pretraining/first"]`.
        config_dir: a folder with your own YAML files, added to the project's `conf`.

    Raises:
        ValueError: one line, if the settings, the data or a checkpoint are wrong.
        OSError: if a file is missing, or the disk is full.

    Example:
        >>> run = train(["run_name=first", "trainer.max_epochs=1"])
        >>> run.best_value, run.summary["metrics"]["val/perplexity"]
        >>> print(generate_text(load_model(run.folder), "Every effort moves you"))
    """
    words = [*([f"--config-dir={config_dir}"] if config_dir is not None else []), *overrides]
    other = [word for word in overrides if word.startswith("-") or key_of(word) in ("sweep", "pipeline")]
    if other:
        raise ValueError(f"train() trains one run and takes KEY=VALUE; leave {other[0]} out, or use python train.py")
    if not (CONF / "train.yaml").is_file():
        raise FileNotFoundError(f"no configuration at {CONF}: install the project with pip install -e .")
    words = rewritten(words, CONF)
    configuration, arguments = checked(words, CONF), parse_arguments(words)
    if configuration.is_multirun:
        raise ValueError("train() trains one run, but a file sets a multirun (hydra.mode); use python train.py")

    def run(run_dir: Path) -> TrainedRun:
        refuse_links(run_dir)
        with recording(run_dir):
            best_value = run_checked(configuration, run_dir, arguments, Path.cwd())
        return TrainedRun(run_dir, best_value, read_summary(run_dir))

    with _logging_restored():
        return in_run_folder(configuration.full, run)


def run_checked(configuration: Checked, run_dir: Path, arguments: Namespace, folder: Path) -> float | None:
    """Train a checked configuration in `run_dir`; return the best value of the monitored metric.

    Args:
        arguments: the parsed command line.
        folder: where it was typed.
    """
    from llm_lightning.experiments import run  # late: it imports lightning

    settings = plain(configuration.config)
    overrides = [word for word in arguments.overrides if key_of(word) != "resume" and not is_of_one_run(word)]
    start = Start(
        folder=str(folder),
        config_dir=arguments.config_dir,
        overrides=overrides,
        resume=settings["resume"],
        notes=list(ignored_settings(settings, overrides)),
        rates=settings["optimizer"].pop("rates", {}),
    )
    return run.train(settings, run_dir, start)


def in_run_folder(full: DictConfig, action: Callable[[Path], Result]) -> Result:
    """Call `action` with the run folder that a composed configuration names, as `hydra.main` does after composing.

    Hydra makes the folder, configures logging, and calls its own callbacks.

    Args:
        full: the configuration with Hydra's own part.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import run_job
    from hydra.types import HydraContext, RunMode

    results: list[Result] = []
    errors: list[Exception] = []

    def job(_: DictConfig) -> None:
        try:
            results.append(action(Path(HydraConfig.get().runtime.output_dir)))
        except Exception as error:  # raised again below; Hydra would print its own lines
            errors.append(error)
            raise

    full.hydra.mode = RunMode.RUN
    callbacks = Callbacks(full)
    callbacks.on_run_start(config=full, config_name="train")
    result = run_job(
        task_function=job,
        config=full,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        hydra_context=HydraContext(config_loader=None, callbacks=callbacks),  # type: ignore[arg-type]
    )
    callbacks.on_run_end(config=full, config_name="train", job_return=result)
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _logging_restored() -> Iterator[None]:
    """Leave the handlers and the level of the root logger as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
