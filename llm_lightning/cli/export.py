"""Write the weights as a folder that transformers loads as GPT2LMHeadModel; `load_model` reads it too.

llm-lightning export outputs/pretraining/my_run exported --dtype bfloat16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llm_lightning.cli.main import add_checkpoint_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to be made; must be new or empty")
    parser.add_argument("--format", choices=("hf",), default="hf", help="hf: Hugging Face (the default)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(args: argparse.Namespace) -> None:
    from llm_lightning.checkpoint import load_model
    from llm_lightning.pretrained import export_hf

    loaded = load_model(args.checkpoint)
    report = export_hf(
        loaded.model,
        loaded.model.config,
        loaded.tokenizer,
        args.folder,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    for note in report["notes"]:
        print(note)
    version = report["transformers"]
    alone = "read back by llm-lightning; transformers is not installed"
    checked = f"compared with transformers {version}" if version else alone
    print(f"{args.folder}: {loaded.model.num_parameters():,} parameters in {args.dtype}, {checked}")
