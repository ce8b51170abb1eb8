"""What `python train.py` does before and after a run: help, checks, resume, one process per job, one-line errors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments import unforeseen
from llm_lightning.experiments.foreign import continued, read_summary, refuse_links
from llm_lightning.experiments.processes import end_with_parent, start, wait_for
from llm_lightning.experiments.run_folder import is_main_process
from llm_lightning.experiments.settings.overrides import key_of, run_dir_is
from llm_lightning.files.disk_errors import explain
from llm_lightning.terminal import guard_messages, one_line, say, visible

STARTED_IN = Path.cwd()
"""Where the user stands."""
USAGE_ERROR = 2
ONE_RUN = "hydra.mode=RUN"
"""Wins over an experiment file with `hydra.mode: MULTIRUN`, which would make a multirun of each of its jobs again."""
_ELSEWHERE = "choose another folder, with run_name or hydra.run.dir"
_AGAIN = "continue with resume=RUN_FOLDER; what was written before is intact"
_SAVE_MEMORY = (
    "out of memory: lower data.batch_size and raise trainer.accumulate_grad_batches by as much, "
    "set model.activation_checkpointing=true, or take a smaller model"
)


def main(script: Path) -> None:
    """Run the command line of `script`, whose configuration is the folder `conf` beside it."""
    end_with_parent()
    guard_messages()
    run_guarded(lambda: _main(script))


def _main(script: Path) -> None:
    from llm_lightning.experiments.settings.help import help_text

    config_dir = script.parent / "conf"
    text = help_text(sys.argv[1:], config_dir)
    if text is not None:
        _print_help(text)
        return
    if any(key_of(word) == "pipeline" and word.partition("=")[2] not in ("null", "none") for word in sys.argv[1:]):
        from llm_lightning.experiments.pipeline import run_pipeline

        run_pipeline(sys.argv[1:], script)
        return
    from llm_lightning.experiments.settings.checks import check_overrides

    typed = continue_run(sys.argv[1:], config_dir)
    if any(key_of(word) == "resume" and word != "resume=null" for word in sys.argv[1:]):
        typed.append(ONE_RUN)  # it may be a job of a multirun that a file asks for
    sys.argv = [str(script), *as_hydra_reads(expand_sweep(typed, config_dir), config_dir)]
    config = check_overrides(sys.argv[1:], config_dir)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions through, to become one line here
    logging.raiseExceptions = False  # a log file that cannot be written must not bury that line under a traceback,
    threading.excepthook = _thread_failed  # nor must TensorBoard's

    import hydra

    failures: list[str] = []

    def job(_: Any) -> float | None:
        return _job(config, failures)  # what was checked, groups that are none switched off

    hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(job)()
    if failures:
        raise ChildProcessError(f"{len(failures)} of the runs failed: {'; '.join(failures)}")


def _print_help(text: str) -> None:
    try:
        say(text, flush=True)
    except BrokenPipeError:  # `--help | head` has read enough
        unforeseen.stop_writing()


def _job(cfg: Any, failures: list[str]) -> float | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        return _own_process([*hydra_config.overrides.task, *one_run(hydra_config)], run_dir, failures)
    code, result = guarded(lambda: refuse_links(run_dir))  # before a line is written to train.log or traceback.txt
    if not code:
        code, result = guarded(lambda: _train(cfg, run_dir), log_dir=run_dir, own=list(cfg.allow_targets))
    if code:
        sys.exit(code)
    return result


def _train(cfg: Any, run_dir: Path) -> float | None:
    from llm_lightning.experiments.run import train  # late: it imports lightning

    config_dir, overrides = _typed()
    overrides = [word for word in overrides if key_of(word) != "resume"]
    return train(cfg, run_dir, {"folder": str(Path.cwd()), "config_dir": config_dir, "overrides": overrides})


def _typed() -> tuple[str | None, list[str]]:
    """`--config-dir` and the overrides of this command line, those that `one_run` added left out."""
    from hydra._internal.utils import get_args_parser

    arguments = get_args_parser().parse_args(sys.argv[1:])
    return arguments.config_dir, [word for word in arguments.overrides if not _of_one_run(word)]


def one_run(hydra_config: Any) -> list[str]:
    """Words after which a command line is one run, even if its files (`experiment=`) ask for many.

    `hydra_config`: Hydra's part of the multirun that the run is a job of. Its callbacks have been called there.
    """
    added = [key_of(word) for word in hydra_config.overrides.hydra if word.startswith("+")]  # and not in any file
    prefixes = [f"hydra.callbacks.{name}" for name in hydra_config.callbacks or ()]
    return [
        ONE_RUN,
        *(f"~{prefix}" for prefix in prefixes if not any(f"{key}.".startswith(f"{prefix}.") for key in added)),
    ]


def _of_one_run(word: str) -> bool:
    return word == ONE_RUN or word.startswith("~hydra.callbacks.")


def _options(config_dir: str | None) -> list[str]:
    return [f"--config-dir={config_dir}"] if config_dir else []


def _own_process(overrides: list[str], run_dir: Path, failures: list[str]) -> float | None:
    """Run one job of a multirun in a fresh process: nothing (devices, seeds, process groups) leaks into the next.

    One that fails is added to `failures`; the others still run.
    """
    command = [sys.executable, sys.argv[0], *_options(_typed()[0]), *overrides, run_dir_is(run_dir)]
    code = wait_for(start(command))
    if code:
        failures.append(f"{run_dir} (exit code {code})")
        return None
    return read_summary(run_dir).get("best_value")


def continue_run(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `resume=FOLDER` by what FOLDER was started with, as far as that is safe; what else is in `argv` wins.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if it is not continued, with the reason.
    """
    names = [word for word in argv if word.startswith("resume=") and word != "resume=null"]
    return continued(argv, config_dir) if names else list(argv)


