"""Exported folders: a flipped bit is named, and at every instant the old or the new export stands there."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrained import CONFIG, TEXT, random_gpt

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig, adapter_state, apply_lora
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights import export_folder, hf_export
from llm_lightning.weights.hf_export import export_hf
from llm_lightning.weights.load import load_model
from llm_lightning.weights.peft_format import export_peft
from llm_lightning.weights.pretrained import load_pretrained

SMALL = replace(CONFIG, vocab_size=257, n_layer=1, n_embd=8, n_head=2)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what it would say of the export is tested elsewhere


def export(folder: Path, seed: int, config: GPTConfig = SMALL) -> None:
    model = random_gpt(config)
    with torch.no_grad():
        model.final_norm.bias[0] = float(seed)
    export_hf(model, config, build_tokenizer("byte"), folder, overwrite=True)


def exported(folder: Path) -> float:
    """Which of the exports stands there, whole."""
    return float(load_pretrained(folder).state["final_norm.bias"][0])


@pytest.mark.slow
def test_every_flip_in_a_file_that_is_read_is_named(tmp_path: Path) -> None:
    """120 flips of one bit each, over the files that a reader opens."""
    tokenizer = build_tokenizer("bpe", vocab_size=280, texts=[TEXT])
    config = replace(SMALL, vocab_size=280)
    base = GPT(config)
    export_hf(base, config, tokenizer, tmp_path / "model")
    header = checkpoints.describe(task="pretraining", model_config=config, tokenizer=tokenizer)
    weights = {f"model.{name}": tensor for name, tensor in base.state_dict().items()}
    checkpoints.save(tmp_path / "base.ckpt", {"state_dict": weights, checkpoints.HEADER: header})
    lora = LoRAConfig(rank=2)
    apply_lora(base, lora)
    for tensor in adapter_state(base).values():
        torch.nn.init.normal_(tensor)
    export_peft(base, lora, tmp_path / "adapter", base_name=str(tmp_path / "base.ckpt"))
    draw, wrong = random.Random(0), []
    for folder, names in {
        "model": ("config.json", "llm_lightning.json", "model.safetensors"),
        "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    }.items():
        load_model(tmp_path / folder)
        for file in (tmp_path / folder / name for name in names):
            content = file.read_bytes()
            for bit in (draw.randrange(8 * len(content)) for _ in range(24)):
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                file.write_bytes(damaged)
                try:
                    load_model(tmp_path / folder)
                    wrong.append(f"{file.name}, bit {bit}: loaded")
                except ValueError as error:
                    if str(file) not in str(error) or "delete" not in str(error) or "\n" in str(error):
                        wrong.append(f"{file.name}, bit {bit}: {error}")
            file.write_bytes(content)
    assert not wrong, "\n".join(wrong)


def test_a_change_that_was_meant(tmp_path: Path) -> None:
    export(tmp_path / "model", 1)
    report, config = tmp_path / "model" / "export_report.json", tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_pdrop": 0.5}))
    for damage in ("{", "[]", "{}", '{"sha256": 3}', '{"sha256": {"config.json": 3}}', "[" * 100_000):
        before = report.read_text()
        report.write_text(damage)
        with pytest.raises(ValueError, match=r"export_report.json is damaged .* or delete it"):
            load_pretrained(tmp_path / "model")
        report.write_text(before)
    with pytest.raises(ValueError, match=r"config.json is not what was exported: .* or delete .*export_report.json"):
        load_pretrained(tmp_path / "model" / "model.safetensors")
    report.unlink()
    assert load_pretrained(tmp_path / "model").config.attention_dropout == 0.5


def test_what_was_added_to_an_export_is_not_lost(tmp_path: Path) -> None:
    export(tmp_path / "model", 1)
    (tmp_path / "model" / "later").mkdir()
    with pytest.raises(ValueError, match=r"model holds later, which is not of the export .* move it elsewhere"):
        export(tmp_path / "model", 2)
    (tmp_path / "model" / "later").rename(tmp_path / "later")
    export(tmp_path / "model", 2)
    assert exported(tmp_path / "model") == 2


# --- killed exports ----------------------------------------------------------------------------------------------


def killed(action: Callable[[], None], patch: pytest.MonkeyPatch, target: Any, name: str, *, after: bool) -> bool:
    """Run `action` in a child process that dies, as by SIGKILL, before or after it calls `target.name`."""
    real = getattr(target, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            patch.setattr(target, name, dies)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


STEPS = [
    (hf_export, "write_shards", False),
    (export_folder, "_put_in_place", False),
    (export_folder, "_swap", False),
    (export_folder, "_swap", True),
    (Path, "rename", False),
    (Path, "rename", True),
    (export_folder, "commit", False),
    (export_folder, "commit", True),
    (export_folder.shutil, "rmtree", False),
]


@pytest.mark.slow
@pytest.mark.parametrize("can_swap", [True, False])
def test_a_killed_export_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool
) -> None:
    folder, number = tmp_path / "model", 1
    if not can_swap:
        monkeypatch.setattr(export_folder, "_swap", lambda *_: False)
    export(folder, number)
    names, deaths = {path.name for path in folder.iterdir()}, 0
    for target, name, after in STEPS:
        with monkeypatch.context() as patch:
            died = killed(partial(export, folder, number + 1), patch, target, name, after=after)
        if not died:  # this step belongs to the other way
            number += 1
        deaths += died
        where = f"{name}, {'after' if after else 'before'}, swap: {can_swap}"
        if can_swap:  # whatever happened, a whole one stands there
            assert exported(folder) in (number, number + 1), where
        left = [path.name for path in tmp_path.iterdir() if path != folder]
        assert left or not died or name == "commit", where
        if not folder.exists():  # between two renames: the next export puts the earlier one back before it begins
            export_folder.check_target(folder, overwrite=True)
            assert exported(folder) == number, where
        number += 10
        export(folder, number)
        assert exported(folder) == number
        assert [path.name for path in tmp_path.iterdir()] == ["model"], where
        assert {path.name for path in folder.iterdir()} == names
    assert deaths >= 5


def test_what_others_are_writing_stays(tmp_path: Path) -> None:
    other = tmp_path / f".model.{export_folder._HOST}.{os.getppid()}.tmp"  # alive
    strange = [tmp_path / name for name in (".model.elsewhere.1.tmp", ".models.999999999.tmp", ".model.tmp")]
    dead = [tmp_path / name for name in (".model.999999999.tmp", ".model.999999999.old")]
    for path in (other, *strange, *dead):
        path.mkdir()
    export(tmp_path / "model", 1)
    export(tmp_path / "model", 2)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "model", other, *strange])


def test_an_error_between_two_renames_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "model", 1)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_folder, "_swap", lambda *_: False)
    with monkeypatch.context() as patch:
        patch.setattr(export_folder, "commit", fails)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path / "model", 2)
    assert exported(tmp_path / "model") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
