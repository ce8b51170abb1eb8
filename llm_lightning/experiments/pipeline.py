"""`pipeline=NAME`: run the stages in order, each from the results of earlier ones.

Every stage is a process with its own run folder, which ends, is killed and continues like any other run. Its
`manifest.json` records its inputs: the same command again runs only stages that are missing, unfinished, or made from
inputs that have changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_lightning.experiments.processes import start, wait_for
from llm_lightning.experiments.ranks.launcher import is_one_of_several
from llm_lightning.experiments.run_folder import RunFolderInUseError
from llm_lightning.experiments.run_records import Facts, read_facts, read_summary, refuse_links
from llm_lightning.experiments.settings.overrides import run_dir_override
from llm_lightning.experiments.stages import Chain, Stage, digest_of, filled, filled_override, plan
from llm_lightning.experiments.summary import git_state, shown_from
from llm_lightning.files.atomic import write_atomically
from llm_lightning.terminal import say

MANIFEST = "manifest.json"
"""File in a stage's folder: the stage's inputs and results."""
MANIFEST_FACTS: Facts = {"finished": bool, "settings": str, "parents": dict}
OUTPUT = "output.txt"
"""File in a command's folder: what it printed."""


class StageFailedError(Exception):
    """A stage ended with a nonzero exit code, which the chain then exits with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_pipeline(argv: Sequence[str], script: Path, verbs: Collection[str] | None) -> None:
    """Run the missing and unfinished stages of the chain that `argv` names.

    Args:
        argv: the command line without the program.
        script: the script that runs a stage; its configuration is the folder `conf` next to it.
        verbs: the commands of `llm-lightning` that a stage may run; None: any.

    Raises:
        ValueError: before any stage runs, if one has a wrong setting; or if another process runs the chain.
        StageFailedError: when a stage fails.
    """
    if is_one_of_several():
        raise ValueError("a pipeline starts the processes of each stage itself: type it once, without a launcher")
    chain = plan(argv, script.parent / "conf", verbs)
    with _owned_chain(chain.folder):
        for number, stage in enumerate(chain.stages, start=1):
            _run_stage(chain, number, stage, script)
    chain.say(f"finished, in {_shown(chain.folder)}")
    runs = [stage.name for stage in chain.stages if not stage.is_command]
    say(f"Next: llm-lightning lineage {shlex.quote(str(_shown(chain.folder / runs[-1])))}")


def _run_stage(chain: Chain, number: int, stage: Stage, script: Path) -> None:
    """Run a stage, unless it is done; write its manifest."""
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
    if not before.get("finished") or stale:  # else the old one holds until the run accepts the new settings
        _write_manifest(folder, manifest)
    code = _own_process(chain, stage, script)
    if code:
        raise StageFailedError(
            f"pipeline={chain.name}: stage {stage.name} ended with exit code {code} in {_shown(folder)}; "
            "see its output above; the same command continues there",
            code,
        )
    results = {"git": git_state(Path(__file__).parents[1])} if stage.is_command else _results(folder)
    _write_manifest(folder, manifest | {"finished": True} | results)


def _judge(
    before: Mapping[str, Any], stage: Stage, parents: Mapping[str, str | None], folder: Path
) -> tuple[bool, str | None]:
    """Whether a stage is done; and why its results can be neither used nor continued, or None.

    Changed settings are no such reason: the run itself accepts or refuses them.
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
        words = [filled_override(word, folders) for word in stage.words]
        return _exit_code([sys.executable, str(script), *chain.options, *words, run_dir_override(folder)])
    command = [sys.executable, "-m", "llm_lightning.cli.main", *(filled(word, folders) for word in stage.words)]
    importable = [str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / OUTPUT).open("wb") as output:
        code = _exit_code(command, stdout=output, env={**os.environ, "PYTHONPATH": os.pathsep.join(importable)})
    say((folder / OUTPUT).read_text("utf-8", errors="replace"), end="", flush=True)
    return code


def _exit_code(command: Sequence[str], **options: Any) -> int:
    return wait_for(start(command, **options))


def _results(folder: Path) -> dict[str, Any]:
    """The manifest entries for a finished run.

    Raises:
        ValueError: if it left no checkpoint for the next stage: `data.preview`, `debug=fast_dev_run`.
    """
    import yaml

    from llm_lightning.weights.checkpoint import verify

    summary = read_summary(folder)
    if summary.get("stopped_by") == "time":
        raise ValueError(f"{_shown(folder)} was stopped by trainer.max_time; the same command continues there")
    if not summary.get("finished") or summary.get("checkpoint") is None:
        raise ValueError(f"{_shown(folder)} has no checkpoint: a run in a pipeline must leave one")
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    kept = ("task", "steps", "monitor", "best_value", "metrics", "versions", "git")
    return {
        "config": digest_of(_without_paths(config)),
        "checkpoint": {"path": summary["checkpoint"], "digest": verify(folder / summary["checkpoint"])},
        "data": summary["lineage"].get("data"),
        **{key: summary[key] for key in kept},
    }


def _without_paths(value: Any) -> Any:
    """`value` with null for every absolute path, so that a run has the same settings in any folder."""
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
        RunFolderInUseError: if a process is running in it.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            pass
    except Timeout:
        raise RunFolderInUseError(f"{_shown(folder)} is in use by a running process; stop it first") from None
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(target)


@contextlib.contextmanager
def _owned_chain(folder: Path) -> Iterator[None]:
    """Hold the lock of the chain in `folder`: only one process may run it."""
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFolderInUseError(
            f"the pipeline in {_shown(folder)} is running in another process; wait, or choose another run_name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    remedy = "delete it: the stage is then run again, or goes on"
    manifest = read_facts(folder / MANIFEST, MANIFEST_FACTS, remedy)
    checkpoint = manifest.get("checkpoint", {"path": "", "digest": ""})
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), str) for key in ("path", "digest")):
        raise ValueError(f"{folder / MANIFEST} is damaged ('checkpoint' must have a path and a digest); {remedy}")
    return manifest


def _shown(path: Path) -> Path:
    return shown_from(Path.cwd(), path)
