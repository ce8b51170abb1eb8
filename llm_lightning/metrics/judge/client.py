"""A language model that judges responses, at any OpenAI-compatible endpoint; by default Ollama on this machine.

Every record has exactly one of four outcomes, and reports count all of them:

    scored      the judge answered with the integer, or the choice, and nothing else
    unparsable  every answer had another form
    timeout     no answer arrived in time
    failed      every attempt ended in a broken connection or a server error

Outcomes are cached on disk by content (model, prompt, temperature, seed, max_tokens): each request is sent only
once, and an interrupted call continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from llm_lightning.files.atomic import cache_dir, write_atomically
from llm_lightning.files.bounded_http import NoConnectionError, Reply, TooLongError, exchange
from llm_lightning.metrics.judge.replies import answer_of, message_of, parsed, shortened

DEFAULT_URL = "http://localhost:11434/v1"
DEFAULT_MODEL = "llama3"
TEMPERATURE = 0.0
SEED = 123  # from the book, like the temperature
RETRY_TEMPERATURE = 0.7
"""For retries: at 0, two llama.cpp servers gave the same text for every seed."""

SCORED, UNPARSABLE, TIMEOUT, FAILED = OUTCOMES = ("scored", "unparsable", "timeout", "failed")
ANSWERED = "answered"

FIRST_DELAY = 0.5  # seconds before the first retry; doubles from there
CONNECT_TIMEOUT = 5.0  # seconds; a judge may think for minutes, but a running server accepts at once
PASSING = (408, 409, 429)  # temporary HTTP errors, in addition to those from 500
MOST_REFUSED = 3  # refused prompts after which the settings are at fault, not one prompt


@dataclass(frozen=True)
class Verdict:
    """The result of one prompt."""

    outcome: str
    """one of `OUTCOMES`"""
    value: int | str | None
    """the score, or `A`, `B`, `tie`; None unless scored"""
    answer: str
    """the last answer, unchanged; empty without one"""
    error: str
    """the reason of a timeout or failure"""
    attempts: int
    """requests sent, including those of earlier calls"""
    prompt_sha256: str


class _Reply(NamedTuple):
    """The result of one seed, as cached."""

    outcome: str
    """`answered`, `timeout` or `failed`"""
    text: str
    """the answer, or the error"""
    attempts: int


class _RefusedError(ValueError):
    """The server refuses the settings, is not a judge, or refuses this one prompt: other prompts show which."""


class Judge:
    """One model on one server. Its answers are cached under `cache_dir()/judge`.

    The API key is `$OPENAI_API_KEY`, if set.

    Args:
        url: base address of the API; with Ollama, vLLM and llama.cpp it ends in `/v1`.
        seed: of the first attempt.
        retries: after an unparsable answer, each with the next seed and `RETRY_TEMPERATURE`; and after a temporary
            error, with the same seed. Timeouts are not retried.
        max_tokens: per answer; a model that reasons first needs more.
        timeout: seconds for one answer, from the connection to the last byte, including retries after errors.
        concurrency: requests at once.
        retry_failed: repeat requests cached as timeout or failed.
        progress: show a bar on a terminal.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = DEFAULT_MODEL,
        *,
        seed: int = SEED,
        retries: int = 2,
        max_tokens: int = 16,
        timeout: float = 60.0,
        concurrency: int = 4,
        retry_failed: bool = False,
        progress: bool = False,
    ) -> None:
        if not _is_address(url):
            raise ValueError(f"url={url} must be an address such as {DEFAULT_URL}")
        for name, value, least in (
            ("retries", retries, 0), ("max_tokens", max_tokens, 1), ("concurrency", concurrency, 1)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout:g} must be a number of seconds above 0")
        self.url, self.model, self.seed, self.retries, self.max_tokens = url, model, seed, retries, max_tokens
        self.timeout, self.concurrency = timeout, concurrency
        self.retry_failed, self.progress = retry_failed, progress
        self._is_reached = self._has_answered = False

    def ask(self, prompts: Sequence[str], parse: Callable[[str], int | str | None]) -> list[Verdict]:
        """Judge prompts; equal prompts are sent once.

        Args:
            parse: returns the value of a complete answer, or None.

        Raises:
            ConnectionError: if no server listens at the address, or it stops listening; earlier answers are cached.
            ValueError: if the server lacks the model, refuses the key, or has another API.
        """
        from tqdm import tqdm

        unique = list(dict.fromkeys(prompts))
        verdicts: dict[str, Verdict] = {}
        refused: list[str] = []

        def settle(prompt: str, judged: Callable[[], Verdict]) -> None:
            try:
                verdicts[prompt] = judged()
            except _RefusedError:  # this prompt or every prompt: others show which
                refused.append(prompt)
                if len(refused) >= MOST_REFUSED and not self._has_answered:
                    raise
            else:
                bar.update()

        with tqdm(total=len(unique), unit="answer", leave=False, disable=None if self.progress else True) as bar:
            rest = iter(unique)
            # One by one until the server responds, so that a wrong address gives a single error at once.
            for prompt in rest:
                settle(prompt, partial(self._judge, prompt, parse))
                if self._is_reached:
                    break
            with ThreadPoolExecutor(self.concurrency) as pool:
                futures = {pool.submit(self._judge, prompt, parse): prompt for prompt in rest}
                try:
                    for future in as_completed(futures):
                        settle(futures[future], future.result)
                except BaseException:  # including Ctrl-C: requests in progress are completed and cached
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            for prompt in refused:
                verdicts[prompt] = self._judge(prompt, parse)
                bar.update()
        return [verdicts[prompt] for prompt in prompts]

    def refuse_unreachable(self) -> None:
        """Check that a server listens at the address, before any work is done.

        Raises:
            ConnectionError: if none does; the message explains how to start a judge.
        """
        try:
            self._exchange("models", None, time.monotonic() + CONNECT_TIMEOUT)
        except NoConnectionError as error:
            raise ConnectionError(self._unreachable(str(error))) from error
        except (OSError, HTTPException):  # slow or unexpected: the first request will show
            return

    # --- one prompt --------------------------------------------------------------------------------------------------

    def _judge(self, prompt: str, parse: Callable[[str], int | str | None]) -> Verdict:
        digest, attempts, answer = hashlib.sha256(prompt.encode()).hexdigest(), 0, ""
        for seed in range(self.seed, self.seed + self.retries + 1):
            reply = self._reply(prompt, seed)
            attempts += reply.attempts
            if reply.outcome != ANSWERED:
                return Verdict(reply.outcome, None, answer, reply.text, attempts, digest)
            answer = reply.text
            value = parse(answer)
            if value is not None:
                return Verdict(SCORED, value, answer, "", attempts, digest)
        return Verdict(UNPARSABLE, None, answer, "", attempts, digest)

    def _reply(self, prompt: str, seed: int) -> _Reply:
        """The reply from the cache, or from the server."""
        request = {"model": self.model, "prompt": prompt, "temperature": self._temperature(seed), "seed": seed}
        request["max_tokens"] = self.max_tokens
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        file = cache_dir() / "judge" / f"{name}.json"
        kept = _read_reply(file)
        if kept is not None and (kept.outcome == ANSWERED or not self.retry_failed):
            return kept
        try:
            reply = self._request(prompt, seed)
        except _RefusedError as error:
            if kept is None:
                raise
            # It failed before, and the settings were right for other prompts then: this prompt is refused.
            reply = _Reply(FAILED, str(error), 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"model": self.model, "seed": seed, **reply._asdict()}))
        return reply

    def _temperature(self, seed: int) -> float:
        return TEMPERATURE if seed == self.seed else RETRY_TEMPERATURE

    def _request(self, prompt: str, seed: int) -> _Reply:
        """Send until an answer arrives, or the time or the attempts are used up."""
        deadline = time.monotonic() + self.timeout
        for attempt in range(1, self.retries + 2):
            is_last = attempt == self.retries + 1
            delay = FIRST_DELAY * 2 ** (attempt - 1)
            try:
                outcome, text, is_final = self._send(prompt, seed, deadline)
            except NoConnectionError as error:
                if is_last or not self._is_reached:
                    raise ConnectionError(self._unreachable(str(error))) from error
            else:
                self._is_reached = True
                self._has_answered |= outcome == ANSWERED
                if is_final or is_last or time.monotonic() + delay >= deadline:
                    return _Reply(outcome, text, attempt)
            time.sleep(delay)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, prompt: str, seed: int, deadline: float) -> tuple[str, str, bool]:
        """(outcome, answer or error, whether a retry is useless)."""
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._temperature(seed),
            "seed": seed,
            "max_tokens": self.max_tokens,
        }
        try:
            reply = self._exchange("chat/completions", json.dumps(request).encode(), deadline)
        except NoConnectionError:
            raise
        except TimeoutError:
            return TIMEOUT, f"no answer within {self.timeout:g} s", True
        except TooLongError as error:
            return FAILED, self._no_completion(str(error)), True
        except (OSError, HTTPException) as error:
            return FAILED, shortened(f"{type(error).__name__}: {error}"), False
        if not 200 <= reply.status < 300:
            self._refuse_settings(reply)
            is_final = reply.status < 500 and reply.status not in PASSING
            return FAILED, f"HTTP {reply.status}: {message_of(reply)}", is_final
        try:
            return ANSWERED, answer_of(reply), True
        except ValueError as error:
            return FAILED, self._no_completion(str(error)), True

    def _exchange(self, path: str, body: bytes | None, deadline: float) -> Reply:
        """Call the API. Redirects are not followed: a prompt goes only to the given address."""
        headers = {
            "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY') or 'none'}",
            "Content-Type": "application/json",
            "User-Agent": "llm-lightning",
        }
        return exchange(
            f"{self.url.rstrip('/')}/{path}",
            seconds=max(deadline - time.monotonic(), 0.001),
            connect_seconds=CONNECT_TIMEOUT,
            body=body,
            headers=headers,
        )

    def _no_completion(self, reason: str) -> str:
        """The reason; raises an error if the server never sent a completion, so may not be a judge."""
        if not self._has_answered:
            raise _RefusedError(
                f"{self.url} answers, but not with a chat completion ({reason}); name the base address "
                f"of an OpenAI-compatible API with --url, such as {DEFAULT_URL}"
            )
        return f"no chat completion: {reason}"

    def _refuse_settings(self, reply: Reply) -> None:
        """Raise errors that may concern every prompt, while none has been answered."""
        if self._has_answered:
            return
        detail = f"(HTTP {reply.status}: {message_of(reply)})"
        if 300 <= reply.status < 400:
            raise _RefusedError(f"{self.url} redirects {detail}; if that is right, name the new address with --url")
        if reply.status in (401, 403):
            raise _RefusedError(f"{self.url} refuses the API key {detail}; set OPENAI_API_KEY")
        if reply.status == 404:
            raise _RefusedError(
                f"{self.url} has no model {self.model!r} {detail}{self._models()}; get it with "
                f"`ollama pull {self.model}`, name another with --model, or the right base address (.../v1) with --url"
            )

    def _models(self) -> str:
        """A hint for error messages: the server's models, if it lists them."""
        try:
            reply = self._exchange("models", None, time.monotonic() + CONNECT_TIMEOUT)
            names = [str(model["id"]) for model in parsed(reply)["data"]]
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            return ""
        return f"; there are {shortened(', '.join(names[:10]))}" if names else ""

    def _unreachable(self, cause: str) -> str:
        if self._is_reached:
            return (
                f"the judge at {self.url} is gone ({cause}); its answers so far are cached: start it again and "
                "repeat the command"
            )
        return (
            f"no judge answers at {self.url} ({cause}); start one with `ollama serve` and `ollama pull {self.model}`, "
            "or name another address with --url"
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises ValueError)
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and url.isascii()
        and url.isprintable()
        and " " not in url
    )


def _read_reply(file: Path) -> _Reply | None:
    """The cached reply; None if there is none or it is damaged."""
    try:
        kept = json.loads(file.read_bytes())
        return _Reply(str(kept["outcome"]), str(kept["text"]), int(kept["attempts"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
