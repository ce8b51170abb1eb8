"""Say which class texts belong to, and with what probability.

llm-lightning classify outputs/classification/my_run "Hello, are you free tonight?"
llm-lightning classify outputs/classification/my_run --file messages.txt --output classes.jsonl
cat messages.txt | llm-lightning classify outputs/classification/my_run --file -
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import add_model_arguments, open_model
from llm_lightning.terminal import inline, one_line, say, say_json, say_lines

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from llm_lightning.weights.load import LoadedModel

TEXTS_AT_ONCE = 1024
"""Texts held in memory, sorted by length so that a batch has little padding."""
TOKENS_PER_BATCH = 8192
WIDTH = 80

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classification:
    """The class of one text."""

    text: str
    label: str
    probabilities: dict[str, float]
    """of every class"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="text to classify")
    parser.add_argument("--file", metavar="FILE", help="more texts, one per line, or a .jsonl file; -: standard input")
    parser.add_argument("--text-field", default="text", metavar="KEY", help="of JSONL records (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON object per text to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")


def run(args: argparse.Namespace) -> None:
    from llm_lightning.files.atomic import write_atomically

    if not args.texts and not args.file:
        raise ValueError('no text: give one in quotes, such as "Are you free tonight?", or --file FILE')
    loaded = open_model(args)
    texts = [*args.texts, *(_read(args.file, args.text_field) if args.file else ())]
    found = classify_texts(loaded, texts, progress=True)
    if args.output:
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
        write_atomically(args.output, "".join(lines))
        say_lines([f"{args.output}: {len(texts):,} texts"])
        return
    for one in found:
        if args.json:
            say_json(asdict(one), ensure_ascii=False)
        else:
            say(_row(one))


def classify_text(loaded: LoadedModel, text: str) -> Classification:
    """Classify one text; see `classify_texts`."""
    return next(classify_texts(loaded, [text]))


def classify_texts(loaded: LoadedModel, texts: Sequence[str], *, progress: bool = False) -> Iterator[Classification]:
    """Classify texts in batches of similar length; yields them in their order.

    Args:
        loaded: what `load_model` returns for a checkpoint of task=classification.
        progress: show a bar on a terminal.

    Raises:
        ValueError: if the model is no classifier, or a text is empty.
    """
    for text, probabilities in zip(texts, class_probabilities(loaded, texts, progress=progress), strict=True):
        named = dict(zip(loaded.labels, probabilities.tolist(), strict=True))
        yield Classification(text, loaded.labels[predicted_class(loaded, probabilities)], named)


def class_probabilities(loaded: LoadedModel, texts: Sequence[str], *, progress: bool = False) -> Iterator[Tensor]:
    """The probability of every class, (K,) float32 for each text in turn; see `classify_texts`."""
    from tqdm import tqdm

    length = loaded.classifier.trunk.config.context_length
    encoded = (_encode(loaded, number, text, length) for number, text in enumerate(texts, start=1))
    n_cut = 0
    bar = tqdm(total=len(texts), unit="text", leave=False, disable=None if progress else True)
    with bar:
        while group := list(islice(encoded, TEXTS_AT_ONCE)):
            n_cut += sum(is_cut for _, is_cut in group)
            for probabilities in _probabilities(loaded, [ids for ids, _ in group]):
                yield probabilities
                bar.update()
    if n_cut:
        log.warning("%d text(s) were longer than %d tokens and were cut to their first %d", n_cut, length, length)


def _encode(loaded: LoadedModel, number: int, text: str, length: int) -> tuple[np.ndarray, bool]:
    """The ids that are read of a text, and whether there are more."""
    ids = loaded.tokenizer.encode_array(text)
    if len(ids) == 0:
        raise ValueError(f"text {number} is empty; a class is read from at least one token")
    return ids[:length], len(ids) > length


def _probabilities(loaded: LoadedModel, rows: list[np.ndarray]) -> list[Tensor]:
    """(K,) for each row."""
    import torch

    from llm_lightning.data.batches import LabelledSample, collate_classification
    from llm_lightning.losses import IGNORE_INDEX

    model, described = loaded.classifier, loaded.header["classifier"]
    device = model.head.weight.device
    found: dict[int, Tensor] = {}
    for batch in _batches(sorted(range(len(rows)), key=lambda index: len(rows[index])), rows):
        samples = [LabelledSample(index, rows[index], IGNORE_INDEX) for index in batch]
        ids, lengths = collate_classification(
            samples, pad_id=described["pad_id"], pad_to=described["pad_to"] if model.reads_pads else None
        )[:2]
        with torch.inference_mode():
            probabilities = model(ids.to(device), lengths.to(device)).float().softmax(-1).cpu()
        found.update(zip(batch, probabilities, strict=True))
    return [found[index] for index in range(len(rows))]


def _batches(order: Iterable[int], rows: list[np.ndarray]) -> Iterator[list[int]]:
    """Consecutive indices whose padded lengths make up `TOKENS_PER_BATCH`; rows come shortest first."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(rows[index]) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def predicted_class(loaded: LoadedModel, probabilities: Tensor) -> int:
    """The index of the class that is said, from its (K,) probabilities."""
    return int(loaded.classifier.predict(probabilities.log()[None].to(loaded.classifier.threshold.device)))


def _row(found: Classification) -> str:
    return f"{inline(found.label)}\t{found.probabilities[found.label]:.3f}\t{one_line(found.text, WIDTH)}"


def _read(name: str, text_field: str) -> list[str]:
    """The texts of a file, or of standard input."""
    from llm_lightning.data.corpus.sources import JsonLines
    from llm_lightning.data.reading import JSONL_SUFFIXES

    if name == "-":
        return _lines("standard input", sys.stdin.buffer.read())
    path = Path(name)
    if path.suffix.lower() in JSONL_SUFFIXES:
        return ["".join(document.chunks) for document in JsonLines(path, text_field).documents()]
    return _lines(name, path.read_bytes())


def _lines(name: str, content: bytes) -> list[str]:
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    empty = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
    if empty is not None:
        raise ValueError(f"{name}, line {empty} is empty; every line is one text")
    return lines
