"""`llm-lightning export --format gguf`: adapters merged, template and origin taken along, refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_gguf
import pytest
import torch
from made_gguf import CONFIGS, random_model
from tiny_run import write_checkpoint

from llm_lightning.cli.main import main as cli
from llm_lightning.data.templates.slots import TEMPLATES
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.lora import LoRAConfig, apply_lora, merge_and_unload
from llm_lightning.weights import checkpoint
from llm_lightning.weights.gguf import llama_cpp
from llm_lightning.weights.gguf.checking import read_model
from llm_lightning.weights.gguf.header import read_header

IDS = torch.arange(20)[None]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama.cpp, which tests of its own ask."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def write(path: Path, model: torch.nn.Module, **more: Any) -> Path:
    header = checkpoint.describe(
        task="sft", model_config=CONFIGS["llama"], tokenizer=made_gguf.tokenizer(), config={}, **more
    )
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(path, {"state_dict": state, checkpoint.HEADER: header})
    return path


def test_a_tuned_model_becomes_a_file_with_its_adapters_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, template = LoRAConfig(rank=2), TEMPLATES["chatml"].describe()
    model = random_model(CONFIGS["llama"])
    apply_lora(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name.lower():
                parameter.normal_(std=0.1)
    lineage = {"parent_name": "smollm2-135m-instruct", "parent": "f" * 64, "base": None}
    path = write(tmp_path / "a.ckpt", model, lora=vars(config), template=template, lineage=lineage)
    assert cli(["export", str(path), str(tmp_path / "out"), "--format", "gguf", "--dtype", "f32"]) == 0
    merged = merge_and_unload(model)
    with torch.no_grad():
        torch.testing.assert_close(read_model(tmp_path / "out" / "model.gguf")(IDS), merged(IDS))
    metadata = read_header(tmp_path / "out" / "model.gguf").metadata
    assert metadata["llm_lightning.parent_name"] == "smollm2-135m-instruct"
    assert metadata["llm_lightning.digest"] == checkpoint.verify(path)
    assert "<|im_start|>" in (tmp_path / "out" / "Modelfile").read_text()
    assert "'<|im_start|>user\\n'" in metadata["tokenizer.chat_template"]
    assert "llama, 80,192 parameters in f32; log-probabilities differ by" in capsys.readouterr().out


def test_a_second_export_replaces_the_first_only_when_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.ckpt", random_model(CONFIGS["llama"]))
    command = ["export", str(path), str(tmp_path / "out"), "--format", "gguf"]
    assert cli(command) == 0
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["dtype"] == "f16"
    assert cli([*command, "--dtype", "bf16"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert cli([*command, "--dtype", "bf16", "--overwrite"]) == 0
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf"], "GGUF has no form for tokenizer=byte"),
        (
            ["--format", "gguf", "--dtype", "float32"],
            "--format gguf has no --dtype float32; there are f16, f32, bf16, q8_0",
        ),
        (["--dtype", "q8_0"], "--format hf has no --dtype q8_0; there are float32, bfloat16"),
        (["--format", "peft", "--dtype", "f16"], "the adapter keeps its own; leave it out"),
    ],
)
def test_what_does_not_fit_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_checkpoint(tmp_path / "a.ckpt")
    assert cli(["export", str(path), str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Classifier(random_model(CONFIGS["llama"]), 2, pooling="last", causal=True)
    head = {"labels": ["ham", "spam"], "pooling": "last", "causal": True, "pad_to": None, "pad_id": 0}
    path = write(tmp_path / "a.ckpt", model, classifier=head)
    assert cli(["export", str(path), str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "GGUF has no form for this model, a classifier" in capsys.readouterr().err
