"""`summary.json`: the results of a run, its parents, versions and devices; and the closing lines on the terminal."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_lightning.experiments.quarantine import BAD_RECORDS
from llm_lightning.experiments.run_folder import RunFolder
from llm_lightning.files.atomic import write_atomically
from llm_lightning.files.places import names_of_parent

PACKAGES = ("llm-lightning", "torch", "lightning", "hydra-core")
SHOWN_METRICS = (
    "val/perplexity",
    "val/bits_per_byte",
    "val/accuracy",
    "val/reward_accuracy",
    "val/reward_margin",
    "train/eval_loss",
)
RESPONSES = "responses.json"
NEXT = {
    "classification": 'llm-lightning classify {} "Hello, are you free tonight?"',
    "sft": "llm-lightning respond {} --split test -o responses.json",
    "dpo": "llm-lightning compare {parent} {} --split test -o comparison.html",
}


def build_summary(
    run: RunFolder,
    trainer: Any,
    module: Any,
    *,
    data: dict[str, Any],
    seconds: float,
    stopped: str | None = None,
) -> dict[str, Any]:
    """Collect the summary of a run that has ended by itself, as plain values.

    Args:
        run: its folder.
        trainer, module: after `fit`, and `test` where there is a test split.
        data: a description of the data (`BaseDataModule.report`).
        seconds: training time in seconds, over all known sessions of the run.
        stopped: what ended the run before its last step (`callbacks/endings.py`).
    """
    from llm_lightning.callbacks.checkpoints import Checkpoints
    from llm_lightning.callbacks.throughput import Throughput

    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
    checkpoints = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)
    kept = (run.checkpoints / name for name in ("best.ckpt", "last.ckpt"))
    checkpoint = next((str(path.relative_to(run.path)) for path in kept if path.is_file()), None)
    metrics = module.latest_metrics()
    return {
        "finished": stopped != "time",  # the same command continues
        "stopped_by": stopped,
        "task": module.task,
        "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
        "steps": trainer.global_step,
        "total_steps": module.total_steps,
        "epochs": round(trainer.global_step / steps_per_epoch(trainer), 2),
        "item": module.item,
        f"{module.item}s": module.items_seen,
        "seconds": round(seconds, 1),
        f"{module.item}s_per_second": throughput.items_per_second if throughput else None,
        "monitor": checkpoints.monitor if checkpoints else None,
        "best_value": checkpoints.best_value if checkpoints else None,
        "best_step": checkpoints.best_step if checkpoints else None,
        "checkpoint": checkpoint,
        "metrics": {k: float(v) for k, v in sorted(metrics.items()) if "/" in k},
        "parameters": {
            "total": sum(p.numel() for p in module.parameters()),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        },
        **module.results(),
        "data": data,
        "sampled": sampled_of(trainer),
        "lineage": module.header.get("lineage", {}),
        "precision": trainer.precision,
        "processes": trainer.world_size,
        "device": device_name(trainer.strategy.root_device),  # by now Lightning has moved the module to the CPU
        "host": platform.node(),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": git_state(Path(__file__).parents[1]),
    }


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`."""
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


def closing_lines(summary: dict[str, Any], run_dir: Path, typed_in: Path) -> list[str]:
    """The results of the run, its folder (relative to `typed_in` if inside it), and the next command."""
    metrics, folder = summary["metrics"], shown_from(typed_in, run_dir)
    items = f"{summary['item']}s"
    rate = summary[f"{items}_per_second"]
    speed = f", {rate:,.0f} {items}/s" if rate else ""
    lines = [
        f"{_ended(summary)}, {summary['epochs']:g} epochs, {summary[items]:,} {items} "
        f"in {duration(summary['seconds'])}{speed}."
    ]
    if left_out := summary.get("data", {}).get("quarantined"):
        noun = "record that could not be read was" if left_out == 1 else "records that could not be read were"
        lines.append(f"{left_out:,} {noun} left out: {folder / BAD_RECORDS} says which and why.")
    if summary.get("stopped_by") == "time":
        lines.append("It is not finished: the same command trains on, for as long again.")
    if summary["best_value"] is not None:
        reached = [f"Best {summary['monitor']} {summary['best_value']:.4f} after {summary['best_step']:,} steps"]
        sets = [name for name in metrics if re.fullmatch(r"val/[^/]+/loss", name) and name != summary["monitor"]]
        reached += [f"{name} {metrics[name]:.4f}" for name in (*SHOWN_METRICS, *sets) if name in metrics]
        line = "; last ".join([reached[0], ", ".join(reached[1:])] if reached[1:] else reached)
        lines.append(f"{line}{_sample_note(summary, 'val')}.")
    lines += _tested(metrics, _sample_note(summary, "test"), _sample_note(summary, "answers"))
    lines += _confused(summary.get("most_confused", {}).get("test", []))
    if summary["checkpoint"] is None:  # callbacks.checkpoints=null
        return [*lines, f"Run folder: {folder}"]
    checkpoint = shlex.quote(str(folder / summary["checkpoint"]))
    lineage = summary["lineage"]
    place = lineage.get("places", {}).get("init_from")
    parent = next(iter(names_of_parent(lineage.get("parent_name"), place, run_dir)), None)
    if parent is not None and Path(parent).is_absolute():
        parent = str(shown_from(typed_in, Path(parent)))
    task = "sft" if summary["task"] == "dpo" and parent is None else summary["task"]  # nothing to compare with
    command = NEXT.get(task, 'llm-lightning generate {} "The"').format(checkpoint, parent=shlex.quote(str(parent)))
    if task == "sft" and (run_dir / RESPONSES).is_file():  # the run has answered already
        command = f"llm-lightning judge {shlex.quote(str(folder / RESPONSES))} --lexical"
    return [*lines, f"Run folder: {folder}", f"Next: {command}"]


