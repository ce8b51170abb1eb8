"""Loss and perplexity of a GPT on text; accuracy of a classifier on labelled text; of tuned models, their own metrics.

  llm-lightning evaluate outputs/pretraining/my_run --split val
  llm-lightning evaluate gpt2-small --text book.txt more.jsonl --stride 512
  llm-lightning evaluate outputs/classification/my_run --split test
  llm-lightning evaluate outputs/classification/my_run --text labelled.csv --label-column kind
  llm-lightning evaluate outputs/sft/my_run --split test      also outputs/dpo/my_run: what the run measured of it

Every token after the first of a document is scored exactly once. Windows of the model's context follow each other
without overlap, as in training; a smaller --stride shows each token more of what stands before it, and takes longer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_lightning.cli.arguments import add_model_arguments, open_model
from llm_lightning.terminal import aligned, inline, one_line, say, say_json, say_lines

if TYPE_CHECKING:
    import numpy as np

    from llm_lightning.data.corpus.token_files import TokenFile
    from llm_lightning.models.gpt import GPT
    from llm_lightning.weights.load import LoadedModel

TOKENS_PER_BATCH = 4096
TUNED = ("sft", "dpo")
WIDTH = 40  # of the name of a class
SOURCE_SETTINGS = ("name", "path", "text_field", "hf_dataset", "hf_config", "hf_split", "hf_revision")
SPLIT_SETTINGS = ("split", "val_fraction", "add_eot")


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float
    """nats per token"""
    perplexity: float
    """exp(loss)"""
    bits_per_byte: float
    """loss in bits, per byte of UTF-8: comparable between tokenizers"""
    n_tokens: int
    """tokens scored"""
    n_bytes: int
    """of the whole text"""


class Window(NamedTuple):
    """A piece of a document, (n + 1,) ids: n inputs and n targets, the first `n_scored` of them scored before."""

    ids: np.ndarray
    n_scored: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text or JSONL files, folders or globs; a CSV, TSV or JSONL with labels",
    )
    what.add_argument(
        "--split", choices=("train", "val", "test"), help="a part of the data that the model was trained with"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="KEY", help="of records: where the text is (default: %(default)s)"
    )
    parser.add_argument(
        "--label-column", default="label", metavar="KEY", help="of records: where the class is (default: %(default)s)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default: the context)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    loaded = open_model(args)
    if isinstance(loaded.model, _classifier()):
        _run_classifier(loaded, args)
        return
    if args.split and loaded.header.get("task") in TUNED:
        _run_tuned(loaded, args)
        return
    if args.split:
        file = open_split(loaded, args.split)
        result = _evaluate(loaded.gpt, [file.tokens], file.n_bytes, args.stride, progress=True)
    else:
        texts = _read_texts(args.text, args.text_field)
        result = evaluate_texts(loaded, texts, stride=args.stride, progress=True)
    if args.json:
        say_json(asdict(result))
        return
    say(f"loss           {result.loss:.4f} nats per token")
    say(f"perplexity     {result.perplexity:.2f}")
    say(f"bits per byte  {result.bits_per_byte:.4f}")
    say(f"tokens         {result.n_tokens:,} scored, of {result.n_bytes:,} bytes of text")


def evaluate_text(loaded: LoadedModel, text: str, *, stride: int | None = None) -> Evaluation:
    """Score one text; see `evaluate_texts`."""
    return evaluate_texts(loaded, [text], stride=stride)


def evaluate_texts(
    loaded: LoadedModel, texts: Sequence[str], *, stride: int | None = None, progress: bool = False
) -> Evaluation:
    """Score texts, each on its own: means are over all their tokens.

    Args:
        loaded: what `load_model` returns.
        stride: tokens from one window to the next; default: the context length.
        progress: show a bar on a terminal.

    Raises:
        ValueError: if no text has two tokens, or the stride does not fit.
    """
    documents = [loaded.tokenizer.encode_array(text) for text in texts]
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return _evaluate(loaded.gpt, documents, n_bytes, stride, progress)


def evaluate_labelled(
    loaded: LoadedModel, records: Sequence[tuple[str, str]], *, progress: bool = False
) -> dict[str, Any]:
    """Score a classifier on (text, label) pairs.

    Returns:
        loss (nats per text), accuracy and its 95% interval, precision, recall, f1, auroc, n, and the confusion matrix
        (rows: true classes); of more than 100 classes instead of it the `most_confused` pairs.

    Raises:
        ValueError: if there is none, or a label is not among the model's classes.
    """
    import torch

    from llm_lightning.cli.classify import class_probabilities, predicted_class
    from llm_lightning.metrics.classes import MOST_SHOWN, auroc, auroc_of_many, count_metrics, described_confusions
    from llm_lightning.metrics.intervals import wilson_interval

    index = {label: number for number, label in enumerate(loaded.labels)}
    unknown = sorted({label for _, label in records} - index.keys())
    if unknown or not records:
        what = f"label {unknown[0]!r} is not a class of this model" if unknown else "there is no labelled text"
        raise ValueError(f"{what}; its classes are {', '.join(loaded.labels)}")
    n, n_classes = len(records), len(loaded.labels)
    labels, predicted = torch.tensor([index[label] for _, label in records]), torch.zeros(n, dtype=torch.int64)
    table = torch.zeros(n, n_classes)  # the one thing here that grows with both
    for row, probabilities in enumerate(class_probabilities(loaded, [text for text, _ in records], progress=progress)):
        table[row], predicted[row] = probabilities, predicted_class(loaded, probabilities)
    if n_classes > MOST_SHOWN:
        area = auroc_of_many(lambda block: table[:, block], labels, n_classes)
    else:
        area = auroc(table.double().log().softmax(-1), labels)
    right = int((predicted == labels).sum())
    low, high = wilson_interval(right, n)
    name, confusions = described_confusions(predicted, labels, loaded.labels)
    return {
        "loss": -table[range(n), labels].double().log().mean().item(),
        "accuracy": right / n,
        "accuracy_low": low,
        "accuracy_high": high,
        **count_metrics(predicted, labels, n_classes),
        "auroc": area,
        "n": n,
        name: confusions,
    }


def _run_tuned(loaded: LoadedModel, args: argparse.Namespace) -> None:
    """A model of task=sft or task=dpo on a part of its own data."""
    import torch

    from llm_lightning.cli.respond import data_of
    from llm_lightning.experiments.evaluation import evaluate_split

    if args.stride is not None:
        raise ValueError(f"--stride {args.stride} is for texts; --split {args.split} of a tuned model has no windows")
    try:
        data = data_of(loaded)
    except ValueError as error:
        raise ValueError(str(error).replace("give a file of records", "use --text FILE")) from error
    dtype = getattr(torch, args.dtype) if args.dtype else None
    found = evaluate_split(loaded, data, args.split, checkpoint=args.checkpoint, dtype=dtype)
    task = loaded.header["task"]
    if args.json:
        say_json({"task": task, "split": args.split, **found})
    else:
        say_lines(_tuned_lines(task, found))


def _tuned_lines(task: str, found: dict[str, float]) -> Iterator[str]:
    yield f"{'loss':<28}{found.pop('loss'):.4f} nats per {'pair' if task == 'dpo' else 'learnt token'}"
    for name in ("exact_match", "reward_accuracy"):
        if name in found:
            low, high = found.pop(f"{name}_low"), found.pop(f"{name}_high")
            yield f"{_words(name):<28}{found.pop(name):.4f} (95% interval {low:.4f} to {high:.4f})"
    for name, value in found.items():
        yield f"{_words(name):<28}{value:,}" if isinstance(value, int) else f"{_words(name):<28}{value:.4f}"


def _words(name: str) -> str:
    return {"exact_match_of_most_frequent": "most frequent answer"}.get(name, name.replace("_", " "))


def _run_classifier(loaded: LoadedModel, args: argparse.Namespace) -> None:
    records = _records_of_split(loaded, args.split) if args.split else _labelled(args)
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


def _records_of_split(loaded: LoadedModel, split: str) -> list[tuple[str, str]]:
    """A part of the data that the checkpoint's own configuration names.

    Raises:
        ValueError: if the checkpoint names no such data, or the data has changed since.
    """
    from llm_lightning.data.classification import ClassificationDataModule
    from llm_lightning.files.places import read_data_again

    if not loaded.header.get("config", {}).get("data"):
        raise ValueError("this model does not say which texts it was trained on; use --text FILE")
    length = loaded.classifier.trunk.config.context_length

    def build(settings: dict[str, Any]) -> ClassificationDataModule:
        # A class that a checkpoint names is never built.
        options = {key: value for key, value in settings.items() if key not in ("_target_", "preview")}
        data = ClassificationDataModule(tokenizer=loaded.tokenizer, context_length=length, **options)
        data.build()
        return data

    data = read_data_again(loaded.header, loaded.path, build, lambda one: one.data_digest)
    trained_on = loaded.header.get("lineage", {}).get("data")
    if trained_on not in (None, data.data_digest):
        raise ValueError(f"{data.describe()}: not the data that the model was trained with; use --text FILE")
    return data.split_of(split)


def _labelled(args: argparse.Namespace) -> list[tuple[str, str]]:
    from llm_lightning.data.records.labelled import read_labelled

    files = [read_labelled(path, text_column=args.text_field, label_column=args.label_column) for path in args.text]
    return [(record.text, record.label) for records in files for record in records]


def _classifier() -> type:
    from llm_lightning.models.classifier import Classifier

    return Classifier


def windows(tokens: np.ndarray, length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows of up to `length` inputs, `stride` apart, so that each target is scored once."""
    last = len(tokens) - 1
    reached = 0
    for start in range(0, last, stride):
        end = min(start + length, last)
        yield Window(tokens[start : end + 1], reached - start)
        reached = end
        if end == last:
            return


