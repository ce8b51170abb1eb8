"""Renders Jinja templates in a child process, which a template that never ends takes down instead of this one."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

SECONDS = 5.0
"""CPU time of one rendering; a common one takes less than a tenth of a millisecond."""
_MOST_SHOWN = 300
_CHILD = """
import sys
sys.path[:] = sys.argv[1:]
from llm_lightning.data.templates.sandbox import serve
serve()
"""


class RenderError(ValueError):
    """A template that cannot be rendered; the message says why, in one line."""


class Renderer:
    """A child process that is started when it is needed, and ends with this one."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        template: str,
        date: str,
        messages: Sequence[Mapping[str, Any]],
        cuts: Sequence[tuple[int, bool]],
        variables: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """Render a conversation once for each cut.

        Args:
            template: a Jinja program.
            date: the day that the program sees, YYYY-MM-DD.
            cuts: (number of first messages, whether the generation prompt follows).
            variables: what the program may name beside the messages.
            tools: schemas of the tools that the assistant may call.

        Raises:
            RenderError: if the template is no Jinja program, refuses the messages, or exceeds the limits of time,
                memory or output.
        """
        conversation: dict[str, Any] = {"messages": list(messages), "cuts": list(cuts), "variables": dict(variables)}
        conversation |= {"tools": tools}
        return self._ask({"template": template, "date": date, "seconds": SECONDS, **conversation})

    def strings_looked_for(self, template: str) -> list[str]:
        """Return the constants that a template compares texts with, or passes to a function or filter.

        Raises:
            RenderError: if the template is no Jinja program.
        """
        return self._ask({"template": template, "cuts": None, "seconds": SECONDS})

    def close(self) -> None:
        """End the child process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def forget(self) -> None:
        """Leave the child process to the process that this one is a fork of."""
        self._child, self._lock = None, threading.Lock()

    def _ask(self, request: Mapping[str, Any]) -> list[str]:
        with self._lock:
            try:
                answer = self._answer(json.dumps(request).encode() + b"\n")
            except BaseException:  # an interrupt: the child's answer would be taken for that to the next request
                self.close()
                raise
        if "error" in answer:
            line = f"line {answer['line']}: " if answer["line"] else ""
            raise RenderError(line + " ".join(answer["error"].split())[:_MOST_SHOWN])
        return list(answer["texts"])

    def _answer(self, line: bytes) -> dict[str, Any]:
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(line)
            child.stdin.flush()
        if answer := child.stdout.readline():
            return dict(json.loads(answer))
        status = child.wait()
        self._child = None
        if status == -signal.SIGPROF:
            raise RenderError(f"computes for more than {SECONDS:g} seconds: it loops")
        raise RenderError(f"its process ended with status {status}")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            command = [sys.executable, "-c", _CHILD, *(path for path in sys.path if isinstance(path, str))]
            # In a session of its own: an interrupt from the keyboard is for this process.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._child


RENDERER = Renderer()
"""The one of this process."""
atexit.register(RENDERER.close)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=RENDERER.forget)
