"""Given weights in a model of other settings: a shorter context, dropout, an untied head, the head of a classifier."""

from __future__ import annotations

import logging
from dataclasses import fields, replace

from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import FREE_FIELDS, GPT, GPTConfig
from llm_lightning.models.skeleton import skeleton

log = logging.getLogger(__name__)


def config_for(own: GPTConfig, wanted: GPTConfig, *, keep_head: bool = True) -> GPTConfig:
    """The config of a model with the sizes of weights of config `own`, and dropouts and context length of `wanted`.

    Args:
        keep_head: whether the language-model head is used; without it, `wanted` decides whether it is tied.

    Raises:
        ValueError: if the wanted context is longer than the weights have positions for.
    """
    check_context(own, wanted.context_length)
    kept = [field.name for field in fields(own) if field.name not in (*FREE_FIELDS, "tied_head")]
    if own.position == "rope":  # no table to cut: the setting limits the data, and the model keeps what it can do
        kept.append("context_length")
    elif wanted.context_length < own.context_length:
        log.info("model.context_length=%d cuts the %d of the weights", wanted.context_length, own.context_length)
    if _is_untied(own, wanted, keep_head):
        log.info("model.tied_head=false: the head starts as a copy of the token embedding")
    elif keep_head:
        kept.append("tied_head")
    for name in kept:
        if name in ("vocab_size", "context_length"):  # the tokenizer comes with the weights
            continue
        ours, theirs = getattr(own, name), getattr(wanted, name)
        if ours != theirs:
            log.info("model.%s=%s is ignored: the weights of init_from have %s", name, theirs, ours)
    return replace(wanted, **{name: getattr(own, name) for name in kept})


def check_context(own: GPTConfig, wanted: int) -> None:
    """Raise ValueError if a context of `wanted` tokens is longer than the weights have positions for."""
    if wanted > own.context_length:
        raise ValueError(
            f"model.context_length={wanted} exceeds the {own.context_length} positions of the weights "
            f"in init_from; set model.context_length={own.context_length} or less"
        )


def adapt(model: GPT, wanted: GPTConfig, *, activation_checkpointing: bool = False, keep_head: bool = True) -> GPT:
    """A GPT of `config_for(model.config, wanted)` with the weights of `model`, in float32 and training mode.

    Raises:
        ValueError: if the wanted context is longer than the weights have positions for.
    """
    config = config_for(model.config, wanted, keep_head=keep_head)
    state = dict(model.state_dict())
    if model.position_embedding is not None:
        state["position_embedding.weight"] = state["position_embedding.weight"][: config.context_length].clone()
    if not keep_head:
        state["lm_head.weight"] = state["token_embedding.weight"]
    if _is_untied(model.config, wanted, keep_head):
        state["lm_head.weight"] = state["token_embedding.weight"].clone()
    with skeleton():
        adapted = GPT(config, init="torch", activation_checkpointing=activation_checkpointing)
    adapted.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    if config.tied_head:
        adapted.lm_head.weight = adapted.token_embedding.weight  # assigning broke the tie
    return adapted.train()


def with_head_of(classifier: Classifier, trunk: GPT, *, pooling: str, causal: bool) -> Classifier:
    """A classifier of `trunk` whose head starts as a copy of another's, of the same classes."""
    n_classes = classifier.head.out_features
    assert isinstance(n_classes, int)
    new = Classifier(trunk, n_classes, pooling=pooling, causal=causal)
    new.head.load_state_dict(classifier.head.state_dict())
    return new


def _is_untied(own: GPTConfig, wanted: GPTConfig, keep_head: bool) -> bool:
    return keep_head and own.tied_head and not wanted.tied_head
