"""Put the answers of two models side by side, on a page: A is the reference, B what was trained from it.

llm-lightning compare outputs/sft/my_run outputs/dpo/my_run --split test -o comparison.html
llm-lightning compare gpt2-small outputs/sft/my_run questions.json -o comparison.md --judge

Both models answer the same prompts with their likeliest tokens. The page and the same in Markdown stand beside each
other, comparison.html and comparison.md, with the learning curves of B in comparison_curves.png where it has any.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_lightning.cli.arguments import add_base_argument, add_device_arguments, open_model
from llm_lightning.cli.comparison_page import Item, Measure, Page, as_html, as_markdown
from llm_lightning.cli.respond import DATA_SUFFIXES
from llm_lightning.terminal import aligned, say_lines, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llm_lightning.data.templates import Conversation, Template
    from llm_lightning.metrics.judge.client import Judge, Verdict
    from llm_lightning.metrics.judge.summaries import Comparison, ScoreSummary
    from llm_lightning.weights.load import LoadedModel

PAGE_SUFFIXES = (".html", ".md")
A, B = COLUMNS = ("model_response_A", "model_response_B")
NGRAM, TIMES = 3, 3
"""A response repeats itself if so many words in a row stand in it so often."""
PANELS = {
    "loss": ("train/loss", "val/loss"),
    "reward margin": ("*/reward_margin",),
    "reward accuracy": ("*/reward_accuracy",),
    "rewards": ("*/chosen_reward", "*/rejected_reward"),
}

Curves = dict[str, list[tuple[int, float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="A", help="a model (see llm-lightning generate --help)")
    parser.add_argument("policy", metavar="B", help="the model that is compared with it")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="?",
        type=Path,
        help="a .json or .jsonl file of records; of pairs, the chosen answer is the correct one",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("comparison.html"),
        help="the page, .html or .md; the other is written beside it (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="instead of a file: a part of the data that B was tuned on, or else A",
    )
    parser.add_argument("--data-of", choices=("A", "B"), help="whose data --split means (default: B, or else A)")
    parser.add_argument(
        "--template", metavar="T", help="alpaca, phi3, chatml, or a text with slots (default: that of B's training)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="records at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="per answer, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--curves", type=Path, metavar="RUN", help="the run whose learning curves are shown (default: B, if it is one)"
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


def run(args: argparse.Namespace) -> None:
    """Answer, measure, judge, write; everything that can be refused early is."""
    from llm_lightning.files.atomic import write_atomically, write_figure
    from llm_lightning.inference.respond import answered

    _check(args)
    curves = _curves(args.curves, Path(args.policy))
    judge = _judge(args)
    models = _open_both(args)
    conversations, source = _conversations(models, args)
    template = _template(models, args.template)
    found = [_respond(model, template, conversations, args, name) for model, name in zip(models, "AB", strict=True)]
    rows = [
        answered(one, dict(zip(COLUMNS, responses, strict=True)))
        for one, *responses in zip(conversations, *found, strict=True)
    ]
    measures, remarks = _measures(rows), _explained(rows)
    notes: list[list[str]] = [[] for _ in rows]
    if judge is not None:
        judged = _judged(judge, rows)
        measures, remarks, notes = [*measures, *judged.measures], [*remarks, *judged.remarks], judged.notes
    picture = args.output.with_name(f"{args.output.stem}_curves.png") if curves else None
    page = Page(
        title=f"{args.reference} and {args.policy}",
        facts=[
            f"A, the reference: {args.reference}",
            f"B, the policy: {args.policy}",
            f"{len(rows):,} records of {source}; template {template.name}; each answer greedy, at most "
            f"{args.max_new_tokens:,} tokens",
        ],
        measures=measures,
        remarks=remarks,
        items=[_item(*pair) for pair in zip(conversations, rows, notes, strict=True)],
        picture=picture.name if picture else None,
    )
    if picture:
        write_figure(picture, _figure(curves))
    for suffix, form in ((".html", as_html), (".md", as_markdown)):
        write_atomically(args.output.with_suffix(suffix), form(page))
    say_lines(aligned([("", "A", "B", "of"), *measures]))
    written = [args.output.with_suffix(suffix) for suffix in PAGE_SUFFIXES] + ([picture] if picture else [])
    say_lines([f"written: {', '.join(map(str, written))}"])


# --- what is asked for -----------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for what is known to be wrong before a model is loaded."""
    for option in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if (args.data is None) == (args.split is None):
        given = "neither is" if args.data is None else "both are"
        raise ValueError(f"give a .json or .jsonl file of records, or --split test; {given} given")
    if args.data_of is not None and args.split is None:
        raise ValueError(f"--data-of {args.data_of} goes with --split")
    if args.data is not None and not args.data.name.lower().endswith(DATA_SUFFIXES):
        raise ValueError(f"{args.data} must be a .json or .jsonl file of records; only two models can be compared")
    if args.data is not None and not args.data.is_file():
        raise FileNotFoundError(f"{args.data} does not exist or is no file")
    if args.output.suffix not in PAGE_SUFFIXES:
        raise ValueError(f"-o {args.output} must end in .html or .md")
    if not args.output.parent.is_dir():
        raise ValueError(f"-o {args.output}: the folder {args.output.parent} does not exist")