def open_split(loaded: LoadedModel, split: str) -> TokenFile:
    """Open the `train` or `val` part of the data that a checkpoint's own configuration names.

    Raises:
        ValueError: if the checkpoint names no such data, or the data has changed since.
    """
    from llm_lightning.data.corpus.sources import open_source
    from llm_lightning.data.corpus.token_files import build_token_files
    from llm_lightning.files.places import read_data_again

    settings = loaded.header.get("config", {}).get("data", {})
    if split == "test" or not set(SPLIT_SETTINGS) <= settings.keys():
        if split == "test":
            raise ValueError("pretraining data has no test split; use --split val or --text FILE")
        raise ValueError("this model does not say which text it was pretrained on; use --text FILE")
    source = read_data_again(
        loaded.header,
        loaded.path,
        lambda found: open_source(**_chosen(found, SOURCE_SETTINGS)),
        lambda one: one.digest(),
    )
    trained_on = loaded.header.get("lineage", {}).get("data")
    if trained_on not in (None, source.digest()):
        raise ValueError(
            f"{source.describe()} is not the data that the model was trained with (sha256 {source.digest()[:12]}, "
            f"in training {trained_on[:12]}), so its parts would be others; use --text FILE"
        )
    files = build_token_files(source, loaded.tokenizer, **_chosen(settings, SPLIT_SETTINGS))
    if split not in files:
        raise ValueError("the model was trained without validation data (data.val_fraction=0); use --split train")
    return files[split]


