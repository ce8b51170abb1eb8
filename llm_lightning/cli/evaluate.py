"""Loss and perplexity of a GPT on text; accuracy of a classifier on labelled text; of tuned models, their own metrics.

  llm-lightning evaluate outputs/pretraining/my_run --split val
  llm-lightning evaluate gpt2-small --text book.txt more.jsonl --stride 512
  llm-lightning evaluate outputs/classification/my_run --split test
  llm-lightning evaluate outputs/classification/my_run --text labelled.csv --label-column kind
  llm-lightning evaluate outputs/sft/my_run --split test      also outputs/dpo/my_run: what the run measured of it

Every token after the first of a document is scored exactly once. Windows of the model's context follow each other
without overlap, as in training; a smaller --stride gives each token more context and takes longer.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_file_arguments, add_model_arguments, add_split, file_options, open_model
from llm_lightning.terminal import aligned, inline, one_line, say, say_json, say_lines

if TYPE_CHECKING:
    from llm_lightning.inference.evaluate import Evaluation
    from llm_lightning.weights.load import LoadedModel

log = logging.getLogger(__name__)

WIDTH = 40  # of the name of a class
INSTEAD = "use --text FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="files of text or records, folders or globs; for a classifier records with labels",
    )
    add_split(what, meaning="a split of the data that the model was trained on")
    parser.add_argument(
        "--text-field", metavar="KEY", help="of records: where the text is (default: as in the training)"
    )
    parser.add_argument(
        "--label-column", metavar="KEY", help="of records: where the class is (default: as in the training)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: the context)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    loaded = open_model(args)
    if "classifier" in loaded.header:
        _run_classifier(loaded, args)
    elif args.split and loaded.header.get("task") in ("sft", "dpo"):
        _run_tuned(loaded, args)
    else:
        _run_gpt(loaded, args)


def _run_gpt(loaded: LoadedModel, args: argparse.Namespace) -> None:
    result = _evaluated(loaded, args)
    if args.json:
        say_json(asdict(result))
        return
    say(f"loss           {result.loss:.4f} nats per token")
    say(f"perplexity     {result.perplexity:.2f}")
    say(f"bits per byte  {result.bits_per_byte:.4f}")
    say(f"tokens         {result.n_tokens:,} scored, of {result.n_bytes:,} bytes of text")


def _evaluated(loaded: LoadedModel, args: argparse.Namespace) -> Evaluation:
    from llm_lightning.data.of_checkpoint import tokens_of
    from llm_lightning.inference.evaluate import evaluate_texts, evaluate_tokens

    task = loaded.header.get("task", "pretraining")
    if task != "pretraining" and not args.json:
        log.warning("the loss of plain text, which is not that of task=%s", task)
    if args.split:
        files = tokens_of(loaded, args.split, instead=INSTEAD)
        options = {"length": loaded.longest_input, "stride": args.stride, "progress": True}
        return evaluate_tokens(
            loaded.gpt, [file.tokens for file in files], sum(file.n_bytes for file in files), **options
        )
    return evaluate_texts(loaded, _read_texts(args, loaded), stride=args.stride, progress=True)


def _run_tuned(loaded: LoadedModel, args: argparse.Namespace) -> None:
    """A model of task=sft or task=dpo on a split of its own data."""
    import torch

    from llm_lightning.data.of_checkpoint import conversations_of
    from llm_lightning.experiments.evaluation import evaluate_split

    if args.stride is not None:
        raise ValueError(f"--stride {args.stride} is for texts; --split {args.split} of a tuned model has no windows")
    data = conversations_of(loaded, instead=INSTEAD, split=args.split)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    metrics = evaluate_split(loaded, data, args.split, checkpoint=args.checkpoint, dtype=dtype)
    task = loaded.header["task"]
    if args.json:
        say_json({"task": task, "split": args.split, **metrics})
    else:
        say_lines(_tuned_lines(task, metrics))


def _tuned_lines(task: str, metrics: dict[str, float]) -> Iterator[str]:
    yield f"{'loss':<28}{metrics.pop('loss'):.4f} nats per {'pair' if task == 'dpo' else 'target token'}"
    for name in ("exact_match", "reward_accuracy"):
        if name in metrics:
            low, high = metrics.pop(f"{name}_low"), metrics.pop(f"{name}_high")
            yield f"{_words(name):<28}{metrics.pop(name):.4f} (95% interval {low:.4f} to {high:.4f})"
    for name, value in metrics.items():
        yield f"{_words(name):<28}{value:,}" if isinstance(value, int) else f"{_words(name):<28}{value:.4f}"


def _words(name: str) -> str:
    return {"exact_match_of_most_frequent": "most frequent answer"}.get(name, name.replace("_", " "))


def _run_classifier(loaded: LoadedModel, args: argparse.Namespace) -> None:
    from llm_lightning.data.of_checkpoint import labelled_texts_of
    from llm_lightning.inference.evaluate import evaluate_labelled

    records = labelled_texts_of(loaded, args.split, instead=INSTEAD) if args.split else _labelled(args, loaded)
    result = evaluate_labelled(loaded, records, progress=True)
    if args.json:
        say_json(result)
        return
    interval = f"95% interval {result['accuracy_low']:.4f} to {result['accuracy_high']:.4f}"
    say(f"accuracy   {result['accuracy']:.4f} ({interval}), {result['n']:,} texts")
    for name in ("loss", "precision", "recall", "f1", "auroc"):
        say(f"{name:<10} {result[name]:.4f}")
    if "most_confused" in result:
        say_lines(_confused_lines(result["most_confused"]))
        return
    labels = [inline(label) for label in loaded.labels]
    width = max(map(len, labels)) + 2
    say(f"{'true | said':<{width + 4}}" + "".join(f"{label:>{width}}" for label in labels))
    for label, counts in zip(labels, result["confusion"], strict=True):
        say(f"{label:<{width + 4}}" + "".join(f"{count:>{width},}" for count in counts))


def _confused_lines(pairs: list[dict[str, Any]]) -> list[str]:
    shown = [
        (one_line(pair["true"], WIDTH), one_line(pair["predicted"], WIDTH), f"{pair['texts']:,}", f"{pair['of']:,}")
        for pair in pairs
    ]
    return aligned([("most confused: true", "said", "texts", "of"), *shown]) if pairs else ["no text was confused"]


def _labelled(args: argparse.Namespace, loaded: LoadedModel) -> list[tuple[str, str]]:
    from llm_lightning.data.of_checkpoint import settings_of
    from llm_lightning.data.records.labelled import read_labelled

    trained = settings_of(loaded)
    records = read_labelled(
        args.text,
        options=file_options(args),
        fold_labels=trained.get("fold_labels", False),
        text_column=args.text_field or trained.get("text_column") or "text",
        label_column=args.label_column or trained.get("label_column") or "label",
    )
    return [(record.text, record.label) for record in records]


def _read_texts(args: argparse.Namespace, loaded: LoadedModel) -> list[str]:
    from llm_lightning.data.corpus.sources import open_source
    from llm_lightning.data.of_checkpoint import settings_of

    field = args.text_field or settings_of(loaded).get("text_field") or "text"
    source = open_source(path=args.text, text_field=field, options=file_options(args))
    source.survey()  # names bad text before any work is spent
    return ["".join(document.chunks) for document in source.documents()]