def _open_both(args: argparse.Namespace) -> list[LoadedModel]:
    """A and B; --base is for the one, or both, that need it."""
    paths = (args.reference, args.policy)
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
    """The wanted one, else that of B's training, else of A's: both models are asked in the same words."""
    from llm_lightning.cli.respond import data_settings, template_of

    reference, policy = models
    is_known = wanted or data_settings(policy).get("template") or not data_settings(reference).get("template")
    return template_of(policy if is_known else reference, wanted)


def _conversations(models: Sequence[LoadedModel], args: argparse.Namespace) -> tuple[list[Conversation], str]:
    """The prompts, and what they are of."""
    from llm_lightning.cli.respond import data_of, read_records

    if args.data is not None:
        return read_records(args.data, models[1])[: args.limit], str(args.data)
    given = {name: loaded for name, loaded in zip("BA", reversed(models), strict=True) if args.data_of in (None, name)}
    for name, loaded in given.items():
        if loaded.header.get("task") in ("sft", "dpo"):
            data = data_of(loaded)
            source = f"the {args.split} split of {name}'s training data ({data.describe()})"
            return data.conversations_of(args.split)[: args.limit], source
    tasks = " and ".join(f"{name}: {loaded.header.get('task')}" for name, loaded in given.items())
    raise ValueError(
        f"--split {args.split} needs a model that was trained on questions and answers (task=sft, task=dpo), and none "
        f"was ({tasks}); give a .json or .jsonl file of records instead"
    )


def _respond(
    loaded: LoadedModel, template: Template, conversations: Sequence[Conversation], args: argparse.Namespace, name: str
) -> list[str]:
    from tqdm import tqdm

    from llm_lightning.inference.respond import respond

    with tqdm(total=len(conversations), desc=name, disable=None) as bar:
        return respond(
            loaded.gpt,
            loaded.tokenizer,
            template,
            conversations,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            on_response=lambda *_: bar.update() and None,
        )


# --- what is measured ------------------------------------------------------------------------------------------------


