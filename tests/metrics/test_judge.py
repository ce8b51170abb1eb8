"""The judge: what it sends, how each record ends, what is kept, and what is told of a mean with records missing."""

from __future__ import annotations

import hashlib
import random
import re
import socket
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import DROP, HUGE_WAYS, SLOW_WAYS, WAYS, WEB_PAGE, JudgeServer, records, scripted, sends, serving

from llm_lightning.files.atomic import cache_dir
from llm_lightning.inference.judging import compare_responses, question, score_responses
from llm_lightning.metrics.judge import client as judging
from llm_lightning.metrics.judge.client import Judge, Verdict
from llm_lightning.metrics.judge.prompts import PROMPTS, parse_choice, parse_score
from llm_lightning.metrics.judge.summaries import summarise_pairs, summarise_scores

RECORD = {
    "instruction": "Name a fruit.",
    "input": "It is yellow.",
    "output": "A banana.",
    "model_response": "Lemon {x}",
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "FIRST_DELAY", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(scripted) as found:
        yield found


def score(server: JudgeServer, rows: list[dict[str, str]], **options: Any) -> list[Verdict]:
    return score_responses(Judge(server.url, **options), rows, "model_response")


def one(server: JudgeServer, **options: Any) -> Verdict:
    return score(server, [RECORD], **options)[0]


def kept() -> list[Path]:
    return sorted((cache_dir() / "judge").glob("*"))


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_books_prompt_to_the_letter(server: JudgeServer) -> None:
    server.script = lambda *_: "85"
    verdict = one(server)
    expected = (
        "Given the input `Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nName a fruit.\n\n### Input:\nIt is yellow.` and correct output `A banana.`, "
        "score the model response `Lemon {x}` on a scale from 0 to 100, where 100 is the best score. "
        "Respond with the integer number only."
    )
    (request,) = server.requests
    assert request.pop("messages") == [{"role": "user", "content": expected}]
    assert request.pop("authorization").startswith("Bearer ")
    assert request == {"model": "llama3", "temperature": 0.0, "seed": 123, "max_tokens": 16}
    assert verdict == Verdict("scored", 85, "85", "", 1, hashlib.sha256(expected.encode()).hexdigest())


def test_a_judge_sees_no_thinking(server: JudgeServer) -> None:
    thought = {"output": "<think>so</think>A banana.", "model_response": "<think>hm</think>Lemon", "other": "Lime"}
    score(server, [RECORD | thought])
    compare_responses(Judge(server.url), [RECORD | thought], "model_response", "other")
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert len(prompts) >= 3
    assert all("A banana." in prompt and "think>" not in prompt for prompt in prompts)


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {}])
def test_without_an_input_there_is_no_input_section(empty: dict[str, Any]) -> None:
    assert question({"instruction": "Name a fruit.", **empty}).endswith("\n\n### Instruction:\nName a fruit.")


def test_the_rubric_has_its_own_scale(server: JudgeServer) -> None:
    server.script = lambda *_: "5"
    (verdict,) = score_responses(Judge(server.url), [RECORD], "model_response", PROMPTS["rubric"])
    assert verdict.value == 5
    sent = server.requests[0]["messages"][0]["content"]
    for text in ("Name a fruit.", "A banana.", "Lemon {x}", "integer only"):
        assert text in sent
    server.script = lambda *_: "85"
    (verdict,) = score_responses(Judge(server.url, model="b"), [RECORD], "model_response", PROMPTS["rubric"])
    assert verdict.outcome == "unparsable"


def test_the_key_comes_from_the_environment(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = lambda *_: "85"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    one(server)
    assert server.requests[0]["authorization"] == "Bearer sk-mine"


def test_a_proxy_is_not_asked_for_this_machine(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = lambda *_: "85"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    assert one(server).value == 85


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("85", 85), (" 85\n", 85), ("0", 0), ("100", 100), ("085", 85), ("101", None), ("-1", None), ("85.", None),
     ("85/100", None), ("85.0", None), ("8 5", None), ("Score: 85", None), ("**85**", None), ("٨٥", None), ("", None),
     ("1e2", None), ("+85", None), ("9" * 5000, None), ("85\n\nIt is right.", None)],
)  # fmt: skip
def test_only_an_integer_in_range_is_a_score(answer: str, expected: int | None) -> None:
    assert parse_score(answer, 0, 100) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A", "A"), (" b\n", "B"), ("Tie", "tie"), ("A.", None), ("AB", None), ("Response A", None), ("", None)],
)
def test_only_a_choice_is_a_choice(answer: str, expected: str | None) -> None:
    assert parse_choice(answer) == expected


