"""Bad input, through the real entry points: one clear line that names the remedy, exit code 2, earlier files intact."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import ROOT, SETTINGS, Outcome, digests, fit_here, train_here, write_checkpoint, write_corpus

from llm_lightning.cli.main import main as cli
from llm_lightning.data.corpus import sources
from llm_lightning.experiments.run_folder import open_run
from llm_lightning.files.download import Pinned
from llm_lightning.weights import checkpoint as checkpoints

Prepare = Callable[[Path], list[str]]


class Gadget:
    """Unpickling one runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def data(name: str, content: bytes | str) -> Prepare:
    """A corpus with this content."""
    return lambda folder: [f"data.path={put(folder / name, content)}"]


def settings(*arguments: str) -> Prepare:
    return lambda _: list(arguments)


def experiment(text: str) -> Prepare:
    """An experiment file of the user's own."""

    def prepare(folder: Path) -> list[str]:
        put(folder / "mine" / "experiment" / "bad.yaml", f"# @package _global_\n{text}\n")
        return [f"--config-dir={folder / 'mine'}", "experiment=bad"]

    return prepare


# --- checkpoints that are none -----------------------------------------------------------------------------------


def corrupt(path: Path) -> None:
    content = bytearray(write_checkpoint(path).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    content = write_checkpoint(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def foreign(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "pytorch-lightning_version": "2.6.6"}, path)


def malicious(path: Path) -> None:
    torch.save({"state_dict": Gadget(path.parents[1] / "canary")}, path)


def malicious_and_signed(path: Path) -> None:
    """As a forger who knows the format writes it."""
    malicious(path)
    archive = path.read_bytes()
    mark = checkpoints._MARK + hashlib.sha256(archive[:-2]).hexdigest().encode()
    path.write_bytes(archive[:-2] + len(mark).to_bytes(2, "little") + mark)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Gadget(path.parents[1] / "canary")))


DAMAGED = {
    corrupt: r"is corrupt: its digest is \w{64}, but it was written as \w{64}; use another checkpoint",
    truncated: r"is not a complete llm-lightning checkpoint \(truncated.*; use another checkpoint",
    foreign: r"is not a complete llm-lightning checkpoint .*written by another program.*\.safetensors",
    malicious: r"is not a complete llm-lightning checkpoint .*written by another program",
    malicious_and_signed: r"cannot be loaded safely \(Weights only load failed.*; use another checkpoint",
    pickled: r"is not a complete llm-lightning checkpoint .*written by another program",
}


def weights(damage: Callable[[Path], None]) -> Prepare:
    """Weights to start from."""

    def prepare(folder: Path) -> list[str]:
        (folder / "weights").mkdir()
        damage(folder / "weights" / "given.ckpt")
        return [f"init_from={folder / 'weights' / 'given.ckpt'}"]

    return prepare


def run_folder(damage: Callable[[Path], None]) -> Prepare:
    """A run to be continued, all of whose checkpoints are bad."""

    def prepare(folder: Path) -> list[str]:
        (folder / "run" / "checkpoints").mkdir(parents=True)
        damage(folder / "run" / "checkpoints" / "step_00000002.ckpt")
        put(folder / "run" / "metrics.csv", "step,train/loss\n0,5.5\n")
        return []

    return prepare


def longer_context(folder: Path) -> list[str]:
    return [f"init_from={write_checkpoint(folder / 'given.ckpt')}", "model.context_length=32"]


def pickled_weights(folder: Path) -> list[str]:
    return [f"init_from={put(folder / 'weights' / 'pytorch_model.bin', b'x').parent}"]


def damaged_safetensors(folder: Path) -> list[str]:
    file = folder / "model.safetensors"
    save_file({"wte.weight": torch.zeros(3, 4)}, file)
    file.write_bytes(file.read_bytes()[:-1])
    return [f"init_from={file}"]


