"""The template of a run: by name, as a text with slots, or described in a checkpoint."""

from __future__ import annotations

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.slots import TEMPLATES, SlotTemplate
from llm_lightning.nearest import did_you_mean


def choose_template(template: str) -> Template:
    """A template by name, or your own as a string with slots.

    Raises:
        ValueError: if it is neither.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" in template:
        return SlotTemplate("data.template", template)
    hint = did_you_mean(template, TEMPLATES)
    raise ValueError(
        f"data.template={template!r} is unknown: {hint}use {', '.join(TEMPLATES)}, or a text with "
        "{instruction} and {response}"
    )
