"""`llm-lightning compare`: two tiny models through its own arguments, a judge that answers by script, and its pages."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from judge_server import serving
from matplotlib.figure import Figure
from tiny_run import SETTINGS, fit_here

from llm_lightning.cli import compare as comparing
from llm_lightning.cli import main as entry
from llm_lightning.cli.comparison_page import EMPTY
from llm_lightning.data.templates.choose import choose_template
from llm_lightning.data.templates.conversation import Conversation, Turn
from llm_lightning.inference.comparison import repeats_itself
from llm_lightning.inference.curves import draw_curves, read_curves
from llm_lightning.inference.respond import answer
from llm_lightning.metrics.intervals import paired_share_interval, wilson_interval
from llm_lightning.metrics.judge import client as judging
from llm_lightning.weights.load import load_model

TEMPLATE = "{instruction} {input} {response}"
HOSTILE = "<script>alert('x')</script> & | `code` *star*\n    indented [link](javascript:1) $x$"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three runs, `base`, `tuned` and `preferring`."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"base": ["task=pretraining"], "tuned": ["task=sft", f"data.template='{TEMPLATE}'"]}
    settings["tuned"] += ["callbacks.responses=null"]
    settings["preferring"] = ["task=dpo", f"data.template='{TEMPLATE}'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LIGHTNING_CACHE", str(folder / "cache"))
        for name, own in settings.items():
            outcome = fit_here([*SETTINGS, *own, "model.context_length=128", f"hydra.run.dir={folder / name}"])
            assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with questions in it and the verb known, as it is in `llm-lightning`."""
    monkeypatch.setitem(entry.VERBS, "compare", "")
    monkeypatch.setattr(judging, "FIRST_DELAY", 0.0)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned", "preferring"):
        Path(name).symlink_to(runs / name)
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"answer {i}"} for i in range(5)]
    Path("q.json").write_text(json.dumps(rows))
    return tmp_path


def compare(*words: object) -> int:
    return entry.main(["compare", *map(str, words)])


