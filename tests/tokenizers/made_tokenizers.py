"""Small tokenizer.json files of the kinds that models ship, trained by the library itself."""

from __future__ import annotations

import json
from functools import cache
from pydoc_data.topics import topics
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

CORPUS = "\n".join(topics.values())[:60_000] + " naïve Größe слово 日本語 テキスト 한국어 ½ ² 😀 we're they'll" * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ("<think>", "</think>", "word")
"""The last one is a word of the corpus, so that merges would yield it."""

# Published in the tokenizer.json of Llama 3 and of Qwen 2.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]),
}


def byte_level(pre: str, *, special_first: bool = True, not_special: tuple[str, ...] = NOT_SPECIAL) -> dict[str, Any]:
    """The content of a tokenizer.json with the cut `pre`; special tokens are its first ids, or its last ones."""
    return json.loads(_byte_level(pre, special_first, not_special))


@cache
def _byte_level(pre: str, special_first: bool, not_special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = CUTS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    first = SPECIAL if special_first else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=800, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([] if special_first else SPECIAL)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in not_special])
    if pre == "llama-bpe":
        begin = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<|im_start|> $A", pair="$A $B", special_tokens=[begin]),
            ]
        )
    return tokenizer.to_str()


def llama2(*, legacy: bool = True) -> dict[str, Any]:
    """The content of a tokenizer.json as of Llama 2: characters, bytes for those it lacks, and a space before a text.

    Args:
        legacy: whether a normalizer adds the space, as in the published file, or a pre-tokenizer.
    """
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer.pre_tokenizer = spaces
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = BpeTrainer(
        vocab_size=700, special_tokens=first, initial_alphabet=alphabet, limit_alphabet=120, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["normalizer"] = json.loads(prepend.__getstate__()) if legacy else None
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    content["pre_tokenizer"] = None if legacy else json.loads(metaspace.__getstate__())
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    content["decoder"] = json.loads(decoders.Sequence(steps).__getstate__())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return content
