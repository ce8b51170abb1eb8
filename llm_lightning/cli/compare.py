"""Show the answers of two models side by side, on an HTML page, and their difference on each measure.

llm-lightning compare outputs/sft/my_run outputs/dpo/my_run --split test -o comparison.html
llm-lightning compare gpt2-small outputs/sft/my_run questions.json --judge

Both models answer the same prompts greedily. Differences are paired, B - A on the same records, with 95% intervals.
The learning curves of both, where they are runs, are in comparison_curves.png beside the page.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llm_lightning.cli.arguments import (
    add_base_argument,
    add_columns_argument,
    add_device_arguments,
    add_file_arguments,
    add_split,
    file_options,
    names_records,
    open_model,
    typed_columns,
)
from llm_lightning.cli.comparison_page import Item, Page, as_html
from llm_lightning.inference.defaults import ANSWER_TOKENS, RECORDS_AT_ONCE
from llm_lightning.terminal import aligned, say_lines, visible

if TYPE_CHECKING:
    from llm_lightning.data.templates.base import Template
    from llm_lightning.data.templates.conversation import Conversation
    from llm_lightning.inference.curves import Curves
    from llm_lightning.metrics.judge.client import Judge
    from llm_lightning.weights.load import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_a", metavar="A", help="a model (see llm-lightning generate --help)")
    parser.add_argument("model_b", metavar="B", help="the model that is compared with it")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        help="a file of records (or a glob, or a folder); of pairs, the chosen answer is the correct one",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("comparison.html"),
        help="the page, .html (default: %(default)s)",
    )
    add_split(parser, meaning="instead of a file: a split of the data that B was tuned on, or else A")
    parser.add_argument("--data-of", choices=("A", "B"), help="whose data --split means (default: B, or else A)")
    parser.add_argument(
        "--template",
        metavar="T",
        help="a name such as alpaca, a text with slots, or a .jinja file (default: the template of B's training)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument(
        "--batch-size", type=int, default=RECORDS_AT_ONCE, metavar="N", help="records at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=ANSWER_TOKENS,
        metavar="N",
        help="per answer, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--curves",
        type=Path,
        metavar="RUN",
        help="the run whose learning curves are shown (default: A and B, if they are runs)",
    )
    judge = parser.add_argument_group("the judge")
    judge.add_argument(
        "--judge", action="store_true", help="let a language model score both, and say which one is better"
    )
    judge.add_argument(
        "--judge-url", metavar="URL", help="of an OpenAI-compatible API (default: Ollama on this machine)"
    )
    judge.add_argument("--judge-model", metavar="NAME", help="its name there (default: llama3)")
    add_device_arguments(parser)
    add_base_argument(parser)
    add_columns_argument(parser)
    add_file_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from llm_lightning.files.atomic import write_atomically, write_figure
    from llm_lightning.inference.comparison import COLUMNS, explanations, judged, measures_of
    from llm_lightning.inference.curves import draw_curves
    from llm_lightning.inference.respond import answered

    _check(args)
    names = unique_names(args.model_a, args.model_b)
    curves = _curves(args, names)
    judge = _judge(args)
    models = _open_both(args)
    conversations, source = _conversations(models, args)
    template = _template(models, args.template)
    answers = [_respond(model, conversations, args, template, name) for model, name in zip(models, "AB", strict=True)]
    rows = [
        answered(one, dict(zip(COLUMNS, responses, strict=True)))
        for one, *responses in zip(conversations, *answers, strict=True)
    ]
    measures, remarks = measures_of(rows), explanations(rows)
    notes: list[list[str]] = [[] for _ in rows]
    if judge is not None:
        with _own_options():
            opinion = judged(judge, rows)
        measures, remarks, notes = [*measures, *opinion.measures], [*remarks, *opinion.remarks], opinion.notes
    picture = args.output.with_name(f"{args.output.stem}_curves.png") if curves else None
    page = Page(
        title=" and ".join(names),
        names=names,
        facts=[
            f"A is {names[0]}: {args.model_a}",
            f"B is {names[1]}: {args.model_b}",
            f"{len(rows):,} records of {source}; template {template.name}; each answer greedy, at most "
            f"{args.max_new_tokens:,} tokens",
        ],
        measures=measures,
        remarks=remarks,
        items=[
            _item(one, row["output"], [row[column] for column in COLUMNS], remarks)
            for one, row, remarks in zip(conversations, rows, notes, strict=True)
        ],
        picture=picture.name if picture else None,
    )
    if picture:
        write_figure(picture, draw_curves(curves))
    write_atomically(args.output, as_html(page))
    say_lines(aligned([("", f"A: {names[0]}", f"B: {names[1]}", "B - A", "of"), *measures]))
    say_lines([f"written: {', '.join(map(str, [args.output, *([picture] if picture else [])]))}"])


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong before a model is loaded."""
    from llm_lightning.data.files.find import find_files
    from llm_lightning.data.files.rows import RECORD_FORMS

    for option in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if (args.data is None) == (args.split is None):
        given = "neither is" if args.data is None else "both are"
        raise ValueError(f"give a file of records, or --split test; {given} given")
    if args.data_of is not None and args.split is None:
        raise ValueError(f"--data-of {args.data_of} goes with --split")
    if args.data is not None and not names_records(args.data):
        raise ValueError(f"{args.data} must be a file of records; only two models can be compared")
    if args.data is not None:
        find_files(args.data, RECORD_FORMS)
    if args.output.suffix == ".md":
        raise ValueError(f"-o {args.output}: the Markdown page was removed; write {args.output.with_suffix('.html')}")
    if args.output.suffix != ".html":
        raise ValueError(f"-o {args.output} must end in .html")
    if not args.output.parent.is_dir():
        raise ValueError(f"-o {args.output}: the folder {args.output.parent} does not exist")


