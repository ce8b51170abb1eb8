"""Replies of a server: the text of a chat completion, or an error on one line."""

from __future__ import annotations

import json
from typing import Any

from llm_lightning.files.bounded_http import Reply

LONGEST_MESSAGE = 10_000  # characters of a server's error that are read
_MISSING = object()
_JSON_NAMES = {str: "text", float: "a number", bool: "a truth value", list: "a list", dict: "an object",
               type(None): "null"}  # fmt: skip


def parsed(reply: Reply) -> Any:
    """The JSON of a reply; raises ValueError if it is not JSON."""
    if reply.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ValueError("it is compressed, which was not requested")
    try:
        return json.loads(reply.body, parse_int=float)  # parsing a million digits as an int takes minutes
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError:
        raise ValueError("it is not JSON") from None


def answer_of(reply: Reply) -> str:
    """The text of the first choice; empty if the model refused or called a tool.

    Raises:
        ValueError: if the reply has another form; names the wrong part.
    """
    item: Any = parsed(reply)
    for key, kind, wanted in (("choices", list, "a list"), (0, dict, "an object"), ("message", dict, "an object")):
        item = _item(item, key)
        if not isinstance(item, kind):
            name = "choices[0]" if key == 0 else key
            raise ValueError(f"{name} must be {wanted}, not {_JSON_NAMES.get(type(item), 'missing')}")
    content = item.get("content")
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content must be text, not {_JSON_NAMES[type(content)]}")
    return content or ""


def _item(container: Any, key: str | int) -> Any:
    try:
        return container[key]
    except (LookupError, TypeError):
        return _MISSING


def message_of(reply: Reply) -> str:
    """The server's error message, on one line."""
    if 300 <= reply.status < 400 and reply.headers.get("Location"):
        return shortened(f"it redirects to {reply.headers['Location']}")
    message: Any = reply.body.decode("utf-8", "replace")
    try:
        body = parsed(reply)
        error = body.get("error", body) if isinstance(body, dict) else body
        message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    except ValueError:  # not JSON: an error page, perhaps
        pass
    return shortened(str(message or reply.reason))


def shortened(text: str) -> str:
    line = " ".join(text[:LONGEST_MESSAGE].split())
    return line if len(line) <= 200 else f"{line[:197]}..."