def _evaluate(
    model: GPT, documents: Sequence[np.ndarray], n_bytes: int, stride: int | None, progress: bool
) -> Evaluation:
    length = model.config.context_length
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"--stride {stride} must be between 1 and context_length={length}, or tokens are left out")
    n_tokens = sum(map(len, documents))
    n_targets = sum(max(0, len(tokens) - 1) for tokens in documents)
    if n_targets == 0:
        raise ValueError(f"a text of {n_tokens} token(s) has nothing to predict; give a longer one")
    loss = _loss_sum(model, documents, stride, n_targets, progress) / n_targets
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) * n_tokens / n_bytes,
        n_tokens=n_targets,
        n_bytes=n_bytes,
    )


def _loss_sum(model: GPT, documents: Sequence[np.ndarray], stride: int, n_targets: int, progress: bool) -> float:
    import numpy as np
    import torch
    from tqdm import tqdm

    from llm_lightning.data.batches import Example, collate_padded
    from llm_lightning.inference.generation import evaluating
    from llm_lightning.losses import causal_lm_loss

    device, length = model.token_embedding.weight.device, model.config.context_length
    pieces = (window for tokens in documents for window in windows(tokens, length, stride))
    bar = tqdm(total=n_targets, unit="token", unit_scale=True, leave=False, disable=None if progress else True)
    total = 0.0
    with evaluating(model), torch.inference_mode(), bar:
        while batch := list(islice(pieces, max(1, TOKENS_PER_BATCH // length))):
            # A token that an earlier window has scored is no target.
            examples = [Example(row, ids, np.arange(len(ids)) > n_scored) for row, (ids, n_scored) in enumerate(batch)]
            padded = collate_padded(examples, pad_id=0)
            hidden = model.hidden_states(padded.input_ids.to(device))
            total += float(causal_lm_loss(hidden, model.head_weight(), padded.labels.to(device)))
            bar.update(sum(len(ids) - 1 - n_scored for ids, n_scored in batch))
    return total


def _read_texts(paths: list[str], text_field: str) -> list[str]:
    from llm_lightning.data.corpus.sources import open_source

    source = open_source(path=paths, text_field=text_field)
    source.survey()  # bad text is named before work is spent
    return ["".join(document.chunks) for document in source.documents()]


def _chosen(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if key in settings}
