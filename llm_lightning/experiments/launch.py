"""What `python train.py` does before and after a run: help, checks, resume, one process per job, one-line errors."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.processes import end_with_parent, start, wait_for
from llm_lightning.experiments.run_folder import is_main_process

STARTED_IN = Path.cwd()
"""Where the user stands; `resume=` works in the folder of the run's first command."""
COMMAND = "command.json"
"""In a run folder: what was typed to start the run, and where."""
USAGE_ERROR = 2
ONE_RUN = "hydra.mode=RUN"
"""Wins over an experiment file with `hydra.mode: MULTIRUN`, which would make a multirun of each of its jobs again."""
_ELSEWHERE = "choose another folder, with run_name or hydra.run.dir"
_MAKE_ROOM = "make room and continue with resume=RUN_FOLDER; what was written before is intact"
_REMEDIES = {
    errno.EACCES: f"make it accessible, or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: _MAKE_ROOM,
}
SHOW_TRACEBACK = "LLM_LIGHTNING_TRACEBACK"


def main(script: Path) -> None:
    """Run the command line of `script`, whose configuration is the folder `conf` beside it."""
    end_with_parent()
    run_guarded(lambda: _main(script))


def _main(script: Path) -> None:
    from llm_lightning.experiments.help import help_text

    config_dir = script.parent / "conf"
    text = help_text(sys.argv[1:], config_dir)
    if text is not None:
        print(text)
        return
    if any(key_of(word) == "pipeline" and word != "pipeline=null" for word in sys.argv[1:]):
        from llm_lightning.experiments.pipeline import run_pipeline

        run_pipeline(sys.argv[1:], script)
        return
    from llm_lightning.experiments.config_checks import check_overrides

    typed = without_null_groups(continue_run(sys.argv[1:]), config_dir)
    if any(key_of(word) == "resume" and word != "resume=null" for word in sys.argv[1:]):
        typed.append(ONE_RUN)  # it may be a job of a multirun that a file asks for
    sys.argv = [str(script), *expand_sweep(typed, config_dir)]
    check_overrides(sys.argv[1:], config_dir)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets exceptions through, to become one line here
    logging.raiseExceptions = False  # a log file that cannot be written must not bury that line under a traceback,
    threading.excepthook = _thread_failed  # nor must TensorBoard's

    import hydra

    failures: list[str] = []

    def job(cfg: Any) -> float | None:
        return _job(cfg, failures)

    hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(job)()
    if failures:
        raise ChildProcessError(f"{len(failures)} of the runs failed: {'; '.join(failures)}")


def _job(cfg: Any, failures: list[str]) -> float | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        return _own_process([*hydra_config.overrides.task, *one_run(hydra_config)], run_dir, failures)
    code, result = guarded(lambda: _train(cfg, run_dir), log_dir=run_dir)
    if code:
        sys.exit(code)
    return result


def _train(cfg: Any, run_dir: Path) -> float | None:
    from llm_lightning.experiments.run import train  # late: it imports lightning

    config_dir, overrides = _typed()
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
    summary = run_dir / "summary.json"
    return json.loads(summary.read_text())["best_value"] if summary.is_file() else None


def continue_run(argv: Sequence[str]) -> list[str]:
    """Replace `resume=FOLDER` by what FOLDER was started with; what else stands in `argv` wins.

    Changes to the folder where they were typed, if it is still there, so that relative paths mean what they meant.
    `allow_targets` is left out: a folder of someone else's must not allow code to run here.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    folders = [word.removeprefix("resume=") for word in argv if word.startswith("resume=") and word != "resume=null"]
    if not folders:
        return list(argv)
    folder = Path(folders[-1]).absolute()
    if not (folder / COMMAND).is_file():
        raise FileNotFoundError(f"resume={folders[-1]}: no run in that folder (it has no {COMMAND})")
    recorded = json.loads((folder / COMMAND).read_text())
    if Path(recorded["folder"]).is_dir():
        os.chdir(recorded["folder"])
    new = [word for word in argv if not word.startswith("resume=")] + [run_dir_is(folder)]
    names = {key_of(word) for word in new} | {"allow_targets"}
    old = [word for word in recorded["overrides"] if key_of(word) not in names]
    return [*_options(recorded["config_dir"]), *old, *new]


def without_null_groups(argv: Sequence[str], config_dir: Path) -> list[str]:
    """`GROUP=null` is what a user types for none, and Hydra refuses: say `GROUP=none`, or nothing where that is all."""
    words = []
    for word in argv:
        group, _, option = word.partition("=")
        if option != "null" or not (config_dir / group).is_dir():
            words.append(word)
        elif (config_dir / group / "none.yaml").is_file():
            words.append(f"{group}=none")
    return words


def expand_sweep(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `sweep=NAME` by `-m` and the `KEY=VALUE,...` of conf/sweep/NAME.yaml; what else stands in `argv` wins.

    Raises:
        ValueError: if there is no such sweep.
    """
    names = [word.partition("=")[2] for word in argv if key_of(word) == "sweep"]
    if not names or names[-1] == "null":
        return list(argv)
    import yaml

    from llm_lightning.experiments.help import group_options

    known = group_options(config_dir, "sweep")
    if names[-1] not in known:
        raise ValueError(f"sweep={names[-1]}: no such sweep; there are {', '.join(known)}")
    swept = yaml.safe_load((config_dir / "sweep" / f"{names[-1]}.yaml").read_text("utf-8"))
    typed = [word for word in argv if key_of(word) != "sweep"]
    keys = {key_of(word) for word in typed}
    return ["-m", *(f"{key}={value}" for key, value in swept.items() if key not in keys), *typed]


def key_of(word: str) -> str:
    """`optimizer.lr` of `++optimizer.lr=1`; a word without `=` is its own key."""
    return word.lstrip("+~").partition("=")[0]


def run_dir_is(folder: Path) -> str:
    """The setting that makes `folder` the run folder."""
    escaped = str(folder).replace("'", r"\'")
    return f"hydra.run.dir='{escaped}'"


def run_guarded(action: Callable[[], Any]) -> None:
    """Call `action`; exit with one line on stderr where it raises an error of the user's kind."""
    code, _ = guarded(action)
    if code:
        sys.exit(code)


def guarded(action: Callable[[], Any], log_dir: Path | None = None) -> tuple[int, Any]:
    """Call `action` and return (exit code, result), with errors of the user's kind turned into one line on stderr."""
    try:
        return 0, action()
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a KeyboardInterrupt that comes before training into an exit with code 1.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("interrupted", file=sys.stderr)
        return 130, None
    except (ValueError, OSError) as error:
        _report(error, log_dir)
        return USAGE_ERROR, None
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)  # callbacks.checkpoints.Interrupted
        if exit_code is None:
            raise
        if is_main_process():  # all processes of a run stop together, with the same words
            print(error, file=sys.stderr)
        return exit_code, None


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):  # that one, TensorBoard raises again in the main thread
        threading.__excepthook__(failure)


def _report(error: BaseException, log_dir: Path | None) -> None:
    if os.environ.get(SHOW_TRACEBACK):
        traceback.print_exception(error)
    elif log_dir is not None:
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            (log_dir / "traceback.txt").write_text("".join(traceback.format_exception(error)))
    print(f"error: {' '.join(_message(error).split())}", file=sys.stderr)


def _message(error: BaseException) -> str:
    """The error's words; one of the system's own, which name no remedy, is given one."""
    if not isinstance(error, OSError) or error.errno not in _REMEDIES:  # ours have no errno
        return str(error)
    return f"{error.filename or 'cannot write'}: {error.strerror}; {_REMEDIES[error.errno]}"
