"""Find near-duplicate texts in a file of instruction records, or write a copy of the file without them.

llm-lightning near-duplicates instruction-data.json
llm-lightning near-duplicates instruction-data.json --threshold 0.8 --keys instruction --show 100
llm-lightning near-duplicates instruction-data.json --remove --keys prompt -o cleaned.json

FILE holds records: .jsonl, .json, .csv, .tsv or .parquet. Each key is compared separately, without empty
texts: `instruction`, `input`, `output` (in `messages`: the user's and the assistant's text), any other field, or
`prompt`, which is instruction and input together. The similarity of two texts is the cosine of the TF-IDF weights of
their character 1- to 3-grams, ignoring case and punctuation. Texts of one character are never near-duplicates.

Each text of a group is similar to another text of the group. --remove keeps the first record of each group, comparing
the keys of --keys, or else `input` and `output` as in the book, because one instruction can have many inputs.
Look at the pairs first: short texts that differ in a single decisive word are similar by this measure.
Records are numbered from 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_lightning.cli.arguments import add_file_arguments, file_options
from llm_lightning.terminal import one_line, say_json, say_lines

if TYPE_CHECKING:
    from llm_lightning.data.near_duplicates import NearDuplicates
    from llm_lightning.data.records.placed import PlacedRecord

KEYS = ("instruction", "input", "output")
REMOVED_BY = ("input", "output")
PROMPT = "prompt"
WIDTH = 100
WRITTEN = (".json", ".jsonl", ".ndjson")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a file of records (or a glob, or a folder)")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help=f"keys to compare (default: {' '.join(KEYS)})")
    parser.add_argument("--threshold", type=float, default=0.9, help="least similarity, 0 to 1 (default: %(default)s)")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="pairs shown per key (default: %(default)s)")
    parser.add_argument("--remove", action="store_true", help="write the file without the later records of each group")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="for --remove: the .json or .jsonl file to write"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all groups")
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    _check(args)
    from llm_lightning.data.near_duplicates import find_near_duplicates
    from llm_lightning.data.records.placed import placed_records

    records = placed_records(args.file, file_options(args))
    keys = _present(args.file, records, args.keys)
    results = {}
    for key in keys:
        texts = [_text(record, key) for record in records]
        results[key] = find_near_duplicates(texts, args.threshold, progress=True)
        if not args.json:
            say_lines(_lines(key, texts, results[key], args.show))
    facts = {"file": args.file, "records": len(records), "threshold": args.threshold}
    facts["keys"] = {key: _facts(one, args.show) for key, one in results.items()}
    if args.remove:
        facts |= _remove(args.output, records, {key: results[key] for key in args.keys or REMOVED_BY if key in results})
    if args.json:
        say_json(facts)
    elif args.remove:
        kept = f"{facts['kept']:,} records, {facts['removed']:,} removed ({facts['removed_by']})"
        say_lines([f"{args.output}: {kept}"])


def _check(args: argparse.Namespace) -> None:
    if args.show < 0:
        raise ValueError(f"--show {args.show} must be 0 or more")
    if args.remove != (args.output is not None):
        raise ValueError("--remove and --output FILE belong together: nothing is removed from the file itself")
    if args.output is not None and args.output.resolve() in _files(args.file):
        raise ValueError(f"--output {args.output} is the file that is read; name another one")
    if args.output is not None and args.output.suffix.lower() not in WRITTEN:
        raise ValueError(f"--output {args.output} must end with {', '.join(WRITTEN)}")
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}; make it first")


def _files(path: str) -> set[Path]:
    from llm_lightning.data.files.find import find_files
    from llm_lightning.data.files.rows import RECORD_FORMS

    return {file.resolve() for file in find_files(path, RECORD_FORMS).files}


def _present(file: str, records: Sequence[PlacedRecord], wanted: Sequence[str] | None) -> list[str]:
    """The keys to compare: the wanted ones, or the usual ones that occur."""
    from llm_lightning.data.records.placed import has_text

    present = [key for key in wanted or KEYS if any(has_text(record, _sources(record, key)[0]) for record in records)]
    missing = [key for key in wanted or () if key not in present]
    if missing or not present:
        there = ", ".join(map(repr, dict.fromkeys(chain.from_iterable(record.record for record in records)))) or "none"
        raise ValueError(
            f"{file}: no record has the key {missing[0] if missing else KEYS[0]!r}; there are {there} (--keys)"
        )
    return list(dict.fromkeys(present))


def _text(record: PlacedRecord, key: str) -> str:
    from llm_lightning.data.records.placed import text_of

    return "\n".join(filter(None, (text_of(record, source) for source in _sources(record, key))))


def _sources(record: PlacedRecord, key: str) -> tuple[str, ...]:
    """The fields that make up a key."""
    return ("instruction", "input") if key == PROMPT and PROMPT not in record.record else (key,)


def _lines(key: str, texts: Sequence[str], duplicates: NearDuplicates, show: int) -> Iterator[str]:
    yield (
        f"{key}: {sum(map(bool, texts)):,} texts; pairs: {duplicates.n_pairs:,}; groups: {len(duplicates.groups):,}; "
        f"later ones of a group: {_n_later(duplicates):,}"
    )
    for pair in islice(duplicates.pairs(), show):
        yield f"  {pair.similarity:.2f}  {pair.first + 1:>6}  {one_line(texts[pair.first], WIDTH)}"
        yield f"        {pair.second + 1:>6}  {one_line(texts[pair.second], WIDTH)}"
    if duplicates.n_pairs > show:
        yield f"  more pairs: {duplicates.n_pairs - show:,} (--show {duplicates.n_pairs})"


def _n_later(duplicates: NearDuplicates) -> int:
    return sum(len(group) - 1 for group in duplicates.groups)


def _facts(duplicates: NearDuplicates, show: int) -> dict[str, Any]:
    pairs = [(first + 1, second + 1, similarity) for first, second, similarity in islice(duplicates.pairs(), show)]
    groups = [[index + 1 for index in group] for group in duplicates.groups]
    return {"n_pairs": duplicates.n_pairs, "n_later": _n_later(duplicates), "pairs": pairs, "groups": groups}


def _remove(output: Path, records: Sequence[PlacedRecord], results: dict[str, NearDuplicates]) -> dict[str, Any]:
    """Write the remaining records; return their number and that of removed ones."""
    from llm_lightning.data.near_duplicates import keep_first
    from llm_lightning.files.atomic import write_atomically

    groups = chain.from_iterable(one.groups for one in results.values())
    kept = [records[index].record for index in keep_first(len(records), groups)]
    try:
        if output.suffix.lower() != ".json":
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        else:
            content = json.dumps(kept, ensure_ascii=False, indent=4) + "\n"
    except TypeError as error:  # a date or a picture of parquet
        raise ValueError(f"{output}: {error}; leave that column out of the file first") from None
    write_atomically(output, content)
    removed = len(records) - len(kept)
    return {"output": str(output), "kept": len(kept), "removed": removed, "removed_by": ", ".join(results) or "nothing"}
