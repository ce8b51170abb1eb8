"""Statistics of a file of records, or of a text: numbers, lengths, and repeated records.

llm-lightning statistics instruction-data.json
llm-lightning statistics chats.jsonl --tokenizer byte --json
llm-lightning statistics instruction-data.json --plot lengths.png
llm-lightning statistics the-verdict.txt

For a file of records, the lengths are those of the fields `instruction`, `input`, `output`, `chosen`,
`rejected` and `text`, where they exist, and of the text of each role in `messages` or `conversations`, or in `prompt`
and `completion`. Any other file is one text, and so are several such files together. Lengths leave out empty values; a
prompt is everything in a record before its answer.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_file_arguments, file_options
from llm_lightning.files.atomic import write_figure
from llm_lightning.terminal import say_json, say_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llm_lightning.data.files.options import FileOptions
    from llm_lightning.data.files.text import TextFile
    from llm_lightning.data.records.placed import PlacedRecord
    from llm_lightning.tokenizers.base import Tokenizer

FIELDS = ("instruction", "input", "output", "chosen", "rejected", "text")
PROMPT = ("system", "instruction", "input")
MEASURES = ("min", "mean", "median", "p95", "max", "total")
SHOWN = 5
BARS = 50
PIECE = 1 << 20  # characters encoded at once

Lengths = dict[str, list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a file of records, or a text (or a glob, or a folder)")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="fields or roles to measure (default: see above)")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 (default), byte, or an encoding of tiktoken")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw histograms of the lengths in tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.tokenizers.build import build_tokenizer

    if args.tokenizer in ("word", "bpe"):
        raise ValueError(f"--tokenizer {args.tokenizer} is trained on text; use gpt2, byte or an encoding of tiktoken")
    tokenizer = build_tokenizer(args.tokenizer)
    options = file_options(args)
    texts = _texts_in(args.file, options)
    if not texts:
        _report_records(args, tokenizer)
        return
    if args.plot or args.keys:
        raise ValueError(f"--plot and --keys are for files of records; {args.file} is read as one text")
    facts = describe_text(args.file, texts, tokenizer)
    if args.json:
        say_json(facts)
    else:
        say_lines(_text_lines(facts))


def _texts_in(path: str, options: FileOptions) -> list[TextFile]:
    """The files, if all of them are running text; none if there are records."""
    from llm_lightning.data.files.find import find_files
    from llm_lightning.data.files.form import form_of
    from llm_lightning.data.files.text import TextFile

    texts = []
    for file in find_files(path).files:
        form = None if file.is_dir() else form_of(file, asked=options.format, encoding=options.encoding)
        if form is None or form.form != "text":
            return []
        texts.append(TextFile(file, form, keeps_ends=options.newlines == "keep"))
    return texts


def _report_records(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    from llm_lightning.data.records.placed import placed_records

    records = placed_records(args.file, file_options(args))
    keys = _present(args.file, records, args.keys)
    tokens = _token_lengths(records, keys, tokenizer)
    facts = {"file": args.file, **describe_records(records, tokens), "tokenizer": args.tokenizer}
    if args.plot:
        write_figure(args.plot, _histograms(tokens, args.tokenizer))
    if args.json:
        say_json(facts)
    else:
        say_lines(_record_lines(facts))


def _present(file: str, records: Sequence[PlacedRecord], wanted: Sequence[str] | None) -> list[str]:
    """The keys to measure: the wanted ones, or the usual ones that occur."""
    from llm_lightning.data.records.messages import ROLES
    from llm_lightning.data.records.placed import has_messages, has_text, text_of

    if wanted:
        present = [key for key in wanted if any(has_text(one, key) for one in records)]
    else:  # `chosen` and `rejected` may be lists of messages
        present = [key for key in FIELDS if any(isinstance(one.record.get(key), str) for one in records)]
        present += [role for role in ROLES if any(has_messages(one) and text_of(one, role) for one in records)]
    missing = [key for key in wanted or () if key not in present]
    if missing or not present:
        there = ", ".join(sorted({repr(key) for one in records for key in one.record})) or "none"
        raise ValueError(f"{file}: no record has the key {(missing or FIELDS)[0]!r}; there are {there} (--keys)")
    return list(dict.fromkeys(present))


def _token_lengths(records: Sequence[PlacedRecord], keys: Sequence[str], tokenizer: Tokenizer) -> Lengths:
    """Key -> number of tokens in each record."""
    from tqdm import tqdm

    from llm_lightning.data.records.placed import text_of

    bar = tqdm(records, desc="encoding", unit="record", leave=False, disable=None)
    rows = [[len(tokenizer.encode_array(text_of(record, key))) for key in keys] for record in bar]
    return {key: list(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def describe_records(records: Sequence[PlacedRecord], tokens: Lengths) -> dict[str, Any]:
    """The statistics of records, as plain values.

    Args:
        tokens: for each key to measure, the number of tokens in each record.
    """
    from llm_lightning.data.records.placed import text_of

    prompts = Counter(tuple(text_of(record, key) for key in PROMPT) for record in records)
    whole = Counter(json.dumps(record.record, sort_keys=True, default=str) for record in records)
    for record in records:
        text_of(record, "output")  # raises if an answer is not text, even if it is not measured
    totals = [sum(lengths) for lengths in zip(*tokens.values(), strict=True)]
    longest = sorted(range(len(records)), key=lambda index: -totals[index])[:SHOWN]
    prompts.pop(("", "", ""), None)  # from records without a prompt
    return {
        "records": len(records),
        "keys": {key: _describe_key([text_of(record, key) for record in records], tokens[key]) for key in tokens},
        "repeated_prompts": prompts.total() - len(prompts),
        "repeated_records": whole.total() - len(whole),
        "longest": [{"place": records[index].place, "tokens": totals[index]} for index in longest],
    }


def _describe_key(texts: Sequence[str], tokens: Sequence[int]) -> dict[str, Any]:
    filled = [index for index, text in enumerate(texts) if text.strip()]
    return {
        "empty": len(texts) - len(filled),
        "characters": _measures([len(texts[index]) for index in filled]),
        "tokens": _measures([tokens[index] for index in filled]),
    }


def _measures(lengths: Sequence[int]) -> dict[str, float] | None:
    import numpy as np

    if not lengths:
        return None
    median, p95 = np.percentile(lengths, (50, 95)).tolist()
    total = sum(lengths)
    values = (min(lengths), total / len(lengths), median, p95, max(lengths), total)
    return dict(zip(MEASURES, values, strict=True))


def describe_text(path: str, files: Sequence[TextFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """The statistics of files of text, one after the other, as plain values.

    Raises:
        ValueError: if they are empty, or are not in their encoding.
    """
    text = "".join(chain.from_iterable(files))
    if not text:
        raise ValueError(f"{path} is empty; give a file with text")
    n_bytes, n_tokens = len(text.encode()), _n_tokens(text, tokenizer)
    return {
        "file": path,
        "characters": len(text),
        "bytes": n_bytes,
        "words": len(text.split()),
        "lines": text.count("\n") + (not text.endswith("\n")),
        "tokens": n_tokens,
        "tokenizer": tokenizer.describe()["name"],
        "bytes_per_token": n_bytes / n_tokens,
    }


def _n_tokens(text: str, tokenizer: Tokenizer) -> int:
    """Count in pieces that encode as the whole text does; encoding it at once would take many times its memory."""
    n_tokens = start = 0
    while start < len(text):
        piece = text[start : start + PIECE]
        cut = tokenizer.split_point(piece) if start + PIECE < len(text) else len(piece)
        piece = piece[:cut] or text[start:]
        n_tokens += len(tokenizer.encode_array(piece))
        start += len(piece)
    return n_tokens


def _text_lines(facts: dict[str, Any]) -> Iterator[str]:
    yield facts["file"]
    for name in ("characters", "bytes", "words", "lines", "tokens"):
        yield f"{name:<12}{facts[name]:>14,}" + (f"  ({facts['tokenizer']})" if name == "tokens" else "")
    yield f"{'bytes/token':<12}{facts['bytes_per_token']:>14.2f}"


def _record_lines(facts: dict[str, Any]) -> Iterator[str]:
    yield f"{facts['file']}: {facts['records']:,} records (tokens: {facts['tokenizer']})"
    yield f"{'':<12}{'empty':>9} {'':<10}" + "".join(f"{name:>11}" for name in MEASURES)
    for key, of_key in facts["keys"].items():
        yield f"{key:<12}{of_key['empty']:>9,} {'characters':<10}{_cells(of_key['characters'])}"
        yield f"{'':<12}{'':>9} {'tokens':<10}{_cells(of_key['tokens'])}"
    yield f"{'repeated':<12}prompts: {facts['repeated_prompts']:,}; whole records: {facts['repeated_records']:,}"
    yield "longest"
    yield from (f"{one['tokens']:>21,} tokens  {one['place']}" for one in facts["longest"])


def _cells(measures: dict[str, float] | None) -> str:
    if measures is None:
        return ""
    return "".join(f"{value:>11,.1f}" if isinstance(value, float) else f"{value:>11,}" for value in measures.values())


def _histograms(tokens: Lengths, tokenizer: str) -> Figure:
    """One histogram per key, without empty values."""
    from matplotlib.figure import Figure  # unlike pyplot: no window system, no global state

    figure = Figure(figsize=(7, 2.5 * len(tokens)), layout="constrained")
    for axes, (key, lengths) in zip(figure.subplots(len(tokens), squeeze=False)[:, 0], tokens.items(), strict=True):
        step = 1 + max(0, max(lengths) - 1) // BARS
        edges = [length - 0.5 for length in range(1, max(lengths) + step + 1, step)]
        axes.hist([length for length in lengths if length], bins=edges)
        axes.set_title(key)
        axes.set_xlabel(f"tokens ({tokenizer})")
        axes.set_ylabel("records")
    return figure