def run_folder_is_a_file(folder: Path) -> list[str]:
    return [f"hydra.run.dir={put(folder / 'file', 'precious')}"]


# (name, what is prepared and typed beside the tiny settings, what the one line says)
COMMAND_LINES: list[tuple[str, Prepare, str]] = [
    ("unknown key", settings("optimizer.lrr=1"), r"unknown key 'optimizer\.lrr'; did you mean 'optimizer\.lr'\?"),
    ("unknown key behind +", settings("+optimizer.lrr=1"), r"unknown key .*did you mean 'optimizer\.lr'\?"),
    ("unknown key behind ++", settings("++optimizer.lrr=1"), r"unknown key .*did you mean 'optimizer\.lr'\?"),
    ("unknown group", settings("optimzer=adamw"), r"'optimzer'; did you mean 'optimizer'\?"),
    ("unknown option", settings("model=nanno"), r"model=nanno: no such option; did you mean 'nano'\?"),
    (
        "unknown key in a file",
        experiment("optimizer:\n  lrr: 1"),
        r"'optimizer\.lrr' in .*bad\.yaml; did you mean 'optimizer\.lr'\?",
    ),
    ("unknown group in a file", experiment("defaults:\n  - override /modle: nano"), r"'modle'.* mean 'model'\?"),
    ("unknown option in a file", experiment("defaults:\n  - override /model: nanno"), r"model=nanno.*mean 'nano'\?"),
    ("broken file", experiment("seed: ["), r"bad\.yaml"),
    (
        "foreign target",
        settings("task._target_=os.system"),
        r"task\._target_='os\.system' is not allowed.*allow_targets",
    ),
    ("foreign target in a file", experiment("task:\n  _target_: builtins.eval"), r"builtins\.eval' is not allowed"),
    ("tokenizer", settings("tokenizer=tiktoken", "tokenizer.name=cl100k"), r"cl100k.*cl100k_base"),
    ("no such folder", settings("--config-dir=nowhere"), r"^error: --config-dir nowhere: no such folder"),
    ("nothing to resume", lambda folder: [f"resume={folder}"], r"resume=.*: no run in that folder"),
    ("unknown sweep", lambda _: ["sweep=nothing"], r"sweep=nothing: no such option; .*book_ch06_table"),
    ("missing file, typed", settings("data.path=nowhere.txt"), r"nowhere\.txt does not exist .*the path .*data\.path"),
]
CASES: list[tuple[str, Prepare, str]] = [
    ("missing file", settings("data.path=nowhere.txt"), r"nowhere\.txt does not exist .*check the path .*data\.path"),
    ("empty file", data("empty.txt", ""), r"empty\.txt holds no text: it is empty; give a file or folder with text"),
    ("invalid UTF-8", data("latin.txt", b"a\ncaf\xe9 au lait"), r"latin\.txt, line 2: byte 5 \(0xe9\) .*data.encoding"),
    ("UTF-16", data("utf16.txt", "hello".encode("utf-16-le")), r"utf16\.txt looks like UTF-16 without .*=utf-16-le"),
    (
        "malformed line",
        data("x.jsonl", '{"text": "a"}\n{"text": \n'),
        r"1 bad record: .*x\.jsonl:2: not JSON",
    ),
    (
        "missing field",
        data("x.jsonl", '{"body": "a", "title": "b"}'),
        r"x\.jsonl: no record has a field 'text' \(data\.text_field\).*'body'.*'title'",
    ),
    ("short corpus", data("short.txt", "hello"), r"not fill one window of 16 .*use more text, or lower model\.cont"),
    ("unknown corpus", settings("data.path=null", "data.name=the_verdit"), r"did you mean the_verdict\?"),
    ("long prompt", settings("callbacks.samples.prompts=['12345678901234567']"), r"prompts\[0\] has 17 tokens.*= 15;"),
    ("long warmup", settings("scheduler.warmup=4"), r"warmup.*4.*4.*steps"),
    ("no batch", settings("data.batch_size=0"), r"data\.batch_size=0 must be at least 1"),
    (
        "batch over corpus",
        settings("data.batch_size=9999", "data.drop_last=true"),
        r"do not fill one batch of data\.batch_size=9999 .*drop_last=false",
    ),
    ("heads", settings("model.n_head=3"), r"n_embd=16 .*n_head=3"),
    ("small vocabulary", settings("model.vocab_size=9"), r"model\.vocab_size=9 is smaller than the tokenizer's 257; "),
    (
        "no end",
        settings("trainer.max_steps=-1", "trainer.max_epochs=-1"),
        r"no end: set trainer\.max_epochs or trainer",
    ),
    ("precision", settings("trainer.precision=bf17"), r"bf17.*bf16-mixed"),
    ("split", settings("data.split=half"), r"data\.split=half.*document"),
    ("fraction", settings("data.val_fraction=2"), r"val_fraction=2"),
    ("learning rate", settings("optimizer.lr=-1"), r"optimizer\.lr=-1"),
    ("checkpoints kept", settings("callbacks.checkpoints.keep=1"), r"keep=1 must be at least 2"),
    ("device", settings("accelerator=mps"), r"(?i)mps"),
    ("missing weights", settings("init_from=gpt3"), r"no weights at gpt3; give .*gpt2-small"),
    ("longer context", longer_context, r"model\.context_length=32 exceeds the 16 positions .*=16 or less"),
    ("pickled weights", pickled_weights, r"pytorch_model\.bin is not read.*save it as safetensors"),
    ("damaged safetensors", damaged_safetensors, r"model\.safetensors is damaged .*; get it again"),
    ("run folder is a file", run_folder_is_a_file, r"/file: File exists; choose another"),
]