def _ended(summary: dict[str, Any]) -> str:
    words = {
        "time": "Stopped by trainer.max_time after",
        "early_stopping": "Stopped early after",
        "other": "Stopped after",
    }
    reason = summary.get("stopped_by")
    if reason is None:
        return f"Finished {summary['steps']:,} steps"
    return f"{words[reason]} {summary['steps']:,} of {summary['total_steps']:,} steps"


def sampled_of(trainer: Any) -> dict[str, dict[str, Any]]:
    """The splits measured only in part: samples measured, samples in all, and the name of a sample."""
    from llm_lightning.callbacks.responses import Responses

    sampled: dict[str, dict[str, Any]] = trainer.datamodule.sampled(trainer)
    answered = next((c.answered for c in trainer.callbacks if isinstance(c, Responses)), None)
    if answered is not None and answered[0] < answered[1]:
        sampled["answers"] = {"measured": answered[0], "of": answered[1], "what": "records"}
    return sampled


def _sample_note(summary: dict[str, Any], split: str) -> str:
    facts = summary.get("sampled", {}).get(split)
    if facts is None:
        return ""
    if split == "answers":
        return f" ({facts['measured']:,} of {facts['of']:,} test {facts['what']}, the first that fit)"
    return f" ({sample_words(split, facts)}, a fixed sample)"


def sample_words(split: str, facts: dict[str, Any]) -> str:
    """`16 of 92 test texts`."""
    return f"{facts['measured']:,} of {facts['of']:,} {split} {facts['what']}"


def _tested(metrics: dict[str, float], note: str, note_of_answers: str) -> list[str]:
    """The best checkpoint's results on the test split."""
    lines = []
    if "test/accuracy" in metrics:
        more = ", ".join(
            f"{name} {metrics[f'test/{name}']:.4f}" for name in ("f1", "auroc") if f"test/{name}" in metrics
        )
        lines.append(f"Test accuracy of the best checkpoint {_with_interval(metrics, 'test/accuracy')}, {more}{note}.")
    if "test/reward_accuracy" in metrics:
        accuracy, margin = _with_interval(metrics, "test/reward_accuracy"), metrics["test/reward_margin"]
        lines.append(f"Test reward accuracy of the best checkpoint {accuracy}, margin {margin:.4f}{note}.")
    if "test/perplexity" in metrics:
        perplexity = f"perplexity {metrics['test/perplexity']:.4f}"
        lines.append(f"Test loss of the best checkpoint {metrics['test/loss']:.4f}, {perplexity}{note}.")
    if "test/exact_match" in metrics:
        frequent = metrics["test/exact_match_of_most_frequent"]
        lines.append(
            f"Exact match of its answers {_with_interval(metrics, 'test/exact_match')}; "
            f"always giving the commonest answer scores {frequent:.4f}{note_of_answers}."
        )
    return lines


def _confused(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """The most confused pairs of many classes."""
    shown = [f"{pair['true']} as {pair['predicted']} ({pair['texts']:,} of {pair['of']:,})" for pair in pairs[:3]]
    return [f"Most confused: {'; '.join(shown)}."] if shown else []


def _with_interval(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.4f} (95% interval {metrics[f'{name}_low']:.4f} to {metrics[f'{name}_high']:.4f})"


def steps_per_epoch(trainer: Any) -> int:
    """Optimizer updates of one pass over the training data."""
    return max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))


def duration(seconds: float) -> str:
    """Seconds in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (hours + minutes > 0) + [f"{rest} s"] * (hours == 0)
    return " ".join(parts)


def device_name(device: Any) -> str:
    """The processor model of a torch device."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or just the architecture on Linux
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    processor = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{device.type}: {processor}, {os.cpu_count()} threads"


def git_state(package: Path) -> dict[str, Any] | None:
    """Commit of the running code, and whether it was changed since; None outside a git repository."""
    try:
        # An installed package can lie inside the repository of something else: is this file tracked?
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".", "../conf", "../train.py")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def shown_from(folder: Path, path: Path) -> Path:
    """`path`, relative to `folder` if it is inside: shorter to type."""
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else path
