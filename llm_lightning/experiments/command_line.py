"""Rewrite the typed command line for Hydra: `resume=`, null groups, text that reads as a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_lightning.experiments.foreign import continued
from llm_lightning.experiments.settings.overrides import key_of

ONE_RUN = "hydra.mode=RUN"
"""Overrides `hydra.mode: MULTIRUN` of a file, which would make each of its jobs a multirun, too."""


def rewritten(argv: Sequence[str], config_dir: Path) -> list[str]:
    """The command line for Hydra.

    Raises:
        FileNotFoundError, ValueError: as the functions below.
    """
    words = continue_run(argv, config_dir)
    if any(key_of(word) == "resume" and word != "resume=null" for word in argv):
        words.append(ONE_RUN)  # the run may be a job of a multirun that a file sets
    return as_hydra_reads(words, config_dir)


def continue_run(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `resume=FOLDER` by the safe words that started FOLDER's run; the rest of `argv` wins.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if it cannot be continued, with the reason.
    """
    names = [word for word in argv if word.startswith("resume=") and word != "resume=null"]
    return continued(argv, config_dir) if names else list(argv)


def as_hydra_reads(argv: Sequence[str], config_dir: Path) -> list[str]:
    """The words in Hydra's grammar: null groups replaced, text that reads as a number quoted.

    Raises:
        ValueError: if a group that every run needs is null.
    """
    from llm_lightning.experiments.settings.groups import without_null_groups
    from llm_lightning.experiments.settings.meaning import as_meant

    return as_meant(without_null_groups(argv, config_dir), config_dir)


def one_run(hydra_config: Any) -> list[str]:
    """Words that make a job's command line one run, even if its files (`experiment=`) set a multirun.

    Args:
        hydra_config: Hydra's part of the job's config. The multirun has already called its callbacks.
    """
    added = [key_of(word) for word in hydra_config.overrides.hydra if word.startswith("+")]  # so in no file
    prefixes = [f"hydra.callbacks.{name}" for name in hydra_config.callbacks or ()]
    return [
        ONE_RUN,
        *(f"~{prefix}" for prefix in prefixes if not any(f"{key}.".startswith(f"{prefix}.") for key in added)),
    ]


def is_of_one_run(word: str) -> bool:
    """Whether `one_run` added the word, which then is not a setting of the run."""
    return word == ONE_RUN or word.startswith("~hydra.callbacks.")
