"""A judge for tests: an OpenAI-compatible server on this machine that answers as it is told and counts what it gets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW, DROP, WEB_PAGE = object(), object(), object()
"""Besides an answer or the number of an HTTP error: no answer in time, a broken connection, no JSON."""

Script = Callable[[str, int], Any]
"""(prompt, seed) -> what comes back"""


class JudgeServer(ThreadingHTTPServer):
    """Serves `/v1/chat/completions` and `/v1/models`."""

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.requests = script, list[dict[str, Any]]()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that gave up waiting is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "phi3", "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request["authorization"] = self.headers["Authorization"]
        self.server.requests.append(request)
        found = self.server.script(request["messages"][0]["content"], request["seed"])
        if found is SLOW:
            self.server.ended.wait(20)
        elif found is DROP:
            self.connection.close()
        elif found is WEB_PAGE:
            self._send(200, "<html>It works!</html>")
        elif isinstance(found, int):
            self._send(found, {"error": {"message": "out of memory", "type": "api_error"}})
        else:
            message = {"role": "assistant", "content": found}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._send(200, {"id": "1", "object": "chat.completion", "model": request["model"], "choices": [choice]})

    def _send(self, status: int, content: Any) -> None:
        is_text = isinstance(content, str)
        body = (content if is_text else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if is_text else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(script: Script) -> Iterator[JudgeServer]:
    """Serve until the end of the block; afterwards nothing listens there."""
    with JudgeServer(script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()


def records(n: int = 110, n_unparsable: int = 5, n_slow: int = 3, n_failing: int = 2) -> list[dict[str, str]]:
    """Records whose responses tell `scripted` what to do; the others get the scores 41 to 60, over and over."""
    kinds = ["prose"] * n_unparsable + ["slow"] * n_slow + ["broken"] * n_failing
    kinds += [f"score {41 + i % 20}" for i in range(n - len(kinds))]
    return [
        {"instruction": f"Task {i}.", "input": "", "output": f"Right {i}.", "model_response": f"<{kind}> {i}"}
        for i, kind in enumerate(kinds)
    ]


def scripted(prompt: str, seed: int) -> Any:
    """What the responses of `records` ask for."""
    kind = prompt[prompt.index("<") + 1 : prompt.index(">")]
    actions = {"prose": "I would give it 85/100.", "slow": SLOW, "broken": 500}
    return actions.get(kind, kind.removeprefix("score "))