def test_an_unparsable_answer_is_asked_again_with_the_next_seed(server: JudgeServer) -> None:
    server.script = lambda _, seed: "70" if seed == 125 else "Good!"
    verdict = one(server)
    assert (verdict.outcome, verdict.value, verdict.attempts) == ("scored", 70, 3)
    assert [request["seed"] for request in server.requests] == [123, 124, 125]
    assert [request["temperature"] for request in server.requests] == [0.0, 0.7, 0.7]
    again = one(server, retries=1)
    assert (again.outcome, again.value, again.answer, again.attempts) == ("unparsable", None, "Good!", 2)
    assert len(server.requests) == 3


@pytest.mark.parametrize("trouble", [500, 503, 429, DROP])
def test_passing_trouble_is_sent_again_with_the_same_seed(server: JudgeServer, trouble: Any) -> None:
    server.script = lambda *_: "70" if len(server.requests) == 3 else trouble
    verdict = one(server)
    assert (verdict.outcome, verdict.value, verdict.attempts) == ("scored", 70, 3)
    assert {request["seed"] for request in server.requests} == {123}


@pytest.mark.parametrize(
    ("answer", "n_requests", "message"),
    [
        (500, 3, "HTTP 500: out of memory"),
        (400, 1, "HTTP 400: out of memory"),
        (DROP, 3, "RemoteDisconnected: Remote end closed"),
    ],
)
def test_lasting_trouble_is_a_failure(server: JudgeServer, answer: Any, n_requests: int, message: str) -> None:
    server.script = lambda *_: answer
    verdict = one(server)
    assert (verdict.outcome, verdict.value, verdict.attempts) == ("failed", None, n_requests)
    assert re.match(message, verdict.error), verdict.error
    assert len(server.requests) == n_requests


def test_something_else_than_a_completion_later_on_is_a_failure(server: JudgeServer) -> None:
    server.script = lambda *_: "70" if len(server.requests) == 1 else WEB_PAGE
    verdicts = score(server, [RECORD, {**RECORD, "model_response": "Lime"}])
    assert [one.outcome for one in verdicts] == ["scored", "failed"]
    assert verdicts[1].error == "no chat completion: it is not JSON"


# --- every record counts ---------------------------------------------------------------------------------------------


def test_110_records_of_which_ten_have_no_score(server: JudgeServer) -> None:
    rows = records()
    score(server, [row for row in rows if "slow" not in row["model_response"]])
    verdicts = score(
        server, rows, timeout=0.3
    )  # is sent the slow ones alone, or a busy machine would have more of them
    summary = summarise_scores(verdicts)
    assert summary.outcomes == {"scored": 100, "unparsable": 5, "timeout": 3, "failed": 2}
    assert summary.n == 110
    assert len(server.requests) == 100 * 1 + 5 * 3 + 3 * 1 + 2 * 3
    assert [one.outcome for one in verdicts[:11]] == ["unparsable"] * 5 + ["timeout"] * 3 + ["failed"] * 2 + ["scored"]
    assert {one.answer for one in verdicts[:5]} == {"I would give it 85/100."}
    assert {one.error for one in verdicts[5:8]} == {"no answer within 0.3 s"}
    assert summary.mean == 50.5  # 41 to 60, five times

    scored_alone = summarise_scores(verdicts[10:])
    assert (summary.scored_low, summary.scored_high) == (scored_alone.low, scored_alone.high)
    assert summary.low < scored_alone.low - 4
    assert summary.high > scored_alone.high + 4
    # Outside of the means that ten zeros, and ten hundreds, would make.
    assert summary.low < 100 * 50.5 / 110 < (100 * 50.5 + 10 * 100) / 110 < summary.high