def says(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
    """Let the two models answer this, A first."""
    queue = list(answers)
    monkeypatch.setattr(comparing, "_respond", lambda *_: queue.pop(0))


class Tables(HTMLParser):
    """The cells of every row of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._is_cell = tag in ("td", "th", "span") or (self._is_cell and tag != "table")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1][-1] += data


def measures(path: Path) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in Tables(path.read_text()).rows if len(row) == 5}


@pytest.mark.slow
def test_both_answer_the_same_prompts_greedily(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("base", "tuned", "q.json", "--max-new-tokens", 5, "--batch-size", 2, "-o", "page.html") == 0
    asked = [Conversation((Turn(f"Say {i}.", "", ""),)) for i in range(5)]
    template, expected = choose_template(TEMPLATE), []  # B's, for both
    for name in ("base", "tuned"):
        loaded = load_model(name)
        expected.append(answer(loaded.gpt, loaded.tokenizer, template, asked, max_new_tokens=5))
    rows = [row for row in Tables(Path("page.html").read_text()).rows if row[0].startswith("answer ")]
    shown = [[comparing._visible(text) or EMPTY for text in one] for one in expected]
    assert rows == [[f"answer {i}", a, b] for i, (a, b) in enumerate(zip(*shown, strict=True))]
    text = Path("page.html").read_text()
    assert [f"<pre>Say {i}.</pre>" in text for i in range(5)] == [True] * 5
    assert "written: page.html, page_curves.png\n" in capsys.readouterr().out


def test_counts_are_those_by_hand(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = "go go go go go"  # "go go go" stands in it three times
    says(monkeypatch, ["Answer 0.", "x", "x y", again, "z"], ["answer 0", "answer 1", "x y", "z", again])
    assert compare("base", "tuned", "q.json") == 0
    found = measures(Path("comparison.html"))
    low, high = wilson_interval(2, 5)
    assert found["exact match"][1] == f"0.400 ({low:.3f} to {high:.3f})"
    assert found["exact match"][0].startswith("0.200 (")
    assert found["ROUGE-L"][1].startswith("0.400 (")
    assert found["identical responses"][0] == found["identical responses"][1]
    assert found["identical responses"][0].startswith("0.200 (")
    assert [cell.split()[0] for cell in found["mean length in words"][:2]] == ["2.2", "2.4"]
    assert [cell.split()[0] for cell in found["repetition"][:2]] == ["0.200", "0.200"]
    assert {row[3] for row in found.values()} == {"of", "5"}
    # Paired: 1 record both, 1 only B, 3 none. Lengths differ by 0, 1, 0, -4, 4.
    low, high = paired_share_interval(1, 0, 1, 3)
    assert found["exact match"][2] == f"+0.200 ({low:+.3f} to {high:+.3f})"
    lengths = [0, 1, 0, -4, 4]
    half = scipy.stats.t.ppf(0.975, 4) * statistics.stdev(lengths) / math.sqrt(5)
    assert found["mean length in words"][2] == f"+0.2 ({0.2 - half:+.1f} to {0.2 + half:+.1f})"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c a b c A B C", True),
        ("a b c a b c", False),
        ("no no no no", False),
        ("no no no no no", True),
        ("no no", False),
        ("", False),
    ],
)
def test_what_repeats_itself(text: str, expected: bool) -> None:
    assert repeats_itself(text) is expected


def test_what_has_no_correct_answer_is_left_out_where_it_matters(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("q.json").write_text(json.dumps([{"instruction": f"{i}", "output": "b" * (i == 0)} for i in range(3)]))
    says(monkeypatch, ["a"] * 3, ["b"] * 3)
    assert compare("base", "tuned", "q.json") == 0
    found = measures(Path("comparison.html"))
    assert found["exact match"][1:] == ["1.000 (0.207 to 1.000)", "+1.000 (-0.122 to +1.000)", "1"]
    assert found["repetition"][3] == "3"
    assert "2 records have no correct answer" in Path("comparison.html").read_text()


def test_of_pairs_the_chosen_answer_is_the_correct_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pairs.json").write_text(
        json.dumps([{"instruction": "Say.", "input": "it", "chosen": "yes", "rejected": "n"}])
    )
    says(monkeypatch, ["n"], ["yes"])
    assert compare("base", "tuned", "pairs.json") == 0
    assert ["yes", "n", "yes"] in Tables(Path("comparison.html").read_text()).rows


def test_everything_is_escaped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"instruction": f"{HOSTILE} ```", "input": HOSTILE, "output": HOSTILE}
    Path("q.json").write_text(json.dumps([record, record]))
    says(monkeypatch, [HOSTILE, ""], [f"\x00\x1b{HOSTILE}", HOSTILE])
    assert compare("base", "tuned", "q.json", "-o", "<b>&.html") == 0
    page = Tables(Path("<b>&.html").read_text())
    assert not page.tags & {"script", "b"}
    assert [HOSTILE, HOSTILE, r"\x00\x1b" + HOSTILE] in page.rows
    assert [HOSTILE, "(empty)", HOSTILE] in page.rows
    assert 'src="%3Cb%3E%26_curves.png"' in Path("<b>&.html").read_text()


# --- the judge -------------------------------------------------------------------------------------------------------


def preferring(prompt: str, seed: int) -> str:
    """Scores good answers 80 and others 20; of two it says which one is good, else the first."""
    if "Response A]" not in prompt:
        return "80" if "response `good" in prompt else "I cannot say." if "response `odd" in prompt else "20"
    first, second = re.findall(r"\[Response [AB]\]\n(\w+)", prompt)
    return "B" if second == "good" != first else "A"


def test_a_judge_scores_both_and_compares_in_both_orders(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, ["bad", "bad", "bad", "good", "good"], ["good", "good", "good", "bad", "good"])
    with serving(preferring) as server:
        assert compare("base", "tuned", "q.json", "--judge", "--judge-url", server.url, "--judge-model", "phi3") == 0
        assert {request["model"] for request in server.requests} == {"phi3"}
    found = measures(Path("comparison.html"))
    assert [cell.split()[0] for cell in found["score of the judge"][:2]] == ["44.0", "68.0"]
    # Three wins, one loss, and a tie where the first one was chosen whichever it was.
    assert [cell.split()[0] for cell in found["win rate"][:2]] == ["0.300", "0.700"]
    low, high = (float(bound) for bound in re.findall(r"\((\S+) to (\S+)\)", found["win rate"][1])[0])
    assert found["win rate"][0] == f"0.300 ({1 - high:.3f} to {1 - low:.3f})"
    page = Path("comparison.html").read_text()
    assert "B wins 3, ties 1, loses 1 of 5" in page
    assert page.count("Judge: score of A 20; score of B 80; B is better") == 3
    assert page.count("Judge: score of A 80; score of B 20; A is better") == 1
    assert page.count("Judge: score of A 80; score of B 80; a tie") == 1


def test_what_the_judge_did_not_score_is_counted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, ["bad"] * 5, ["good"] * 4 + ["odd"])
    with serving(preferring) as server:
        assert compare("base", "tuned", "q.json", "--judge-url", server.url) == 0
    assert "Scores of B: 1 unparsable of 5" in Path("comparison.html").read_text()
    # 64 - 44.4 with the missing one at 0, 84 + 11.1 with it at 100.
    assert measures(Path("comparison.html"))["score of the judge"][1:] == [
        "80.0 (19.6 to 95.1)",
        "+60.0 (+60.0 to +60.0)",
        "5 and 4",
    ]
    assert "score of A 20; score of B unparsable; a tie" in Path("comparison.html").read_text()


@pytest.mark.parametrize("is_serving", [False, True])
def test_a_judge_that_is_not_there_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_serving: bool
) -> None:
    says(monkeypatch, ["a"] * 5, ["b"] * 5)
    with serving(lambda *_: 404) as server:
        if is_serving:  # but without the model
            assert compare("base", "tuned", "q.json", "--judge-url", server.url) == 2
    if not is_serving:
        monkeypatch.setattr(comparing, "open_model", lambda *_, **__: pytest.fail("told too late"))
        assert compare("base", "tuned", "q.json", "--judge", "--judge-url", server.url) == 2
    error = capsys.readouterr().err
    assert ("name another with --judge-model" if is_serving else "name another address with --judge-url") in error
    assert error.count("\n") == 1
    assert not Path("comparison.html").exists()


# --- data, curves, and bad input -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "of", "data"),
    [
        (["base", "tuned"], "B", "short_answers"),
        (["tuned", "base"], "A", "short_answers"),
        (["tuned", "preferring"], "B", "short_preferences"),
        (["tuned", "preferring", "--data-of", "A"], "A", "short_answers"),
    ],
)
def test_a_split_is_of_b_or_else_of_a(words: list[str], of: str, data: str, here: Path) -> None:
    assert compare(*words, "--split", "test", "--limit", 2, "--max-new-tokens", 2) == 0
    page = Path("comparison.html").read_text()
    assert f"the test split of {of}&#39;s training data ({data}" in page
    assert "; template data.template; each answer greedy" in page
    assert page.count("<h2>") == 2


@pytest.mark.slow
def test_curves_are_those_that_exist(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dpo").mkdir()
    Path("dpo/metrics.csv").write_text(
        "step,train/loss,val/reward_margin,val/chosen_reward,lr\n0,0.69,,,1\n1,0.5,0.1,-0.2,1\n"
    )
    curves = read_curves(Path("dpo"), is_required=True)
    assert curves == {
        "train/loss": [(0, 0.69), (1, 0.5)],
        "val/reward_margin": [(1, 0.1)],
        "val/chosen_reward": [(1, -0.2)],
    }
    figure = draw_curves({"one": curves, "two": {"train/loss": [(0, 0.7)], "val/loss": [(0, 0.6)]}})
    units = ["loss (nats per token or pair)", "reward margin (nats)", "rewards (nats)"]
    assert [axes.get_ylabel() for axes in figure.axes] == units
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["one: training", "two: training", "two: validation"]
    assert list(lines["one: training"].get_xdata()) == [1, 2]
    assert lines["one: training"].get_color() == lines["two: training"].get_color()
    assert lines["one: training"].get_linestyle() != lines["two: training"].get_linestyle()
    command = ["base/checkpoints/last.ckpt", "tuned/checkpoints/last.ckpt", "q.json", "--max-new-tokens", 1]
    assert compare(*command) == 0  # neither is a run folder
    assert "curves" not in Path("comparison.html").read_text() + capsys.readouterr().out
    assert compare(*command, "--curves", "dpo") == 0
    assert Path("comparison_curves.png").read_bytes().startswith(b"\x89PNG")
    assert '<img src="comparison_curves.png"' in Path("comparison.html").read_text()


def test_runs_have_their_own_names(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unlike each other, whatever is compared; and both curves are drawn."""
    drawn: list[str] = []
    monkeypatch.setattr("llm_lightning.inference.curves.draw_curves", lambda runs: drawn.extend(runs) or Figure())
    says(monkeypatch, ["a"] * 5, ["b"] * 5)
    assert compare("base", "tuned", "q.json") == 0
    assert re.match(r" +A: base +B: tuned +B - A +of\n", capsys.readouterr().out)
    assert list(measures(Path("comparison.html"))[""]) == ["A: base", "B: tuned", "B - A", "of"]
    assert "reference" not in Path("comparison.html").read_text()
    assert drawn == ["base", "tuned"]


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ("outputs/sft/first", "outputs/sft/second", ("first", "second")),
        ("outputs/sft/first", "outputs/dpo/first/", ("sft/first", "dpo/first")),
        ("gpt2-small", "outputs/sft/my_run/checkpoints/best.ckpt", ("gpt2-small", "my_run")),
        ("run/checkpoints/best.ckpt", "run/checkpoints/last.ckpt", ("best.ckpt", "last.ckpt")),
        ("run", "run/checkpoints/best.ckpt", ("run", "best.ckpt")),
        ("run", "run", ("run (A)", "run (B)")),
    ],
)
def test_names_tell_two_runs_apart(a: str, b: str, names: tuple[str, str]) -> None:
    assert comparing.unique_names(a, b) == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "tuned"], "or --split test; neither is given"),
        (["base", "tuned", "q.json", "--split", "val"], "or --split test; both are given"),
        (["base", "tuned", "third"], "third must be a file of records; only two models"),
        (["base", "tuned", "nowhere.json"], "nowhere.json does not exist"),
        (["base", "base", "--split", "test"], "(B: pretraining and A: pretraining); give a file of records"),
        (["base", "tuned", "--split", "test", "--data-of", "A"], "none was (A: pretraining); give a file"),
        (["base", "tuned", "q.json", "--data-of", "A"], "--data-of A goes with --split"),
        (["base", "nothing", "q.json"], "nothing"),
        (["base", "tuned", "q.json", "--limit", "0"], "--limit 0 must be at least 1"),
        (["base", "tuned", "q.json", "--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["base", "tuned", "q.json", "--template", "alpaka"], "did you mean alpaca?"),
        (["base", "tuned", "q.json", "-o", "page.pdf"], "must end in .html"),
        (["base", "tuned", "q.json", "-o", "page.md"], "the Markdown page was removed; write page.html"),
        (["base", "tuned", "q.json", "-o", "no/page.html"], "the folder no does not exist"),
        (["base", "tuned", "q.json", "--curves", "nowhere"], "nowhere/metrics.csv does not exist"),
        (["base", "tuned", "q.json", "--curves", "odd"], "odd/metrics.csv is not the metrics file of a run"),
        (["base", "tuned", "q.json", "--curves", "empty"], "has no loss and no rewards; there are lr"),
        (["base", "tuned", "q.json", "--base", "base"], "neither base nor tuned is an adapter alone"),
        (["base", "tuned", "long.json"], "long.json:1: the prompt of 202 tokens leaves no room"),
        (["base", "tuned", "q.json", "--judge-url", "localhost"], "must be an address such as http"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {"odd": "a,b\n1,2\n", "empty": "step,lr\n0,1\n"}.items():
        Path(name).mkdir()
        Path(name, "metrics.csv").write_text(content)
    Path("long.json").write_text(json.dumps([{"instruction": "x" * 200, "output": "a"}]))
    assert compare(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("comparison.html").exists()


def test_the_base_goes_to_the_model_that_needs_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str | None] = {}
    monkeypatch.setattr(comparing, "_is_adapter", lambda path: path == "b")
    monkeypatch.setattr(comparing, "_opened", lambda args, path: given.update({path: args.base}))
    comparing._open_both(argparse.Namespace(model_a="a", model_b="b", base="weights"))
    assert given == {"a": None, "b": "weights"}


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "lightning", "matplotlib", "tqdm"}
    code = f"import sys, llm_lightning.cli.compare; print({heavy!r} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
