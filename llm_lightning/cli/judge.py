"""Score responses with a language model, or by their similarity to the references.

  llm-lightning judge responses.json
  llm-lightning judge responses.json --model llama3.1 --prompt rubric --column "model 1 response"
  llm-lightning judge responses.json --pairwise --column before --column after
  llm-lightning judge responses.json --lexical
  llm-lightning judge responses.json --url https://api.openai.com/v1 --model gpt-4-turbo

Records are objects with `instruction`, `output`, an optional `input`, and one or more responses. Without --url the
judge is Ollama on this machine (`ollama serve`, `ollama pull llama3`). Every record is counted, as scored, unparsable,
timeout or failed. Answers are cached: a second call sends nothing, and an interrupted call continues.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import add_file_arguments, file_options
from llm_lightning.metrics.judge.client import DEFAULT_MODEL, DEFAULT_URL, SEED, Judge
from llm_lightning.metrics.judge.prompts import PROMPTS
from llm_lightning.terminal import say_json, say_lines

if TYPE_CHECKING:
    from llm_lightning.inference.judge_report import Report, Responses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a file of records")
    parser.add_argument(
        "--column",
        action="append",
        metavar="KEY",
        help="of the responses, may be repeated (default: every key that starts with model_response)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records of each file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--pairwise", action="store_true", help="ask which of two columns is better, in both orders")
    how.add_argument("--lexical", action="store_true", help="compute exact match, ROUGE-L and chrF; asks no judge")
    _add_judge_arguments(parser.add_argument_group("the judge"))
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the report (default: FILE.judged.json beside the responses; .pairwise.json or .lexical.json in those "
        "modes); the histogram has the same name and ends in .png",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object per file")
    add_file_arguments(parser)


def _add_judge_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default=DEFAULT_URL, help="of an OpenAI-compatible API (default: %(default)s)")
    group.add_argument("--model", default=DEFAULT_MODEL, help="its name there (default: %(default)s)")
    group.add_argument(
        "--prompt", choices=PROMPTS, default="book", help="book: 0 to 100; rubric: 1 to 5 (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=SEED, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="after an unparsable answer, with the next seed, or after an error (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=16,
        metavar="N",
        help="per answer; a model that thinks aloud first needs more (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="for one answer, retries after errors included (default: %(default)g)",
    )
    group.add_argument(
        "--concurrency", type=int, default=4, metavar="N", help="requests at once (default: %(default)s)"
    )
    group.add_argument("--retry-failed", action="store_true", help="send again what timed out or failed before")


def run(args: argparse.Namespace) -> None:
    from llm_lightning.inference.judge_report import read_responses, write_report

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    outputs = _output_files(args)
    options = file_options(args)
    files = [read_responses(path, args.column, args.limit, options) for path in args.files]  # before anything is sent
    report_on = _mode(args, files)
    for file, output in zip(files, outputs, strict=True):
        report = report_on(file)
        written = write_report(report, output)
        if args.json:
            say_json(report.summary)
        else:
            say_lines([*report.lines, f"written: {', '.join(map(str, written))}"])


def _output_files(args: argparse.Namespace) -> list[Path]:
    """Where each file's report goes, checked before any request is sent."""
    if args.output is not None and len(args.files) > 1:
        raise ValueError(f"-o {args.output} is one file and there are {len(args.files)}; leave it out or judge one")
    kind = "pairwise" if args.pairwise else "lexical" if args.lexical else "judged"
    outputs = [args.output] if args.output else [path.with_name(f"{path.stem}.{kind}.json") for path in args.files]
    counts, read = Counter(outputs), set(args.files)
    for path, output in zip(args.files, outputs, strict=True):
        if counts[output] > 1:
            raise ValueError(f"{output} would hold the reports of two files; judge {path} alone, with -o")
        if output.suffix == ".png" or output in read:
            raise ValueError(f"-o {output} must be a file of its own, such as {path.stem}.{kind}.json")
        if not output.parent.is_dir():
            raise ValueError(f"-o {output}: the folder {output.parent} does not exist")
    return outputs


def _mode(args: argparse.Namespace, files: Sequence[Responses]) -> Callable[[Responses], Report]:
    from llm_lightning.inference.judge_report import lexical_report, pair_report, score_report

    if args.lexical:
        return lexical_report
    for file in files:
        if args.pairwise and len(file.columns) != 2:
            raise ValueError(
                f"{file.path}: --pairwise compares two columns, not {len(file.columns)} "
                f"({', '.join(map(repr, file.columns))}); give --column twice"
            )
    judge = Judge(
        args.url,
        args.model,
        seed=args.seed,
        retries=args.retries,
        max_tokens=args.max_tokens,
        timeout=args.timeout,
        concurrency=args.concurrency,
        retry_failed=args.retry_failed,
        progress=True,
    )
    if args.pairwise:
        return lambda file: pair_report(judge, file)
    return lambda file: score_report(judge, file, args.prompt)
