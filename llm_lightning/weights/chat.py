"""How a model converses, as the plain values that an export writes into its files and checks them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, str]
"""`role` and `content`, as other programs have them."""


class Prompt(NamedTuple):
    """A conversation that waits for an answer, and its token ids by our template."""

    messages: list[Message]
    ids: list[int]


class Chat(NamedTuple):
    """The template of a model."""

    description: Mapping[str, Any]
    """Ours, from which `data/templates/choose.py` rebuilds it."""
    jinja: str
    """The same as a program for transformers, llama.cpp and others."""
    end_id: int | None
    """The last id of an answer, at which generation stops."""
    tokens: Mapping[str, str]
    """The special tokens that the program may name, such as `bos_token`."""
    variables: Mapping[str, str]
    """What else it may name: the date."""
    prompts: tuple[Prompt, ...]
    """Examples, by which a written template is checked."""
