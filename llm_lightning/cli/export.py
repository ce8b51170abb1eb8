"""Write the weights as a folder that transformers loads, or as GGUF for llama.cpp and Ollama, adapters merged; or the
adapter alone, in PEFT's format.

llm-lightning export outputs/pretraining/my_run exported --dtype bfloat16
llm-lightning export outputs/classification/my_run exported
llm-lightning export outputs/sft/my_run exported --format gguf --dtype q8_0
llm-lightning export outputs/classification/my_lora_run adapter --format peft
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_base_argument, add_checkpoint_argument
from llm_lightning.terminal import say, say_lines

if TYPE_CHECKING:
    from llm_lightning.weights.chat import Chat
    from llm_lightning.weights.load import LoadedModel


_DTYPES = {"hf": ("float32", "bfloat16"), "gguf": ("f16", "f32", "bf16", "q8_0"), "peft": ()}
"""The default is the first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the export; must be new or empty")
    parser.add_argument(
        "--format",
        choices=("hf", "gguf", "peft"),
        default="hf",
        help="hf: the model (the default); gguf: the model for llama.cpp; peft: the adapter alone",
    )
    parser.add_argument(
        "--dtype",
        choices=[dtype for dtypes in _DTYPES.values() for dtype in dtypes],
        help="of the weights; hf: float32 (its default), bfloat16; gguf: f16 (its default), f32, bf16, q8_0",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export, in one step")
    add_base_argument(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.models.classifier import Classifier
    from llm_lightning.models.lora import merge_and_unload
    from llm_lightning.weights.hf_export import export_classifier, export_hf
    from llm_lightning.weights.load import load_model

    dtype = _dtype(args)
    loaded = load_model(args.checkpoint, base=args.base)
    if args.format == "peft":
        _export_adapter(loaded, args.folder, overwrite=args.overwrite)
        return
    if args.format == "gguf":
        _export_gguf(loaded, args.folder, dtype, overwrite=args.overwrite)
        return
    trunk, origin = merge_and_unload(loaded.model).trunk, _origin_of(loaded)
    options: dict[str, Any] = {"lineage": origin, "dtype": dtype, "overwrite": args.overwrite}
    if isinstance(loaded.model, Classifier):
        report = export_classifier(loaded.model, loaded.labels, loaded.tokenizer, args.folder, **options)
    else:
        options |= {"chat": _chat_of(loaded), "generation": loaded.header.get("generation")}
        report = export_hf(trunk, trunk.config, loaded.tokenizer, args.folder, **options)
    for note in report["notes"]:
        say(note)
    compared = "read back bit for bit; not compared with transformers, which is not installed or lacks the class"
    if version := report["transformers"]:
        compared = (
            f"compared with transformers {version}, logits differ by at most {report['max_logit_difference']:.2g}"
        )
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    say_lines([f"{args.folder}: {n_parameters:,} parameters in {dtype}, {compared}"])


def _dtype(args: argparse.Namespace) -> str:
    known: tuple[str, ...] = _DTYPES[args.format]
    if args.dtype is not None and args.dtype not in known:
        there = f"there are {', '.join(known)}" if known else "the adapter keeps its own; leave it out"
        raise ValueError(f"--format {args.format} has no --dtype {args.dtype}; {there}")
    return args.dtype or next(iter(known), "")


def _export_gguf(loaded: LoadedModel, folder: Path, dtype: str, *, overwrite: bool) -> None:
    from llm_lightning.models.classifier import Classifier
    from llm_lightning.models.lora import merge_and_unload
    from llm_lightning.weights.gguf.exporting import export_gguf

    if isinstance(loaded.model, Classifier):
        raise ValueError("GGUF has no form for this model, a classifier; leave --format gguf out")
    model = merge_and_unload(loaded.model).trunk
    report = export_gguf(
        model,
        loaded.tokenizer,
        folder,
        dtype=dtype,
        chat=_chat_of(loaded),
        origin=_origin_of(loaded),
        overwrite=overwrite,
    )
    for note in report["notes"]:
        say(note)
    version, foreign = report["xllamacpp"], report["llama_cpp_max_difference"]
    bound = f"the bound is {report['bound']:.2g}"
    by_other = f"in llama.cpp (xllamacpp {version}) by {foreign:.2g}" if version else "xllamacpp is not installed"
    checked = f"log-probabilities differ by {report['max_difference']:.2g} when read back, {by_other}; {bound}"
    say_lines([f"{folder}: {report['architecture']}, {model.num_parameters():,} parameters in {dtype}; {checked}"])


def _export_adapter(loaded: LoadedModel, folder: Path, *, overwrite: bool) -> None:
    from llm_lightning.files.places import parent_names
    from llm_lightning.models.lora import LoRAConfig
    from llm_lightning.weights.peft_format import export_peft

    if not loaded.header.get("lora"):
        raise ValueError("this model has no adapter (it was not trained with lora=...); leave --format peft out")
    config = LoRAConfig(**loaded.header["lora"])
    base = next(iter(parent_names(loaded.header, loaded.path)), "")
    export_peft(
        loaded.model,
        config,
        folder,
        base_name=base,
        tokenizer=loaded.tokenizer,
        chat=_chat_of(loaded),
        overwrite=overwrite,
    )
    say_lines([f"{folder}: adapter of rank {config.rank}{f' for {base}' if base else ''}"])


def _origin_of(loaded: LoadedModel) -> dict[str, str]:
    """Where the weights come from: the digest of their file, and what they were trained from."""
    lineage = loaded.header.get("lineage", {})
    keys = ("source", "parent_name", "parent", "base", "data")
    facts = {"digest": loaded.header.get("digest"), **{key: lineage.get(key) for key in keys}}
    # What is published should not show where it was made.
    return {key: _without_folders(value) for key, value in facts.items() if isinstance(value, str)}


def _without_folders(value: str) -> str:
    return Path(value).name if Path(value).is_absolute() else value


def _chat_of(loaded: LoadedModel) -> Chat | None:
    """The template of the model's training, or its own; None if there is none that its tokenizer can follow."""
    from llm_lightning.data.templates.as_jinja import chat_of
    from llm_lightning.data.templates.choose import from_description, template_in

    description = template_in(loaded.header)
    try:
        return chat_of(from_description(description), loaded.tokenizer) if description else None
    except ValueError as error:
        say(f"the export has no chat template: {error}")
        return None
