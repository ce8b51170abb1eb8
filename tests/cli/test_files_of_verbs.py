"""The verbs read what training reads: the same files, options, columns and lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_run import SETTINGS, fit_here, write_checkpoint

from llm_lightning.cli.arguments import OwnWords, in_own_words, names_records
from llm_lightning.cli.main import main as cli
from llm_lightning.data.files.form import FORMS
from llm_lightning.data.files.options import FileOptions
from llm_lightning.weights.checkpoint import HEADER, load, save
from llm_lightning.weights.load import resolve

Records = list[dict[str, str]]
REVIEWS = [{"body": f"é {n} “a”, {'good' if n % 2 else 'bad'}", "kind": "ab"[n % 2]} for n in range(40)]
ASKED = [{"question": f"q{n}; “x”", "answer": f"a {n}"} for n in range(40)]


def table(records: Records, separator: str = ",", header: bool = True) -> str:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(records[0]), delimiter=separator)
    if header:
        writer.writeheader()
    writer.writerows(records)
    return written.getvalue()


def lines(records: Records) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode()


def parquet(records: Records) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


FILES: dict[str, tuple[Callable[[Records], bytes], list[str]]] = {
    "x.csv": (lambda records: table(records).encode("utf-8-sig"), []),
    "x.json": (lambda records: json.dumps(records).encode(), []),
    "x.jsonl.gz": (lambda records: gzip.compress(lines(records)), []),
    "x.parquet": (parquet, []),
    "utf16.csv": (lambda records: table(records).encode("utf-16"), []),
    "crs.csv": (lambda records: table(records).replace("\r\n", "\r").encode(), []),
    "folder/x.tsv": (lambda records: table(records, "\t").encode(), ["--quotes"]),
    "glob-*.csv": (
        lambda records: table(records, ";").encode("cp1252"),
        ["--encoding", "cp1252", "--separator", ";", "--format", "csv"],
    ),
}


def put(folder: Path, name: str, records: Records) -> tuple[str, list[str]]:
    """What is typed for a file of records: its name, that of its folder, or a glob; and options."""
    make, options = FILES[name]
    (folder / name.replace("*", "1")).parent.mkdir(exist_ok=True)
    (folder / name.replace("*", "1")).write_bytes(make(records))
    return str(folder / name.partition("/")[0]), options


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose columns are `body` and `kind`."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "train.csv").write_text(table(REVIEWS))
    words = [word for word in SETTINGS if "samples" not in word]
    columns = [f"data.path={folder}/train.csv", "data.text_column=body", "data.label_column=kind"]
    return run([*words, "task=classification", *columns], folder / "run")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose columns are `question` and `answer`."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "train.csv").write_text(table(ASKED))
    columns = [
        "task=sft",
        "model.context_length=64",
        f"data.path={folder}/train.csv",
        "data.columns.instruction=question",
        "data.columns.output=answer",
        "data.template='{instruction} {response}'",
        "callbacks.responses=null",
    ]
    return run([*SETTINGS, *columns], folder / "run")


def run(arguments: list[str], folder: Path) -> Path:
    outcome = fit_here([*arguments, f"hydra.run.dir={folder}"])
    assert outcome.code == 0, outcome.err
    return folder


def said(words: list[str], capsys: pytest.CaptureFixture) -> Any:
    """What a verb prints as JSON."""
    capsys.readouterr()
    assert cli([*words, "--json"]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# --- every verb, every form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_classify_and_evaluate_read_the_columns_of_the_training(
    classifier: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    typed, options = put(tmp_path, name, REVIEWS)
    found = said(["classify", str(classifier), "--file", typed, *options], capsys)
    assert [one["text"] for one in found] == [one["body"] for one in REVIEWS]
    (result,) = said(["evaluate", str(classifier), "--text", typed, *options], capsys)
    right = [one["label"] == review["kind"] for one, review in zip(found, REVIEWS, strict=True)]
    assert (result["n"], result["accuracy"]) == (40, pytest.approx(sum(right) / 40))


@pytest.mark.parametrize("name", FILES)
def test_respond_and_judge_read_the_columns_of_the_training(
    tuned: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    typed, options = put(tmp_path, name, ASKED[:5])
    output = tmp_path / "out.json"
    words = ["respond", str(tuned), typed, "-o", str(output), "--max-new-tokens", "2", *options]
    assert cli(words) == 0, capsys.readouterr().err
    answers = json.loads(output.read_text())
    assert [(one["question"], one["output"]) for one in answers] == [
        (one["question"], one["answer"]) for one in ASKED[:5]
    ]
    kept = ("instruction", "output", "model_response")
    typed, options = put(tmp_path, name, [{key: one[key] or "-" for key in kept} for one in answers])
    if "folder" not in name and "*" not in name:
        said(["judge", typed, "--lexical", "-o", str(tmp_path / "report.json"), *options], capsys)
        assert len(json.loads((tmp_path / "report.json").read_text())["records"]) == 5


@pytest.mark.parametrize("name", FILES)
def test_verbs_without_a_model(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    typed, options = put(tmp_path, name, ASKED[:5])
    (facts,) = said(["statistics", typed, "--tokenizer", "byte", "--keys", "question", *options], capsys)
    assert (facts["records"], facts["keys"]["question"]["characters"]["max"]) == (5, len(ASKED[0]["question"]))
    (found,) = said(["near-duplicates", typed, "--keys", "question", "--threshold", "0.1", *options], capsys)
    assert (found["records"], found["keys"]["question"]["n_later"]) == (5, 4)
    columns = ["--columns", "instruction=question", "output=answer"]
    words = ["inspect-data", typed, "--tokenizer", "byte", "-n", "1", "--template", "{instruction} {response}"]
    assert cli([*words, *options, *columns]) == 0
    assert "q0; “x” >>a 0<|endoftext|><<" in capsys.readouterr().out


def test_compare_reads_files_of_every_form(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    typed, options = put(tmp_path, "glob-*.csv", ASKED[:3])
    page = tmp_path / "page.html"
    words = ["compare", str(tuned), str(tuned / "checkpoints" / "last.ckpt"), typed, "-o", str(page)]
    assert cli([*words, "--max-new-tokens", "2", *options]) == 0, capsys.readouterr().err
    assert f"3 records of {typed}" in page.read_text()


def test_evaluate_scores_texts_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = write_checkpoint(tmp_path / "gpt.ckpt")
    results = []
    for name in FILES:
        typed, options = put(tmp_path, name, [{"text": one["body"]} for one in REVIEWS])
        results += said(["evaluate", str(base), "--text", typed, *options], capsys)
    assert all(one == results[0] for one in results)
    assert results[0]["n_bytes"] == sum(len(one["body"].encode()) for one in REVIEWS)


# --- lines -----------------------------------------------------------------------------------------------------------

TEXTS = ["é “a”\u2028b\x85c", " two ", "3"]
LINES = {
    "lf": "\n".join(TEXTS).encode(),
    "crlf": "\r\n".join([*TEXTS, ""]).encode("utf-8-sig"),
    "cr": "\r".join([*TEXTS, ""]).encode(),
    "utf16": "\r\n".join(TEXTS).encode("utf-16"),
    "gzip": gzip.compress("\n".join(TEXTS).encode()),
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("from_standard_input", [False, True])
def test_prompts_and_texts_are_the_same_lines(
    classifier: Path,
    tmp_path: Path,
    kind: str,
    from_standard_input: bool,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(LINES[kind])
    typed = "-" if from_standard_input else str(file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES[kind])))
    assert [one["text"] for one in said(["classify", str(classifier), "--file", typed], capsys)] == TEXTS
    asked: list[str] = []
    monkeypatch.setattr(
        "llm_lightning.inference.text.generate_texts", lambda _, prompts, **__: asked.extend(prompts) or []
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES[kind])))
    base = write_checkpoint(tmp_path / "gpt.ckpt")
    assert cli(["generate", str(base), "--prompts-file", typed, "--no-stream"]) == 0
    assert asked == TEXTS


def test_lines_in_another_encoding_and_lines_that_are_records(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_checkpoint(tmp_path / "gpt.ckpt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("“a”\n".encode("cp1252"))))
    assert cli(["generate", str(base), "--prompts-file", "-"]) == 2
    assert "generate: standard input, line 1: byte 0 (0x93) is not valid UTF-8" in (err := capsys.readouterr().err)
    assert err.endswith("are those of cp1252 (Windows): give --encoding cp1252\n")
    (tmp_path / "x.jsonl").write_bytes(lines(ASKED))
    assert cli(["generate", str(base), "--prompts-file", str(tmp_path / "x.jsonl")]) == 2
    assert "x.jsonl holds records (jsonl), not one text a line; --format text takes its" in capsys.readouterr().err


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("text,label", [], None),
        ("Text,label", [], "no column 'text' (data.text_column): 'Text' is read"),
        ("message,label", [], "no column 'text' (data.text_column): 'message' is read"),
        ("message,other", ["--text-field", "message"], None),
        ("1,2", ["--no-header", "--text-field", "1"], None),
    ],
)
def test_the_column_of_a_text(
    classifier: Path,
    tmp_path: Path,
    header: str,
    options: list[str],
    message: str | None,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = with_usual_columns(classifier, tmp_path)
    rows = "" if "--no-header" in options else f"{header}\n"
    (tmp_path / "x.csv").write_text(f'{rows}"one, two",x\nthree,y\n')
    capsys.readouterr()
    assert cli(["classify", str(model), "--file", str(tmp_path / "x.csv"), "--json", *options]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["text"] for line in printed.out.splitlines()] == ["one, two", "three"]
    assert message is None or message in caplog.text


def test_a_table_without_such_a_column_is_refused_once(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "x.csv").write_text("title,message,label\na,b,x\nc,d,y\n")
    assert cli(["classify", str(with_usual_columns(classifier, tmp_path)), "--file", str(tmp_path / "x.csv")]) == 2
    err = capsys.readouterr().err
    assert "x.csv: there is no column 'text' (--text-field); there are 'title', 'message', 'label'; name it, as" in err
    assert err.count("\n") == 1


def with_usual_columns(classifier: Path, folder: Path) -> Path:
    """The model, as if its columns were called `text` and `label`."""
    path = resolve(classifier)
    assert path is not None
    changed = load(path)
    changed[HEADER]["config"]["data"] |= {"text_column": "text", "label_column": "label"}
    save(folder / "usual.ckpt", changed)
    return folder / "usual.ckpt"


# --- words -----------------------------------------------------------------------------------------------------------


def test_messages_name_the_options_of_the_verb() -> None:
    for message, own in {
        "set data.encoding=cp1252": "give --encoding cp1252",
        "if ';' separates its cells, set \"data.separator=';'\"": "if ';' separates its cells, give --separator ';'",
        "set data.quotes=true, or data.quotes=false to keep": "give --quotes, or --no-quotes to keep",
        "data.newlines=keep keeps them": "--newlines keep keeps them",
        "(choose with data.columns.instruction)": "(choose with --columns instruction=NAME)",
        "or say the form with data.format": "or say the form with --format",
    }.items():
        assert in_own_words(message) == own
        assert OwnWords().format(logging.makeLogRecord({"msg": message})) == own


def test_options_have_the_defaults_of_the_settings() -> None:
    import argparse

    from llm_lightning.cli import arguments

    parser = argparse.ArgumentParser()
    arguments.add_file_arguments(parser)
    assert arguments.file_options(parser.parse_args([])) == FileOptions()
    assert arguments.FORMS == FORMS
    for words in (["--format", "xls"], ["--encoding", "latim"], ["--separator", "ab"]):
        with pytest.raises(ValueError, match=words[1]):
            arguments.file_options(parser.parse_args(words))


def test_what_names_records_and_what_a_model(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "one.ckpt").write_bytes(b"")
    (tmp_path / "questions").write_text("{}")
    names = [
        "data",
        "run",
        "one.ckpt",
        "questions",
        "none.jsonl.gz",
        "none.ckpt",
        "*.csv",
        "a.json,b.csv",
        "gpt2-small",
    ]
    found = {name: names_records(str(tmp_path / name) if "," not in name else name) for name in names}
    assert [name for name, is_data in found.items() if is_data] == [
        "data", "questions", "none.jsonl.gz", "*.csv", "a.json,b.csv"
    ]  # fmt: skip
