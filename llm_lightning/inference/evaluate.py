"""How well a GPT predicts text, and how well a classifier tells labelled texts apart.

Every token after the first of a document is scored exactly once. Windows of the model's context follow each other
without overlap, as in training; a smaller stride gives each token more context and takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from llm_lightning.data.batches import Example, collate_padded
from llm_lightning.inference.classify import class_probabilities, predicted_class
from llm_lightning.inference.generation import evaluating
from llm_lightning.losses import causal_lm_loss
from llm_lightning.metrics.intervals import wilson_interval
from llm_lightning.models.gpt import GPT
from llm_lightning.weights.load import LoadedModel

TOKENS_PER_BATCH = 4096


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
    """A piece of a document, (n + 1,) ids: n inputs and n targets, of which the first `n_scored` are scored already."""

    ids: np.ndarray
    n_scored: int


def evaluate_text(loaded: LoadedModel, text: str, *, stride: int | None = None) -> Evaluation:
    """Score one text; see `evaluate_texts`."""
    return evaluate_texts(loaded, [text], stride=stride)


def evaluate_texts(
    loaded: LoadedModel, texts: Sequence[str], *, stride: int | None = None, progress: bool = False
) -> Evaluation:
    """Score each text by itself; the means are over the tokens of all of them.

    Args:
        loaded: what `load_model` returns.
        stride: tokens from one window to the next, 1 to the context length (the default).
        progress: show a bar on a terminal.

    Raises:
        ValueError: if the model is a classifier, no text has two tokens, or the stride does not fit.
    """
    documents = [loaded.tokenizer.encode_document(text) for text in texts]
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    n_begins = 0 if loaded.tokenizer.bos_id is None else len(texts)
    return evaluate_tokens(loaded.gpt, documents, n_bytes, n_begins=n_begins, stride=stride, progress=progress)


def evaluate_tokens(
    model: GPT,
    documents: Sequence[np.ndarray],
    n_bytes: int,
    *,
    n_begins: int = 0,
    length: int | None = None,
    stride: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Score documents of token ids, (n,) each, that encode `n_bytes` of UTF-8; see `evaluate_texts`.

    Args:
        n_begins: how many of the ids begin a text and encode none of its bytes.
        length: inputs of a window; default: the context length.
    """
    length = model.config.context_length if length is None else length
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"--stride {stride} must be between 1 and context_length={length}, or tokens are left out")
    n_tokens = sum(map(len, documents))
    n_targets = sum(max(0, len(tokens) - 1) for tokens in documents)
    if n_targets == 0:
        raise ValueError(f"a text of {n_tokens} token(s) has nothing to predict; give a longer one")
    loss = _loss_sum(model, documents, length, stride, n_targets, progress) / n_targets
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss / math.log(2) * (n_tokens - n_begins) / n_bytes,
        n_tokens=n_targets,
        n_bytes=n_bytes,
    )


def windows(tokens: np.ndarray, length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows of up to `length` inputs, `stride` apart; every target is scored once."""
    last = len(tokens) - 1
    reached = 0
    for start in range(0, last, stride):
        end = min(start + length, last)
        yield Window(tokens[start : end + 1], reached - start)
        reached = end
        if end == last:
            return


def _loss_sum(
    model: GPT, documents: Sequence[np.ndarray], length: int, stride: int, n_targets: int, progress: bool
) -> float:
    pieces = (window for tokens in documents for window in windows(tokens, length, stride))
    bar = tqdm(total=n_targets, unit="token", unit_scale=True, leave=False, disable=None if progress else True)
    total = 0.0
    with evaluating(model), torch.inference_mode(), bar:
        while batch := list(islice(pieces, max(1, TOKENS_PER_BATCH // length))):
            # A token that an earlier window has scored is no target.
            examples = [Example(row, ids, np.arange(len(ids)) > n_scored) for row, (ids, n_scored) in enumerate(batch)]
            padded = collate_padded(examples, pad_id=0)
            hidden = model.hidden_states(padded.input_ids.to(model.device))
            total += float(causal_lm_loss(hidden, model.head_weight(), padded.labels.to(model.device)))
            bar.update(sum(len(ids) - 1 - n_scored for ids, n_scored in batch))
    return total


def evaluate_labelled(
    loaded: LoadedModel, records: Sequence[tuple[str, str]], *, progress: bool = False
) -> dict[str, Any]:
    """Score a classifier on (text, label) pairs.

    Returns:
        loss (nats per text), accuracy and its 95% interval, precision, recall, f1, auroc, n, and the confusion matrix
        (rows: true classes); for more than 100 classes the `most_confused` pairs instead of the matrix.

    Raises:
        ValueError: if the model is not a classifier, there are no pairs, or a label is not among its classes.
    """
    # torchmetrics takes matplotlib and more along, which scoring text does not need.
    from llm_lightning.metrics.classes import MOST_SHOWN, auroc, auroc_of_many, count_metrics, described_confusions

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
