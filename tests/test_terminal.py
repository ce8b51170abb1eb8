"""Text of others on a terminal: controls are shown, ordinary text is left alone, and nothing prints by another way."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
import logging
import re
import shutil
import unicodedata
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from judge_server import ESCAPES, response, sends, serving
from test_layering import FILES, PACKAGE, nodes
from tiny_run import SETTINGS, train_here, write_checkpoint, write_corpus

from llm_lightning.cli.main import main as cli
from llm_lightning.metrics.judge import client as judging
from llm_lightning.terminal import GREEN, GREY, PLAIN, guard_messages, inline, say, say_json, say_lines, visible
from llm_lightning.weights import checkpoint as checkpoints

HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202ey"
KEPT = {*"\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
SHOWN = re.compile(r"\\x1b|\\u001b|\\033")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def controls(text: str) -> set[str]:
    """What a terminal would obey in a text, besides line breaks and tabs."""
    return {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - KEPT


# --- characters ------------------------------------------------------------------------------------------------------


def test_every_control_is_shown_and_no_other_character() -> None:
    # U+13430 to U+1343F: of all Unicode versions; some Pythons do not know the later ones.
    known = [chr(code) for code in [*range(0x20000), *range(0xE0000, 0xE2000)] if not 0x13430 <= code <= 0x1343F]
    changed = {char for char in known if visible(char) != char}
    expected = {char for char in known if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - KEPT
    assert expected <= changed
    assert {unicodedata.category(char) for char in changed - expected} <= {"Cn"}
    assert {visible(char).encode("ascii").decode("unicode_escape") for char in changed} == changed
    assert {char for char in known if inline(char) != char} == changed | {"\n", "\t"}


def test_ordinary_text_stays_as_it_is() -> None:
    texts = ["👩‍👩‍👧 ❤️ 🇩🇪 👍🏽", "می‌خواهم", "مرحبا بالعالم ١٢٣", "क्‍ष", "日本語、한국어", "שָׁלוֹם", "ﷺ\ufe0f"]
    for text in (*texts, "e\u0301 a\u00a0b\u2009c", "C:\\x1b", "a\n\tb"):
        assert visible(text) == text
    assert inline("a\n\tb\r") == r"a\n\tb\r"
    assert visible(HOSTILE) == r"x\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202ey"


def test_only_our_colours_pass() -> None:
    out = io.StringIO()
    say(f"{GREEN}a\x1b[31m{PLAIN}{GREY}\x1b[32;1m{PLAIN}", file=out, colours=True)
    assert out.getvalue() == f"{GREEN}a\\x1b[31m{PLAIN}{GREY}\\x1b[32;1m{PLAIN}\n"
    out = io.StringIO()
    say(f"{GREEN}a", file=out)
    assert out.getvalue() == "\\x1b[32ma\n"


def test_lines_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    say_lines(["a\nb", HOSTILE])
    assert capsys.readouterr().out.splitlines() == [r"a\nb", visible(HOSTILE)]
    for ensure_ascii in (True, False):
        value = {f"é{HOSTILE}": [HOSTILE, "\r\n\t\ud800\U000e0041", "é"]}
        say_json(value, ensure_ascii=ensure_ascii)
        printed = capsys.readouterr().out
        assert json.loads(printed) == value
        assert not controls(printed)
        assert ("é" in printed) is not ensure_ascii


def test_a_stream_that_has_not_all_characters() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    say("é \ud800 ok", file=stream, flush=True)
    assert stream.buffer.getvalue() == rb"\xe9 \ud800 ok" + b"\n"


def test_logs_and_warnings_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    error = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(error):
        warnings.simplefilter("always")
        guard_messages()
        try:
            logging.getLogger("anyone").warning("%s is odd", HOSTILE)
            warnings.warn(HOSTILE, stacklevel=1)
        finally:
            logging.setLogRecordFactory(factory)
    assert caplog.records[-1].getMessage() == f"{visible(HOSTILE)} is odd"
    assert visible(HOSTILE) in error.getvalue()
    assert not controls(error.getvalue())


def test_nothing_prints_by_another_way() -> None:
    found = []
    for file in (one for one in FILES if one != PACKAGE / "terminal.py"):
        for node in nodes(file):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("print", "pprint", "traceback.print_exc", "traceback.print_exception") or re.fullmatch(
                    r"sys\.(__)?std(out|err)(__)?(\.buffer)?\.write(lines)?", name
                ):
                    found.append(f"{file}, line {node.lineno}: {name}")
    assert not found, "use llm_lightning.terminal"


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile data, checkpoints and runs, by names that are hostile themselves."""
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE
    folder.mkdir()
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        classes, words = (f"ham{HOSTILE}", f"spam{HOSTILE}"), (chr(97 + i // 10) * (i % 10 + 1) for i in range(60))
        rows = [(f"{HOSTILE} {word}", classes[index % 2]) for index, word in enumerate(words)]
        csv.writer(file).writerows([(f"text{HOSTILE}", f"label{HOSTILE}"), *rows])
    records = [
        {"instruction": f"{HOSTILE} say {index}", "input": "", "output": f"{index} {HOSTILE}",
         f"model_response{HOSTILE}": f"{HOSTILE} {index}", f"model_response {HOSTILE}2": f"{HOSTILE}"}
        for index in range(30)
    ]  # fmt: skip
    pairs = [{**one, "chosen": one["output"], "rejected": HOSTILE * 2} for one in records]
    (folder / "records.json").write_text(json.dumps([*records, records[0]]))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "bad.json").write_text(json.dumps([{HOSTILE: HOSTILE, "instruction": [HOSTILE]}]))
    (folder / "bad.jsonl").write_text(f'{{"text": "{HOSTILE}"}}\n')
    write_corpus(folder / "corpus.txt")
    (folder / "hostile.txt").write_text(f"{HOSTILE} " * 60)
    (folder / "labelled.csv").write_text(f"text,label\n{HOSTILE},{HOSTILE}\n")
    for name, content in (("peft", "adapter_config.json"), ("gpt2", "config.json"), ("gpt2", "llm_lightning.json")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / content).write_text(json.dumps({HOSTILE: HOSTILE, "peft_type": HOSTILE, "model_type": HOSTILE,
            "base_model_name_or_path": HOSTILE, "tokenizer": {"name": HOSTILE}, "format": HOSTILE}))  # fmt: skip
        shutil.copy(folder / "corpus.txt", folder / name / "adapter_model.safetensors")
        shutil.copy(folder / "corpus.txt", folder / name / "model.safetensors")
    _write_checkpoints(folder)
    return folder


def _write_checkpoints(folder: Path) -> None:
    """`told.ckpt` says much that is hostile; others have one hostile value where another is needed."""
    state = checkpoints.load(write_checkpoint(folder / "plain.ckpt", context_length=64))
    header = state[checkpoints.HEADER]
    told = {
        "config": {HOSTILE: {HOSTILE: HOSTILE}, "data": {"path": HOSTILE, "name": HOSTILE}, "monitor": HOSTILE},
        "metrics": {HOSTILE: 1.0},
        "lineage": {"data": HOSTILE, "parent": HOSTILE, "parent_name": f"{folder}/{HOSTILE}.ckpt"},
    }
    heads = {
        "told": told,
        "task": {"task": HOSTILE},
        "tokenizer": {"tokenizer": {"name": HOSTILE}},
    }
    for name, more in heads.items():
        checkpoints.save(folder / f"{name}.ckpt", {**state, checkpoints.HEADER: {**header, **more}})


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of hostile classes, and a model of hostile answers, in a hostile folder."""
    cache = str(tmp_path_factory.mktemp("cache"))
    place, made = tmp_path_factory.mktemp("runs"), {}
    words = {
        "classification": ["data.name=null", f"data.path='{folder}/labels.csv'", f'data.text_column="text{HOSTILE}"',
                           f'data.label_column="label{HOSTILE}"'],
        "sft": [f"data.path='{folder}/records.json'", "model.context_length=256"],
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LIGHTNING_CACHE", cache)
        for task, own in words.items():
            settings = [word for word in SETTINGS if "samples" not in word] if task == "classification" else SETTINGS
            outcome = train_here([*settings, f"task={task}", *own, f"hydra.run.dir={place}/{task}"])
            assert outcome.code == 0, outcome.err
            printed = outcome.out + outcome.err
            assert not controls(printed), f"{task}: {controls(printed)}"
            assert not controls((place / task / "train.log").read_text("utf-8"))
            assert SHOWN.search(printed) or SHOWN.search((place / task / "train.log").read_text("utf-8"))
            made[task] = folder / f"{task}_run"
            shutil.copytree(place / task, made[task])
    return made


def typed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What a verb shows on a terminal."""
    out, error = Terminal(), Terminal()
    root = logging.getLogger()
    with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(root, "handlers", [])
        with contextlib.suppress(SystemExit):
            cli(words)
    return out.getvalue(), error.getvalue()


def check(cases: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shows something hostile, and no control of it."""
    wrong, silent = [], []
    for words in cases:
        try:
            printed, error = typed(words, monkeypatch)
        except Exception as failure:
            wrong.append(f"{[visible(word) for word in words]}: {failure!r}")
            continue
        for colour in (GREEN, GREY, PLAIN):
            printed = printed.replace(colour, "")
        if found := controls(printed) | (controls(error) - {"\r"}):  # of bars
            wrong.append(f"{[visible(word) for word in words]}: {found}")
        if not SHOWN.search(printed + error):
            silent.append(f"{[visible(word) for word in words]}: {printed}{error}")
    assert not wrong, "\n".join(wrong)
    assert not silent, "these print nothing that is hostile:\n" + "\n".join(silent)


@pytest.mark.slow
def test_no_verb_prints_a_control(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, records, pairs = (str(folder / name) for name in ("plain.ckpt", "records.json", "pairs.json"))
    told, bad, out = str(folder / "told.ckpt"), str(folder / "bad.json"), f"{tmp_path}/{HOSTILE}"
    new, column = ["--max-new-tokens", "2"], ["--column", f"model_response{HOSTILE}"]
    cases = [
        [HOSTILE],
        ["inspect", plain, HOSTILE],
        ["inspect", plain, f"--{HOSTILE}"],
        *(["inspect", str(folder / f"{name}.ckpt")] for name in ("told", "task", "tokenizer", "gone")),
        *(["inspect", str(folder / name)] for name in ("peft", "gpt2", "nothing", "corpus.txt")),
        *(["generate", str(folder / name), "to be", *new] for name in ("peft", "gpt2", "tokenizer.ckpt")),
        ["inspect", told, "--json"],
        ["lineage", told],
        ["lineage", told, "--json"],
        ["generate", plain, HOSTILE, *new],
        ["generate", plain, HOSTILE, "b", *new],
        ["generate", plain, HOSTILE * 10, *new],
        ["generate", plain, "--prompts-file", out],
        ["generate", plain, "a", "--device", HOSTILE],
        ["classify", plain, "--file", f"{out}.txt"],
        ["evaluate", plain, "--text", f"{out}.txt"],
        ["judge", records, "--lexical", *column],
        ["judge", records, "--lexical", "--json", *column],
        ["judge", records, "--column", HOSTILE],
        ["judge", bad],
        ["judge", str(folder / "bad.jsonl")],
        ["judge", records, "--url", f"http://{HOSTILE}"],
        ["compare", plain, plain, f"{out}.txt"],
        ["statistics", records],
        ["statistics", records, "--json"],
        ["statistics", records, "--keys", HOSTILE],
        ["statistics", str(folder / "hostile.txt")],
        ["near-duplicates", records],
        ["near-duplicates", records, "--keys", f"model_response{HOSTILE}"],
        ["near-duplicates", records, "--keys", HOSTILE],
        ["near-duplicates", records, "--remove", "-o", f"{out}.jsonl"],
        ["inspect-data", records, "--tokenizer", "byte"],
        ["inspect-data", pairs, "--tokenizer", "byte"],
        ["inspect-data", pairs, "--tokenizer", "byte", "--html", f"{out}.html"],
        ["inspect-data", records, "--tokenizer", HOSTILE],
        ["inspect-data", records, "--template", HOSTILE],
        ["inspect-data", bad],
        ["export", plain, str(folder)],
        ["export", plain, f"{out}/peft", "--format", HOSTILE],
    ]
    check(cases, monkeypatch)


@pytest.mark.slow
def test_no_judge_prints_a_control(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_DELAY", 0.0)
    monkeypatch.chdir(tmp_path)
    servers = {
        "error": sends(response({"error": {"message": ESCAPES}}, "500 Oops")),
        "key": sends(response({"error": {"message": ESCAPES}}, "401 Unauthorized")),
        "redirect": sends(response("", "302 Found", f"Location: /{HOSTILE}".encode().decode("latin-1"))),
        "answer": ESCAPES,
        "reason": sends(f"HTTP/1.1 400 {HOSTILE}\r\nContent-Length: 0\r\n\r\n"),
    }
    one, two = ["--column", f"model_response{HOSTILE}"], ["--column", f"model_response {HOSTILE}2"]
    words = ["judge", str(folder / "records.json"), "--limit", "2"]
    for name, answer in servers.items():
        with serving(lambda *_, answer=answer: answer) as server:
            modes = [[*words, *mode, "--url", server.url, "--model", f"{name}{HOSTILE}"]
                     for mode in (one, ["--pairwise", *one, *two])]  # fmt: skip
            check(modes, monkeypatch)


@pytest.mark.slow
def test_no_verb_prints_a_control_of_a_run(
    folder: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classes, answers, plain = (str(path) for path in (runs["classification"], runs["sft"], folder / "plain.ckpt"))
    records, new, out = str(folder / "records.json"), ["--max-new-tokens", "2"], f"{tmp_path}/{HOSTILE}"
    cases = [
        *(["inspect", run] for run in (classes, answers)),
        ["classify", classes, HOSTILE],
        ["classify", classes, HOSTILE, "--json"],
        ["classify", classes, HOSTILE, "--output", f"{out}.jsonl"],
        ["evaluate", classes, "--split", "val"],
        ["evaluate", classes, "--text", str(folder / "labelled.csv")],
        ["evaluate", classes, "--text", str(folder / "labels.csv")],
        ["respond", answers, records, "-o", f"{out}.json", "--limit", "1", *new],
        ["respond", answers, answers, records, "-o", f"{out}2.json", "--limit", "1", *new],
        ["respond", answers, str(folder / "bad.json"), "-o", f"{out}.json"],
        ["compare", plain, answers, records, "--limit", "2", "-o", f"{out}.html", *new],
        ["inspect-data", answers],
        ["export", plain, f"{out}/export"],
        ["export", classes, f"{out}/classifier"],
    ]
    check(cases, monkeypatch)


@pytest.mark.parametrize("are_many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_training_prints_a_control(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_many: bool
) -> None:
    labels = ["task=classification", f"data.path='{folder}/labels.csv'", "data.name=null"]
    columns = [f'data.text_column="text{HOSTILE}"', f'data.label_column="label{HOSTILE}"']
    preview = ["data.preview=true", "model.context_length=256"]
    owner = {"pid": 1, "host": HOSTILE, "process_start": HOSTILE, "started": HOSTILE, "command": [HOSTILE]}
    command = {"folder": HOSTILE, "config_dir": None, "overrides": [f"+{HOSTILE}=1"]}
    for name, content in (("owner", owner), ("command", command)):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(content))
    few = [
        [*labels, *columns, *preview],
        ["task=pretraining", f"data.path='{folder}/hostile.txt'", *preview],
        [f"task={HOSTILE}"],
        [f"run_name={HOSTILE}"],
        ["task=pretraining", f"data.path='{folder}/corpus.txt'", f"hydra.run.dir={tmp_path}/owner"],
    ]
    many = [
        ["task=sft", f"data.path='{folder}/records.json'", *preview],
        ["task=dpo", f"data.path='{folder}/pairs.json'", *preview],
        labels,
        [*labels, *columns, f'data.labels=["{HOSTILE}"]'],
        ["task=sft", f"data.path='{folder}/bad.json'"],
        ["task=pretraining", f"data.path='{folder}/{HOSTILE}'"],
        ["task=pretraining", f"init_from='{folder}/tokenizer.ckpt'"],
        ["task=pretraining", f"init_from='{folder}/{HOSTILE}'"],
        [f"+{HOSTILE}=1"],
        [f"optimizer.lr={HOSTILE}"],
        [f"resume={folder}/{HOSTILE}"],
        [f"resume={tmp_path}/command"],
        [f"pipeline={HOSTILE}"],
        [f"sweep={HOSTILE}"],
        ["--help", HOSTILE],
    ]
    wrong, silent = [], []
    monkeypatch.chdir(tmp_path)
    for words in many if are_many else few:
        run = [] if any("hydra.run.dir" in word or "resume" in word for word in words) else ["hydra.run.dir=run"]
        settings = [word for word in SETTINGS if "samples" not in word or "classification" not in words[0]]
        outcome = train_here(words if words[0] == "--help" else [*settings, *run, *words])
        if found := controls(outcome.out) | (controls(outcome.err) - {"\r"}):
            wrong.append(f"{[visible(word) for word in words]}: {found} {outcome}")
        if not SHOWN.search(outcome.out + outcome.err):
            silent.append(f"{[visible(word) for word in words]}: {outcome}")
    assert not wrong, "\n".join(wrong)
    assert not silent, "these print nothing that is hostile:\n" + "\n".join(silent)


def test_text_for_a_program_is_as_it_was_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(folder / "plain.ckpt"), HOSTILE, "--max-new-tokens", "1", "--greedy"]
    for how in ("--stream", "--no-stream"):
        assert cli([*command, how]) == 0
        raw = capsys.readouterr().out
        assert raw.startswith(HOSTILE)
        assert typed([*command, how], monkeypatch)[0] == visible(raw)
