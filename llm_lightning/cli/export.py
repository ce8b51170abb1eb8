"""Write the weights as a folder that transformers loads, adapters merged; or the adapter alone, in PEFT's format.

llm-lightning export outputs/pretraining/my_run exported --dtype bfloat16
llm-lightning export outputs/classification/my_run exported
llm-lightning export outputs/classification/my_lora_run adapter --format peft
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import add_base_argument, add_checkpoint_argument
from llm_lightning.terminal import say, say_lines

if TYPE_CHECKING:
    from llm_lightning.weights.load import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the export; must be new or empty")
    parser.add_argument(
        "--format", choices=("hf", "peft"), default="hf", help="hf: the model (the default); peft: the adapter alone"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export, in one step")
    add_base_argument(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.models.classifier import Classifier
    from llm_lightning.models.lora import merge_and_unload
    from llm_lightning.weights.hf_export import export_classifier, export_hf
    from llm_lightning.weights.load import load_model

    loaded = load_model(args.checkpoint, base=args.base)
    if args.format == "peft":
        _export_adapter(loaded, args.folder, overwrite=args.overwrite)
        return
    trunk, options = merge_and_unload(loaded.model).trunk, {"dtype": args.dtype, "overwrite": args.overwrite}
    if isinstance(loaded.model, Classifier):
        report = export_classifier(loaded.model, loaded.labels, loaded.tokenizer, args.folder, **options)
    else:
        report = export_hf(trunk, trunk.config, loaded.tokenizer, args.folder, **options)
    for note in report["notes"]:
        say(note)
    version = report["transformers"]
    alone = "read back by llm-lightning; transformers is not installed"
    checked = f"compared with transformers {version}" if version else alone
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    say_lines([f"{args.folder}: {n_parameters:,} parameters in {args.dtype}, {checked}"])


def _export_adapter(loaded: LoadedModel, folder: Path, *, overwrite: bool) -> None:
    from llm_lightning.files.places import parent_names
    from llm_lightning.models.lora import LoRAConfig
    from llm_lightning.weights.peft_format import export_peft

    if not loaded.header.get("lora"):
        raise ValueError("this model has no adapter (it was not trained with lora=...); leave --format peft out")
    config = LoRAConfig(**loaded.header["lora"])
    base = next(iter(parent_names(loaded.header, loaded.path)), "")
    export_peft(loaded.model, config, folder, base_name=base, overwrite=overwrite)
    say_lines([f"{folder}: adapter of rank {config.rank}{f' for {base}' if base else ''}"])