def repeats_itself(response: str) -> bool:
    """Say whether some three words in a row stand in it three times or more."""
    words = response.casefold().split()
    runs = Counter(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return any(count >= TIMES for count in runs.values())


def _measures(rows: Sequence[dict[str, Any]]) -> list[Measure]:
    from llm_lightning.metrics.answers import chrf, exact_match, rouge_l

    with_answer = [row for row in rows if row["output"].strip()]
    references = [row["output"] for row in with_answer]
    compared = [[row[column] for row in with_answer] for column in COLUMNS]
    matches = [[exact_match(*pair) for pair in zip(one, references, strict=True)] for one in compared]
    responses = [[row[column] for row in rows] for column in COLUMNS]
    n_same = sum(one == other for one, other in zip(*responses, strict=True))
    same, n, n_with = _share(n_same, len(rows)), f"{len(rows):,}", f"{len(references):,}"
    lengths = [[len(one.split()) for one in found] for found in responses]
    return [
        _measure("exact match", [_share(sum(one), len(one)) for one in matches], n_with),
        _measure("ROUGE-L", [_mean(rouge_l(one, references), 1) for one in compared], n_with),
        _measure("chrF", [_mean(chrf(one, references), 1) for one in compared], n_with),
        _measure("identical responses", [same, same], n),
        _measure("mean length in words", [_mean(one, digits=1) for one in lengths], n),
        _measure("repetition", [_share(sum(map(repeats_itself, one)), len(one)) for one in responses], n),
    ]


def _measure(name: str, cells: Sequence[str], of: str) -> Measure:
    a, b = cells
    return Measure(name, a, b, of)


def _explained(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the numbers mean."""
    n_without = sum(not row["output"].strip() for row in rows)
    remarks = [
        "In brackets: 95% intervals (Wilson's of shares, Student's t of means). Exact match, ROUGE-L and chrF compare "
        "with the correct answer, from 0 to 1.",
        "Repetition: the share of responses in which some three words in a row stand three times or more.",
    ]
    if n_without:
        remarks.append(f"{n_without:,} records have no correct answer and are left out of the first three rows.")
    return remarks


def _share(count: int, n: int) -> str:
    from llm_lightning.metrics.intervals import wilson_interval

    return _cell(count / n, *wilson_interval(count, n)) if n else "-"


def _mean(values: Sequence[float], highest: float = math.inf, digits: int = 3) -> str:
    from llm_lightning.metrics.intervals import mean_interval

    return _cell(*mean_interval(values, 0, highest), digits) if values else "-"


def _cell(mean: float | None, low: float, high: float, digits: int = 3) -> str:
    if mean is None:
        return "-"
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if math.isfinite(high) else ""
    return f"{mean:.{digits}f}{interval}"


# --- what a judge says -----------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What a judge adds to the page."""

    measures: list[Measure]
    remarks: list[str]
    notes: list[list[str]]
    """of each record"""


def _judge(args: argparse.Namespace) -> Judge | None:
    """The judge, if one is wanted and something listens at its address: told before the models are at work."""
    if not args.judge and args.judge_url is None and args.judge_model is None:
        return None
    from llm_lightning.metrics.judge.client import DEFAULT_MODEL, DEFAULT_URL, Judge

    judge = Judge(args.judge_url or DEFAULT_URL, args.judge_model or DEFAULT_MODEL, progress=True)
    with _own_options():
        judge.refuse_unreachable()
    return judge


@contextmanager
def _own_options() -> Iterator[None]:
    """Errors of the judge, which names the options of `llm-lightning judge`, with those of this verb."""
    try:
        yield
    except (ValueError, ConnectionError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        raise kind(re.sub(r"--(url|model)\b", r"--judge-\1", str(error))) from error


def _judged(judge: Judge, rows: Sequence[dict[str, Any]]) -> Judged:
    """Scores of both, and which one is better, asked in both orders."""
    from llm_lightning.inference.judging import compare_responses, score_responses
    from llm_lightning.metrics.judge.summaries import summarise_pairs, summarise_scores

    with _own_options():
        verdicts = [score_responses(judge, rows, column) for column in COLUMNS]
        pairs = compare_responses(judge, rows, B, A)  # the first one's wins are counted
    scores = [summarise_scores(found) for found in verdicts]
    summary = summarise_pairs(pairs)
    lost = (None if summary.mean is None else 1 - summary.mean, 1 - summary.high, 1 - summary.low)
    won = (summary.mean, summary.low, summary.high)
    n_scored = [f"{one.outcomes['scored']:,}" for one in scores]
    scored_of = " and ".join(dict.fromkeys(n_scored))
    measures = [
        _measure("score of the judge", [_cell(one.mean, one.low, one.high, 1) for one in scores], scored_of),
        Measure("win rate", _cell(*lost), _cell(*won), f"{summary.outcomes['scored']:,}"),
    ]
    remarks = [
        f"Judged by {judge.model} at {judge.url}. Scores are from 0 to 100. B wins {summary.wins:,}, ties "
        f"{summary.ties:,}, loses {summary.losses:,} of {summary.n:,}, asked in both orders: a response wins if it is "
        "chosen in both, else it is a tie, half a win for each.",
    ]
    if summary.decided:
        share = summary.first_chosen / summary.decided
        remarks.append(
            f"The response shown first was chosen in {share:.0%} of the {summary.decided:,} that were no tie."
        )
    remarks += _failures({"Scores of A": scores[0], "Scores of B": scores[1], "Pairs": summary})
    return Judged(measures, remarks, [_notes(*one) for one in zip(*verdicts, pairs, strict=True)])


def _failures(summaries: dict[str, ScoreSummary | Any]) -> list[str]:
    """What is missing, and how the intervals count it."""
    remarks = []
    for name, summary in summaries.items():
        missing = [f"{count:,} {kind}" for kind, count in summary.outcomes.items() if kind != "scored" and count]
        if missing:
            remarks.append(
                f"{name}: {', '.join(missing)} of {summary.n:,}; the interval counts them as worst at its lower end "
                "and as best at its upper end."
            )
    return remarks


def _notes(score_a: Verdict, score_b: Verdict, pair: Comparison) -> list[str]:
    scores = [f"score of {name} {one.outcome if one.value is None else one.value}" for name, one in
              (("A", score_a), ("B", score_b))]  # fmt: skip
    # Of the comparison, "A" is what stood first in it: our B.
    better = {"A": "B is better", "B": "A is better", "tie": "a tie"}.get(pair.winner or "", f"pair {pair.outcome}")
    return [*scores, better]


# --- curves ----------------------------------------------------------------------------------------------------------


def _curves(wanted: Path | None, policy: Path) -> Curves:
    """The curves that are shown, of a run that was named or of B; empty if B has none."""
    file = (wanted or policy) / "metrics.csv"
    if not file.is_file():
        if wanted is not None:
            raise FileNotFoundError(f"--curves {wanted}: {file} does not exist; name the folder of a run")
        return {}
    from llm_lightning.files.metrics_csv import read_metrics

    try:
        found = read_metrics(file)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} is not the metrics file of a run ({type(error).__name__}: {error})") from error
    curves = {name: values for names in PANELS.values() for name, values in _chosen(found, names).items()}
    if wanted is not None and not curves:
        raise ValueError(
            f"--curves {wanted}: {file} has no loss and no rewards; there are {', '.join(found) or 'none'}"
        )
    return curves


def _chosen(curves: Curves, patterns: Sequence[str]) -> Curves:
    from fnmatch import fnmatchcase

    return {name: curves[name] for pattern in patterns for name in curves if fnmatchcase(name, pattern)}


def _figure(curves: Curves) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    panels = {title: found for title, names in PANELS.items() if (found := _chosen(curves, names))}
    figure = Figure(figsize=(7, 3 * len(panels)), layout="constrained")
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (title, found) in zip(drawn, panels.items(), strict=True):
        for name, values in found.items():
            # The row of step s stands for s + 1 updates.
            steps = [step + 1 for step, _ in values]
            axes.plot(steps, [value for _, value in values], label=name, marker="." if len(steps) < 50 else None)
        axes.set_ylabel(title)
        axes.legend()
        axes.grid(alpha=0.3)
    drawn[-1].set_xlabel("updates")
    return figure


# --- records ---------------------------------------------------------------------------------------------------------


def _item(conversation: Conversation, row: dict[str, Any], remarks: list[str]) -> Item:
    """What a reader sees of a record: the questions without the fixed words of the template."""
    lines = [conversation.system] if conversation.system else []
    for number, turn in enumerate(conversation.turns, start=1):
        lines += [turn.instruction, *([turn.input] if turn.input else [])]
        if number < len(conversation.turns):
            lines.append(turn.response)
    prompt, correct, a, b = map(_visible, ("\n\n".join(lines), row["output"], row[A], row[B]))
    return Item(prompt, correct, a, b, remarks)


def _visible(text: str) -> str:
    return visible(text.replace("\r\n", "\n"))
