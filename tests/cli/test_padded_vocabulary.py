"""Heads with more rows than the tokenizer has tokens: what stands for no token is never written, wherever text is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import SETTINGS, fit_here, write_checkpoint, write_corpus

from llm_lightning.cli.main import main as cli
from llm_lightning.inference.generation import generate
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.weights.checkpoint import HEADER, load, save
from llm_lightning.weights.families.gpt2 import to_hf
from llm_lightning.weights.load import load_model

ROWS = 320  # of the head; the byte tokenizer has 257 tokens


def write_padded(path: Path) -> Path:
    """A model that finds the rows without a token far likelier than any token."""
    config = replace(load_model(write_checkpoint(path)).gpt.config, vocab_size=ROWS, context_length=128)
    torch.manual_seed(0)
    model = GPT(replace(config, tied_head=False))
    with torch.no_grad():
        model.final_norm.bias.fill_(1.0)
        model.lm_head.weight[257:] = 9.0
    state = load(path)
    state[HEADER] |= {"model": vars(model.config)}
    state["state_dict"] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save(path, state)
    return path


def test_what_must_never_be_drawn_never_is() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=ROWS, context_length=32, n_layer=1, n_head=2, n_embd=16, tied_head=False)).eval()
    with torch.no_grad():
        model.final_norm.bias.fill_(1.0)
        model.lm_head.weight[257:] = 9.0
        model.lm_head.weight[7] = 9.0  # a gap inside the vocabulary
    never = [7, *range(257, ROWS)]
    ways: list[dict] = [{}, {"temperature": 1e-30}, {"temperature": 1.0}, {"temperature": 50.0}]
    ways += [{"temperature": 1.0, "top_k": k} for k in (1, 50, 300, ROWS)]
    ways += [{"temperature": 1.0, "top_p": p} for p in (0.1, 0.9, 1.0)]
    ways += [{"temperature": 2.0, "top_k": 300, "top_p": 0.99}]
    for settings in ways:
        options = {"max_new_tokens": 20, "seed": 3, **settings}
        free = generate(model, [[1], [2, 3]], **options)
        assert settings.get("temperature") == 50.0 or any(i in never for ids in free for i in ids), settings
        held = generate(model, [[1], [2, 3]], never=never, **options)
        assert not any(i in never for ids in held for i in ids), settings
        assert [len(ids) for ids in held] == [20, 20], settings


def test_drawn_like_from_the_head_without_the_rows() -> None:
    torch.manual_seed(0)
    padded = GPT(GPTConfig(vocab_size=ROWS, context_length=32, n_layer=1, n_head=2, n_embd=16)).eval()
    cut = GPT(replace(padded.config, vocab_size=257)).eval()
    names = ("token_embedding.weight", "lm_head.weight")
    cut.load_state_dict({k: v[:257] if k in names else v for k, v in padded.state_dict().items()})
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 40}, {"temperature": 1.0, "top_p": 0.9}):
        options = {"max_new_tokens": 30, "seed": 5, **settings}
        assert generate(padded, [[1], [2]], never=range(257, ROWS), **options) == generate(cut, [[1], [2]], **options)


@pytest.mark.slow
def test_every_place_that_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = write_padded(tmp_path / "base.ckpt")
    # As pretrained: samples while it learns.
    corpus = write_corpus(tmp_path / "corpus.txt")
    pretrained = tmp_path / "pretrained"
    settings = [*SETTINGS, f"data.path={corpus}", f"model.vocab_size={ROWS}", "callbacks.samples.temperature=1"]
    outcome = fit_here([*settings, f"hydra.run.dir={pretrained}"])
    assert outcome.code == 0, outcome.err
    assert load_model(pretrained).gpt.config.vocab_size == ROWS
    # Tuned: samples and the answers of the test split.
    tuned = tmp_path / "tuned"
    settings = [
        *(word for word in SETTINGS if "samples." not in word),
        "task=sft",
        f"init_from={base}",
        "optimizer.lr=1e-6",
        "model.context_length=128",
    ]
    settings += ["callbacks.responses.max_new_tokens=4", "callbacks.samples.max_new_tokens=4"]
    settings += ["data.template='{instruction} {input} {response}'"]
    outcome = fit_here([*settings, f"hydra.run.dir={tuned}"])
    assert outcome.code == 0, outcome.err
    assert len(json.loads((tuned / "responses.json").read_text())) > 10
    # The verbs.
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": "Say", "input": "", "output": "x"}]))
    for command in (
        ["generate", str(base), "to be", "--greedy", "--max-new-tokens", "5"],
        ["generate", str(base), "to be", "--seed", "1", "--max-new-tokens", "5", "--stream"],
        ["respond", str(tuned), str(questions), "-o", str(tmp_path / "r.json"), "--max-new-tokens", "5"],
        ["compare", str(base), str(tuned), str(questions), "-o", str(tmp_path / "c.html"), "--max-new-tokens", "5"],
    ):
        assert cli(command) == 0, capsys.readouterr().err


def test_weights_of_others_with_a_padded_head(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50_304, context_length=16, n_layer=1, n_head=1, n_embd=64))
    with torch.no_grad():
        model.final_norm.bias.fill_(1.0)
        model.token_embedding.weight[50_257:] = 9.0
    weights = to_hf(model.state_dict(), model.config)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "m.safetensors")
    assert cli(["generate", str(tmp_path / "m.safetensors"), "to be", "--greedy", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("to be")
