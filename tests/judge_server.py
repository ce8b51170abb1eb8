"""A judge for tests: an OpenAI-compatible server on this machine that answers as it is told and counts what it gets."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW, DROP, WEB_PAGE = object(), object(), object()
"""Besides an answer or the number of an HTTP error: no answer in time, a broken connection, no JSON."""

Raw = Callable[[socket.socket, threading.Event], None]
"""What else may come back: it writes to the connection itself, at most until the server ends."""

Script = Callable[[str, int], Any]
"""(prompt, seed) -> what comes back"""


class JudgeServer(ThreadingHTTPServer):
    """Serves `/v1/chat/completions` and `/v1/models`."""

    request_queue_size = 64

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
        elif callable(found):
            self.close_connection = True
            found(self.connection, self.server.ended)
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


# --- all that can go wrong -------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202e"


def sends(*pieces: bytes | str, hold: bool = False, reset: bool = False) -> Raw:
    """Write `pieces` and end the connection: at once, never (`hold`), or without the usual words (`reset`)."""

    def write(connection: socket.socket, ended: threading.Event) -> None:
        for piece in pieces:
            connection.sendall(piece.encode() if isinstance(piece, str) else piece)
        if hold:
            ended.wait(20)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

    return write


def floods(start: bytes | str, piece: bytes) -> Raw:
    """Write `start` and then `piece` over and over, as fast as it is read, without end."""

    def write(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(start.encode() if isinstance(start, str) else start)
        many = piece * max(1, (1 << 16) // len(piece))
        while not ended.is_set():
            connection.sendall(many)

    return write


def dribbles(start: str, piece: str) -> Raw:
    """Write `start` and then `piece` over and over, a byte at a time, with a pause shorter than any timeout."""

    def write(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(start.encode())
        while True:
            for byte in piece.encode():
                if ended.wait(0.04):
                    return
                connection.sendall(bytes([byte]))

    return write


def response(body: Any, status: str = "200 OK", *headers: str, length: Any = None) -> bytes:
    """A whole answer over HTTP; what is not bytes or text is sent as JSON."""
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    length = len(content) if length is None else length
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {length}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + content


def completion(content: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content, **more}}]}


OK, CHUNKED = "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
GOOD = response(completion("70"))
NESTED = "[" * 200_000
DIGITS = "7" * 1_000_000

SLOW_WAYS: dict[str, Raw] = {
    "no byte": sends(hold=True),
    "slow status line": dribbles("", "HTTP/1.1 200 OK"),
    "slow header": dribbles(OK + "X-Slow: ", "a"),
    "slow headers": dribbles(OK, "X: y\r\n"),
    "slow body": dribbles(OK + "Content-Length: 100000\r\n\r\n", " "),
    "slow body without a length": dribbles(OK + "\r\n", " "),
    "slow chunks": dribbles(CHUNKED, "1\r\n \r\n"),
    "slow chunk size": dribbles(CHUNKED, "0"),
    "slow trailers": dribbles(CHUNKED + "0\r\n", "X: y\r\n"),
    "slow 100 Continue": dribbles("", "HTTP/1.1 100 Continue\r\n\r\n"),
    "slow error": dribbles("HTTP/1.1 500 Oops\r\nContent-Length: 100000\r\n\r\n", " "),
    "less than its length, held": sends(response(completion("70"), length=5000), hold=True),
}
"""Each holds its client for ever; all count as timeouts."""

HUGE_WAYS: dict[str, Raw] = {
    "2 GB": floods(OK + f"Content-Length: {2 << 30}\r\n\r\n", b" "),
    "body without end": floods(OK + "\r\n", b" "),
    "chunks without end": floods(CHUNKED, b"1000\r\n" + b" " * 4096 + b"\r\n"),
    "chunk of a negative size": floods(CHUNKED + "-1\r\n", b" "),
    "error of 2 GB": floods(f"HTTP/1.1 400 No\r\nContent-Length: {2 << 30}\r\n\r\n", b"x"),
    "headers without end": floods(OK, b"X: y\r\n"),
    "header without end": floods(OK + "X: ", b"y"),
    "status line without end": floods("HTTP/1.1 ", b"2"),
    "compressed text of 1 GB": sends(
        response(gzip.compress(bytes(1 << 24)) * 64, "200 OK", "Content-Encoding: gzip"),
    ),
}
"""Each sends more than fits into memory; all count as failed."""

WAYS: dict[str, tuple[Raw, str]] = {
    **{name: (sends(response(body)), "failed") for name, body in {
        "empty": "", "no JSON": "It works!", "HTML": "<html>It works!</html>", "half of it": '{"choices": [{"mess',
        "not UTF-8": b'{"choices": "\xff\xfe\xfd"}', "event stream": f"data: {json.dumps(completion('70'))}\n\n",
        "nested lists": NESTED, "nested objects": '{"choices":' * 100_000, "nested content":
        '{"choices":[{"message":{"content":' + NESTED + "]" * 200_000 + "}}]}", "null": None, "number": 70,
        "text": "\"70\"", "list": [completion("70")], "no choices": {}, "error with status 200": {"error": "busy"},
        "choices null": {"choices": None}, "choices empty": {"choices": []}, "choices text": {"choices": "70"},
        "choices object": {"choices": {"0": 1}}, "choice null": {"choices": [None]}, "choice number": {"choices": [70]},
        "choice list": {"choices": [["70"]]}, "no message": {"choices": [{"text": "70"}]},
        "message null": {"choices": [{"message": None}]}, "message text": {"choices": [{"message": "70"}]},
        "message list": {"choices": [{"message": ["70"]}]}, "content number": completion(70),
        "content truth": completion(True), "content fraction": completion(70.0), "content list": completion(["70"]),
        "content parts": completion([{"type": "text", "text": "70"}]), "content object": completion({"text": "70"}),
    }.items()},
    **{name: (sends(response(body)), "unparsable") for name, body in {
        "content null": completion(None), "content empty": completion(""), "no content": {"choices": [{"message": {}}]},
        "tool calls": completion(None, tool_calls=[{"function": {"name": "score", "arguments": "{\"score\": 70}"}}]),
        "refusal": completion(None, refusal="I cannot."), "NaN": completion("NaN"), "infinity": completion("inf"),
        "negative": completion("-5"), "above the scale": completion("101"), "huge score": completion("9" * 5000),
        "exponent": completion("7e1"), "escapes": completion(ESCAPES), "half a pair": completion("\ud800"),
        "long answer": completion("70 " * 500_000),
    }.items()},
    **{name: (sends(raw), "scored") for name, raw in {
        "several choices": response({"choices": [*completion("70")["choices"], *completion("80")["choices"]]}),
        "more than asked for": response({**completion("70", x=[1]), "usage": None, "choices_more": [{}]}),
        "number of a million digits": response('{"created": ' + DIGITS + ", " + json.dumps(completion("70"))[1:]),
        "NaN in the JSON": response('{"created": NaN, ' + json.dumps(completion("70"))[1:]),
        "byte order mark": response(b"\xef\xbb\xbf" + json.dumps(completion("70")).encode()),
        "UTF-16": response(json.dumps(completion("70")).encode("utf-16")),
        "100 Continue first": b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
        "length is no number": response(completion("70"), length="abc"),
        "length is negative": response(completion("70"), length=-5),
        "two answers": GOOD + GOOD,
        "chunks": CHUNKED.encode() + b"%x\r\n" % len(json.dumps(completion("70")))
        + json.dumps(completion("70")).encode() + b"\r\n0\r\n\r\n",
    }.items()},
    **{name: (sends(response(body, *status)), "failed") for name, (body, *status) in {
        "500 for ever": ("", "500 Internal Server Error"), "503": ("busy", "503 Busy", "Retry-After: 999999999"),
        "429, wait for ever": ({}, "429 Too Many Requests", "Retry-After: 999999999"),
        "429, wait until the past": ({}, "429 Too Many", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"),
        "429, nonsense": ({}, "429 Too Many", "Retry-After: nan"), "400": ({"error": {"message": "no"}}, "400 Bad"),
        "error is text": ({"error": "no"}, "400 Bad"), "error is a list": ({"error": [["no"]]}, "400 Bad"),
        "message is an object": ({"error": {"message": {"a": [1]}}}, "400 Bad"), "error null": ({"error": None}, "418"),
        "error in detail": ({"detail": [{"msg": "no"}]}, "422 Unprocessable"), "nested error": (NESTED, "400 Bad"),
        "error of escapes": ({"error": {"message": ESCAPES}}, "400 Bad"), "page of escapes": (ESCAPES, "400 Bad"),
        "reason of escapes": ("", "400 \x1b[31mred\x07"), "401": ({}, "401 Unauthorized"), "403": ({}, "403 Forbidden"),
        "404": ({}, "404 Not Found"), "204": ("", "204 No Content"), "304": ("", "304 Not Modified"),
        "redirect to itself": ("", "302 Found", "Location: /v1/chat/completions"),
        "redirect elsewhere": ("", "307 Temporary", "Location: http://127.0.0.1:9/"),
        "redirect to a file": ("", "301 Moved", "Location: file:///etc/passwd"),
        "redirect to nowhere": ("", "308 Permanent"), "status 999": ("", "999 What"), "status 103": ("", "103 Early"),
    }.items()},
    **{name: (action, "failed") for name, action in {
        "closed at once": sends(), "closed in the status line": sends("HTTP/1.1 2"), "closed in the headers":
        sends(OK + "Content-Le"), "closed before the body": sends(OK + "Content-Length: 500\r\n\r\n"),
        "closed in the body": sends(GOOD[:-9]), "closed in a chunk": sends(CHUNKED + "500\r\n{"),
        "closed before the last chunk": sends(CHUNKED + "1\r\n{\r\n"), "reset at once": sends(reset=True),
        "reset in the body": sends(GOOD[:-9], reset=True), "shorter length than there is":
        sends(response(completion("70"), length=20)), "no HTTP": sends("SSH-2.0-OpenSSH_9.6\r\n"),
        "status is no number": sends("HTTP/1.1 okay\r\n\r\n"), "binary": sends(bytes(range(256)) * 10),
        "chunk size is no number": sends(CHUNKED + "zz\r\n{}\r\n"),
        "chunk larger than the rest": sends(CHUNKED + "ffffffffffffffffffff\r\n{}"),
        "compressed": sends(response(gzip.compress(b"{}"), "200 OK", "Content-Encoding: gzip")),
        "unknown compression": sends(response(completion("70"), "200 OK", "Content-Encoding: zz")),
    }.items()},
}  # fmt: skip
"""What else a server does, and what its record counts as."""
