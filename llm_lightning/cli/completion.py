"""Print a script that completes the verbs, options, files and names of weights of llm-lightning in a shell.

  eval "$(llm-lightning completion bash)"                                   in ~/.bashrc
  llm-lightning completion zsh > ~/.zfunc/_llm-lightning                    a folder of $fpath
  llm-lightning completion fish > ~/.config/fish/completions/llm-lightning.fish

Print it again after an update. For the settings of train.py: eval "$(python train.py -sc install=bash)"
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from llm_lightning.terminal import say
from llm_lightning.weights.releases import RELEASES

SHELLS = ("bash", "zsh", "tcsh", "fish")
FILES = {"FILE", "FILE.png", "PATH", "FOLDER", "DATA", "SOURCE", "RUN"}
"""Metavars of arguments that are completed with the names of files."""
WEIGHTS = {"CHECKPOINT", "A", "B"}
"""Metavars of arguments that are completed with the names of files and of published weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> None:
    import shtab

    say(shtab.complete(_whole_parser(), shell=args.shell))


def _whole_parser() -> argparse.ArgumentParser:
    """One parser with the arguments of every verb; `llm-lightning` itself reads those of one."""
    import shtab

    from llm_lightning.cli.main import VERBS

    parser = argparse.ArgumentParser(prog="llm-lightning")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers()
    for verb, summary in VERBS.items():
        of_verb = verbs.add_parser(verb, help=summary)
        import_module(f"llm_lightning.cli.{verb.replace('-', '_')}").add_arguments(of_verb)
        for action in of_verb._actions:
            if action.metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            if action.metavar in WEIGHTS:
                action.complete = shtab.FILE | _weights()  # type: ignore[attr-defined]
    return parser


def _weights() -> dict[str, Any]:
    """What completes names of published weights as well as files, by shell; tcsh can do one of them."""
    names, function = " ".join(RELEASES), "_llm_lightning_weights"
    return {
        "bash": function,
        "zsh": function,
        "fish": f"(__fish_complete_path (commandline -ct); string split ' ' '{names}')",
        "preamble": {
            "bash": f"{function}() {{\n  compgen -f -- $1\n  compgen -W '{names}' -- $1\n}}",
            "zsh": f"{function}() {{\n  _alternative 'names:weights:({names})' 'files:file:_files'\n}}",
        },
    }
