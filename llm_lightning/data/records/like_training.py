"""Conversations of a file of one's own, read with the settings of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llm_lightning.data.files.options import FileOptions
from llm_lightning.data.records import instruction, preference
from llm_lightning.data.records.instruction import InstructionForm
from llm_lightning.data.records.preference import PreferenceForm
from llm_lightning.data.records.rows import Source, collected, open_records
from llm_lightning.data.templates.conversation import Conversation

Columns = Mapping[str, str | None]


def read_like_training(
    source: Source,
    options: FileOptions,
    settings: Mapping[str, Any],
    columns: Columns | None = None,
    *,
    pairs_win: bool = False,
) -> list[Conversation]:
    """Read the records of a source. Answers may be empty; the answer of a pair is the chosen one.

    Args:
        settings: `data.*` of a run, or none.
        columns: names of fields, which win over those of the settings.
        pairs_win: read pairs where records have an output, too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file, line and field of everything that is wrong, the first ten.
    """
    names = {**(settings.get("columns") or {}), **(columns or {})}
    unknown = set(columns or {}) - {*instruction.FIELDS, *preference.FIELDS}
    if unknown:
        known = ", ".join(dict.fromkeys((*instruction.FIELDS, *preference.FIELDS)))
        raise ValueError(f"data.columns: unknown field {sorted(unknown)[0]!r}; there are {known}")
    if _holds_pairs(source, options, names, pairs_win):
        form: Any = _form(PreferenceForm, settings, names, preference.FIELDS)
    else:
        form = _form(InstructionForm, {**settings, "empty_output": "keep"}, names, instruction.FIELDS)
    return collected(source, options, form)[0]


def _holds_pairs(source: Source, options: FileOptions, names: Columns, pairs_win: bool) -> bool:
    """Whether the first record that can be read has a chosen and a rejected answer."""
    _, rows = open_records(source, options)
    first: Mapping[str, Any] = next((row.record for row in rows if row.wrong is None), {})
    pair = {names.get(field) or field for field in ("chosen", "rejected")}
    return pair <= set(first) and (pairs_win or (names.get("output") or "output") not in first)


def _form(kind: Any, settings: Mapping[str, Any], names: Columns, known: tuple[str, ...]) -> Any:
    given = {one.name: settings[one.name] for one in fields(kind) if one.name in settings}
    return kind(**given | {"columns": {field: name for field, name in names.items() if field in known}})
