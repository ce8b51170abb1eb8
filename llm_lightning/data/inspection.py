"""Samples as the model sees them: tokens with a target in colour, ends of text and padding visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from llm_lightning.data.batches import LMBatch
from llm_lightning.files.pages import render
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.terminal import GREEN, GREY, PLAIN, counted, visible
from llm_lightning.tokenizers.base import Tokenizer

PAD = "\u00b7"
TEMPLATE = Path(__file__).with_name("inspection.html")


class Piece(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    kind: str
    """target, prompt or pad"""


def rows_of(tokenizer: Tokenizer, batch: LMBatch) -> Iterator[tuple[list[Piece], int, int]]:
    """(pieces, number of tokens, number of targets) of each row of a padded batch."""
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        targets = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
        real = [index for index, token in enumerate(ids) if token != tokenizer.eot_id]
        last = max([*targets, *(index - 1 for index in real)], default=0)
        # The first token is never a target; the last label is no input.
        tokens = [(ids[0], "prompt")]
        tokens += [
            (label if label != IGNORE_INDEX else ids[index + 1], "prompt" if label == IGNORE_INDEX else "target")
            for index, label in enumerate(labels[: last + 1])
        ]
        n_targets = sum(kind == "target" for _, kind in tokens)
        pieces = [
            Piece(_decoded(tokenizer, [token for token, _ in run]), kind)
            for kind, run in groupby(tokens, key=lambda token: token[1])
        ]
        if n_pads := len(ids) - last - 1:
            pieces.append(Piece(PAD * n_pads, "pad"))
        yield pieces, len(tokens), n_targets


def as_text(tokenizer: Tokenizer, batch: LMBatch, *, colour: bool = False, titles: Sequence[str] | None = None) -> str:
    """For a terminal; without colour, targets are put between >> and <<. Rows are called `titles`, else records."""
    lines = []
    for number, (pieces, n_tokens, n_targets) in enumerate(rows_of(tokenizer, batch)):
        title = titles[number] if titles else f"record {number}"
        lines += [f"--- {title}: {counted(n_tokens, 'token')}, loss on {n_targets}"]
        lines += ["".join(_painted(piece) if colour else _marked(piece) for piece in pieces)]
    return "\n".join(lines)


def as_html(tokenizer: Tokenizer, batch: LMBatch, title: str, *, titles: Sequence[str] | None = None) -> str:
    """An HTML page; `titles` as in `as_text`."""
    rows = [
        {
            "title": titles[number].capitalize() if titles else f"Record {number}",
            "tokens": counted(n_tokens, "token"),
            "n_targets": n_targets,
            "pieces": pieces,
        }
        for number, (pieces, n_tokens, n_targets) in enumerate(rows_of(tokenizer, batch))
    ]
    return render(TEMPLATE, title=title, rows=rows, pad=PAD)


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    spelling = {index: word for word, index in tokenizer.controls.items()}
    pieces = []
    for control, run in groupby(ids, key=spelling.get):
        tokens = list(run)
        pieces.append(tokenizer.decode(tokens) if control is None else control * len(tokens))
    return visible("".join(pieces))


def _painted(piece: Piece) -> str:
    return {"target": GREEN, "pad": GREY, "prompt": ""}[piece.kind] + piece.text + PLAIN


def _marked(piece: Piece) -> str:
    return f">>{piece.text}<<" if piece.kind == "target" else piece.text
