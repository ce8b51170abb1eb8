"""The defaults that a function and its verb share. Imports nothing, so that help is instant."""

from __future__ import annotations

MAX_NEW_TOKENS = 100
TEMPERATURE = 0.8
TOP_K = 50
"""Of `generate_text`."""

ANSWER_TOKENS = 256
"""New tokens per answer, the book's."""
ANSWER_TEMPERATURE = 0.0
RECORDS_AT_ONCE = 32
"""Of `respond`."""
