"""`llm-lightning lineage`: the chain of checkpoints, and what became of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CONTEXT_LENGTH

from llm_lightning.cli import lineage
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.checkpoint import HEADER, describe, save
from llm_lightning.weights.releases import RELEASES


def write(folder: Path, task: str, parent: str | None, parent_name: str | Path | None, seed: int = 0) -> str:
    """A run folder with one checkpoint; returns its digest."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=257, context_length=CONTEXT_LENGTH, n_layer=1, n_head=2, n_embd=16)
    header = describe(
        task=task,
        model_config=config,
        tokenizer=build_tokenizer("byte"),
        step=1200,
        metrics={"val/loss": 1.5, "val/perplexity": 4.5},
        config={"monitor": "val/loss"},
        lineage={"data": "d" * 64, "parent": parent, "parent_name": str(parent_name) if parent_name else None},
    )
    state = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    return save(folder / "checkpoints" / "best.ckpt", {HEADER: header, "state_dict": state})


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Three runs, each from the one before; their digests."""
    monkeypatch.chdir(tmp_path)
    one = write(tmp_path / "one", "pretraining", None, None)
    two = write(tmp_path / "two", "sft", one, tmp_path / "one")
    return {"one": one, "two": two, "three": write(tmp_path / "three", "dpo", two, tmp_path / "two")}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    parser = argparse.ArgumentParser()
    lineage.add_arguments(parser)
    lineage.run(parser.parse_args(arguments))
    return capsys.readouterr().out.splitlines()


def test_one_line_for_each_run_the_newest_first(chain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    facts = "1,200 steps  val/loss 1.5000  data dddddddddddd  weights"
    assert shown(capsys, "three") == [
        f"dpo               {facts} {chain['three'][:12]}  three/checkpoints/best.ckpt",
        f"└─ sft               {facts} {chain['two'][:12]}  two/checkpoints/best.ckpt",
        f"   └─ pretraining       {facts} {chain['one'][:12]}  one/checkpoints/best.ckpt",
    ]


def test_json_has_whole_digests(chain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    links: list[dict[str, Any]] = [json.loads(line) for line in shown(capsys, "three", "--json")]
    assert [link["digest"] for link in links] == [chain["three"], chain["two"], chain["one"]]
    assert [link["parent"] for link in links] == [chain["two"], chain["one"], None]
    assert {link["state"] for link in links} == {"same"}


def test_a_parent_that_was_trained_on_is_said(chain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("one"), "pretraining", None, None, seed=1)
    lines = shown(capsys, "three")
    assert lines[2].endswith("one/checkpoints/best.ckpt (changed since)")
    assert "changed" not in lines[0] + lines[1]


def test_a_parent_that_is_gone_ends_the_chain(chain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("two/checkpoints/best.ckpt").unlink()
    lines = shown(capsys, "three")
    assert len(lines) == 2
    assert lines[1].endswith(f"weights {chain['two'][:12]}  two (gone)")


def test_a_damaged_parent_is_said(chain: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("two/checkpoints/best.ckpt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert shown(capsys, "three")[1].endswith("two (damaged)")


def test_published_weights_are_named_and_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digest = RELEASES["gpt2-small"].sha256
    assert digest is not None
    write(tmp_path / "run", "sft", digest, "gpt2-small")
    assert shown(capsys, "run")[1] == f"└─ weights           weights {digest[:12]}  gpt2-small"
    write(tmp_path / "run", "sft", "e" * 64, "gpt2-medium")
    assert shown(capsys, "run")[1].endswith("gpt2-medium (not read)")


def test_a_run_that_began_with_itself_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run", "sft", "e" * 64, tmp_path / "run")
    assert len(shown(capsys, str(tmp_path / "run"))) == 2
