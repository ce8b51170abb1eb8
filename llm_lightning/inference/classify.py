"""The class of a text, and the probability of every class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llm_lightning.data.batches import LabelledSample, collate_classification
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.weights.load import LoadedModel

TEXTS_AT_ONCE = 1024
"""Texts held in memory, sorted by length so that a batch has little padding."""
TOKENS_PER_BATCH = 8192

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classification:
    """The class of one text."""

    text: str
    label: str
    probabilities: dict[str, float]
    """of every class"""


def classify_text(loaded: LoadedModel, text: str) -> Classification:
    """Classify one text; see `classify_texts`."""
    return next(classify_texts(loaded, [text]))


def classify_texts(loaded: LoadedModel, texts: Sequence[str], *, progress: bool = False) -> Iterator[Classification]:
    """Classify texts in batches of similar length, and yield the results in the order of the texts.

    Args:
        loaded: what `load_model` returns for a checkpoint of task=classification.
        progress: show a bar on a terminal.

    Raises:
        ValueError: if the model is not a classifier, or a text is empty.
    """
    for text, probabilities in zip(texts, class_probabilities(loaded, texts, progress=progress), strict=True):
        named = dict(zip(loaded.labels, probabilities.tolist(), strict=True))
        yield Classification(text, loaded.labels[predicted_class(loaded, probabilities)], named)


def class_probabilities(loaded: LoadedModel, texts: Sequence[str], *, progress: bool = False) -> Iterator[Tensor]:
    """Yield the probabilities of all classes, (K,) float32 on the CPU, for each text; see `classify_texts`."""
    length = _longest_text(loaded)
    encoded = (_encode(loaded, number, text, length) for number, text in enumerate(texts, start=1))
    n_cut = 0
    with tqdm(total=len(texts), unit="text", leave=False, disable=None if progress else True) as bar:
        while group := list(islice(encoded, TEXTS_AT_ONCE)):
            n_cut += sum(is_cut for _, is_cut in group)
            for probabilities in _probabilities(loaded, [ids for ids, _ in group]):
                yield probabilities
                bar.update()
    if n_cut:
        log.warning("%d text(s) were longer than %d tokens and were cut to their first %d", n_cut, length, length)


def predicted_class(loaded: LoadedModel, probabilities: Tensor) -> int:
    """The index of the predicted class, from the (K,) probabilities; a tuned threshold of two classes is applied."""
    return int(loaded.classifier.predict(probabilities.log()[None].to(loaded.classifier.threshold.device)))


def _longest_text(loaded: LoadedModel) -> int:
    """The number of tokens to which the run cut its texts."""
    max_length = (loaded.header.get("config", {}).get("data") or {}).get("max_length")
    limits = (loaded.longest_input, max_length, loaded.header.get("classifier", {}).get("pad_to"))
    return min(limit for limit in limits if isinstance(limit, int))


def _encode(loaded: LoadedModel, number: int, text: str, length: int) -> tuple[np.ndarray, bool]:
    """The token ids that the model reads, and whether the text has more."""
    ids = loaded.tokenizer.encode_document(text)
    if len(ids) == 0:
        raise ValueError(f"text {number} is empty; a class needs at least one token")
    return ids[:length], len(ids) > length


def _probabilities(loaded: LoadedModel, rows: list[np.ndarray]) -> list[Tensor]:
    """(K,) for each row."""
    model, described = loaded.classifier, loaded.header["classifier"]
    device = model.head.weight.device
    found: dict[int, Tensor] = {}
    for batch in consecutive_batches(sorted(range(len(rows)), key=lambda index: len(rows[index])), rows):
        samples = [LabelledSample(index, rows[index], IGNORE_INDEX) for index in batch]
        ids, lengths = collate_classification(
            samples, pad_id=described["pad_id"], pad_to=described["pad_to"] if model.reads_pads else None
        )[:2]
        with torch.inference_mode():
            probabilities = model(ids.to(device), lengths.to(device)).float().softmax(-1).cpu()
        found.update(zip(batch, probabilities, strict=True))
    return [found[index] for index in range(len(rows))]


def consecutive_batches(order: Iterable[int], rows: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Consecutive indices whose padded lengths fill `TOKENS_PER_BATCH`; `order` has the shortest rows first."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
