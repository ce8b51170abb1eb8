"""`pipeline=NAME`: runs one after the other, each from what an earlier one left, as conf/pipeline/NAME.yaml lists them.

Every stage is a process and a run folder of its own, so that it ends, is killed and continues as any other run does.
Its `manifest.json` says what it was made from: the same command again runs only what is not there, not finished, or
made from something else than what stands there now.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_lightning.experiments.foreign import Facts, read_facts, read_summary, refuse_links
from llm_lightning.experiments.launch import as_hydra_reads
from llm_lightning.experiments.processes import start, wait_for
from llm_lightning.experiments.run_folder import RunFolderInUseError, is_main_process
from llm_lightning.experiments.settings.help import group_options
from llm_lightning.experiments.settings.overrides import key_of, parsed, run_dir_is
from llm_lightning.files.atomic import write_atomically
from llm_lightning.terminal import say

MANIFEST = "manifest.json"
"""In the folder of a stage: what it was made from and what it reached."""
MANIFEST_FACTS: Facts = {"finished": bool, "settings": str, "parents": dict}
OUTPUT = "output.txt"
"""In the folder of a command: what it printed."""
ONE_STAGE_ONLY = ("task", "experiment", "init_from", "resume", "sweep")
"""What makes a stage what it is: typed for all stages, it would make them all the same."""


class StageFailedError(Exception):
    """A stage ended with an exit code other than 0, which is then the chain's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Stage:
    """One run of a chain, or one command of `llm-lightning`."""

    name: str
    words: tuple[str, ...]
    """Overrides of the run, or words of the command; `{NAME}` stands for the folder of the stage NAME."""
    is_command: bool
    parents: tuple[str, ...]
    """Earlier stages that `words` names."""
    settings: str
    """Digest of all settings, wherever they come from; folders of stages count by their names."""


@dataclass(frozen=True)
class Chain:
    """What a command line with `pipeline=NAME` asks for."""

    name: str
    folder: Path
    stages: tuple[Stage, ...]
    options: tuple[str, ...]
    """`--config-dir`, for every run."""

    def say(self, text: str) -> None:
        say(f"pipeline={self.name}: {text}", flush=True)  # before what the stage's process prints


def run_pipeline(argv: Sequence[str], script: Path) -> None:
    """Run what is still to be run of the chain that `argv` names.

    Raises:
        ValueError: before anything is run, if a stage has a wrong setting; or if another process works on the chain.
        StageFailedError: when a stage fails.
    """
    if not is_main_process() or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a pipeline starts the processes of each stage itself: type it once, without a launcher")
    chain = plan(argv, script.parent / "conf")
    with _owned(chain.folder):
        for number, stage in enumerate(chain.stages, start=1):
            _run_stage(chain, number, stage, script)
    chain.say(f"finished, in {_shown(chain.folder)}")
    runs = [stage.name for stage in chain.stages if not stage.is_command]
    say(f"Next: llm-lightning lineage {shlex.quote(str(_shown(chain.folder / runs[-1])))}")


def plan(argv: Sequence[str], config_dir: Path) -> Chain:
    """Read the chain that `argv` names, and check every setting of every stage.

    Settings beside `pipeline=` are those of every stage, `+STAGE.KEY=VALUE` is one of that stage alone; both win over
    the file. `run_name` and `hydra.run.dir` name the folder of the chain.

    Raises:
        ValueError: one line: what is wrong, in which stage.
    """
    from hydra._internal.utils import get_args_parser

    flags = [word for word in argv if word.startswith("-") and not word.startswith(("--config-dir", "-cd"))]
    if flags:
        raise ValueError(f"pipeline= is a chain of runs: leave {' '.join(flags)} out; only --config-dir goes with it")
    arguments = get_args_parser().parse_intermixed_args(list(argv))
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
        stages.append(_planned(name, stage, words, names[:position], options, config_dir))
    return Chain(name, folder, tuple(stages), options)


def _folder(name: str, typed: Sequence[str]) -> Path:
    """Where the chain lives."""
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
    """The stage that `+STAGE.KEY=VALUE` is meant for."""
    return next((name for name in names if word.startswith(f"+{name}.")), None)


