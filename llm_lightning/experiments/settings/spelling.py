"""Values of the command line, rewritten for the kind of their setting: quoted texts, lists, names with texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

Kind = Literal["text", "texts", "numbers", "named texts", "sources", "anything"]
"""One text; a list of texts; a list of numbers; texts by name (`{a: x}`); a list of nodes whose values are texts but
for `NUMBERS`; or left to Hydra: numbers, switches, nodes, words mixed with these."""

NUMBERS = ("weight",)
"""Keys of a source that are no text."""

_NUMBER_OR_SWITCH = re.compile(r"[+-]?(\d[\d_]*)?\.?[\d_]*(e[+-]?\d[\d_]*)?|[+-]?(inf|nan)|true|false", re.IGNORECASE)
_SWEEP = re.compile(r"(choice|shuffle|sort|tag)\((.*)\)", re.DOTALL)
_SLICED = re.compile(r"[\w+-]+(\[[\w%:+-]*\][\w+-]*)+")
"""Parts of a split of the hub, `train[:50%]+test[-9:]`, which Hydra reads in quotes only."""


def rewritten_value(value: str, kind: Kind) -> str:
    """A value, or each value of a sweep, rewritten for its kind."""
    call = _SWEEP.fullmatch(value.strip())
    if call:
        arguments = [
            one if re.match(r"\s*\w+\s*=", one) else rewritten_value(one, kind) for one in split_values(call[2])
        ]
        return f"{call[1]}({','.join(arguments)})"
    if re.fullmatch(r"range\(.*\)", value.strip(), re.DOTALL) and kind == "text":
        return _spelt_out(value)
    parts = split_values(value)
    if len(parts) > 1:
        return ",".join(rewritten_value(part, kind) for part in parts)
    rewritten: dict[Kind, Callable[[str], str]] = {"text": _text, "named texts": _named, "sources": _sources}
    return rewritten[kind](value) if kind in rewritten else _list(value, kind)


def _spelt_out(value: str) -> str:
    """`range(1,3)` as texts: `'1','2'`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        sweep: Any = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:  # reported where all words are parsed
        return value
    return ",".join(f"'{number}'" for number in sweep.range())


def _text(value: str) -> str:
    """The text, quoted if Hydra would read a number or a switch; each item of a list likewise. Null stays null."""
    stripped = value.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        return (
            f"[{','.join(_text(part) for part in split_values(stripped[1:-1]))}]"
            if stripped[1:-1].strip()
            else stripped
        )
    is_read_otherwise = stripped and (_NUMBER_OR_SWITCH.fullmatch(stripped) or _SLICED.fullmatch(stripped))
    return f"'{stripped}'" if is_read_otherwise else value


def _named(value: str, texts: Callable[[str], bool] = lambda key: True) -> str:
    """`{a: 1984}` with quoted texts.

    Args:
        texts: whether the value of a key is text.
    """
    stripped = value.strip()
    if not (stripped.startswith("{") and stripped.endswith("}")):
        return value
    parts = (part.partition(":") for part in split_values(stripped[1:-1]))
    return f"{{{','.join(key + colon + (_text(one) if texts(key.strip()) else one) for key, colon, one in parts)}}}"


def _sources(value: str) -> str:
    """`[{name: a, path: 1984, weight: 1}, ...]` with quoted texts."""
    stripped = value.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return value
    return f"[{','.join(_named(part, lambda key: key not in NUMBERS) for part in split_values(stripped[1:-1]))}]"


def _list(value: str, kind: Kind) -> str:
    stripped = value.strip()
    is_other = stripped.startswith(("{", "${")) or re.fullmatch(r"\w+\(.*\)", stripped, re.DOTALL)
    if stripped.startswith("[") or is_other or stripped.lower() == "null":
        return _text(value) if kind == "texts" else value
    if kind == "texts" and not re.search(r"""['"\\$]""", stripped):
        return f"['{stripped}']"  # quoted, because Hydra accepts fewer characters in a list than outside one
    return f"[{_text(stripped) if kind == 'texts' else stripped}]"


def split_values(value: str) -> list[str]:
    """The parts between commas outside quotes and brackets."""
    parts, depth, quote, start, position = [], 0, "", 0, 0
    while position < len(value):
        character = value[position]
        if character == "\\":
            position += 1
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(value[start:position])
            start = position + 1
        position += 1
    return [*parts, value[start:]]