def labelled(name: str, content: bytes | str, *arguments: str) -> Prepare:
    """Labelled texts with this content."""
    return lambda folder: ["task=classification", f"data.path={put(folder / name, content)}", *arguments]


def table(n_ham: int, n_spam: int, more: str = "") -> str:
    """As many labelled texts, no two alike, and further lines."""
    letters = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(n_ham + n_spam)]
    rows = [
        f"{'spam' if i < n_spam else 'ham'} {word}\t{'spam' if i < n_spam else 'ham'}" for i, word in enumerate(letters)
    ]
    return "\n".join(["text\tlabel", *rows, more])


GOOD = table(40, 40)
CASES += [
    ("unknown label", labelled("x.tsv", table(40, 40, "hi\tspma"), "data.labels=[ham,spam]"),
     r"x\.tsv:82: unknown label 'spma' .*did you mean 'spam'\?"),
    ("one class", labelled("x.tsv", table(40, 0)), r"all 40 records have the label 'ham'; there must be at least two"),
    ("class missing in a split", labelled("x.tsv", table(40, 1)),
     r"the val split has no text of class 'spam' .*give more texts, or raise data\.val_fraction"),
    ("empty text", labelled("x.tsv", table(9, 9, " \tham")), r"x\.tsv: .* line 20: the text is empty"),
    ("wrong columns", labelled("x.csv", "body,kind\nhi,ham\n"),
     r"no column 'text' \(data\.text_column\) and 'label' .* there are 'body', 'kind'"),
    ("unbalanced quotes", labelled("x.csv", 'text,label\nfine,ham\n"open,ham\n'),
     r"x\.csv, line 3: quotes are not balanced from here on .*; double a quotation mark"),
    ("extra columns", labelled("x.tsv", table(9, 9, "a\tb\tham")), r"line 20: 3 columns, more than the 2 of the head"),
    ("NUL byte", labelled("x.tsv", table(9, 9, "a\0b\tham")), r"line 20: the text holds a NUL byte; is the file dam"),
    ("labels in latin-1", labelled("x.tsv", b"text\tlabel\ncaf\xe9\tham"), r"x\.tsv, line 2: byte 14 .*data.encoding"),
    ("bad labelled JSON", labelled("x.jsonl", '{"text": "a", "label": "x"}\n{"text"'), r"line 2: not JSON"),
    ("missing labelled file", lambda _: ["task=classification", "data.path=nowhere.csv"],
     r"nowhere\.csv does not exist .*; check .*data\.path"),
    ("too many blocks", labelled("x.tsv", GOOD, "task.trained_blocks=7"), r"trained_blocks=7 must be between 0 and"),
    ("pads that are read", labelled("x.tsv", GOOD, "task.pooling=last_position"), r"reads the padding.*set data\.pad_"),
    ("pooling", labelled("x.tsv", GOOD, "task.pooling=middle"), r"task\.pooling='middle' must be one of last, first"),
    ("class weights", labelled("x.tsv", GOOD, "task.class_weights=[1,2,3]"), r"class_weights=.*2 positive numbers"),
    ("LoRA target without a layer", labelled("x.tsv", GOOD, "lora=default", "lora.targets=[q_proj]"),
     r"lora\.targets: 'q_proj' matches no linear layer; there are down_proj, head, lm_head, out_proj"),
    ("LoRA on a tied weight", lambda _: ["lora=default", "lora.targets=[lm_head]"],
     r"lora\.targets: lm_head\.weight is tied to token_embedding\.weight.*set model\.tied_head=false"),
    ("LoRA rank", lambda _: ["lora=default", "lora.rank=0"], r"lora\.rank=0 must be at least 1"),
    ("LoRA rank over a layer", lambda _: ["lora=default", "lora.rank=17"], r"lora\.rank=17 exceeds the 16 inputs"),
]  # fmt: skip


