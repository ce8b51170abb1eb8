"""A run folder may be someone else's: what is believed of it, and what is not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from hostile import BENIGN, Outside, build, folders, settings, watch
from tiny_run import ROOT, digests, finish, start, train_here, write_corpus

from llm_lightning.experiments import run_records
from llm_lightning.experiments.command_line import continue_run
from llm_lightning.experiments.pipeline import MANIFEST_FACTS
from llm_lightning.experiments.run import say_finished
from llm_lightning.experiments.run_folder import OWNER_FACTS, RunFolder, open_run
from llm_lightning.experiments.run_records import Start
from llm_lightning.experiments.settings.checks import check_overrides

CONF = ROOT / "conf"


def recorded(run: Path, *words: str, config_dir: str | None = None, **more: object) -> Path:
    """A run folder in which these words were typed."""
    run.mkdir(exist_ok=True)
    command = {"folder": str(run.parent), "config_dir": config_dir, "overrides": [*words], **more}
    (run / "command.json").write_text(json.dumps(command))
    return run


def refusal(run: Path, *typed: str) -> str | None:
    try:
        continue_run([f"resume={run}", *typed], CONF)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


# --- settings ------------------------------------------------------------------------------------------------------

OWN = [
    "task=sft",
    "experiment=book/ch05",
    "optimizer=adamw",
    "~callbacks.samples",
    "callbacks.samples=null",
    "callbacks.samples.prompts=['/home is', '../x', 'C:\\\\x']",
    "data.columns={instruction: question, input: null}",
    'data.template="Q: {instruction}[ ({input})]\\nA: {response}"',
    "data.labels=['a/b', c]",
    "data.hf_dataset=roneneldan/TinyStories",
    "data.path=null",
    "init_from=gpt2-medium",
    "init_from=smollm2-135m-instruct-q4",
    "task.reference=cached",
    "callbacks.checkpoints.monitor=${monitor}",
    "+trainer.profiler=simple",
    "+trainer.gradient_clip_algorithm=norm",
    "+trainer.limit_test_batches=0.5",
    "+callbacks.rate._target_=lightning.pytorch.callbacks.LearningRateMonitor",
    "+callbacks.swa={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 1e-2}",
    "+logger.extra={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: 'RUN/more', name: a, version: one}",
    "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, find_unused_parameters: false}",
    "run_name=first",
    "hydra.run.dir='/somewhere/else'",
]
"""What one's own folder holds, and is continued with without a word."""


def test_ones_own_settings_are_taken_over_and_those_of_an_attacker_by_none_but_the_user(tmp_path: Path) -> None:
    wrong = []
    for number, word in enumerate(OWN):
        run = tmp_path / f"own{number}"
        word = word.replace("RUN", str(run))
        if message := refusal(recorded(run, "seed=3", word)):
            wrong.append(f"{word} is refused: {message}")
    for number, word in enumerate(settings(tmp_path)):
        run = recorded(tmp_path / f"run{number}", "seed=3", word)
        message = refusal(run)
        if message is None or word not in message or "type what you trust again with resume=" not in message:
            wrong.append(f"{word} is taken over, or not named: {message}")
        elif (message := refusal(run, word)) and "leave " not in message and word != "resume=/":
            wrong.append(f"{word} was typed again, and is refused: {message}")
    assert not wrong, "\n".join(wrong)


def test_a_refusal_is_one_line_that_names_all_that_is_asked_for(tmp_path: Path) -> None:
    run = recorded(
        tmp_path / "run", "hydra.verbose=true", "seed=1", "+logger.x._target_='a\x1b[31m'", config_dir="mine"
    )
    outcome = train_here([f"resume={run}"])
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        f"error: resume={run}: its command.json asks for --config-dir=mine (files that can set anything); "
        "hydra.verbose=true (a setting of Hydra's own); +logger.x._target_='a\\x1b[31m' (a class that is not ours). "
        "A run folder may be someone else's: type what you trust again with resume=, or start a new run\n"
    )
    (tmp_path / "mine").mkdir()
    typed = ["hydra.verbose=false", "+logger.x._target_=x", f"--config-dir={tmp_path / 'mine'}"]
    words = continue_run([f"resume={run}", *typed], CONF)
    assert words == [typed[2], "seed=1", *typed[:2], f"resume='{run}'", f"hydra.run.dir='{run}'"]
    assert continue_run(words, CONF) == words  # as a process does that Lightning starts


