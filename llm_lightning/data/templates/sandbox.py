"""The process that runs Jinja templates: it reads requests and writes answers, one line of JSON each.

A chat template is a program that comes with weights of strangers. It runs in jinja2's sandbox, which keeps it from
Python's objects; and in a process of its own, because nothing inside of one can stop every computation without end: the
system ends this one at its limit of CPU time, and `renderer.py` starts another.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llm_lightning.terminal import reply

MOST_CHARACTERS = 1 << 24
"""Of one rendering, 16 million; a template that writes more is stopped while it writes."""
MOST_MEMORY = 1 << 30
"""Bytes of this process's address space."""


class RaisedError(TemplateError):
    """What a template refuses by `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which some templates mark the answers: written as it is."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox; what it only hides from the output, it refuses here."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")


class _GuardedNamespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def serve() -> None:
    """Answer requests from standard input until it ends."""
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(answer)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """`texts`, one for each cut; or `error` with a `line` of the template."""
    try:
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        if request["cuts"] is None:
            return {"texts": _strings_looked_for(request["template"])}
        template = _compiled(request["template"], request["date"])
        return {"texts": [_rendered(template, request, *cut) for cut in request["cuts"]]}
    except RaisedError as error:
        return {"error": f"refuses: {error}", "line": None}
    except TemplateSyntaxError as error:
        return {"error": error.message, "line": error.lineno}
    except MemoryError:
        return {"error": f"needs more than {MOST_MEMORY >> 20:,} MiB of memory", "line": None}
    except Exception as error:  # whatever its expressions raise
        return {"error": str(error) or type(error).__name__, "line": _line_of(error)}


def _rendered(template: jinja2.Template, request: dict[str, Any], n_messages: int, is_prompt: bool) -> str:
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    pieces: list[str] = []
    length = 0
    known = {"messages": request["messages"][:n_messages], "add_generation_prompt": is_prompt, **request["variables"]}
    for piece in template.generate(tools=request["tools"], documents=None, **known):
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise TemplateError(f"writes more than {MOST_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=32)
def _compiled(text: str, day: str) -> jinja2.Template:
    """Compile with the settings of transformers; the current day is `day`, as YYYY-MM-DD."""
    environment = _environment()
    environment.globals["strftime_now"] = lambda form: date.fromisoformat(day).strftime(form)
    return environment.from_string(text)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["namespace"] = _GuardedNamespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment


def _strings_looked_for(text: str) -> list[str]:
    """The constants that a template compares texts with, or passes to a function or filter such as `split`."""
    return sorted(set(_constants(_environment().parse(text))))


def _constants(tree: nodes.Template) -> Iterator[str]:
    operands: list[nodes.Expr] = []
    for compared in tree.find_all(nodes.Compare):
        operands += [compared.expr, *(operand.expr for operand in compared.ops)]
    for call in tree.find_all((nodes.Call, nodes.Filter, nodes.Test)):
        operands += call.args  # type: ignore[attr-defined]
    yield from (one.value for one in operands if isinstance(one, nodes.Const) and isinstance(one.value, str))


def _line_of(error: Exception) -> int | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return frames[-1].lineno if frames else None


def _raise(message: str) -> None:
    raise RaisedError(message)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r} in a namespace begins with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike Jinja's, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