@pytest.mark.slow
def test_a_second_call_sends_nothing(server: JudgeServer) -> None:
    rows = records()
    score(server, [row for row in rows if "slow" not in row["model_response"]])
    verdicts = score(server, rows, timeout=0.3)
    sent = len(server.requests)
    assert score(server, rows) == verdicts
    assert len(server.requests) == sent
    server.script = lambda prompt, seed: 500 if "slow" in prompt else scripted(prompt, seed)
    again = score(server, rows, retry_failed=True)
    assert Counter(kind_of(request) for request in server.requests[sent:]) == {"slow": 9, "broken": 6}
    assert [one.outcome for one in again[:11]] == ["unparsable"] * 5 + ["failed"] * 5 + ["scored"]
    server.script = lambda *_: "80"
    assert [one.value for one in score(server, rows, retry_failed=True)[:11]] == [None] * 5 + [80] * 5 + [41]


def kind_of(request: dict[str, Any]) -> str:
    prompt = request["messages"][0]["content"]
    return prompt[prompt.index("<") + 1 : prompt.index(">")]


def made(*values: int | None) -> list[Verdict]:
    """Verdicts; None: unparsable."""
    return [Verdict("unparsable" if value is None else "scored", value, "", "", 1, "") for value in values]


def test_the_interval_by_hand() -> None:
    alone = summarise_scores(made(50, 60, 70))
    assert (alone.low, alone.high) == (alone.scored_low, alone.scored_high)
    assert (alone.mean, alone.low, alone.high) == pytest.approx((60, 60 - 24.841, 60 + 24.841), abs=1e-3)
    # 50 60 70 50 60 70 50 60 70 and 0: mean 54, s 20.656, t 2.26216; with 100: mean 64, s 15.055
    summary = summarise_scores(made(*[50, 60, 70] * 3, None))
    assert summary.mean == 60
    assert (summary.low, summary.high) == pytest.approx((54 - 14.777, 64 + 10.770), abs=2e-3)
    # On a scale from 1 to 5 a missing score is at worst a 1: nine 3 and 1 have mean 2.8 and s 0.63246.
    rubric = summarise_scores(made(*[3] * 9, None), PROMPTS["rubric"])
    assert (rubric.low, rubric.high) == pytest.approx((2.8 - 0.45243, 3.2 + 0.45243), abs=1e-4)


def test_the_interval_never_narrows_with_missing_scores() -> None:
    rng = random.Random(0)
    for _ in range(200):
        values = [rng.randint(0, 100) for _ in range(rng.randint(0, 12))]
        alone, more = (summarise_scores(made(*values, *[None] * n)) for n in (0, rng.randint(1, 9)))
        assert (more.low, more.high) != (alone.low, alone.high) or (more.low, more.high) == (0, 100)
        assert 0 <= more.low <= alone.low <= alone.high <= more.high <= 100


def test_without_any_score_the_interval_is_the_scale() -> None:
    summary = summarise_scores(made(None, None))
    assert (summary.mean, summary.low, summary.high) == (None, 0, 100)
    assert summary.outcomes == {"scored": 0, "unparsable": 2, "timeout": 0, "failed": 0}


# --- servers that misbehave ------------------------------------------------------------------------------------------


def rows_named(names: Iterable[str]) -> list[dict[str, str]]:
    return [{**RECORD, "model_response": f"<{name}>"} for name in names]


def misbehaving(prompt: str, _: int) -> Any:
    """What the response names; `good` is scored."""
    name = prompt[prompt.index("<") + 1 : prompt.index(">")]
    return "50" if name.startswith("good") else (SLOW_WAYS | HUGE_WAYS)[name] if name not in WAYS else WAYS[name][0]


