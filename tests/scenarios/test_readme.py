"""Every command of the README runs, on a tiny model and text where it leaves the choice."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from forked import jobs_are_forks
from judge_server import serving
from tiny_run import ROOT, SETTINGS, fit_here, train_here, write_checkpoint, write_corpus

from llm_lightning.cli.main import main as cli
from llm_lightning.experiments.settings.checks import check_overrides
from llm_lightning.experiments.settings.yaml_files import group_options
from llm_lightning.experiments.stages import plan

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`((?:python train\.py|llm-lightning)[^`]*)`", README)))
TRAINING = [command for command in COMMANDS if command.startswith("python train.py")]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LAUNCHED = re.findall(r"(?:torchrun|srun) [^`\n]*?train\.py ([^`\n]*)", README)
"""The settings of commands that a launcher starts; `test_ranks.py` runs such commands."""
SET_UP = [line for block in BLOCKS for line in block.splitlines() if line.startswith("pip install")]
RUNS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("python train.py")]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) > 8
    assert len(RUNS) >= 2
    assert len(LAUNCHED) == 3
    assert SET_UP[:2] == ["pip install -e . && python train.py run_name=first", 'pip install -e ".[dev]" && pytest']


@pytest.mark.parametrize("line", SET_UP)
def test_set_up_is_what_ci_runs(line: str) -> None:
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python") and "--help" not in c and "-sc" not in c]
)
def test_settings_compose(command: str) -> None:
    arguments = shlex.split(command)[2:]
    if len(arguments) == 1 and arguments[0].partition("=")[0] in ("experiment", "pipeline", "sweep"):
        group, _, option = arguments[0].partition("=")  # test_configs checks them all
        assert option in group_options(ROOT / "conf", group)
        return
    if any(word.startswith("pipeline=") for word in arguments):
        assert plan(arguments, ROOT / "conf")
        return
    assert check_overrides(arguments, ROOT / "conf").seed is not None


@pytest.mark.parametrize("words", LAUNCHED)
def test_settings_under_a_launcher_compose(words: str) -> None:
    settings = check_overrides(shlex.split(words), ROOT / "conf")
    assert settings.trainer.devices == "auto", "follows the launcher"


def test_the_quick_start_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answers = [{"instruction": f"{i} and 1?", "output": f"{i}"} for i in range(40)]
    pairs = [{"instruction": f"{i} and 1?", "chosen": f"{i}", "rejected": "no"} for i in range(40)]
    for name, rows in (("sft", answers), ("dpo", pairs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    write_corpus(tmp_path / "pretraining.json", 300).rename(tmp_path / "pretraining.txt")
    [quick] = [block for block in BLOCKS if "llm-lightning compare" in block]
    for line in ["python train.py run_name=first", *quick.splitlines()]:
        program, *arguments = shlex.split(line)
        if program == "llm-lightning":
            assert cli(arguments) in (0, None), line
            continue
        task = next((word[5:] for word in arguments if word.startswith("task=")), "pretraining")
        data = f"data.path={tmp_path / task}.{'txt' if task == 'pretraining' else 'json'}"
        samples = [word for word in SETTINGS if "samples" not in word and "context_length" not in word]
        tiny = [*samples, "model.context_length=64", *([] if task == "pretraining" else TUNED[1:])]
        outcome = fit_here([*arguments[1:], *tiny, data, f"hydra.run.dir=outputs/{task}/first"])
        assert outcome.code == 0, f"{line}: {outcome.err}"
    assert (tmp_path / "comparison.html").is_file()


@pytest.mark.slow
def test_the_same_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path / "corpus.txt", 60)
    [block] = [block for block in BLOCKS if "trainer.max_epochs=2" in block]
    for line in block.splitlines():
        tiny = [s for s in SETTINGS if "max_steps" not in s]
        outcome = train_here([*tiny, f"data.path={corpus}", *shlex.split(line)[2:]])
        assert outcome.code == 0, outcome.err
    assert [folder.name for folder in (tmp_path / "outputs" / "pretraining").iterdir()] == ["longer"]


@pytest.mark.slow
def test_the_sweep_starts_every_job_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [command] = [c for c in COMMANDS if c.startswith("python train.py -m ") and "optuna" not in c]
    corpus = write_corpus(tmp_path / "corpus.txt", 60)
    started = jobs_are_forks(monkeypatch)
    typed = [*shlex.split(command)[2:], *SETTINGS, f"data.path={corpus}"]
    outcome = train_here(typed)
    assert outcome.code == 0, outcome.err
    [folder] = (tmp_path / "outputs" / "sweeps").iterdir()
    jobs = {f"lr_{lr}-seed_{seed}": (float(lr), seed) for lr in ("1e-3", "2e-3") for seed in (1, 2)}
    for name, (lr, seed) in jobs.items():
        settings = yaml.safe_load((folder / name / "config.yaml").read_text())
        assert (settings["optimizer"]["lr"], settings["seed"]) == (lr, seed)
    assert len(started) == len(jobs)
    assert train_here(typed).code == 0
    assert len(started) == len(jobs), "all of them are finished"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" in c])
def test_help(command: str) -> None:
    outcome = train_here(shlex.split(command)[2:])
    assert outcome.code == 0
    assert "optimizer.lr=" in outcome.out


TUNED = ["model.context_length=128", "data.template='{instruction} {input} {response}'"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that the README speaks of: a GPT, a classifier, adapters for that GPT."""
    folder = tmp_path_factory.mktemp("runs")
    base = write_checkpoint(folder / "outputs" / "pretraining" / "first" / "checkpoints" / "best.ckpt")
    classify = [word for word in SETTINGS if "samples" not in word]
    speak = [*SETTINGS, f"data.path={write_corpus(folder / 'text.txt', 60)}", "lora=default", f"init_from={base}"]
    for name, arguments in (
        ("outputs/classification/first", [*classify, "task=classification", f"init_from={base}"]),
        ("outputs/sft/first", [*SETTINGS, "task=sft", *TUNED]),
        ("polite", speak),
    ):
        outcome = fit_here([*arguments, f"hydra.run.dir={folder / name}"])
        assert outcome.code == 0, outcome.err
    assert cli(["export", str(folder / "polite"), str(folder / "rude_from_peft"), "--format", "peft"]) == 0
    return folder