SEVERAL = [
    "data.val_path=/a.txt",
    "data.test_path=[b.txt,/c.txt]",
    "++data.val_sets.hard=/d.txt",
    "data.val_sets={easy: e.txt}",
    "data.mixture=[{name: web, path: /f.txt, weight: 0.5}, {name: hub, hf_dataset: a/b, weight: 1}]",
    "data.mixture.2.path=/g.txt",
]
SEVERAL_KEYS = (
    *("data.val_path", "data.test_path", "data.val_sets.hard", "data.val_sets.easy"),
    *("data.mixture.0.path", "data.mixture.2.path"),
)


def test_a_path_counts_where_its_digest_is_recorded(tmp_path: Path) -> None:
    """Whether it fits is seen when it is read: test_whereabouts."""
    words = ["data.path=a.txt", "init_from=b.ckpt"]
    keys = [word.partition("=")[0] for word in words]
    places = {key: {"digest": "0" * 64} for key in keys}
    assert refusal(recorded(tmp_path / "known", *words, places=places)) is None
    for key in keys:
        message = refusal(recorded(tmp_path / "known", *words, places={**places, key: {"digest": 3}}))
        assert message is not None
        assert f"{key}=" in message
        assert message.count("whose content was not recorded") == 1
    all_known = {key: {"digest": "0"} for key in SEVERAL_KEYS}
    assert refusal(recorded(tmp_path / "several", *SEVERAL, places=all_known)) is None
    for key in SEVERAL_KEYS:
        known = {other: {"digest": "0"} for other in SEVERAL_KEYS if other != key}
        message = refusal(recorded(tmp_path / "several", *SEVERAL, places=known))
        assert message is not None, key
        assert message.count("whose content was not recorded") == 1
    earlier = recorded(tmp_path / "earlier", *words)  # a folder of an earlier version: checkpoints know
    assert "data.path=a.txt" in (refusal(earlier) or "")
    (earlier / "checkpoints").mkdir()
    (earlier / "checkpoints" / "step_00000004.ckpt").touch()
    assert refusal(earlier) is None