@pytest.mark.slow
def test_every_record_counts_whatever_the_server_does(server: JudgeServer) -> None:
    server.script = misbehaving
    expected = {"good": "scored", **dict.fromkeys(SLOW_WAYS, "timeout"), **dict.fromkeys(HUGE_WAYS, "failed")}
    expected |= {name: kind for name, (_, kind) in WAYS.items()}
    started = time.monotonic()
    found = dict(zip(["good", *SLOW_WAYS], score(server, rows_named(["good", *SLOW_WAYS]), timeout=0.5), strict=True))
    others = [*HUGE_WAYS, *WAYS]
    found |= zip(others, score(server, rows_named(["good too", *others]), timeout=30, concurrency=8)[1:], strict=True)
    assert time.monotonic() - started < 60
    wrong = [f"{name}: {one.outcome}, not {expected[name]} ({one})" for name, one in found.items()
             if one.outcome != expected[name]]  # fmt: skip
    wrong += [f"{name}: no reason" for name, one in found.items() if one.outcome in ("timeout", "failed")
              and not one.error]  # fmt: skip
    wrong += [f"{name}: {len(one.error)} characters" for name, one in found.items() if len(one.error) > 300]
    wrong += [f"{name}: value {one.value}" for name, one in found.items()
              if one.value != {"good": 50}.get(name, 70 if expected[name] == "scored" else None)]  # fmt: skip
    assert not wrong, "\n".join(wrong)
    summary = summarise_scores(list(found.values()))
    assert summary.outcomes == {kind: Counter(expected.values())[kind] for kind in summary.outcomes}

    sent = len(server.requests)
    rows = rows_named(expected)
    assert score(server, rows) == [found[name] for name in expected]
    assert len(server.requests) == sent, "a second call sends nothing"
    lasting = rows_named(["good", "401", "404", "HTML", "2 GB", "redirect elsewhere"])
    assert [one.outcome for one in score(server, lasting, retry_failed=True)] == ["scored", *["failed"] * 5]
    sent = len(server.requests)
    server.script = lambda *_: "80"
    again = score(server, rows, retry_failed=True)
    lost = {name for name, kind in expected.items() if kind in ("timeout", "failed")}
    assert {kind_of(request) for request in server.requests[sent:]} == lost
    assert len(server.requests) == sent + len(lost)
    assert {name for name, one in zip(expected, again, strict=True) if one.value == 80} == lost


def test_a_huge_answer_takes_little_memory(server: JudgeServer) -> None:
    server.script = misbehaving
    tracemalloc.start()
    try:
        verdicts = score(server, rows_named(["good", *HUGE_WAYS]), concurrency=1, timeout=30)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20  # four megabytes, in a few copies
    finally:
        tracemalloc.stop()
    assert {one.outcome for one in verdicts[1:]} == {"failed"}


def test_a_first_answer_that_is_none_is_one_clear_error_or_counted(server: JudgeServer) -> None:
    """Each way as the first that a server does: whatever is wrong, it is of a kind that becomes one line."""
    wrong = []
    for name, (action, kind) in WAYS.items():
        server.script = lambda *_, action=action: action
        try:
            (verdict,) = score(server, [RECORD], model=name, retries=0)
        except (ValueError, ConnectionError) as error:
            if kind != "failed" or "\n" in str(error) or len(str(error)) > 900:
                wrong.append(f"{name}: {error!r}")
        else:
            wrong += [] if verdict.outcome == kind else [f"{name}: {verdict}"]
    assert not wrong, "\n".join(wrong)


