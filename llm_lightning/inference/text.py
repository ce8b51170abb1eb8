"""Text in, text out: prompts and their continuations."""

from __future__ import annotations

from collections.abc import Sequence

from llm_lightning.inference.defaults import MAX_NEW_TOKENS, TEMPERATURE, TOP_K
from llm_lightning.inference.generation import OnToken, generate
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights.load import LoadedModel


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_token: OnToken | None = None,
) -> str:
    """Continue one prompt; return the prompt and its continuation. See `generate_texts`."""
    return generate_texts(
        loaded,
        [prompt],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_token=on_token,
    )[0]


def generate_texts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_token: OnToken | None = None,
) -> list[str]:
    """Continue several prompts in one batch, with the defaults of `llm-lightning generate`.

    Args:
        loaded: what `load_model` returns.
        max_new_tokens: per prompt; a continuation also ends at the end of text and at the model's context length.
        temperature: 0 takes the likeliest token (greedy); below 1 sharper, above 1 more random.
        top_k: sample from the k likeliest tokens; default: 50, or all tokens where `top_p` is given.
        top_p: sample from the fewest tokens whose probabilities sum to p, 0 < p <= 1.
        seed: the same seed gives the same text; default: another text at each call.
        on_token: called with (row, token id) for each new token.

    Returns:
        the prompts with their continuations.

    Raises:
        ValueError: if the model is a classifier, a prompt does not fit its context, or a setting is out of range.
    """
    prompt_ids = [_encode(loaded.tokenizer, prompt) for prompt in prompts]
    eot_id = loaded.tokenizer.eot_id
    new_ids = generate(
        loaded.gpt,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=TOP_K if top_k is None and top_p is None else top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=() if eot_id is None else (eot_id,),
        never=loaded.tokenizer.ids_without_token(loaded.gpt.config.vocab_size),
        on_token=on_token,
    )
    pairs = zip(prompts, prompt_ids, new_ids, strict=True)
    # Decoded together, because words are joined by a space; an empty prompt does not show its end of text.
    return [loaded.tokenizer.decode([*ids, *new] if prompt else new) for prompt, ids, new in pairs]


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids and not prompt and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]  # what precedes a text in training
    return ids
