"""HTML pages from templates. All values are escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_lightning.terminal import inline


def render(template: Path, **values: Any) -> str:
    """Render a Jinja template; HTML in the values is shown as text. The filter `inline` shows controls, too."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = inline
    return environment.get_template(template.name).render(values)