def test_prompts_and_keys_go_nowhere_else(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with serving(lambda *_: "70") as elsewhere:
        for status in ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"):
            target = f"Location: {elsewhere.url}/chat/completions"
            server.script = lambda *_, sent=(status, target): sends(f"HTTP/1.1 {sent[0]}\r\n{sent[1]}\r\n\r\n")
            with pytest.raises(ValueError, match=f"it redirects to {elsewhere.url}.*name the new address with --url"):
                one(server)
        assert elsewhere.requests == []


def test_what_is_sent_again_fits_into_the_time_of_one_answer(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "FIRST_DELAY", 0.2)
    server.script = lambda *_: 500
    started = time.monotonic()
    verdict = one(server, timeout=0.5, retries=20)
    assert time.monotonic() - started < 5
    assert (verdict.outcome, verdict.attempts) == ("failed", 2)  # after 0 and 0.2 seconds; the next would be at 0.6


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_answers_are_kept_by_content_not_by_address(server: JudgeServer) -> None:
    server.script = lambda *_: "85"
    verdict = one(server)
    with serving(lambda *_: "1") as elsewhere:
        assert one(elsewhere) == verdict
        assert one(elsewhere, timeout=1.0, concurrency=1, retries=0) == verdict
        assert elsewhere.requests == []
        for other in ({"model": "phi3"}, {"seed": 7}, {"max_tokens": 5}):
            assert one(elsewhere, **other).value == 1
        assert len(elsewhere.requests) == 3
        assert score(elsewhere, [{**RECORD, "model_response": "Lime"}])[0].value == 1


def test_what_is_kept_needs_no_server(server: JudgeServer) -> None:
    rows = records(12, 2, 0, 2)
    verdicts = score(server, rows)
    gone = Judge(f"http://127.0.0.1:{closed_port()}/v1")
    assert score_responses(gone, rows, "model_response") == verdicts


def test_equal_prompts_are_asked_once(server: JudgeServer) -> None:
    def pausing(*_: Any) -> str:
        time.sleep(0.05)
        return "85"

    server.script = pausing
    rows = [RECORD, *[{**RECORD, "model_response": "Lime"}] * 20]
    assert [one.value for one in score(server, rows, concurrency=8)] == [85] * 21
    assert len(server.requests) == 2


def test_an_interrupted_call_goes_on(server: JudgeServer) -> None:
    rows = records(20, 0, 0, 0)
    read: list[str] = []

    def pausing(prompt: str, seed: int) -> Any:
        time.sleep(0.03)
        return scripted(prompt, seed)

    server.script = pausing

    def interrupted(answer: str) -> int:
        read.append(answer)
        if len(read) == 6:
            raise KeyboardInterrupt
        return int(answer)

    judge = Judge(server.url, concurrency=1)
    with pytest.raises(KeyboardInterrupt):
        judge.ask([row["model_response"] for row in rows], interrupted)
    sent = len(server.requests)
    assert sent < 20
    again = Judge(server.url).ask([row["model_response"] for row in rows], int)
    assert [one.value for one in again] == list(range(41, 61))
    assert len(server.requests) == 20


def test_a_damaged_file_is_asked_again(server: JudgeServer) -> None:
    server.script = lambda *_: "85"
    one(server)
    (file,) = kept()
    for damage in (b"", b"[]", b'{"outcome": "answered"}', b"\xff"):
        file.write_bytes(damage)
        assert one(server).value == 85
    assert len(server.requests) == 5


# --- no judge --------------------------------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(_: float) -> None:
        pytest.fail("the first contact is not tried again")

    monkeypatch.setattr(judging.time, "sleep", waiting)
    url = f"http://127.0.0.1:{closed_port()}/v1"
    message = (
        rf"no judge answers at {url} \(.*refused\); start one with `ollama serve` and `ollama pull llama3`, or .*--url"
    )
    with pytest.raises(ConnectionError, match=message):
        score_responses(Judge(url), records(), "model_response")
    assert kept() == []


def test_a_judge_that_dies_keeps_what_it_said(server: JudgeServer) -> None:
    rows = records(20, 0, 0, 0)

    def dying(prompt: str, seed: int) -> Any:
        if len(server.requests) == 6:
            server.shutdown()
            server.server_close()
        return scripted(prompt, seed)

    server.script = dying
    with pytest.raises(ConnectionError, match=r"is gone \(.*\); its answers so far are cached: .*repeat the command"):
        score(server, rows, concurrency=1)
    assert len(server.requests) == 6
    with serving(scripted) as restarted:
        assert {one.outcome for one in score(restarted, rows)} == {"scored"}
        assert len(restarted.requests) == 14


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"has no model 'llama3' \(HTTP 404: out of memory\); there are phi3; get it with `ollama pull llama3`"),
        (401, r"refuses the API key \(HTTP 401: out of memory\); set OPENAI_API_KEY"),
        (403, r"refuses the API key \(HTTP 403"),
        (WEB_PAGE, r"answers, but not with a chat completion .*base address .*, such as http://localhost:11434/v1"),
    ],
)
def test_what_no_record_can_help_ends_the_call(server: JudgeServer, status: Any, message: str) -> None:
    server.script = lambda *_: status
    with pytest.raises(ValueError, match=message):
        score(server, records())
    assert len(server.requests) == 3, "one may be refused for what it says, but not three"
    assert kept() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:11434/v1"}, r"url=localhost:11434/v1 must be an address such as http://localhost:11434/v1"),
        ({"url": "http:///v1"}, r"must be an address"),
        ({"retries": -1}, r"retries=-1 must be at least 0"),
        ({"max_tokens": 0}, r"max_tokens=0 must be at least 1"),
        ({"concurrency": 0}, r"concurrency=0 must be at least 1"),
        ({"timeout": 0}, r"timeout=0 must be a number of seconds above 0"),
        ({"timeout": float("nan")}, r"timeout=nan must be"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge(**options)


# --- pairs -----------------------------------------------------------------------------------------------------------


def pair(a: str, b: str, number: int = 0) -> dict[str, str]:
    return {"instruction": f"Task {number}.", "output": "Right.", "a": f"<{a}>", "b": f"<{b}>"}


def shown(prompt: str) -> tuple[str, str]:
    """The responses A and B of a prompt."""
    first, second = re.findall("<(.*?)>", prompt)
    return first, second


def better(prompt: str, _: int) -> str:
    """Prefers the longer one."""
    first, second = shown(prompt)
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def test_pairs_are_asked_in_both_orders(server: JudgeServer) -> None:
    server.script = better
    rows = [pair("long", "s", 1), pair("s", "long", 2), pair("long", "s", 3), pair("same", "size", 4)]
    comparisons = compare_responses(Judge(server.url), rows, "a", "b")
    assert [one.winner for one in comparisons] == ["A", "B", "A", "tie"]
    sent = Counter(shown(request["messages"][0]["content"]) for request in server.requests)
    assert sent == {("long", "s"): 3, ("s", "long"): 3, ("same", "size"): 1, ("size", "same"): 1}
    summary = summarise_pairs(comparisons)
    assert (summary.wins, summary.ties, summary.losses, summary.n) == (2, 1, 1, 4)
    # 1, 0, 1 and 1/2: mean 0.625, s 0.4787, t 3.18245, so the interval reaches over both ends
    assert (summary.mean, summary.low, summary.high) == (0.625, 0, 1)
    assert (summary.first_chosen, summary.decided) == (3, 6)
    assert summary.outcomes == {"scored": 4, "unparsable": 0, "timeout": 0, "failed": 0}
    assert compare_responses(Judge(server.url), rows, "a", "b") == comparisons
    assert len(server.requests) == 8
    mirrored = summarise_pairs(compare_responses(Judge(server.url), rows, "b", "a"))
    assert (mirrored.wins, mirrored.losses) == (1, 2)
    assert len(server.requests) == 8, "the same two prompts, the other way round"


def test_a_judge_that_looks_at_the_place_finds_only_ties(server: JudgeServer) -> None:
    server.script = lambda *_: "A"
    rows = [pair("x", "y", number) for number in range(10)]
    summary = summarise_pairs(compare_responses(Judge(server.url), rows, "a", "b"))
    assert (summary.wins, summary.ties, summary.losses, summary.mean) == (0, 10, 0, 0.5)
    assert (summary.first_chosen, summary.decided) == (20, 20)


def test_a_tie_in_one_order_is_a_tie(server: JudgeServer) -> None:
    server.script = lambda prompt, _: "A" if shown(prompt) == ("x", "y") else "tie"
    (found,) = compare_responses(Judge(server.url), [pair("x", "y")], "a", "b")
    assert (found.outcome, found.winner) == ("scored", "tie")


def test_pairs_count_their_failures(server: JudgeServer) -> None:
    def script(prompt: str, seed: int) -> Any:
        if "broken" in prompt:
            return 500
        return "Both!" if shown(prompt) == ("odd", "x") else better(prompt, seed)

    server.script = script
    rows = [*[pair("long", "s", number) for number in range(20)], pair("broken", "s"), pair("x", "odd")]
    comparisons = compare_responses(Judge(server.url), rows, "a", "b")
    assert [one.winner for one in comparisons[-2:]] == [None, None]
    summary = summarise_pairs(comparisons)
    assert summary.outcomes == {"scored": 20, "unparsable": 1, "timeout": 0, "failed": 1}
    assert (summary.wins, summary.mean, summary.scored_low, summary.high) == (20, 1.0, 1.0, 1)
    # 20 ones and 2 zeros: mean 10/11, s 0.29424, t 2.07961
    assert summary.low == pytest.approx(0.909091 - 2.07961 * 0.294245 / 22**0.5, abs=1e-5)