def unique_names(a: str, b: str) -> tuple[str, str]:
    """The names of two runs, with as many folders before them as tell them apart.

    A checkpoint has the name of its run, unless both are of one run.
    """
    whole = [_parts(path) for path in (a, b)]
    runs = [parts[: parts.index("checkpoints")] or parts if "checkpoints" in parts else parts for parts in whole]
    for one, other in (runs, [[part for part in parts if part != "checkpoints"] for parts in whole]):
        for length in range(1, max(len(one), len(other)) + 1):
            names = "/".join(one[-length:]), "/".join(other[-length:])
            if names[0] != names[1]:
                return names
    return f"{runs[0][-1]} (A)", f"{runs[1][-1]} (B)"


def _parts(path: str) -> list[str]:
    place = Path(path).absolute() if Path(path).exists() else Path(path)
    return [part for part in place.parts if part != place.anchor] or [path]


def _curves(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Curves]:
    """The curves of the run that `--curves` names, else of those of both that are runs."""
    from llm_lightning.inference.curves import read_curves

    if args.curves is not None:
        return {args.curves.absolute().name: read_curves(args.curves, is_required=True)}
    paths = zip(names, (args.model_a, args.model_b), strict=True)
    found = {name: read_curves(Path(path), is_required=False) for name, path in paths}
    return {name: curves for name, curves in found.items() if curves}


def _open_both(args: argparse.Namespace) -> list[LoadedModel]:
    """Load A and B; --base is for the adapters among them."""
    paths = (args.model_a, args.model_b)
    if args.base is None:
        return [_opened(args, path) for path in paths]
    need_base = [_is_adapter(path) for path in paths]
    if not any(need_base):
        raise ValueError(f"neither {paths[0]} nor {paths[1]} is an adapter alone; leave --base out")
    without = argparse.Namespace(**vars(args) | {"base": None})
    return [_opened(args if needed else without, path) for path, needed in zip(paths, need_base, strict=True)]


