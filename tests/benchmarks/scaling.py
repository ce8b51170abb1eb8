"""How the time of each reader and tool grows with its input: CPU seconds at N and at ten times as much.

    python tests/benchmarks/scaling.py               all cases
    python tests/benchmarks/scaling.py json labels   those whose name holds one of the words; --json: a line for each

About 10 is linear. Ten times as much that takes 100 times as long is quadratic; small times say little.
"""

from __future__ import annotations

import gc
import io
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 300.0
"""Seconds on the clock after which a measurement is given up: only what never ends meets it."""
CASES: dict[str, tuple[int, Callable[[int, Path], Callable[[], Any]]]] = {}
"""name -> (N, what makes the input of a size and returns what is measured on it)."""


class TookTooLongError(BaseException):
    """Raised by a timer, past everything that handles errors."""


def case(name: str, n: int) -> Callable[[Callable[[int, Path], Callable[[], Any]]], Any]:
    def add(make: Callable[[int, Path], Callable[[], Any]]) -> Any:
        CASES[name] = (n, make)
        return make

    return add


def seconds(action: Callable[[], Any]) -> float:
    """CPU time of the fastest of three calls, or of one that takes long; errors of the user's kind count as an end.

    Infinite where `LIMIT` is over. Python's garbage collector waits: now and then it looks at all objects there are.
    """
    best = math.inf
    for _ in range(3):
        gc.collect()
        gc.disable()
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(ValueError):
                action()
        except TookTooLongError:
            return math.inf
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.enable()
        best = min(best, time.process_time() - start)
        if best > 1:
            break
    return best


def _stop(*_: Any) -> None:
    raise TookTooLongError


def ratio(name: str) -> tuple[float, float]:
    """CPU seconds of a case at N and at 10 N."""
    signal.signal(signal.SIGALRM, _stop)
    n, make = CASES[name]
    found = []
    for size in (n, 10 * n):
        with tempfile.TemporaryDirectory() as folder:
            found.append(seconds(make(size, Path(folder))))
    return found[0], found[1]


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def records(n: int, **fixed: Any) -> list[dict[str, Any]]:
    draw = random.Random(0)
    words = ["red", "green", "blue", "white", "black", "gold", "grey"]
    return [
        {"instruction": f"Say {i} " + " ".join(draw.choices(words, k=6)), "input": "", "output": draw.choice(words)}
        | fixed
        for i in range(n)
    ]


def pairs(n: int) -> list[dict[str, Any]]:
    return [{**one, "chosen": f"{one['output']}, please", "rejected": f"{i} no"} for i, one in enumerate(records(n))]


# --- files of records ------------------------------------------------------------------------------------------------