def test_resume_names_a_run_folder(tmp_path: Path) -> None:
    run = recorded(tmp_path / "it's a run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    last = run / "checkpoints" / "last.ckpt"
    assert refusal(last) == f"resume={last} is a file; give its run folder: resume={run}"
    assert (
        refusal(run / "command.json") == f"resume={run / 'command.json'} is a file; give its run folder: resume={run}"
    )
    assert "leave -m out" in (refusal(run, "-m") or "")
    assert "leave sweep=book_ch06_table out" in (refusal(run, "sweep=book_ch06_table") or "")
    assert "no run in that folder" in (refusal(tmp_path / "nowhere") or "")
    words = continue_run([f"resume={run}"], CONF)
    assert check_overrides(words, CONF).resume == str(run)
    assert continue_run(words, CONF) == words


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    damaged = [
        b"[1]",
        b"{}",
        b"3",
        b'"x"',
        b"null",
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"a":' * 9999,
    ]
    wrong = []
    for name, facts, good in (
        ("command.json", run_records.COMMAND_FACTS, {"folder": "x", "config_dir": None, "overrides": []}),
        ("summary.json", run_records.SUMMARY_FACTS, {"finished": True, "total_steps": 3}),
        ("owner.json", OWNER_FACTS, {"pid": 1, "host": "h", "process_start": None, "started": "s"}),
        ("manifest.json", MANIFEST_FACTS, {"finished": True, "settings": "s", "parents": {}}),
    ):
        path = tmp_path / name
        path.write_text(json.dumps(good))
        assert run_records.read_facts(path, facts, "mend it") == good
        others = [json.dumps(good | {key: ["x"] if key != "overrides" else "x"}).encode() for key in good]
        missing = [json.dumps({key: good[key] for key in good if key != left}).encode() for left in good]
        for content in [*damaged, *others, *missing]:
            path.write_bytes(content)
            try:
                run_records.read_facts(path, facts, "mend it")
                wrong.append(f"{name}: {content[:40]!r} is taken")
            except ValueError as error:
                if not str(error).startswith(f"{path} is damaged (") or not str(error).endswith("; mend it"):
                    wrong.append(f"{name}: {content[:40]!r}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_run_folder_with_a_damaged_file_ends_in_one_line(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", *BENIGN)
    for name in ("command.json", "owner.json", "summary.json"):
        kept = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_bytes(b"[1]")
        outcome = train_here([f"resume={run}"])
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: {run / name} is damaged (holds a JSON list, not an object); ")
        assert outcome.err.count("\n") == 1
        (run / name).unlink()
        if kept is not None:
            (run / name).write_bytes(kept)


def test_a_finished_run_whose_summary_does_not_say_what_was_reached(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trainer": {"max_epochs": 1, "max_steps": -1}, "callbacks": {}}
    start = Start(str(tmp_path), None, [])
    known = {"finished": True, "steps": 4, "total_steps": 4, "epochs": 1, "item": "token", "tokens": 9, "seconds": 1.0}
    known |= {"tokens_per_second": 2.5, "monitor": "val/loss", "best_value": 1.5, "best_step": 4, "task": "pretraining"}
    known |= {"checkpoint": "checkpoints/best.ckpt", "metrics": {"val/perplexity": 3.0}, "lineage": {}}
    assert say_finished(settings, RunFolder(tmp_path, None, known), start) == 1.5
    wrong = []
    for key in ("checkpoint", "lineage", "item", "steps", "best_value", "best_step", "tokens", "metrics"):
        others = [known | {key: ["x"]}, {name: value for name, value in known.items() if name != key}]
        for summary in others[key == "metrics" :]:
            try:
                say_finished(settings, RunFolder(tmp_path, None, summary), start)
                wrong.append(f"{key} in {summary}")
            except ValueError as error:
                if f"{tmp_path / 'summary.json'} is damaged (it does not say what was reached" not in str(error):
                    wrong.append(f"{key}: {error}")
    assert not wrong, "\n".join(wrong)


# --- hostile folders -----------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    """Others' files; at the end they are what they were."""
    made = Outside.make(tmp_path / "outside")
    before = digests(made.folder)
    yield made
    assert digests(made.folder) == before
    assert not made.canary.exists()


@pytest.mark.slow
def test_of_two_hundred_hostile_folders_none_runs_or_touches_anything(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions that a start calls, in this process: every one of these folders is refused before anything."""
    monkeypatch.setenv("SECRET", "hunter2")
    refusal(recorded(tmp_path / "first", "seed=1"))  # what is imported only once
    wrong, count, environment = [], 0, dict(os.environ)
    for hostile in folders(tmp_path / "runs", outside, 200):
        count += 1
        with watch() as seen:
            message = refusal(hostile.run)
        if message is None:
            wrong.append(f"{hostile.why}: not refused")
        elif "\n" in message or len(message) > 2500 or "hunter2" in message:
            wrong.append(f"{hostile.why}: {message}")
        if seen or Path.cwd() == hostile.run or dict(os.environ) != environment or str(hostile.run) in sys.path:
            wrong.append(f"{hostile.why}: {seen}")
    assert count == 200
    assert not wrong, "\n".join(wrong)


def test_a_folder_with_links_is_refused_by_every_way_in(outside: Outside, tmp_path: Path) -> None:
    """`resume=`, the same run_name, and a chain: nothing is written, not even the reason."""
    run = tmp_path / "outputs" / "pretraining" / "theirs"
    build(run, outside, [], lambda run, outside: (run / "train.log").symlink_to(outside / "victim.txt"), None, ".")
    (run / "traceback.txt").symlink_to(outside.folder / "victim.txt")
    before = digests(run)
    for command in ([f"resume={run}"], [*BENIGN, f"hydra.run.dir={run}"], ["pipeline=nano", f"hydra.run.dir={run}"]):
        outcome = train_here(command)
        assert outcome.code == 2
        assert (
            f"{run} is not continued: traceback.txt is a link to {outside.folder}/victim.txt (and 1 more)"
            in outcome.err
        )
        assert outcome.err.count("\n") == 1
    with pytest.raises(ValueError, match="is a link"), open_run(run, {}):
        pass
    assert digests(run) == before


@pytest.mark.slow
def test_programs_and_modules_in_a_folder_lie_unused(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with harmless settings is continued, from where the user stands; what else lies in it is not used."""
    run = tmp_path / "run"
    build(run, outside, ["data.name=python_reference"], None, None, str(run))
    monkeypatch.chdir(tmp_path)
    with watch() as seen:
        outcome = train_here([f"resume={run}", f"data.path={write_corpus(tmp_path / 'corpus.txt')}"])
    assert outcome.code == 0, outcome.err
    assert (run / "summary.json").is_file()
    assert (run / "bin" / "git").read_text().startswith("#!")
    started = [line for line in seen if line.startswith(("subprocess", "os.exec", "os.posix_spawn", "os.system"))]
    assert all(str(run) not in line.partition("(")[2].partition(",")[0] for line in started), started
    imported = [line for line in seen if line.startswith("import ") and str(run) in line]
    written = [line for line in seen if line.startswith("open for writing ")]
    own = (
        str(run),
        os.environ["LLM_LIGHTNING_CACHE"],
        str(Path.home() / ".cache"),
        "/dev/",
        str(tmp_path / "corpus.txt"),
    )
    outer = [line for line in written if not line.removeprefix("open for writing ").startswith(own)]
    outer = [line for line in outer if "__pycache__" not in line]
    assert not imported
    assert not outer
    assert Path.cwd() == tmp_path


@pytest.mark.slow
def test_a_hostile_folder_in_a_process_of_its_own(outside: Outside, tmp_path: Path) -> None:
    run = tmp_path / "evil"
    build(run, outside, [f"+hydra.job.env_set.PATH='{run}/bin:/usr/bin:/bin'"], None, None, "nowhere")
    outcome = finish(start(["resume=evil"], tmp_path))
    assert (outcome.code, outcome.out) == (2, "")
    assert "asks for +hydra.job.env_set.PATH=" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil", "outside"]


@pytest.mark.slow
def test_hostile_folders_in_processes_of_their_own(outside: Outside, tmp_path: Path) -> None:
    wrong = []
    for hostile in list(folders(tmp_path / "runs", outside, 200))[::17]:
        before = digests(hostile.run) if "a pipe" not in hostile.why else {}
        outcome = finish(Forked([f"resume={hostile.run}", "trainer.max_steps=2"], tmp_path))
        same = not before or digests(hostile.run) == before
        if outcome.code != 2 or outcome.err.count("\n") != 1 or not same:
            wrong.append(f"{hostile.why}: {outcome.code} {outcome.err}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_two_processes_import_nothing_from_the_folder(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PYTHONPATH with an empty entry means the folder that a process starts in: never the run folder."""
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    two = ["accelerator=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=csv"]
    build(run, outside, two, None, None, str(run))
    shutil.copy(outside.folder / "sitecustomize.py", run)
    monkeypatch.setenv("PYTHONPATH", f"{home}:")
    outcome = finish(start([f"resume={run}"], home))
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "summary.json").read_text())["processes"] == 2
    assert not list(home.iterdir())