def _words(stage: Mapping[str, Any], typed: Sequence[str]) -> list[str]:
    """The words of a stage; what was typed wins, the last of each setting."""
    if "command" in stage:
        return shlex.split(stage["command"])
    return list({key_of(word): word for word in [*stage["overrides"], *typed]}.values())


def _planned(
    pipeline: str,
    stage: Mapping[str, Any],
    words: Sequence[str],
    earlier: Sequence[str],
    options: Sequence[str],
    config_dir: Path,
) -> Stage:
    name, is_command = stage["name"], "command" in stage
    allowed = (*earlier, name) if is_command else earlier
    for word in words:
        named = re.findall(r"\{(\w+)\}", word) if is_command or key_of(word) == "init_from" else []
        wrong = [other for other in named if other not in allowed]
        if wrong:
            raise ValueError(
                f"pipeline={pipeline}: stage {name}: {word}: no earlier stage is named {wrong[0]}; "
                f"there are {', '.join(earlier) or 'none'}"
            )
    parents = tuple(other for other in earlier if any(f"{{{other}}}" in word for word in words))
    if is_command:
        from llm_lightning.cli.main import VERBS

        if words[0] not in VERBS:
            raise ValueError(
                f"pipeline={pipeline}: stage {name}: there is no llm-lightning {words[0]}; there are {', '.join(VERBS)}"
            )
        return Stage(name, tuple(words), is_command, parents, _digest(list(words)))
    from omegaconf import OmegaConf

    from llm_lightning.experiments.settings.checks import asks_for_many, check_overrides

    unfilled = {other: f"{{{other}}}" for other in earlier}
    argv = [*options, *(_filled_override(word, unfilled) for word in words)]
    try:
        config = check_overrides(argv, config_dir)
        if any(key_of(word) == "experiment" for word in words) and asks_for_many(argv, config_dir):
            raise ValueError("its experiment is a multirun (hydra.mode), and a stage is one run; choose another file")
    except ValueError as error:
        raise ValueError(f"pipeline={pipeline}: stage {name}: {error}") from None
    return Stage(name, tuple(words), is_command, parents, _digest(OmegaConf.to_container(config, resolve=True)))