WORDS = ("CKPT", "CLASSIFIER", "TUNED", "ADAPTED", "RECORDS", "responses.json")
LISTS = [command for command in COMMANDS if command.startswith("llm-lightning runs")]
TOOLS = [command for command in COMMANDS if any(word in command for word in WORDS)]
OF_REAL_MODEL = [command for command in COMMANDS if "PRETRAINED" in command]
"""`test_real_model.py` runs them."""


@pytest.mark.parametrize("command", TOOLS)
def test_tools(command: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.txt", 60)
    rows = [{"instruction": f"{i}", "output": "a", "model_response": "a"} for i in range(40)]
    for name in ("records.json", "responses.json"):
        (tmp_path / name).write_text(json.dumps(rows))
    if command == "llm-lightning judge responses.json":
        with serving(lambda *_: "85") as server:
            assert cli([*shlex.split(command)[1:], "--url", server.url]) == 0
        return
    words = {
        "CKPT": str(runs / "outputs" / "pretraining" / "first"),
        "CLASSIFIER": str(runs / "outputs" / "classification" / "first"),
        "TUNED": str(runs / "outputs" / "sft" / "first"),
        "ADAPTED": str(runs / "polite"),
        "RECORDS": "records.json",
        "FILE": "text.txt",
        "FOLDER": "exported",
    }
    if "respond CKPT" in command or "compare CKPT" in command:  # the other one reads 16 bytes, less than any question
        words["CKPT"] = words["TUNED"]
    arguments = [words.get(word, word) for word in shlex.split(command)[1:]]
    assert cli(arguments) in (0, None)


@pytest.mark.parametrize("command", LISTS)
def test_lists(command: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(runs)
    assert cli(shlex.split(command)[1:]) == 0
    assert "first" in capsys.readouterr().out


def test_every_tool_command_is_run() -> None:
    others = [
        c
        for c in COMMANDS
        if c.startswith("llm-lightning")
        and c not in (*TOOLS, *LISTS, *OF_REAL_MODEL)
        and "completion" not in c
        and "VERB" not in c
    ]
    assert all(command == "llm-lightning" or len(command.split()) == 2 for command in others), (
        "mentioned by name, not as a command"
    )


def test_completion_prints_a_script(capsys: pytest.CaptureFixture) -> None:
    [hydras], [ours] = ([c for c in COMMANDS if word in c] for word in (" -sc ", " completion "))
    outcome = train_here(shlex.split(hydras)[2:])
    assert outcome.code == 0
    assert cli(shlex.split(ours)[1:]) in (0, None)
    for script in (outcome.out, capsys.readouterr().out):
        assert "complete " in script


def test_lines_of_python(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(runs)
    adapters, tools = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(tools, "README.md", "exec"), {})
    text, classified = capsys.readouterr().out.split("Classification(")
    assert text.startswith("The")
    assert "probabilities={'ham':" in classified
    exec(compile(adapters.replace("gpt2-small", "outputs/pretraining/first"), "README.md", "exec"), names := {})
    assert names["generate_text"](names["loaded"], "to", max_new_tokens=3).startswith("to")
