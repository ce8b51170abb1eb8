"""Rewrite the typed command line for Hydra: `resume=`, `sweep=`, null groups, text that reads as a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_lightning.experiments.foreign import continued
from llm_lightning.experiments.settings.overrides import key_of

ONE_RUN = "hydra.mode=RUN"
"""Overrides `hydra.mode: MULTIRUN` in an experiment file, which would make each of its jobs a multirun, too."""


def rewritten(argv: Sequence[str], config_dir: Path) -> list[str]:
    """The command line for Hydra.

    Raises:
        FileNotFoundError, ValueError: as the functions below.
    """
    words = continue_run(argv, config_dir)
    if any(key_of(word) == "resume" and word != "resume=null" for word in argv):
        words.append(ONE_RUN)  # the run may be a job of a multirun that a file sets
    return as_hydra_reads(expand_sweep(words, config_dir), config_dir)


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


def expand_sweep(argv: Sequence[str], config_dir: Path) -> list[str]:
    """Replace `sweep=NAME` by `-m` and the `KEY=VALUE,...` of conf/sweep/NAME.yaml; the rest of `argv` wins.

    Raises:
        ValueError: if there is no such sweep.
    """
    names = [word.partition("=")[2] for word in argv if key_of(word) == "sweep"]
    if not names or names[-1] in ("null", "none"):
        return list(argv)
    import yaml

    from llm_lightning.experiments.settings.yaml_files import group_options

    known = group_options(config_dir, "sweep")
    if names[-1] not in known:
        raise ValueError(f"sweep={names[-1]}: no such sweep; there are {', '.join(known)}")
    swept = yaml.safe_load((config_dir / "sweep" / f"{names[-1]}.yaml").read_text("utf-8"))
    typed = [word for word in argv if key_of(word) != "sweep"]
    keys = {key_of(word) for word in typed}
    return ["-m", *(f"{key}={value}" for key, value in swept.items() if key not in keys), *typed]
