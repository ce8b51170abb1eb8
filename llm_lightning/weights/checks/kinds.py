"""Kinds of values in a checkpoint, and the messages that refuse others.

Every check raises ValueError with the key and the fault; `checkpoint.py` adds the file and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short
from typing import Any

from torch import Tensor

MOST = 1 << 63  # limit of integers in a header; larger ones cannot be printed
Check = tuple[Callable[[Any], bool], str]
"""(whether a value is right, what it must be)"""


def is_int(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < MOST


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


DICT: Check = (lambda value: isinstance(value, dict), "a dict")
LIST: Check = (lambda value: isinstance(value, (list, tuple)), "a list")
TEXT: Check = (lambda value: isinstance(value, str), "a text")
FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
COUNT: Check = (is_int, "a whole number of at least 0")
SIZE: Check = (lambda value: is_int(value, 1), "a whole number of at least 1")
NUMBER: Check = (is_number, "a number")


def or_none(check: Check) -> Check:
    return (lambda value: value is None or check[0](value)), f"{check[1]} or null"


def list_of(check: Check) -> Check:
    return (
        lambda value: isinstance(value, (list, tuple)) and all(map(check[0], value)),
        f"a list, of which each is {check[1]}",
    )


def dict_of(check: Check) -> Check:
    return (
        lambda value: isinstance(value, dict) and all(isinstance(k, str) and check[0](v) for k, v in value.items()),
        f"a dict, of which each value is {check[1]}",
    )


def check_keys(facts: Mapping[str, Any], where: str, checks: Mapping[str, Check], *, is_optional: bool = False) -> None:
    """Check the values of the given keys, which are in `facts` unless they are optional."""
    for key, (is_right, what) in checks.items():
        name = ".".join(part for part in (where, key) if part)
        if key not in facts:
            if is_optional:
                continue
            raise ValueError(f"it does not hold what a model needs: {name} is missing")
        if not is_right(facts[key]):
            raise ValueError(f"{name}={short(facts[key])} must be {what}")


def refuse_unknown(facts: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
    """Refuse keys that are not known."""
    if unknown := sorted(facts.keys() - set(known)):
        raise ValueError(f"{where}.{word(unknown[0])} is unknown to this version of llm-lightning")


def word(name: Any) -> str:
    """A key as part of a dotted name; an unsuitable one is quoted and shortened."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,80}", name) else short(name)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