def _run_stage(chain: Chain, number: int, stage: Stage, script: Path) -> None:
    """Run a stage, unless that was done; leave its manifest."""
    folder = chain.folder / stage.name
    parents = {name: _checkpoint_digest(chain.folder / name) for name in stage.parents}
    before = _read_manifest(folder)
    unchanged, stale = _judge(before, stage, parents, folder)
    if unchanged:
        chain.say(f"stage {stage.name} is unchanged and not run again ({_shown(_kept_in(folder, stage))})")
        return
    if stale:
        chain.say(f"stage {stage.name} {stale}: {_shown(folder)} is kept as {_move_aside(folder).name}")
    chain.say(f"stage {number} of {len(chain.stages)}, {stage.name}, in {_shown(folder)}")
    manifest = {
        "pipeline": chain.name,
        "stage": stage.name,
        "finished": False,
        "command" if stage.is_command else "overrides": list(stage.words),
        "settings": stage.settings,
        "parents": parents,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not before.get("finished") or stale:  # else that one stays true until the run has taken other settings
        _write_manifest(folder, manifest)
    code = _own_process(chain, stage, script)
    if code:
        raise StageFailedError(
            f"pipeline={chain.name}: stage {stage.name} ended with exit code {code} in {_shown(folder)}; "
            "its words stand above, and the same command goes on there",
            code,
        )
    results = _of_this_code() if stage.is_command else _results(folder)
    _write_manifest(folder, manifest | {"finished": True} | results)


def _judge(
    before: Mapping[str, Any], stage: Stage, parents: Mapping[str, str | None], folder: Path
) -> tuple[bool, str | None]:
    """Whether a stage is done, and else why what it left can be neither used nor continued, if so.

    Other settings are no such reason: the run itself says which may change, continues or refuses them.
    """
    if not before:
        return False, None
    changed = [name for name in {**before["parents"], **parents} if before["parents"].get(name) != parents.get(name)]
    if changed:
        return False, f"was made from another {' and '.join(changed)}"
    same = before["finished"] and before["settings"] == stage.settings
    if not before["finished"] or stage.is_command:
        return same, None
    from llm_lightning.weights.checkpoint import CheckpointError, verify

    try:
        digest = verify(folder / before["checkpoint"]["path"])
    except (FileNotFoundError, CheckpointError) as error:
        return False, f"has no valid checkpoint ({error})"
    return same and digest == before["checkpoint"]["digest"], None


def _kept_in(folder: Path, stage: Stage) -> Path:
    return folder / OUTPUT if stage.is_command else folder


def _own_process(chain: Chain, stage: Stage, script: Path) -> int:
    """Run a stage in a fresh process; return its exit code."""
    folder = chain.folder / stage.name
    folders = {one.name: str(chain.folder / one.name) for one in chain.stages}
    if not stage.is_command:
        words = [_filled_override(word, folders) for word in stage.words]
        return _exit_code([sys.executable, str(script), *chain.options, *words, run_dir_is(folder)])
    command = [sys.executable, "-m", "llm_lightning.cli.main", *(_filled(word, folders) for word in stage.words)]
    importable = [str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / OUTPUT).open("wb") as output:
        code = _exit_code(command, stdout=output, env={**os.environ, "PYTHONPATH": os.pathsep.join(importable)})
    say((folder / OUTPUT).read_text("utf-8", errors="replace"), end="", flush=True)
    return code


def _exit_code(command: Sequence[str], **options: Any) -> int:
    return wait_for(start(command, **options))


def _filled_override(word: str, folders: Mapping[str, str]) -> str:
    """`word` with folders in the place of names, quoted: they may hold what Hydra's grammar reads as its own."""
    if not any(f"{{{name}}}" in word for name in folders):
        return word
    key, _, value = _filled(word, folders).partition("=")
    escaped = value.strip("'\"").replace("'", r"\'")
    return f"{key}='{escaped}'"


def _filled(word: str, folders: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: folders.get(match[1], match[0]), word)


def _results(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself.

    Raises:
        ValueError: if it left no checkpoint for the next stage: `data.preview`, `debug=fast_dev_run`.
    """
    import yaml

    from llm_lightning.weights.checkpoint import verify

    summary = read_summary(folder)
    if summary.get("stopped_by") == "time":
        raise ValueError(f"{_shown(folder)} was stopped by trainer.max_time; the same command goes on there")
    if not summary.get("finished") or summary.get("checkpoint") is None:
        raise ValueError(f"{_shown(folder)} was left without a checkpoint: such a run is no stage of a pipeline")
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    kept = ("task", "steps", "monitor", "best_value", "metrics", "versions", "git")
    return {
        "config": _digest(_without_paths(config)),
        "checkpoint": {"path": summary["checkpoint"], "digest": verify(folder / summary["checkpoint"])},
        "data": summary["lineage"].get("data"),
        **{key: summary[key] for key in kept},
    }


def _of_this_code() -> dict[str, Any]:
    from llm_lightning.experiments.summary import git_state

    return {"git": git_state(Path(__file__).parents[1])}


def _without_paths(value: Any) -> Any:
    """`value` with null for every absolute path: the same run has the same settings in any folder."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return None if isinstance(value, str) and Path(value).is_absolute() else value


def _checkpoint_digest(folder: Path) -> str | None:
    digest: str | None = _read_manifest(folder).get("checkpoint", {}).get("digest")
    return digest


def _move_aside(folder: Path) -> Path:
    """Rename the folder to the first free `NAME.old-N`.

    Raises:
        RunFolderInUseError: if its run is going on.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            pass
    except Timeout:
        raise RunFolderInUseError(f"{_shown(folder)} is in use: its run is going on; stop it first") from None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(target)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Be the only process that works on the chain in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderInUseError(
            f"the pipeline in {_shown(folder)} is going on in another process; wait, or choose another run_name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    remedy = "delete it: the stage is then run again, or goes on"
    manifest = read_facts(folder / MANIFEST, MANIFEST_FACTS, remedy)
    checkpoint = manifest.get("checkpoint", {"path": "", "digest": ""})
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), str) for key in ("path", "digest")):
        raise ValueError(f"{folder / MANIFEST} is damaged ('checkpoint' must have a path and a digest); {remedy}")
    return manifest


def _shown(path: Path) -> Path:
    """Relative to where the user stands, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
