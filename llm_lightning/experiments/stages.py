"""The stages of `pipeline=NAME`: read from conf/pipeline/NAME.yaml and the command line, and checked."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_lightning.experiments.command_line import as_hydra_reads
from llm_lightning.experiments.settings.overrides import key_of, parse_arguments, parsed, quoted, unquoted
from llm_lightning.experiments.settings.yaml_files import group_options
from llm_lightning.terminal import say

ONE_STAGE_ONLY = ("task", "experiment", "init_from", "resume", "sweep")
"""Settings that distinguish the stages; typed for all, they would make the stages equal."""


@dataclass(frozen=True)
class Stage:
    """One run of a chain, or one command of `llm-lightning`."""

    name: str
    words: tuple[str, ...]
    """Overrides of the run, or words of the command; `{NAME}` is replaced by the folder of the stage NAME."""
    is_command: bool
    parents: tuple[str, ...]
    """Earlier stages that `words` names."""
    settings: str
    """Digest of all settings, whatever their source, with stages' names instead of their folders."""


@dataclass(frozen=True)
class Chain:
    """The stages of a command line with `pipeline=NAME`."""

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    options: tuple[str, ...]
    """`--config-dir`, for every run."""

    def say(self, text: str) -> None:
        say(f"pipeline={self.name}: {text}", flush=True)  # before what the stage's process prints


def plan(argv: Sequence[str], config_dir: Path, verbs: Collection[str] | None = None) -> Chain:
    """Read the chain that `argv` names, and check every setting of every stage.

    Settings typed with `pipeline=` apply to every stage, `+STAGE.KEY=VALUE` to that stage only; both override the
    file. `run_name` and `hydra.run.dir` set the folder of the chain.

    Args:
        argv: the command line without the program.
        config_dir: the folder of train.yaml.
        verbs: the commands of `llm-lightning` that a stage may run; None: any.

    Raises:
        ValueError: one line naming the stage and its error.
    """
    flags = [word for word in argv if word.startswith("-") and not word.startswith(("--config-dir", "-cd"))]
    if flags:
        raise ValueError(f"pipeline= is a chain of runs: leave {' '.join(flags)} out; only --config-dir goes with it")
    arguments = parse_arguments(argv)
    options = (f"--config-dir={arguments.config_dir}",) if arguments.config_dir else ()
    typed = as_hydra_reads([*options, *arguments.overrides], config_dir)[len(options) :]
    name = [_value(word) for word in typed if key_of(word) == "pipeline"][-1]
    listed = _read_stages(name, [Path(arguments.config_dir), config_dir] if options else [config_dir])
    names = [stage["name"] for stage in listed]
    own = {"pipeline", "run_name", "hydra.run.dir"}
    for_all = [word for word in typed if key_of(word) not in own and _stage_of(word, names) is None]
    for word in for_all:
        if key_of(word) in ONE_STAGE_ONLY:
            raise ValueError(f"{word} would be for every stage of pipeline={name}; write +STAGE.{word} for one")
    folder = _folder(name, typed)
    stages = []
    for position, stage in enumerate(listed):
        for_one = [word.partition(".")[2] for word in typed if _stage_of(word, names) == stage["name"]]
        words = _words(stage, [*for_all, *for_one])
        if "command" not in stage:
            words = as_hydra_reads([*options, *words], config_dir)[len(options) :]
        try:
            stages.append(_planned(stage, words, names[:position], options, config_dir, verbs))
        except ValueError as error:
            raise ValueError(f"pipeline={name}: stage {stage['name']}: {error}") from None
    return Chain(name, folder, tuple(stages), options)


def _folder(name: str, typed: Sequence[str]) -> Path:
    """The folder of the chain."""
    values = {key_of(word): _value(word) for word in typed if key_of(word) in ("run_name", "hydra.run.dir")}
    run_name = values.get("run_name")
    if run_name and not re.fullmatch(r"\w[\w.-]*", run_name):
        raise ValueError(f"run_name={run_name!r} names a folder: use letters, digits, dot, dash and underscore")
    return Path(values.get("hydra.run.dir") or Path("outputs", "pipeline", run_name or name)).absolute()