def as_hydra_reads(argv: Sequence[str], config_dir: Path) -> list[str]:
    """The words of a user as Hydra means the same by them: no group is null, text that reads as a number is quoted.

    Raises:
        ValueError: if a group that every run needs is null.
    """
    from llm_lightning.experiments.settings.groups import without_null_groups
    from llm_lightning.experiments.settings.meaning import as_meant

    return as_meant(without_null_groups(argv, config_dir), config_dir)


def expand_sweep(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `sweep=NAME` by `-m` and the `KEY=VALUE,...` of conf/sweep/NAME.yaml; what else stands in `argv` wins.

    Raises:
        ValueError: if there is no such sweep.
    """
    names = [word.partition("=")[2] for word in argv if key_of(word) == "sweep"]
    if not names or names[-1] in ("null", "none"):
        return list(argv)
    import yaml

    from llm_lightning.experiments.settings.help import group_options

    known = group_options(config_dir, "sweep")
    if names[-1] not in known:
        raise ValueError(f"sweep={names[-1]}: no such sweep; there are {', '.join(known)}")
    swept = yaml.safe_load((config_dir / "sweep" / f"{names[-1]}.yaml").read_text("utf-8"))
    typed = [word for word in argv if key_of(word) != "sweep"]
    keys = {key_of(word) for word in typed}
    return ["-m", *(f"{key}={value}" for key, value in swept.items() if key not in keys), *typed]


def run_guarded(action: Callable[[], Any]) -> None:
    """Call `action`; exit with one line on stderr where it raises an error of the user's kind."""
    code, _ = guarded(action)
    if code:
        sys.exit(code)


def guarded(action: Callable[[], Any], log_dir: Path | None = None, own: Sequence[str] = ()) -> tuple[int, Any]:
    """Call `action` and return (exit code, result), with exceptions turned into one line on stderr.

    Code of the packages `own`, or of those that `allow_targets` on the command line lets in, keeps its traceback.
    """
    try:
        return 0, action()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a KeyboardInterrupt that comes before training into an exit with code 1.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        say("interrupted", file=sys.stderr)
        return 130, None
    except (ValueError, OSError) as error:
        _report(error, log_dir, is_own=unforeseen.passes_through(error, own or _allowed()))
        return USAGE_ERROR, None
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)  # callbacks.checkpoints.Interrupted
        if exit_code is not None:
            if is_main_process():  # all processes of a run stop together, with the same words
                say(error, file=sys.stderr)
            return exit_code, None
        if unforeseen.passes_through(error, own or _allowed()):
            raise
        if unforeseen.is_out_of_memory(error):
            _report(MemoryError(f"{error}; {_SAVE_MEMORY}").with_traceback(error.__traceback__), log_dir)
            return USAGE_ERROR, None
        file = log_dir / unforeseen.TRACEBACK if log_dir is not None else unforeseen.cache_file("train")
        return unforeseen.report(error, prefix="error: ", file=file), None


def _allowed() -> list[str]:
    """Packages that `allow_targets` on the command line names."""
    values = [word.partition("=")[2] for word in sys.argv[1:] if key_of(word) == "allow_targets"]
    return [name for value in values for name in re.findall(r"[\w.]+", value)]


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):  # that one, TensorBoard raises again in the main thread
        threading.__excepthook__(failure)


def _report(error: BaseException, log_dir: Path | None, *, is_own: bool = False) -> None:
    if isinstance(error, BrokenPipeError):
        unforeseen.stop_writing()
    if is_own or os.environ.get(unforeseen.SHOW_TRACEBACK):
        say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    elif log_dir is not None:
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            text = visible("".join(traceback.format_exception(error)))
            (log_dir / unforeseen.TRACEBACK).write_text(text, "utf-8")
    say(f"error: {one_line(_message(error))}", file=sys.stderr)


def _message(error: BaseException) -> str:
    return explain(error, elsewhere=_ELSEWHERE, again=_AGAIN) if isinstance(error, OSError) else str(error)
