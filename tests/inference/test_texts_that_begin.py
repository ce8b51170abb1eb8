"""Texts of models that begin each one with an id of their own, as Llama's do."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from llm_lightning.inference.evaluate import evaluate_texts
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.byte import ByteTokenizer


class BeginningTokenizer(ByteTokenizer):
    bos_id = 0


def test_the_first_token_of_a_text_is_scored_after_the_begin_and_bytes_count_once():
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 32, 1, 2, 8)).eval()
    loaded = SimpleNamespace(gpt=model, tokenizer=BeginningTokenizer())
    texts = ["abc", "de"]
    with torch.no_grad():
        surprise = 0.0
        for text in texts:
            ids = torch.tensor([0, *text.encode()])
            log_probs = model(ids[None]).log_softmax(-1)[0]
            surprise -= sum(log_probs[position, ids[position + 1]].item() for position in range(len(text)))
    found = evaluate_texts(loaded, texts)
    assert found.n_tokens == 5
    assert found.loss == pytest.approx(surprise / 5, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(surprise / math.log(2) / 5, rel=1e-5)
