"""Answers of a model to conversations, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_lightning.data.templates import Conversation, Template
from llm_lightning.inference.generation import generate
from llm_lightning.models.gpt import GPT
from llm_lightning.tokenizers import Tokenizer

BATCH_SIZE = 32
MAX_NEW_TOKENS = 256
"""The book's."""

OnResponse = Callable[[int, str], None]
"""Called with (index, response) as each is known."""


def respond(
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    on_response: OnResponse | None = None,
    **sampling: Any,
) -> list[str]:
    """Answer the last question of every conversation.

    A batch holds prompts of similar length, the longest first, so that too little memory shows at once. An answer
    ends at the end of text, after `max_new_tokens`, or at the model's context.

    Args:
        sampling: settings of `generation.generate`; default: greedy.

    Returns:
        the answers, trimmed, in the order of the conversations.

    Raises:
        ValueError: naming the record, if a prompt leaves no room for an answer.
    """
    prompts = [template.prompt_ids(tokenizer, one) for one in conversations]
    for prompt, one in zip(prompts, conversations, strict=True):
        if len(prompt) >= model.config.context_length:
            raise ValueError(
                f"{one.place or 'a record'}: the prompt of {len(prompt)} tokens leaves no room for an answer within "
                f"context_length={model.config.context_length}; shorten it or use a model with a longer context"
            )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    never = tokenizer.ids_without_token(model.config.vocab_size)
    responses: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        new_ids = generate(
            model,
            [prompts[index] for index in batch],
            max_new_tokens=max_new_tokens,
            stop_ids=() if tokenizer.eot_id is None else (tokenizer.eot_id,),
            never=never,
            **sampling,
        )
        for index, ids in zip(batch, new_ids, strict=True):
            responses[index] = tokenizer.decode(ids).strip()
            if on_response is not None:
                on_response(index, responses[index])
    return [responses[index] for index in range(len(conversations))]


def answered(conversation: Conversation, responses: Mapping[str, str]) -> dict[str, Any]:
    """The record with its responses, in the book's file shape: instruction, input, output, model_response."""
    last = conversation.turns[-1]
    shape = {"instruction": last.instruction, "input": last.input, "output": last.response}
    return {**shape, **conversation.record, **shape, **responses}
