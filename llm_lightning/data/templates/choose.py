"""The template of a run: by name, as a text with slots or a Jinja file, or described in a header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.chat import DATE, ChatTemplate
from llm_lightning.data.templates.slots import TEMPLATES, SlotTemplate
from llm_lightning.nearest import did_you_mean

NAMED: dict[str, tuple[str, ...]] = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
}
"""Jinja templates in `named/`, with the control tokens that they write."""
DEFAULT = "alpaca"


def choose_template(
    wanted: str | None, *, own: Mapping[str, Any] | None = None, template_date: str | None = None
) -> Template:
    """Choose a template.

    Args:
        wanted: a name, a text with slots, or a `.jinja` file; None: the model's own, else alpaca.
        own: the description of the model's own template, which may have `others` by name.
        template_date: the day that a Jinja template sees; default: the one in `own`, else 2024-07-26.

    Raises:
        ValueError: if there is no such template, or it cannot be read.
    """
    if wanted is None:
        return from_description(own, template_date=template_date) if own else TEMPLATES[DEFAULT]
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    date = template_date or DATE
    if wanted in NAMED:
        text = Path(__file__).with_name("named").joinpath(f"{wanted}.jinja").read_text(encoding="utf-8")
        return ChatTemplate(wanted, text, date, controls=NAMED[wanted])
    special = tuple(sorted((own or {}).get("tokens", {}).items()))
    others = (own or {}).get("others", {})
    if wanted in others:
        return ChatTemplate(wanted, others[wanted], date, special)
    if wanted.endswith(".jinja"):
        if own and own["name"] == Path(wanted).name and not Path(wanted).exists():
            return from_description(own, template_date=template_date)  # a run goes on without the file
        return ChatTemplate(Path(wanted).name, _read(Path(wanted)), date, special)
    if "{" in wanted:
        return SlotTemplate("data.template", wanted)
    names = [*TEMPLATES, *NAMED, *others]
    raise ValueError(
        f"data.template={wanted!r} is unknown: {did_you_mean(wanted, names)}use {', '.join(names)}, a text with "
        "{instruction} and {response}, or a .jinja file"
    )


def from_description(description: Mapping[str, Any], *, template_date: str | None = None) -> Template:
    """Rebuild the template that `describe()`, or a reader of weights, described.

    Raises:
        ValueError: if the description is damaged.
    """
    kind, name, text = (description.get(key) for key in ("kind", "name", "text"))
    if kind not in ("slots", "jinja") or not isinstance(name, str) or not isinstance(text, str):
        raise ValueError(f"the description of template {name!r} of kind {kind!r} is damaged")
    if kind == "slots":
        known = TEMPLATES.get(name)
        template = SlotTemplate(name, text, description.get("system", ""))
        return template if known != template else known
    return ChatTemplate(
        name,
        text,
        template_date or description.get("date") or DATE,
        tuple(sorted(description.get("tokens", {}).items())),
        tuple(description.get("controls", ())),
    )


def template_in(header: Mapping[str, Any]) -> dict[str, Any] | None:
    """The description of the template in a header: of the model's training, or its own; None: there is none.

    Checkpoints of earlier versions name it in their settings alone.
    """
    if "template" in header:
        return dict(header["template"])
    wanted = (header.get("config", {}).get("data") or {}).get("template")
    return choose_template(wanted).describe() if wanted is not None else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data.template={path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"data.template={path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
