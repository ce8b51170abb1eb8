"""Text in, text out: prompts and their continuations, questions and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.inference.defaults import ANSWER_TEMPERATURE, ANSWER_TOKENS, MAX_NEW_TOKENS, TEMPERATURE, TOP_K
from llm_lightning.inference.generation import OnToken, generate
from llm_lightning.inference.template import template_of
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
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "on_token": on_token}
    new_ids = _new_ids(loaded, prompt_ids, loaded.tokenizer.stop_ids, top_k, top_p, **options)
    pairs = zip(prompts, prompt_ids, new_ids, strict=True)
    # Decoded together, because words are joined by a space; what precedes a text is not shown.
    n_before = 0 if loaded.tokenizer.bos_id is None else 1
    return [loaded.tokenizer.decode([*ids[n_before:], *new] if prompt else new) for prompt, ids, new in pairs]


def answer_texts(
    loaded: LoadedModel,
    questions: Sequence[str],
    *,
    template: str | Template | None = None,
    system: str | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    temperature: float = ANSWER_TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_token: OnToken | None = None,
) -> list[str]:
    """Answer several questions in one batch, with the defaults of `llm-lightning generate --chat`.

    Args:
        template: see `template.template_of`.
        system: the system message, which may be empty; None: that of the template, if it has one.

    For the others see `generate_texts`.

    Returns:
        the answers alone, trimmed.
    """
    chosen = template_of(loaded, template)
    conversations = [Conversation((Turn(question, "", ""),), system, "the question") for question in questions]
    chosen.check(conversations)
    prompt_ids = [chosen.prompt_ids(loaded.tokenizer, one) for one in conversations]
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "on_token": on_token}
    new_ids = _new_ids(loaded, prompt_ids, chosen.stop_ids(loaded.tokenizer), top_k, top_p, **options)
    return [loaded.tokenizer.decode(ids).strip() for ids in new_ids]


def _new_ids(
    loaded: LoadedModel,
    prompt_ids: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    top_k: int | None,
    top_p: float | None,
    **options: Any,
) -> list[list[int]]:
    return generate(
        loaded.gpt,
        prompt_ids,
        top_k=TOP_K if top_k is None and top_p is None else top_k,
        top_p=top_p,
        stop_ids=stop_ids,
        never=loaded.tokenizer.ids_without_token(loaded.gpt.config.vocab_size),
        **options,
    )


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, from the beginning of a text on."""
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    if not ids and not prompt and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]  # what precedes a text in training
    return ids