def _opened(args: argparse.Namespace, path: str) -> LoadedModel:
    loaded = open_model(args, checkpoint=path)
    try:
        loaded.gpt  # noqa: B018 (a classifier is refused now, not after the other model has answered)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return loaded


def _is_adapter(path: str) -> bool:
    from llm_lightning.weights.checkpoint import read_header
    from llm_lightning.weights.load import resolve
    from llm_lightning.weights.peft_format import is_peft_folder

    if is_peft_folder(path):
        return True
    file = resolve(path)
    return file is not None and "base" in read_header(file)


def _template(models: Sequence[LoadedModel], wanted: str | None) -> Template:
    """The wanted template, else the template of B's training, else of A's: both models get the same prompts."""
    from llm_lightning.data.templates.choose import template_in
    from llm_lightning.inference.template import template_of

    a, b = models
    is_known = wanted or template_in(b.header) or not template_in(a.header)
    return template_of(b if is_known else a, wanted)


def _conversations(models: Sequence[LoadedModel], args: argparse.Namespace) -> tuple[Sequence[Conversation], str]:
    """The prompts, and the name of their source."""
    from llm_lightning.data.of_checkpoint import conversations_of
    from llm_lightning.inference.respond import read_records

    if args.data is not None:
        read = read_records(args.data, models[1], options=file_options(args), columns=typed_columns(args))
        return read[: args.limit], args.data
    given = {name: loaded for name, loaded in zip("BA", reversed(models), strict=True) if args.data_of in (None, name)}
    for name, loaded in given.items():
        if loaded.header.get("task") in ("sft", "dpo"):
            data = conversations_of(loaded, instead="give a file of records", split=args.split)
            source = f"the {args.split} split of {name}'s training data ({data.describe()})"
            return data.conversations_of(args.split)[: args.limit], source
    tasks = " and ".join(f"{name}: {loaded.header.get('task')}" for name, loaded in given.items())
    raise ValueError(
        f"--split {args.split} needs a model that was trained on questions and answers (task=sft, task=dpo), and none "
        f"was ({tasks}); give a file of records instead"
    )


def _respond(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    args: argparse.Namespace,
    template: Template,
    name: str,
) -> list[str]:
    from llm_lightning.inference.respond import respond

    return respond(
        loaded,
        conversations,
        template=template,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        title=name,
    )


def _judge(args: argparse.Namespace) -> Judge | None:
    """The judge, if one is wanted; an address where nothing listens is refused before any model runs."""
    if not args.judge and args.judge_url is None and args.judge_model is None:
        return None
    from llm_lightning.metrics.judge.client import DEFAULT_MODEL, DEFAULT_URL, Judge

    judge = Judge(args.judge_url or DEFAULT_URL, args.judge_model or DEFAULT_MODEL, progress=True)
    with _own_options():
        judge.refuse_unreachable()
    return judge


@contextmanager
def _own_options() -> Iterator[None]:
    """Errors of the judge name the options of `llm-lightning judge`; name those of this verb instead."""
    try:
        yield
    except (ValueError, ConnectionError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        raise kind(re.sub(r"--(url|model)\b", r"--judge-\1", str(error))) from error


def _item(conversation: Conversation, correct: str, answers: Sequence[str], remarks: list[str]) -> Item:
    """A record as a reader sees it: the questions, without the fixed text of the template."""
    lines = [conversation.system] if conversation.system else []
    for number, turn in enumerate(conversation.turns, start=1):
        lines += [turn.instruction, *([turn.input] if turn.input else [])]
        if number < len(conversation.turns):
            lines.append(turn.response)
    prompt, correct, a, b = map(_visible, ("\n\n".join(lines), correct, *answers))
    return Item(prompt, correct, a, b, remarks)


def _visible(text: str) -> str:
    return visible(text.replace("\r\n", "\n"))
