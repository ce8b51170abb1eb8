"""`llm-lightning runs`: the table, what is chosen and how it is printed; what it imports."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import make_run, write_summary

from llm_lightning.cli.main import main
from llm_lightning.experiments.run_list import runs
from llm_lightning.experiments.run_table import table


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished jobs and one that failed, in the folder `outputs`."""
    monkeypatch.chdir(tmp_path)
    for index, rate in enumerate((0.01, 0.001)):
        folder = Path("outputs", "study", f"lr_{rate:g}")
        make_run(folder, "finished", optimizer__lr=rate, scheduler__min_lr=rate / 100)
        write_summary(folder, loss=1.5 - index / 4)
    make_run(Path("outputs/study/lr_10"), "failed", optimizer__lr=10.0, scheduler__min_lr=0.1)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_table(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == [
        "name            status      steps       time  best val/loss  optimizer.lr  reason",
        "study/lr_0.001  finished  100/100  1 min 2 s         1.2500         0.001",
        "study/lr_0.01   finished  100/100  1 min 2 s         1.5000          0.01",
        "study/lr_10     failed     53/100                    1.8750          10.0  loss is not finite at step 51",
        "3 runs: 2 finished, 1 failed",
    ]


def test_chosen_and_sorted(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--where", "status=finished", "--sort=-best_value", "outputs/study")
    assert [line.split()[0] for line in lines] == ["name", "lr_0.01", "lr_0.001", "2"]
    assert lines == shown(capsys, "outputs/study", "--where", "status=finished", "--sort", "best_value", "--reverse")
    assert shown(capsys, "--columns", "name,seed,test/accuracy", "--where", "test/accuracy=0.75")[:2] == [
        "name            seed  test/accuracy",
        "study/lr_0.001     1         0.7500",
    ]


def test_for_programs(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_summary(Path("outputs/study/lr_0.01"), metrics={"val/loss": float("nan")})
    records = [json.loads(line) for line in shown(capsys, "--json")]
    assert records[0] == runs("outputs")[0]
    assert [record["val/loss"] for record in records] == [1.26, None, 1.875]
    assert [json.loads(line) for line in shown(capsys, "--json", "--columns", "name,seed")][2] == {
        "name": "study/lr_10",
        "seed": 1,
    }
    rows = list(csv.DictReader(io.StringIO("\n".join(shown(capsys, "--csv")))))
    assert [row["reason"] for row in rows] == ["", "", "loss is not finite at step 51"]
    assert [float(row["optimizer.lr"]) for row in rows] == [0.001, 0.01, 10.0]


def test_nothing_to_list(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert shown(capsys, "empty", "--where", "status=failed", "--sort", "val/loss") == ["no runs in empty"]
    assert shown(capsys, "empty", "--json") == []
    assert shown(capsys, "--where", "status=died") == ["no run in outputs has status=died"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist; give the folder that holds the runs"),
        (["--columns", "name,lerning_rate"], "--columns lerning_rate: no run has it; There are name, "),
        (["--sort", "optimizer.r"], "--sort optimizer.r: no run has it; did you mean optimizer.lr? "),
        (["--where", "status=fialed"], "--where status=fialed: did you mean failed? "),
    ],
)
def test_wrong_words(study: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["runs", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llm-lightning runs: {message}")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_table_fits_the_terminal(study: Path, width: int) -> None:
    for index in range(2):
        name = Path("outputs", "study", f"a_name_that_is_far_longer_than_any_other_and_goes_on_{index}")
        make_run(name, "failed", seed=index, model__n_layer=index, model__n_head=1 - index)
    lines = table(runs("outputs"), width=width)
    rows = lines[:6]
    assert max(map(len, rows)) <= width
    names = ("goes_on_0", "goes_on_1", "study/lr_0.001", "study/lr_0.01", "study/lr_10")
    assert all(row.split()[0].endswith(name) for row, name in zip(rows[1:], names, strict=True))
    losses = ("1.8750", "1.8750", "1.2500", "1.5000", "1.8750")
    assert all(loss in row.split() for row, loss in zip(rows[1:], losses, strict=True))
    assert lines[6].startswith("settings that differ too: ") == (width < 140)
    below = [line for line in lines[6:] if line.endswith(": loss is not finite at step 51")]
    assert len(below) == (0 if width == 140 else 3)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["runs", "--help"])
    assert end.value.code == 0
    assert "at any depth (default: outputs)" in " ".join(capsys.readouterr().out.split())


def test_a_pipe_gets_whole_lines(study: Path) -> None:
    long = "x" * 300
    make_run(Path("outputs") / long[:200], "finished")
    command = [sys.executable, "-m", "llm_lightning", "runs"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "40"})
    assert long[:200] in outcome.stdout


def test_nothing_heavy_is_imported(study: Path) -> None:
    code = (
        "import sys; from llm_lightning.cli.main import main; main(['runs'])\n"
        "print(sorted({'torch', 'lightning', 'hydra', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.splitlines()[-1] == "[]"
