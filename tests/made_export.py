"""A small model of the Llama kind and its tokenizer, for tests of what goes to other programs."""

from __future__ import annotations

import torch

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.tokenizer_json import JsonTokenizer

LLAMA = GPTConfig(
    260, 48, 2, 4, 32, norm="rms", position="rope", mlp="swiglu", n_kv_head=2, ffn_width=52, qkv_bias=False,
    out_bias=False, mlp_bias=False, rope_theta=77.0, residual_dropout=0.1,
)  # fmt: skip
CONTROLS = ("<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>")


@torch.no_grad()
def random_gpt(config: GPTConfig) -> GPT:
    """Every tensor is drawn, norms and biases too."""
    generator = torch.Generator().manual_seed(5)
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.1, generator=generator)
    return model


def json_tokenizer(begins: bool = False) -> JsonTokenizer:
    """A byte-level BPE of 256 bytes, one merge and four control tokens; `begins`: each text with <|begin|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "Ġa"])}, [("Ġ", "a")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(CONTROLS))
    if begins:
        special = [("<|begin|>", 258)]
        library.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=special)
    named = {"eos_token": "<|im_end|>", "bos_token": "<|begin|>", "pad_token": "<|end|>"}
    return JsonTokenizer(
        library.to_str(), bos_id=258 if begins else None, eot_id=257, stop_ids=[260, 257], special_tokens=named
    )
