"""What `python train.py ...` does before and after a run: help, checks, resume, one process per job, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

USAGE_ERROR = 2
SHOW_TRACEBACK = "LLM_LIGHTNING_TRACEBACK"


def main(script: Path) -> None:
    """Run the command line of `script`, whose configuration is the folder `conf` beside it."""
    run_guarded(lambda: _main(script))


def _main(script: Path) -> None:
    from llm_lightning.experiments.help import help_text

    config_dir = script.parent / "conf"
    text = help_text(sys.argv[1:], config_dir)
    if text is not None:
        print(text)
        return
    from llm_lightning.experiments.config_checks import check_overrides

    sys.argv[1:] = continue_run(sys.argv[1:])
    check_overrides(sys.argv[1:], config_dir)

    import hydra

    hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(_job)()


def _job(cfg: Any) -> float | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_config = HydraConfig.get()
    run_dir = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        return _own_process(list(hydra_config.overrides.task), run_dir)
    code, result = guarded(lambda: _train(cfg, run_dir, list(hydra_config.overrides.task)), log_dir=run_dir)
    if code:
        sys.exit(code)
    return result


def _train(cfg: Any, run_dir: Path, overrides: list[str]) -> float | None:
    from llm_lightning.experiments.run import train  # late: it imports lightning

    return train(cfg, run_dir, overrides)


def _own_process(overrides: list[str], run_dir: Path) -> float | None:
    """Run one job of a multirun in a fresh process: nothing (devices, seeds, process groups) leaks into the next."""
    command = [sys.executable, sys.argv[0], *overrides, f"hydra.run.dir={run_dir}"]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise ChildProcessError(f"job in {run_dir} ended with exit code {code}: {' '.join(overrides)}")
    return json.loads((run_dir / "summary.json").read_text())["best_value"]


def continue_run(argv: list[str]) -> list[str]:
    """Replace `resume=FOLDER` by the overrides that FOLDER was started with; what else stands in `argv` wins.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    folders = [word.removeprefix("resume=") for word in argv if word.startswith("resume=") and word != "resume=null"]
    if not folders:
        return argv
    folder = Path(folders[-1])
    recorded = folder / "overrides.yaml"
    if not recorded.is_file():
        raise FileNotFoundError(f"resume={folder}: no run in that folder (it has no overrides.yaml)")
    import yaml

    new = [word for word in argv if not word.startswith("resume=")]
    names = {word.lstrip("+~").split("=")[0] for word in new}
    old = [word for word in yaml.safe_load(recorded.read_text()) if word.lstrip("+~").split("=")[0] not in names]
    return [*old, *new, f"hydra.run.dir={folder}"]


def run_guarded(action: Callable[[], Any]) -> None:
    """Call `action`; exit with one line on stderr where it raises an error of the user's kind."""
    code, _ = guarded(action)
    if code:
        sys.exit(code)


def guarded(action: Callable[[], Any], log_dir: Path | None = None) -> tuple[int, Any]:
    """Call `action` and return (exit code, result), with errors of the user's kind turned into one line on stderr."""
    try:
        return 0, action()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130, None
    except (ValueError, OSError) as error:
        _report(error, log_dir)
        return USAGE_ERROR, None
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)  # callbacks.checkpoints.Interrupted
        if exit_code is None:
            raise
        print(error, file=sys.stderr)
        return exit_code, None


def _report(error: BaseException, log_dir: Path | None) -> None:
    if os.environ.get(SHOW_TRACEBACK):
        traceback.print_exception(error)
    elif log_dir is not None and log_dir.is_dir():
        (log_dir / "traceback.txt").write_text("".join(traceback.format_exception(error)))
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