@case("json: one object of many fields, the last twice", 20_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.placed import placed_records

    fields = ", ".join(f'"k{i}": 1' for i in [*range(n), n - 1])
    path = written(folder / "x.jsonl", "{" + fields + "}\n")
    return lambda: placed_records(path)


for _suffix in ("json", "jsonl"):

    @case(f"json: many records, .{_suffix}", 3_000)
    def _(n: int, folder: Path, suffix: str = _suffix) -> Callable[[], Any]:
        from llm_lightning.data.records.placed import placed_records

        rows = records(n)
        text = json.dumps(rows, indent=1) if suffix == "json" else "".join(json.dumps(one) + "\n" for one in rows)
        path = written(folder / f"x.{suffix}", text)
        return lambda: placed_records(path)


@case("json: many records on one line", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.placed import placed_records

    path = written(folder / "x.json", json.dumps(records(n)))
    return lambda: placed_records(path)


@case("json: every record bad", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.placed import placed_records

    path = written(folder / "x.jsonl", '{"a": NaN}\n{"a"\n{"a": 1, "a": 2}\n' * (n // 3))
    return lambda: placed_records(path)


@case("json: half a surrogate pair in every record", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.placed import placed_records

    path = written(folder / "x.json", "[" + ",\n".join(['{"a": "\\ud83d"}'] * n) + "]")
    return lambda: placed_records(path)


@case("json: one long string", 300_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.placed import placed_records

    path = written(folder / "x.json", json.dumps([{"a": "word \n\u00e9 " * (n // 8)}]))
    return lambda: placed_records(path)


@case("labels: csv", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.labelled import read_labelled

    path = written(folder / "x.csv", "text,label\n" + "".join(f'"a ""{i}"",\nb",{i % 3}\n' for i in range(n)))
    return lambda: read_labelled(path)


@case("labels: csv of many columns", 300)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.labelled import read_labelled

    names = [f"c{i}" for i in range(n)]
    path = written(folder / "x.csv", ",".join(["text", "label", *names]) + "\n" + ",".join(["a", "b", *names]) + "\n")
    return lambda: [read_labelled(path) for _ in range(20)]


@case("labels: csv whose quotes never end", 20_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.labelled import read_labelled

    path = written(folder / "x.csv", 'text,label\n"a,b\n' + "a,b\n" * n)
    return lambda: read_labelled(path)


@case("labels: jsonl", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.labelled import read_labelled

    path = written(folder / "x.jsonl", "".join(json.dumps({"text": f"a {i}", "label": i % 3}) + "\n" for i in range(n)))
    return lambda: read_labelled(path)


@case("labels: unknown ones", 500)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.classification import _class_indices
    from llm_lightning.data.records.labelled import LabelledText

    rows = [LabelledText("a", f"label {i}", "x") for i in range(n)]
    return lambda: _class_indices(rows, [f"label {i}" for i in range(1, n)])


@case("instructions", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.instruction import read_instructions

    path = written(folder / "x.json", json.dumps(records(n)))
    return lambda: read_instructions(path)


@case("preferences", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.preference import read_preferences

    path = written(folder / "x.json", json.dumps(pairs(n)))
    return lambda: read_preferences(path)


def conversation(n: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"word {i}"} for i in range(2 * n)]


@case("one conversation of many turns: read", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.records.instruction import read_instructions

    path = written(folder / "x.json", json.dumps([{"messages": conversation(n)}]))
    return lambda: read_instructions(path)


@case("one conversation of many turns: encoded", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.instruction import encode
    from llm_lightning.data.templates.choose import choose_template
    from llm_lightning.data.templates.conversation import Conversation, Turn
    from llm_lightning.tokenizers.build import build_tokenizer

    one = Conversation(tuple(Turn(f"word {i}", "", "yes") for i in range(n)))
    return lambda: encode(build_tokenizer("byte"), choose_template("alpaca"), one)


@case("one conversation of many turns: prompt", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.templates.choose import choose_template
    from llm_lightning.data.templates.conversation import Conversation, Turn
    from llm_lightning.tokenizers.build import build_tokenizer

    one = Conversation(tuple(Turn(f"word {i}", "", "yes") for i in range(n)))
    return lambda: choose_template("alpaca").prompt_ids(build_tokenizer("byte"), one)


# --- data modules ----------------------------------------------------------------------------------------------------


def built(kind: str, path: Path, **options: Any) -> Any:
    from llm_lightning.data.classification import ClassificationDataModule
    from llm_lightning.data.instruction import InstructionDataModule
    from llm_lightning.data.preference import PreferenceDataModule
    from llm_lightning.tokenizers.build import build_tokenizer

    kinds = {"labels": ClassificationDataModule, "sft": InstructionDataModule, "dpo": PreferenceDataModule}
    options = {"context_length": 256, "batch_size": 8, "path": str(path), **options}
    data = kinds[kind](tokenizer=build_tokenizer("byte"), **options)
    data.build()
    for epoch in range(2):
        data.order_of(data.train_samples, is_training=True)(epoch)
    data.order_of(data.test_samples["test"], is_training=False)(0)
    return data


@case("classification data, two classes", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    rows = "".join(f"{chr(97 + i % 26) * (i // 26 % 40 + 1)} {i:x}q\t{i % 2}\n" for i in range(n))
    path = written(folder / "x.tsv", "text\tlabel\n" + rows)
    return lambda: built("labels", path)


@case("classification data, a class for each ten texts", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    letters = "abcdefghij"
    names = ["".join(letters[int(d)] for d in str(i)) for i in range(n // 10)]
    rows = "".join(f"{name} {letter}\t{name}\n" for name in names for letter in letters)
    path = written(folder / "x.tsv", "text\tlabel\n" + rows)
    return lambda: built("labels", path)


@case("classification data, all texts the same", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.tsv", "text\tlabel\n" + "".join(f"same\t{i % 2}\n" for i in range(n)))
    return lambda: built("labels", path)


@case("instruction data", 500)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.json", json.dumps(records(n)))
    return lambda: built("sft", path)


@case("instruction data, all in one group", 500)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.conversations import split_conversations
    from llm_lightning.data.records.instruction import read_instructions

    path = written(folder / "x.json", json.dumps([{**one, "group": str(i // 2)} for i, one in enumerate(records(n))]))
    found, _ = read_instructions(path)
    return lambda: split_conversations(found, "grouped", (0.1, 0.1), 1)


@case("groups in one chain", 5_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.splits import joined_groups

    first, second = [str(i // 2) for i in range(n)], [str((i + 1) // 2) for i in range(n)]
    return lambda: joined_groups(first, second)


@case("preference data", 300)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.json", json.dumps(pairs(n)))
    return lambda: built("dpo", path)


@case("order of batches, a class for each text", 10_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.order import bucketed_order

    draw = np.random.default_rng(0)
    lengths, classes = draw.integers(1, 99, n).tolist(), draw.integers(0, n, n).tolist()
    return lambda: bucketed_order(lengths, classes, seed=1, epoch=0)


@case("texts compared: combining marks", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.splits import normalized

    text = "a" + "\u0301\u0316" * n
    return lambda: normalized(text)


@case("texts compared: a long text", 100_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.splits import normalized

    text = "_-_ a1 " * (n // 7)
    return lambda: normalized(text)


@case("inspect-data", 200)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.json", json.dumps(records(n)))
    return lambda: cli("inspect-data", path, "-n", n)


# --- text ------------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "words": "the quick brown fox ",
    "one letter": "a",
    "letters without a space": "acgtaccgtta",
    "digits": "3141592653",
    "signs": "=-=-_",
    "spaces": " ",
    "line breaks": "\n",
    "Chinese": "\u6c49\u5b57\u8bed\u8a00\u6587\u5b57",
    "emoji": "\U0001f600",
}


for _name, _unit in SCRIPTS.items():
    for _tokenizer in ("gpt2", "byte", "word"):

        @case(f"tokenizer {_tokenizer}: {_name}", 20_000)
        def _(n: int, folder: Path, unit: str = _unit, name: str = _tokenizer) -> Callable[[], Any]:
            from llm_lightning.tokenizers.build import build_tokenizer
            from llm_lightning.tokenizers.word import WordTokenizer

            tokenizer = WordTokenizer(["a", "fox"]) if name == "word" else build_tokenizer(name)
            text = unit * (n // len(unit))
            return lambda: tokenizer.decode(tokenizer.encode_array(text).tolist())

    @case(f"token files: {_name}", 2_000_000)
    def _(n: int, folder: Path, unit: str = _unit) -> Callable[[], Any]:
        from llm_lightning.data.corpus.encoding import in_pieces as _pieces
        from llm_lightning.tokenizers.build import build_tokenizer

        text, tokenizer = unit * (n // len(unit)), build_tokenizer("gpt2")
        return lambda: sum(map(len, _pieces([text], tokenizer.split_point)))


for _name in ("word", "bpe"):

    @case(f"tokenizer {_name}: trained", 20_000)
    def _(n: int, folder: Path, name: str = _name) -> Callable[[], Any]:
        from llm_lightning.tokenizers.build import build_tokenizer

        draw = random.Random(0)
        text = " ".join("".join(draw.choices("abcdef", k=draw.randint(1, 5))) for _ in range(n // 4))
        return lambda: build_tokenizer(name, vocab_size=300 if name == "bpe" else None, texts=[text])

    @case(f"tokenizer {_name}: trained on many small texts", 2_000)
    def _(n: int, folder: Path, name: str = _name) -> Callable[[], Any]:
        from llm_lightning.tokenizers.build import build_tokenizer

        texts = [f"ab {i % 7} cd" for i in range(n)]
        return lambda: build_tokenizer(name, vocab_size=300 if name == "bpe" else None, texts=texts)


@case("tokenizer bpe: trained on text without a space", 66_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.tokenizers.build import build_tokenizer

    text = "".join(random.Random(0).choices("acgt", k=n))
    return lambda: build_tokenizer("bpe", vocab_size=300, texts=[text])


@case("tokenizer: many runs of white space just too short", 100_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.tokenizers.tiktoken_encodings import _split_long_white_space

    text = ("a" + " " * 9_000) * (n // 9_000)
    return lambda: _split_long_white_space(text)


@case("corpus: one file, surveyed and tokenised", 200_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.corpus.sources import open_source
    from llm_lightning.data.corpus.token_files import build_token_files
    from llm_lightning.tokenizers.build import build_tokenizer

    path, runs = written(folder / "x.txt", "the quick brown fox.\n" * (n // 21)), iter(range(99))
    return lambda: build_token_files(open_source(path=path), build_tokenizer("gpt2"), cache=folder / str(next(runs)))


@case("corpus: many small files", 200)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.corpus.sources import open_source
    from llm_lightning.data.corpus.token_files import build_token_files
    from llm_lightning.tokenizers.build import build_tokenizer

    texts, runs = folder / "texts", iter(range(99))
    texts.mkdir()
    for index in range(n):
        written(texts / f"{index}.txt", f"text {index} of many")
    return lambda: build_token_files(open_source(path=texts), build_tokenizer("byte"), cache=folder / str(next(runs)))


@case("corpus: jsonl", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.corpus.sources import open_source
    from llm_lightning.data.corpus.token_files import build_token_files
    from llm_lightning.tokenizers.build import build_tokenizer

    path = written(folder / "x.jsonl", "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(n)))
    runs = iter(range(99))
    return lambda: build_token_files(open_source(path=path), build_tokenizer("byte"), cache=folder / str(next(runs)))


@case("template of your own", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.data.templates.choose import choose_template

    text = "{instruction}" + "[[x]] {{y}} \\n" * n + "{response}"
    return lambda: choose_template(text)


# --- answers ---------------------------------------------------------------------------------------------------------


@case("answers: exact match, ROUGE-L, chrF of many", 300)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.json", json.dumps(records(n, model_response="a red one")))
    return lambda: cli("judge", path, "--lexical", "-o", folder / "o.json")


@case("answers: ROUGE-L of one long one", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.metrics.answers import rouge_l

    draw = random.Random(0)
    one, other = (" ".join(draw.choices("abcdefghij", k=n)) for _ in range(2))
    return lambda: rouge_l([one], [other])


@case("answers: chrF of one long one", 5_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.metrics.answers import chrf

    draw = random.Random(0)
    one, other = ("".join(draw.choices("abcdefghij", k=n)) for _ in range(2))
    return lambda: chrf([one], [other])


@case("answers: most frequent, intervals", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.metrics.answers import most_frequent_answer_score
    from llm_lightning.metrics.intervals import mean_interval, wilson_interval

    texts = [f"answer {i}" for i in range(n)]
    return lambda: (most_frequent_answer_score(texts), mean_interval([i / n for i in range(n)]), wilson_interval(3, n))


@case("statistics", 500)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.json", json.dumps(records(n)))
    return lambda: cli("statistics", path, "--tokenizer", "byte")


@case("statistics of a text", 300_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    path = written(folder / "x.txt", "the quick brown fox.\n" * (n // 21))
    return lambda: cli("statistics", path)


@case("judge: many files", 30)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.cli.judge import _output_files

    files = [folder / f"{i}.json" for i in range(20 * n)]
    import argparse

    args = argparse.Namespace(output=None, files=files, pairwise=False, lexical=True)
    return lambda: _output_files(args)


@case("judge: summaries", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.metrics.judge.client import Verdict
    from llm_lightning.metrics.judge.prompts import PROMPTS
    from llm_lightning.metrics.judge.summaries import summarise_scores

    found = [Verdict("scored", i % 100, "1", "", 1, "x") for i in range(n)]
    return lambda: summarise_scores(found, PROMPTS["book"])


@case("compare: the page", 100)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.cli.comparison_page import Item, Page, as_html
    from llm_lightning.inference.comparison import explanations, measures_of

    rows = [{**one, "model_response_A": "a b c " * 9, "model_response_B": "red"} for one in records(n)]
    items = [Item(row["instruction"], row["output"], "a\n\tb `c`", "d", ["x"]) for row in rows]

    def make() -> None:
        as_html(Page("t", ["f"], measures_of(rows), explanations(rows), items, None))

    return make


@case("compare: one long response", 5_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.cli.compare import _visible
    from llm_lightning.inference.comparison import repeats_itself

    text = "a `b`  c\n\t | x" * n
    return lambda: (repeats_itself(text), _visible(text))


@case("respond: what an interrupted command left", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.inference.respond import _read_progress

    path = written(folder / "x.jsonl", "".join(json.dumps([f"{i:064x}", "answer"]) + "\n" for i in range(n)))
    return lambda: _read_progress(path)


@case("classify: lines", 10_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.cli.classify import _lines
    from llm_lightning.inference.classify import consecutive_batches

    content = "".join(f"line {i}\n" for i in range(n)).encode()
    rows = [np.zeros(3)] * n
    return lambda: (_lines("x", content), list(consecutive_batches(range(n), rows)))


@case("threshold", 2_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    import torch

    from llm_lightning.metrics.class_report import best_threshold

    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(n, generator=draw), torch.randint(2, (n,), generator=draw)
    return lambda: best_threshold(scores, labels)


@case("classes: all metrics, texts", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    return lambda: class_metrics(n, 30)


@case("classes: all metrics, classes", 200)
def _(n: int, folder: Path) -> Callable[[], Any]:
    return lambda: class_metrics(1_000, n)


def class_metrics(n: int, classes: int) -> None:
    import torch

    from llm_lightning.metrics.classes import auroc_of_many, count_metrics, described_confusions, softmax_columns

    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(n, classes, generator=draw), torch.randint(classes, (n,), generator=draw)
    count_metrics(logits.argmax(-1), labels, classes)
    described_confusions(logits.argmax(-1), labels, [str(index) for index in range(classes)])
    auroc_of_many(softmax_columns(logits), labels, classes)


# --- run folders -----------------------------------------------------------------------------------------------------


@case("metrics.csv: read and continued", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.callbacks.run_logs import MetricsFile
    from llm_lightning.files.metrics_csv import read_metrics

    rows = "".join(f"{i},0.5,,0.1\n" for i in range(n))
    content = "step,train/loss,val/loss,train/eval_loss\n" + rows

    def use() -> None:
        path = written(folder / "metrics.csv", content)
        logger = MetricsFile(folder, resumed_step=n - 5)
        logger.log_metrics({"train/loss": 1.0}, n)
        logger.save()
        read_metrics(path)

    return use


@case("metrics.csv: a save after each row", 300)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.callbacks.run_logs import MetricsFile

    def use() -> None:
        (folder / "metrics.csv").unlink(missing_ok=True)
        logger = MetricsFile(folder)
        for step in range(n):
            logger.log_metrics({"train/loss": 1.0}, step)
            logger.save()

    return use


@case("samples.md: read again", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.callbacks.samples import drop_sections_from

    content = "".join(f"## step {i}, val/loss 1\n\n    text\n\n" for i in range(n))
    return lambda: drop_sections_from(written(folder / "samples.md", content), n - 3)


@case("samples: repetition", 3_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.callbacks.samples import repetition_rate

    return lambda: repetition_rate([list(range(n)), [1] * n])


@case("checkpoints: many in a folder", 100)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.weights.checkpoint import newest_valid, save

    save(folder / "step_00000000.ckpt", {})
    for index in range(1, n):
        written(folder / f"step_{index:08d}.ckpt", "damaged")
    return lambda: newest_valid(folder)


@case("frozen store: many examples", 1_000)
def _(n: int, folder: Path) -> Callable[[], Any]:
    import torch

    from llm_lightning.files.frozen_cache import FrozenCache

    keys, runs = [index.to_bytes(32, "big") for index in range(n)], iter(range(99))

    def use() -> None:
        store = FrozenCache({"x": next(runs)}, width=4, dtype=torch.float32, code="", folder=folder)
        store.ensure(keys, [1] * n, lambda rows: torch.zeros(len(rows), 4), rows_per_batch=64, description="x")
        store.batch(keys, 1)

    return use


@case("config: many unknown keys", 300)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.experiments.settings.changes import diff_configs
    from llm_lightning.experiments.settings.checks import unknown_keys

    config = {f"key{i}": {"a": i} for i in range(n)}
    known = {f"known{i}": 1 for i in range(150)}
    return lambda: (list(unknown_keys(config, known)), diff_configs(config, {**config, "x": 1}))


@case("config: many labels on the command line", 100)
def _(n: int, folder: Path) -> Callable[[], Any]:
    from llm_lightning.experiments.settings.checks import check_overrides

    conf = Path(__file__).resolve().parents[2] / "conf"
    labels = ",".join(f"l{i}" for i in range(n))
    return lambda: check_overrides(["task=classification", f"data.labels=[{labels}]"], conf)


def cli(*words: Any) -> None:
    from llm_lightning.cli.main import main

    assert main([str(word) for word in words]) in (0, 2)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--json"]
    as_json = "--json" in sys.argv
    if not as_json:
        print(f"{'':<62}{'N':>10}{'at N':>9}{'at 10 N':>10}{'ratio':>8}")
    for name in [name for name in CASES if not words or any(word in name for word in words)]:
        one, ten = ratio(name)
        if as_json:
            print(json.dumps([name, one, ten]), flush=True)
            continue
        print(f"{name:<62}{CASES[name][0]:>10,}{one:>8.3f}s{ten:>9.3f}s{ten / max(one, 1e-9):>8.1f}", flush=True)
