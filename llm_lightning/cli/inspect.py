"""Show what a checkpoint contains: task, progress, sizes, tokenizer, metrics, settings, lineage.

The whole file is read and compared with its digest.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from llm_lightning.cli.arguments import add_checkpoint_argument
from llm_lightning.terminal import say_json, say_lines

LONGEST_TEXT = 400
"""characters of a text that is shown; a longer one, such as tokenizer.json of megabytes, is counted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> None:
    facts = describe(args.checkpoint)
    if args.json:
        say_json(facts)
        return
    say_lines(f"{name:<12}{value}" for name, value in _rows(facts))


def describe(name_or_path: str) -> dict[str, Any]:
    """Return a checkpoint's header with its path, its number of parameters, and whether its bytes were compared with an
    earlier digest.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if what is there is damaged or not a GPT.
    """
    from llm_lightning.weights.checkpoint import examine
    from llm_lightning.weights.load import load_model, resolve
    from llm_lightning.weights.releases import is_release

    path = resolve(name_or_path)
    if path is None:
        loaded = load_model(name_or_path)
        header, parameters = loaded.header, sum(parameter.numel() for parameter in loaded.model.parameters())
    else:
        header, parameters = examine(path)
    verified = path is not None or is_release(name_or_path)
    return {"path": str(path or name_or_path), "parameters": parameters, "verified": verified, **header}


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) in the order of interest; long lists and texts are counted."""
    for name in ("path", "format", "task", "step", "epoch", "tokens_seen", "sequences_seen", "parameters"):
        if name in facts:
            value = facts[name]
            yield name, f"{value:,}" if isinstance(value, int) else value
    for name in ("model", "classifier", "lora", "tokenizer", "template", "generation", "metrics", "lineage"):
        if facts.get(name):
            yield name, "  ".join(_flat(facts[name]))
    if "digest" in facts:
        yield "digest", f"{facts['digest']} ({'verified' if facts['verified'] else 'nothing to compare it with'})"
    for setting in _flat(facts.get("config", {})):
        yield "setting", setting


def _flat(value: Any, name: str = "") -> Iterator[str]:
    """`a.b=1` for each leaf, as on the command line."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and len(value) > 8:
        yield f"{name}=[{len(value):,} items]"
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        yield f"{name}=[{len(value):,} characters]"
    elif isinstance(value, float):
        yield f"{name}={value:.6g}"
    else:
        yield f"{name}={'null' if value is None else value}"