def _value(word: str) -> str:
    value = parsed(word).value()
    return "" if value is None else str(getattr(value, "text", value))


def _read_stages(name: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The stages of conf/pipeline/NAME.yaml, refusing keys that nothing reads."""
    import yaml

    files = [folder / "pipeline" / f"{name}.yaml" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        known = sorted({option for folder in folders for option in group_options(folder, "pipeline")})
        raise ValueError(f"pipeline={name}: no such pipeline; there are {', '.join(known)}")
    content = yaml.safe_load(file.read_text("utf-8"))
    if not isinstance(content, dict) or list(content) != ["stages"] or not content["stages"]:
        raise ValueError(f"{file} must have one key, stages: a list")
    stages: list[dict[str, Any]] = content["stages"]
    for stage in stages:
        right = isinstance(stage, dict) and set(stage) in ({"name", "overrides"}, {"name", "command"})
        if not right or not re.fullmatch(r"[A-Za-z]\w*", str(stage["name"])):
            raise ValueError(f"{file}: a stage has a name and either overrides or a command, not {stage}")
    names = [stage["name"] for stage in stages]
    if len(set(names)) < len(names) or all("command" in stage for stage in stages):
        raise ValueError(f"{file}: every stage has a name of its own, and one at least is a run")
    return stages


def _stage_of(word: str, names: Sequence[str]) -> str | None:
    """The stage of `+STAGE.KEY=VALUE`."""
    return next((name for name in names if word.startswith(f"+{name}.")), None)


def _words(stage: Mapping[str, Any], typed: Sequence[str]) -> list[str]:
    """The words of a stage; typed settings win, and the last one for each key."""
    if "command" in stage:
        return shlex.split(stage["command"])
    return list({key_of(word): word for word in [*stage["overrides"], *typed]}.values())


def _planned(
    stage: Mapping[str, Any],
    words: Sequence[str],
    earlier: Sequence[str],
    options: Sequence[str],
    config_dir: Path,
    verbs: Collection[str] | None,
) -> Stage:
    name, is_command = stage["name"], "command" in stage
    allowed = (*earlier, name) if is_command else earlier
    for word in words:
        named = re.findall(r"\{(\w+)\}", word) if is_command or key_of(word) == "init_from" else []
        wrong = [other for other in named if other not in allowed]
        if wrong:
            there = ", ".join(earlier) or "none"
            raise ValueError(f"{word}: no earlier stage is named {wrong[0]}; there are {there}")
    parents = tuple(other for other in earlier if any(f"{{{other}}}" in word for word in words))
    if is_command:
        if verbs is not None and words[0] not in verbs:
            raise ValueError(f"there is no llm-lightning {words[0]}; there are {', '.join(verbs)}")
        return Stage(name, tuple(words), is_command, parents, digest_of(list(words)))
    from llm_lightning.experiments.settings.checks import checked
    from llm_lightning.experiments.settings.nodes import plain

    unfilled = {other: f"{{{other}}}" for other in earlier}
    configuration = checked([*options, *(filled_override(word, unfilled) for word in words)], config_dir)
    if configuration.is_multirun:
        raise ValueError("its experiment is a multirun (hydra.mode), and a stage is one run; choose another file")
    return Stage(name, tuple(words), is_command, parents, digest_of(plain(configuration.config)))


def filled_override(word: str, folders: Mapping[str, str]) -> str:
    """`word` with folders in place of names, quoted: a folder's name may contain signs of Hydra's grammar."""
    if not any(f"{{{name}}}" in word for name in folders):
        return word
    key, _, value = word.partition("=")
    return f"{key}={quoted(filled(unquoted(value), folders))}"


def filled(word: str, folders: Mapping[str, str]) -> str:
    """`word` with folders in place of `{NAME}`."""
    return re.sub(r"\{(\w+)\}", lambda match: folders.get(match[1], match[0]), word)


def digest_of(value: Any) -> str:
    """sha256 of a value as JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
