"""`python train.py`: help, a pipeline, a multirun or one run; errors in one line."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments import unforeseen
from llm_lightning.experiments.errors import guarded, run_guarded, thread_failed
from llm_lightning.experiments.processes import end_with_parent
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.run_records import refuse_links
from llm_lightning.experiments.settings.overrides import key_of
from llm_lightning.signals import ending
from llm_lightning.terminal import guard_messages, say


def main(script: Path, verbs: Collection[str] | None = None) -> None:
    """Run the command line of `script`, whose configuration is the folder `conf` next to it.

    Args:
        script: the file that was started.
        verbs: the commands of `llm-lightning` that a pipeline may run; None: any.
    """
    guard_messages()
    causes.begin()
    with ending():
        run_guarded(lambda: _main(script, verbs))


def _main(script: Path, verbs: Collection[str] | None) -> None:
    end_with_parent()
    from llm_lightning.experiments.settings.help import help_text

    argv, config_dir = sys.argv[1:], script.parent / "conf"
    text = help_text(argv, config_dir)
    if text is not None:
        _print_help(text)
    elif {"-sc", "--shell-completion"} & set(argv):
        _complete(config_dir)
    elif any(key_of(word) == "pipeline" and word.partition("=")[2] not in ("null", "none") for word in argv):
        from llm_lightning.experiments.pipeline import run_pipeline

        run_pipeline(argv, script, verbs)
    else:
        _run(script, config_dir)


def _print_help(text: str) -> None:
    try:
        say(text, flush=True)
    except BrokenPipeError:  # `--help | head` has read enough
        unforeseen.stop_writing()


def _complete(config_dir: Path) -> None:
    """Let Hydra print a script for the shell (`-sc install=bash`), or what may follow a word (`-sc query=bash`)."""
    import hydra

    from llm_lightning.experiments.settings.compose import prepare_hydra

    prepare_hydra()
    hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(lambda _: None)()


def _run(script: Path, config_dir: Path) -> None:
    """Run once in this process, or each job of a multirun in its own."""
    from llm_lightning.experiments.command_line import rewritten
    from llm_lightning.experiments.multirun import run_multirun
    from llm_lightning.experiments.ranks.local import local_ranks
    from llm_lightning.experiments.ranks.supervisor import supervise_run, take_place
    from llm_lightning.experiments.settings.checks import checked_settings
    from llm_lightning.experiments.settings.overrides import parse_arguments, split_options
    from llm_lightning.experiments.settings.targets import check_targets
    from llm_lightning.experiments.start import in_run_folder, run_checked
    from llm_lightning.experiments.threads import choose_wait_policy

    folder, typed = Path.cwd(), sys.argv[1:]
    options, overrides = split_options(rewritten(typed, config_dir))
    words = [*options, *overrides]  # Hydra takes options only before or after all overrides
    sys.argv = [str(script), *words]
    configuration, arguments = checked_settings(words, config_dir), parse_arguments(words)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises exceptions, which become one line here
    logging.raiseExceptions = False  # a log file that cannot be written must not bury that line under a traceback,
    threading.excepthook = thread_failed  # nor must TensorBoard's
    shows = arguments.cfg or arguments.info or arguments.hydra_help or arguments.resolve
    if arguments.multirun or configuration.is_multirun or shows:
        run_multirun(script, arguments.config_dir, config_dir)
        return
    _name_folder(configuration.config, words)
    own = list(configuration.config.allow_targets)
    choose_wait_policy(configuration.config.trainer)  # before torch is loaded, here or in the ranks
    if (ranks := local_ranks(configuration.config)) > 1:
        sys.exit(supervise_run(script, typed, ranks, configuration.full))
    take_place(configuration.full)
    check_targets(configuration.config, own)  # imports torch

    def run(run_dir: Path) -> int:
        code, _ = guarded(lambda: refuse_links(run_dir))  # before a line is written to train.log or traceback.txt
        if not code:
            code, _ = guarded(lambda: run_checked(configuration, run_dir, arguments, folder), log_dir=run_dir, own=own)
        return code

    code = in_run_folder(configuration.full, run)
    if code:
        sys.exit(code)


def _name_folder(config: Any, words: Sequence[str]) -> None:
    """Name the run folder as the other processes of the run do, if nothing names it."""
    from llm_lightning.experiments.ranks.causes import SUPERVISOR
    from llm_lightning.experiments.ranks.naming import shared_name
    from llm_lightning.experiments.settings.compose import name_folders

    is_named = config.run_name is not None or any(key_of(word) == "hydra.run.dir" for word in words)
    if not is_named and SUPERVISOR not in os.environ:  # a supervisor names the folder of its ranks
        name = shared_name(words)
        if name is not None:
            name_folders(name)
