"""The template in which a model is asked."""

from __future__ import annotations

import logging

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.chat import ChatTemplate
from llm_lightning.data.templates.choose import choose_template, from_description, template_in
from llm_lightning.weights.load import LoadedModel

log = logging.getLogger(__name__)


def template_of(loaded: LoadedModel, wanted: str | Template | None) -> Template:
    """Choose the template of a model's prompts.

    Args:
        wanted: a name, a text with slots or a `.jinja` file; None: the template of the model's training, else its own,
            else alpaca, which is logged.

    Raises:
        ValueError: if there is no such template, or the model's tokenizer lacks its control tokens.
    """
    if isinstance(wanted, Template):
        return wanted
    own = template_in(loaded.header)
    if wanted is None and own is None:
        log.warning("this model was trained without a template: alpaca is used; --template names another")
    chosen = from_description(own) if wanted is None and own is not None else choose_template(wanted, own=own)
    if isinstance(chosen, ChatTemplate):
        chosen.check_tokenizer(loaded.tokenizer)
    return chosen