def records(name: str, content: str, *arguments: str) -> Prepare:
    """Instruction records with this content."""
    length = [] if any("context_length" in word for word in arguments) else ["model.context_length=400"]
    return lambda folder: ["task=sft", f"data.path={put(folder / name, content)}", *length, *arguments]


def questions(n: int = 40, **fields: str) -> str:
    """As many records, one a line; `fields` are those of the last."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(n)]
    rows[-1] |= fields
    return "".join(json.dumps(row) + "\n" for row in rows)


CASES += [
    ("no output field", records("q.jsonl", questions() + '{"instruction": "a", "answer": "b"}\n'),
     r"q\.jsonl: .* line 41: no field 'output'; there are 'instruction', 'answer' \(choose with data\.columns"),
    ("empty output", records("q.jsonl", questions(output=" ")), r"q\.jsonl: .* line 40: the output is empty; .*=skip"),
    ("empty instruction", records("q.jsonl", questions(instruction="")), r"q\.jsonl: .* line 40: the instruction is"),
    ("number as output", records("q.json", '[{"instruction": "a",\n"output": 7}]'), r"q\.json: .*holds 7, not tex"),
    ("half a JSON array", records("q.json", '[\n{"instruction": "a", "output": "b"},\n{"instruction"'),
     r"q\.json.*(:3|line 3)"),
    ("no records", records("q.json", "[]"), r"q\.json"),
    ("roles", records("q.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n'),
     r"q\.jsonl: .* line 1: the conversation has no question with an answer: its roles are user"),
    ("records beyond the context", records("q.jsonl", questions(), "model.context_length=20", "data.too_long=drop"),
     r"(do not fit into|fits into) 20 tokens"),
    ("answers beyond the context", records("q.jsonl", questions(8, output="x" * 500), "data.split=order",
     "data.val_fraction=0.2", "data.test_fraction=0.2"),
     r"1 of 8 records do not fit into 400 tokens \(1 dropped, 0 answers cut\), more than data\.max_dropped=0\.05"),
    ("no response slot", records("q.jsonl", questions(), "data.template='Q: {instruction}'"),
     r"template data\.template has no \{response\} slot"),
    ("unknown placeholder", records("q.jsonl", questions(), "data.template='{instruction} {respons}'"),
     r"unknown placeholder \{respons\}; did you mean \{response\}\?"),
    ("unknown template", records("q.jsonl", questions(), "data.template=alpacca"), r"did you mean alpaca\?"),
    ("no input slot", records("q.jsonl", questions(input="b"), "data.template='{instruction} {response}'"),
     r"q\.jsonl:40 has an input, but template data\.template has no \{input\} slot"),
    ("loss_on", records("q.jsonl", questions(), "data.loss_on=answer"), r"data\.loss_on='answer' must be one of resp"),
    ("too few records", records("q.jsonl", questions(3)), r"3 records leave none for (val|test); give more, or raise"),
    ("missing records", lambda _: ["task=sft", "data.path=nowhere.json"],
     r"nowhere\.json does not exist .*; check .*data\.path"),
    ("unknown instruction set", lambda _: ["task=sft", "data.path=null", "data.name=alpaca"],
     r"data\.name=alpaca is unknown: did you mean alpaca_52k\?"),
]  # fmt: skip


def pairs(*arguments: str, rows: str | None = None) -> Prepare:
    """Pairs in x.jsonl; its last line is `rows` where that is given."""
    good = "".join(
        json.dumps({"instruction": f"Say {i}.", "chosen": f"{i}", "rejected": "no"}) + "\n" for i in range(40)
    )
    typed = ["task=dpo", "model.context_length=400", *arguments]
    return lambda folder: [*typed, f"data.path={put(folder / 'x.jsonl', good + (rows or ''))}"]


CASES += [
    ("no rejected answer", pairs(rows='{"instruction": "a", "chosen": "b"}\n'),
     r"x\.jsonl: .* line 41: no field 'rejected'; there are 'instruction', 'chosen' \(choose with data\.columns"),
    ("empty chosen answer", pairs(rows='{"instruction": "a", "chosen": " ", "rejected": "b"}\n'),
     r"x\.jsonl: .* line 41: the chosen answer is empty; data\.empty_answer=skip leaves such records out"),
    ("two histories", pairs(rows=json.dumps({
        side: [{"role": "user", "content": side}, {"role": "assistant", "content": "b"}]
        for side in ("chosen", "rejected")})),
     r"x\.jsonl: .* line 41: chosen and rejected must be alike up to their last message"),
    ("pairs beyond the context", pairs("data.max_length=20", "data.too_long=drop"),
     r"(do not fit into|fits into) 20 tokens"),
    ("all pairs alike", lambda folder: ["task=dpo", "model.context_length=400", "data.path=" + str(put(
        folder / "x.json", json.dumps([{"prompt": f"{i}", "chosen": "b", "rejected": "b"} for i in range(40)])))],
     r"no train pair of two different answers"),
    ("missing pairs", lambda _: ["task=dpo", "data.path=nowhere.json"], r"nowhere\.json does not exist"),
    ("unknown preference set", lambda _: ["task=dpo", "data.path=null", "data.name=short_preference"],
     r"data\.name=short_preference is unknown: did you mean short_preferences\?"),
    ("SFT run that does not exist", pairs("init_from=outputs/sft/nothing"), r"no weights at outputs/sft/nothing"),
    ("preference loss", pairs("task.loss=sigmod"), r"'sigmod' is unknown: did you mean sigmoid\?"),
    ("beta", pairs("task.beta=0"), r"beta=0.* must be more than 0"),
    ("label smoothing", pairs("task.label_smoothing=0.5"),
     r"label_smoothing=0\.5 must be at least 0 and less than 0\.5"),
    ("reference without adapters", pairs("task.reference=adapter_off"),
     r"task\.reference=adapter_off needs adapters, .*add lora=default, or use copy or cached"),
    ("unknown reference", pairs("task.reference=cashed"), r"'cashed' is unknown: did you mean cached\?"),
    ("missing reference", pairs("task.reference=outputs/sft/nothing"),
     r"'outputs/sft/nothing' is no longer accepted: .*use auto, copy"),
    ("dropout beside a reference", pairs("model.dropout=0.1"), r"set model\.dropout=0 and lora\.dropout=0"),
]  # fmt: skip
for bad, text in DAMAGED.items():
    CASES += [(f"{bad.__name__} weights", weights(bad), text), (f"{bad.__name__} run", run_folder(bad), text)]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., None]:
    """Type a command; it must end as bad input should."""
    folder = tmp_path / "work"
    base = [*SETTINGS, f"data.path={write_corpus(folder.with_suffix('.txt'))}", f"hydra.run.dir={folder / 'run'}"]

    def check(arguments: list[str], message: str, run: Callable[[list[str]], Outcome] = train_here) -> None:
        before = digests(tmp_path)
        names = {word.partition("=")[0] for word in arguments}
        if "task=classification" in arguments:  # it has no samples of text
            names |= {"callbacks.samples.prompts", "callbacks.samples.max_new_tokens"}
        kept = [word for word in base if word.partition("=")[0] not in names]
        typed = sorted(kept + arguments, key=lambda word: not word.startswith("--"))  # options stand first
        assert_refused(run(typed), message)
        after = digests(tmp_path)
        assert {path: after.get(path) for path in before} == before
        assert not [path for path in after if path.name == "canary" or path.suffix == ".tmp"]

    return check


def assert_refused(outcome: Outcome, message: str, prefix: str = "error: ") -> None:
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(prefix)
    assert re.search(message, lines[0]), lines[0]
    assert outcome.code == 2
    assert "Traceback" not in outcome.out


@pytest.mark.parametrize(
    ("run", "prepare", "message"),
    [(train_here, *case[1:]) for case in COMMAND_LINES] + [(fit_here, *case[1:]) for case in CASES],
    ids=[case[0] for case in COMMAND_LINES + CASES],
)
def test_bad_input_ends_in_one_line(tmp_path: Path, refused: Any, run: Any, prepare: Prepare, message: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    refused(prepare(folder), message, run)


ADAPTED = ["task=classification", "lora=default", "lora.rank=2", "trainer.max_steps=4"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ADAPTED` without a summary, as if it had been killed."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    settings = [word for word in SETTINGS if "samples" not in word]
    assert fit_here([*settings, *ADAPTED, f"hydra.run.dir={folder}"]).code == 0
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("lora.rank=3", r"cannot resume.*lora\.rank.*2.*3"),
        ("lora.targets=[qkv_proj]", r"cannot resume.*lora\.targets"),
        ("lora=null", r"cannot resume.*lora"),
        ("task.trained_blocks=0", r"cannot resume.*task\.trained_blocks.*auto.*0"),
        ("data.split_seed=7", r"cannot resume.*data\.split_seed.*123.*7"),
    ],
)
def test_what_may_not_change_on_resume(tmp_path: Path, refused: Any, killed: Path, changed: str, message: str) -> None:
    shutil.copytree(killed, tmp_path / "work" / "run")
    names = {changed.partition("=")[0]} | ({"lora.rank"} if changed == "lora=null" else set())
    kept = [word for word in ADAPTED if word.partition("=")[0] not in names]
    refused([*kept, changed, "data.path=null"], message, fit_here)


def test_a_run_folder_in_use_names_the_process(tmp_path: Path, refused: Any) -> None:
    with open_run(tmp_path / "work" / "run", {}):
        refused([], rf"run folder .*run is in use by process {os.getpid()} .*wait for it to end, stop it, or choose")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder(tmp_path: Path, refused: Any) -> None:
    run = tmp_path / "work" / "run"
    run.mkdir(parents=True, mode=0o500)
    refused([], r"run/\.lock: Permission denied; ")


@pytest.fixture
def server() -> Iterator[str]:
    """A web server that answers everything with the same six bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"forged")

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_download_with_the_wrong_digest(refused: Any, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = Pinned(f"{server}/the-verdict.txt", "0" * 64, None, "the-verdict.txt")
    monkeypatch.setitem(sources.NAMED, "the_verdict", pinned)
    message = r"cannot download .*: the 6 bytes received have sha256 \w{64}, expected 0{64}; .*put a copy"
    refused(["data.path=null", "data.name=the_verdict"], message)


@pytest.mark.parametrize("n_bytes", [0, 1000, 10_000])
def test_a_full_disk(tmp_path: Path, refused: Any, n_bytes: int) -> None:
    """No file of more than `n_bytes` can be written: not the configuration, not the tokens, not the checkpoint."""
    put(tmp_path / "work" / "run" / "notes.txt", "precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        refused([], r"File too large.*make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- the tools ---------------------------------------------------------------------------------------------------

VERBS = {
    "generate": lambda checkpoint, _: ["generate", checkpoint, "to be"],
    "evaluate": lambda checkpoint, folder: ["evaluate", checkpoint, "--text", str(write_corpus(folder / "text.txt"))],
    "export": lambda checkpoint, folder: ["export", checkpoint, str(folder / "exported")],
    "inspect": lambda checkpoint, _: ["inspect", checkpoint],
}


def run_cli(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Outcome:
    capsys.readouterr()
    return Outcome(cli(arguments), *capsys.readouterr())


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verb", VERBS)
def test_every_tool_refuses_a_bad_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    damage(folder / "last.ckpt")
    for given in (folder / "last.ckpt", tmp_path / "run"):
        arguments = VERBS[verb](str(given), tmp_path)
        before = digests(tmp_path)
        assert_refused(run_cli(arguments, capsys), DAMAGED[damage], prefix=f"llm-lightning {verb}: ")
        assert digests(tmp_path) == before


@pytest.mark.parametrize("verb", VERBS)
def test_every_tool_refuses_a_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    for given, message in (("nowhere.ckpt", "no checkpoint at"), ("nowhere", "no weights at nowhere; give")):
        outcome = run_cli(VERBS[verb](given, tmp_path), capsys)
        assert_refused(outcome, message, prefix=f"llm-lightning {verb}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "GOOD", "12345678901234567"], r"17 tokens.*16"),
        (["generate", "GOOD"], r"no prompt: give one"),
        (["generate", "GOOD", "a", "--temperature", "-1"], r"temperature"),
        (["generate", "GOOD", "a", "--device", "cuda:77"], r"--device cuda:77 is not available here; use .*cpu"),
        (["evaluate", "GOOD", "--text", "nowhere.txt"], r"nowhere\.txt does not exist"),
        (["evaluate", "GOOD", "--split", "val"], r"does not say which text .*use --text FILE"),
        (["export", "GOOD", "FOLDER"], r"is not empty; choose another folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_tools_refuse_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    words = {"GOOD": str(write_checkpoint(tmp_path / "good.ckpt")), "FOLDER": str(tmp_path)}
    before = digests(tmp_path)
    outcome = run_cli([words.get(word, word) for word in arguments], capsys)
    assert_refused(outcome, message, prefix=f"llm-lightning {arguments[0]}: ")
    assert digests(tmp_path) == before


# --- as the shell sees it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train.py", "optimizer=adamww"], r"^error: optimizer=adamww: no such option; did you mean 'adamw'\?"),
        (["-m", "llm_lightning.cli.main", "runs", "nowhere"], r"^llm-lightning runs: nowhere does not exist; give"),
    ],
    ids=["unknown option", "missing folder"],
)
def test_exit_codes_of_real_processes(tmp_path: Path, command: list[str], message: str) -> None:
    script = [str(ROOT / "train.py"), *command[1:]] if command[0] == "train.py" else command
    done = subprocess.run([sys.executable, *script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), message, prefix="")
