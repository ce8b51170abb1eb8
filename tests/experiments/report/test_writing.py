"""The three files of a report: what is in them, and that nothing in them can act."""

from __future__ import annotations

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest
from made_sweeps import make_job, make_study, write_sweep

from llm_lightning.cli.main import main
from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.report.drawing import VARIABLES
from llm_lightning.experiments.report.entries import Entry, read_entries
from llm_lightning.experiments.report.writing import write_report

FILES = ("report.html", "report.md", "results.csv")
HOSTILE = [
    "<script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\x1b[31mred\x1b]0;title\x07",
    "[x](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "a|b `c` *d* _e_ $f$ <img src=x onerror=alert(1)>",
    "</pre></code><svg onload=alert(1)>",
    "```\n# heading\n```",
    "\"'><a href='javascript:x'>y</a> {{ 7*7 }} {% raw %}",
]


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def assert_inert(self) -> None:
        assert not self.tags & {"script", "iframe", "object", "embed", "form", "base", "link"}
        for name, value in self.attributes:
            assert not name.startswith("on"), (name, value)
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (name, value)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 12 jobs, of which three did not finish, with its report."""
    folder = tmp_path_factory.mktemp("sweeps") / "study"
    make_study(folder, rows=40)
    write_report([folder])
    return folder


@pytest.mark.slow
def test_every_job_is_in_every_file(study: Path) -> None:
    names = {path.parent.name for path in study.glob("*/job.json")}
    assert len(names) == 12
    page, text = Page((study / FILES[0]).read_text()), (study / FILES[1]).read_text().replace("\\", "")
    rows = list(csv.DictReader((study / FILES[2]).open()))
    for name in names:
        assert name in page.text
        assert name in text
    assert {row["name"] for row in rows} == names
    assert "12 jobs: 9 finished, 1 failed, 1 died, 1 waiting" in page.text
    assert "non-finite loss (nan) after 51 updates" in page.text
    finished = next(row for row in rows if row["name"] == "lr_0.001-n_embd_64-seed_2")
    summary = json.loads((study / "lr_0.001-n_embd_64-seed_2" / "summary.json").read_text())
    assert float(finished["best_value"]) == summary["best_value"]
    assert float(finished["test/accuracy"]) == summary["metrics"]["test/accuracy"]
    assert (float(finished["optimizer.lr"]), finished["seed"], finished["tokens"]) == (0.001, "2", "819200")


def test_the_page_says_how_to_repeat_the_sweep_and_its_best(study: Path) -> None:
    page = Page((study / FILES[0]).read_text())
    assert "python train.py -m optimizer.lr=1e-4,1e-3,1e-2 model.n_embd=32,64 seed=1,2 run_name=study" in page.text
    assert "python train.py -m optimizer.lr=0.001 model.n_embd=64 seed=1,2\n" in page.text
    assert "95% t interval over seeds" in page.text
    assert "95% Wilson interval over test records" in page.text


def test_the_plots_take_the_colours_of_the_page(study: Path) -> None:
    content = (study / FILES[0]).read_text()
    page = Page(content)
    titles = [value for name, value in page.attributes if name == "aria-label"]
    assert titles == [
        "val/loss over training",
        "train/loss over training",
        "val/loss by optimizer.lr",
        "val/loss by model.n_embd",
        "val/loss by optimizer.lr and model.n_embd",
    ]
    assert "optimizer.lr (log scale)" in page.text
    svgs = "".join(re.findall("<svg.*?</svg>", content, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svgs), "a colour that only one scheme can show"
    for variable in VARIABLES.values():
        assert content.count(f"{variable}: ") == 2, "light, and dark on a screen"
    page.assert_inert()


@pytest.mark.slow
def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    folder = tmp_path / "a<b>&`c`"
    write_sweep(folder, *HOSTILE)
    for number, text in enumerate(HOSTILE):
        name = re.sub(r"[/\x00]", "_", text) or "x"
        for seed in (1, 2):
            job = folder / f"{name}-{seed}"
            summary = {"device": text, "versions": {text: text}, "lineage": {"data": text}, "item": text}
            summary |= {f"{text}s": text, f"{text}s_per_second": text}
            make_job(job, "finished", 1 + number, rows=12, summary=summary, tokenizer__name=text, seed=seed)
        Failure("error", "ValueError", text, 1, lines=[text]).write(folder / f"{name}-1")
    write_report([folder])
    page = Page((folder / FILES[0]).read_text())
    page.assert_inert()
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    rendered = Page(markdown.markdown((folder / FILES[1]).read_text(), extensions=["tables", "fenced_code"]))
    rendered.assert_inert()
    assert not rendered.tags & {"img", "a", "svg"}
    for file in FILES:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", (folder / file).read_text()), "an escape of a terminal"
    with (folder / FILES[2]).open() as lines:
        for row in csv.reader(lines):
            assert not [cell for cell in row if cell.lstrip().startswith(("=", "+", "-", "@", "\t"))]
    assert len(list(csv.DictReader((folder / FILES[2]).open()))) == 2 * len(HOSTILE)


def test_a_damaged_file_costs_its_content_and_is_named(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_job(tmp_path / f"seed_{seed}", "finished", 1.5 + seed / 10, rows=20, seed=seed)
    (tmp_path / "seed_1" / "metrics.csv").write_text("step,train/loss,val/loss\n0,1,\n10,one,2\n20,3,4\n")
    (tmp_path / "seed_2" / "job.json").write_text('{"words": ')
    (tmp_path / "seed_3" / "metrics.csv").write_bytes(b"\xff\x00\n" * 9)
    make_job(tmp_path / "seed_4", "waiting", seed=4)
    for file in ("seed_4/job.json", "seed_3/command.json", "sweep.json"):  # of a foreign archive
        (tmp_path / file).unlink(missing_ok=True)
        os.mkfifo(tmp_path / file)
    written = write_report([tmp_path])
    page = Page((tmp_path / FILES[0]).read_text())
    assert "step 10: train/loss='one' is not a number" in page.text
    assert "job.json is damaged" in page.text
    assert f"{tmp_path / 'seed_4' / 'job.json'} is not a regular file" in page.text
    assert "unknown task" not in page.text, "a part without a metric"
    assert len(written.entries) == 4


def test_one_run_gets_a_page_about_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my_run"
    make_job(run, "finished", 1.5, rows=40, seed=3, summary={"data": {"records": 470}})
    (run / "samples.md").write_text("".join(f"## step {n}, val/loss 2\n\n    <b>text {n}</b>\n\n" for n in range(30)))
    (run / "plots").mkdir()
    for name in ("test_confusion.png", "loss.png"):
        (run / "plots" / name).write_bytes(b"\x89PNG" + name.encode())
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    page = Page((run / "report.html").read_text())
    page.assert_inert()
    titles = [value for name, value in page.attributes if name == "aria-label"]
    assert titles == ["loss over training", "learning rate over training", "norm of the gradient over training"]
    assert "<b>text 0</b>" in page.text
    assert "<b>text 29</b>" in page.text
    assert "data.records" in page.text
    assert [value for name, value in page.attributes if name == "alt"] == ["test confusion"]


def test_further_validation_sets_share_the_picture_of_their_metric(tmp_path: Path) -> None:
    run = tmp_path / "my_run"
    make_job(run, "finished", 1.5, seed=3)
    (run / "metrics.csv").write_text("step,train/loss,val/loss,val/hard/loss,val/easy/loss\n0,5,5,6,4\n10,4,4,5,3\n")
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert [value for name, value in page.attributes if name == "aria-label"] == ["loss over training"]
    assert "validation (line: the main set, dashed: hard, dotted: easy)" in page.text


def test_a_report_of_several_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, loss in (("adamw", 1.5), ("muon", 1.4)):
        for seed in (1, 2):
            make_job(Path(name, f"seed_{seed}"), "finished", loss + seed**2 / 10 * loss, seed=seed)
    assert main(["report", "adamw", "muon", "-o", "both", "--where", "status=finished"]) == 0
    assert "best of 2 settings: folder muon" in capsys.readouterr().out
    rows = list(csv.DictReader(Path("both", "results.csv").read_text().splitlines()))
    assert [Path(row["folder"]).parent.name for row in rows] == ["adamw", "adamw", "muon", "muon"]
    text = Path("both", "report.md").read_text().replace("\\", "")
    assert all(f"| {path} |" in text for path in ("adamw/seed_1", "muon/seed_1")), "jobs of one name"
    assert main(["report", "adamw", "--where", "status=failed"]) == 2
    assert "no runs with status=failed in adamw" in capsys.readouterr().err


def test_a_curve_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_job(tmp_path / "seed_1", "finished", rows=20, seed=1)
    (first,) = read_entries(tmp_path, "")
    assert first.curves["train/loss"][-1][0] == 190
    with monkeypatch.context() as patch:
        patch.setattr("llm_lightning.experiments.report.entries.read_metrics", lambda path: pytest.fail("read again"))
        assert read_entries(tmp_path, "")[0].curves == first.curves
    make_job(tmp_path / "seed_1", "finished", rows=21, seed=1)
    (again,) = read_entries(tmp_path, "")
    assert isinstance(again, Entry)
    assert again.curves["train/loss"][-1][0] == 200
