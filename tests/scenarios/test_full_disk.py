"""No room left: whoever writes names the file and the remedy, in one line, and leaves no half file."""

from __future__ import annotations

import json
import random
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from judge_server import serving
from tiny_run import SETTINGS, fit_here, write_checkpoint

from llm_lightning.callbacks.run_logs import MetricsFile, TensorBoard
from llm_lightning.callbacks.samples import append_section
from llm_lightning.cli.main import main as cli
from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.disk_errors import explain
from llm_lightning.files.frozen_cache import FrozenCache
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig, apply_lora
from llm_lightning.weights.peft_format import export_peft


@contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file of more bytes can be written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def problem(message: str, path: Path) -> str | None:
    """What is wrong with an error line on a file that had no room."""
    line, in_cache = message.rstrip("\n"), path.is_relative_to(cache_dir())
    if "\n" in line or "File too large" not in line or "make room" not in line:
        return f"not one line with a remedy: {line}"
    if f"{path}" not in line:
        return f"does not name {path}: {line}"
    if ("LLM_LIGHTNING_CACHE" in line) != in_cache or "run_name" in line:
        return f"advises the wrong setting: {line}"
    stray = list(path.parent.rglob("*.tmp")) if path.parent.is_dir() else []
    return f"leaves {stray}" if stray else None


@pytest.mark.slow
def test_every_verb_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(write_checkpoint(tmp_path / "gpt.ckpt", context_length=256))
    rows = [{"instruction": f"Say {i}.", "input": "", "output": "it", "model_response": "it"} for i in range(9)]
    records, text = tmp_path / "records.json", tmp_path / "text.txt"
    records.write_text(json.dumps([*rows, rows[0]]))
    text.write_text("to be or not to be")
    out, new = tmp_path / "out", ["--max-new-tokens", "3"]
    out.mkdir()
    cases: list[tuple[list[str], Path, tuple[int, ...]]] = [
        (["respond", checkpoint, str(records), *new, "-o"], out / "answers.json", (0, 100, 500, 1000)),
        (["export", checkpoint], out / "exported", (0, 50, 500, 5000, 20_000)),
        (["compare", checkpoint, checkpoint, str(records), *new, "-o"], out / "page.html", (0, 2000)),
        (["judge", str(records), "--lexical", "-o"], out / "judged.json", (0, 1000)),
        (["near-duplicates", str(records), "--remove", "-o"], out / "kept.jsonl", (0, 50)),
        (["statistics", str(records), "--tokenizer", "byte", "--plot"], out / "lengths.png", (0, 5000)),
        (["inspect-data", str(records), "--tokenizer", "byte", "--html"], out / "records.html", (0, 500)),
    ]
    wrong = []
    for words, output, sizes in cases:
        for n_bytes in sizes:
            with room_for(n_bytes):
                code = cli([*words, str(output)])
            message = capsys.readouterr().err.splitlines()
            named = out / ".answers.json.progress.jsonl" if "answers" in output.name and n_bytes < 700 else output
            found = problem(message[-1] if message else "", named)
            if code != 2 or found:
                wrong.append(f"{words[0]}, {n_bytes} bytes: code {code}, {found}")
    with serving(lambda *_: "70") as server:
        words = ["judge", str(records), "--url", server.url, "-o", str(out / "scores.json")]
        with room_for(10):
            code = cli(words)
        found = problem(capsys.readouterr().err, cache_dir() / "judge")
        wrong += [f"judge, cache: code {code}, {found}"] if code != 2 or found else []
        with room_for(500):
            code = cli(words)
        found = problem(capsys.readouterr().err, out / "scores.json")
        wrong += [f"judge, report: code {code}, {found}"] if code != 2 or found else []
        assert cli(words) == 0
    assert not wrong, "\n".join(wrong)
    assert cli([*cases[0][0], str(out / "answers.json")]) == 0


def test_every_log_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of TensorBoard's, as in a run
    board, table = TensorBoard(tmp_path / "board"), MetricsFile(tmp_path)
    board.log_metrics({"loss": 1.0}, 0)
    board.save()
    table.log_metrics({"train/loss": 1.0}, 0)
    table.save()
    append_section(tmp_path / "samples.md", "## step 0, x\n")

    def fill_board() -> None:
        for step in range(1000):
            board.log_metrics({"loss": 1.0}, step)
            board.log_text("samples", "x" * 1000, step)
        board.save()

    def fill_table() -> None:
        for step in range(1, 100):
            table.log_metrics({"train/loss": 1.0}, step)
        table.save()

    config = GPTConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=16)
    model, lora = GPT(config), LoRAConfig(rank=2)
    apply_lora(model, lora)
    store = FrozenCache({}, width=64, dtype=torch.float32, code="")

    def fill_store() -> None:
        store.ensure([b"a"], [100], lambda _: torch.zeros(100, 64), rows_per_batch=100, description="rows")

    cases: dict[str, tuple[Callable[[], None], Path]] = {
        "TensorBoard": (fill_board, tmp_path / "board"),
        "metrics.csv": (fill_table, tmp_path / "metrics.csv"),
        "samples.md": (lambda: append_section(tmp_path / "samples.md", "x" * 5000), tmp_path / "samples.md"),
        "adapter": (lambda: export_peft(model, lora, tmp_path / "adapter"), tmp_path / "adapter"),
        "frozen": (fill_store, store.folder),
    }
    wrong = []
    for name, (write, path) in cases.items():
        with room_for(300):
            try:
                write()
                found: str | None = "no error"
            except OSError as error:
                found = problem(explain(error, elsewhere="run_name", again="go on"), path)
        wrong += [f"{name}: {found}"] if found else []
    assert not wrong, "\n".join(wrong)


def test_training_without_room_in_the_cache_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(random.Random(0).choices("abcdefghij ", k=60_000)))
    monkeypatch.chdir(tmp_path)
    cases = {"tokens": ([], 20_000), "tokenizers": (["tokenizer=bpe", "tokenizer.vocab_size=900"], 4000)}
    wrong = []
    for part, (words, n_bytes) in cases.items():
        with room_for(n_bytes):
            outcome = fit_here([*SETTINGS, *words, f"data.path={corpus}", f"hydra.run.dir={tmp_path / part}"])
        found = problem(outcome.err, cache_dir() / part)
        wrong += [f"{part}: {found}"] if outcome.code != 2 or found else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli(["statistics", str(tmp_path / "text.txt"), "--tokenizer", "byte"]) == 2
        full.flush()  # as Python does at its end
    told = "standard output: No space left on device; make room and repeat the command"
    assert capsys.readouterr().err == f"llm-lightning statistics: {told}\n"
