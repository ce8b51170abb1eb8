"""The chat templates that come with weights, described: files of transformers' folders, and GGUF's metadata.

A description is plain data (see `data/templates/choose.py`, which makes a template of it): `kind`, `name`, `text` (a
Jinja program, which is not run here), `tokens` (the special tokens that the text may name, such as `bos_token`), and
`others` (further templates of the model by name).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_lightning.weights.export_folder import read_json

OWN = "own"
"""The name of a template that comes with the weights."""
JINJA_FILE, JSON_FILE, TOKENIZER_FILE = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
MORE_FOLDER = "additional_chat_templates"
FILES = (JINJA_FILE, JSON_FILE, TOKENIZER_FILE, "special_tokens_map.json")
"""What `read_chat_template` reads, beside the folder `MORE_FOLDER`."""
_MOST_BYTES = 1 << 20
"""Of one template; the longest published ones have about 20,000."""


def read_chat_template(folder: Path) -> dict[str, Any] | None:
    """Return the description of a folder's chat template, or None if there is none.

    A file of its own is preferred to `tokenizer_config.json`, as in transformers.

    Raises:
        ValueError: if a file is damaged, or several templates are named and none is the default.
    """
    config = _json(folder / TOKENIZER_FILE)
    named = _named(folder / TOKENIZER_FILE, config.get("chat_template"))
    named |= _named(folder / JSON_FILE, _json(folder / JSON_FILE).get("chat_template"))
    more = folder / MORE_FOLDER
    named |= {path.stem: _text(path) for path in sorted(more.glob("*.jinja"))}
    if (folder / JINJA_FILE).is_file():
        named["default"] = _text(folder / JINJA_FILE)
    if not named:
        return None
    if "default" not in named:
        raise ValueError(f"{folder} has chat templates named {', '.join(named)}, but none named default")
    return describe_chat_template(
        named.pop("default"), _special_tokens(config) | _special_tokens(_json(folder / FILES[-1])), named
    )


def describe_chat_template(
    text: str, tokens: Mapping[str, str], others: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the description of a model's own template.

    Args:
        text: a Jinja program.
        tokens: name -> spelling of the special tokens, such as `bos_token` and `eos_token`.
        others: name -> text of further templates.
    """
    return {"kind": "jinja", "name": OWN, "text": text, "tokens": dict(tokens), "others": dict(others or {})}


def _named(path: Path, value: Any) -> dict[str, str]:
    """name -> text, of one template or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if not isinstance(value, dict) or not all(isinstance(one, str) for pair in value.items() for one in pair):
        raise ValueError(f"{path}: chat_template must be a text, or a list of objects with 'name' and 'template'")
    return value


def _special_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like; each is a text, or an object with its text under `content`."""
    found = {key: value for key, value in values.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in found.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; no chat template has more than {_MOST_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
