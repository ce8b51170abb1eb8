"""`pipeline=NAME`: what is run, what is not run again, what is moved aside, and how a chain stops and goes on."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Forked
from tiny_run import (
    SETTINGS,
    Outcome,
    assert_same,
    finish,
    fit_here,
    living,
    start,
    train_here,
    write_checkpoint,
    write_corpus,
)

from llm_lightning.cli import main as cli
from llm_lightning.experiments import pipeline
from llm_lightning.experiments.stages import plan
from llm_lightning.weights import checkpoint as checkpoints

CONF = Path(__file__).parents[2] / "conf"
TINY = [word for word in SETTINGS if not word.startswith("model.context_length")]
TINY += ["model.context_length=32", "callbacks.samples.max_new_tokens=4"]


def write_pipeline(folder: Path, name: str, stages: dict[str, list[str] | str]) -> list[str]:
    """A pipeline of one's own; returns the words that name it."""
    (folder / "pipeline").mkdir(parents=True, exist_ok=True)
    kinds = {True: "command", False: "overrides"}
    listed = [{"name": key, kinds[isinstance(words, str)]: words} for key, words in stages.items()]
    (folder / "pipeline" / f"{name}.yaml").write_text(yaml.safe_dump({"stages": listed}))
    return ["--config-dir", str(folder), f"pipeline={name}"]


def stage_here(command: list[str], **options: Any) -> int:
    """What the process of a stage does, in this one: starting it takes longer than all that it does."""
    if "-m" not in command:
        return fit_here([word for word in command[2:] if not word.startswith("--config-dir")]).code
    with redirect_stdout(io.StringIO()) as out:
        code = cli.main(command[3:])
    options["stdout"].write(out.getvalue().encode())
    return code


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_exit_code", stage_here)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pretraining, pretraining on from there, and a command."""
    folder = tmp_path_factory.mktemp("conf")
    corpus = write_corpus(folder / "corpus.txt")
    stages = {
        "first": [f"data.path={corpus}"],
        "second": [f"data.path={corpus}", "init_from={first}", "optimizer.lr=1e-4"],
        "show": "inspect {second}",
    }
    return [*write_pipeline(folder, "tiny", stages), *TINY]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> tuple[Path, Outcome]:
    """The chain, run once."""
    folder = tmp_path_factory.mktemp("chains") / "a (strange) name=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_exit_code", stage_here)
        return folder, train_here([*words, f"hydra.run.dir='{folder}'"])


@pytest.fixture
def chain(whole: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of that chain, to go on with."""
    return Path(shutil.copytree(whole[0], tmp_path / "chain"))


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def weights(folder: Path) -> dict:
    return checkpoints.load(folder / "checkpoints" / "last.ckpt")["state_dict"]


# --- what is run ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_begins_with_what_the_one_before_left(whole: tuple[Path, Outcome]) -> None:
    folder, outcome = whole
    assert (outcome.code, outcome.err) == (0, "")
    first, second = manifest(folder / "first"), manifest(folder / "second")
    assert first["parents"] == {}
    assert second["parents"] == {"first": first["checkpoint"]["digest"]}
    assert (
        checkpoints.read_header(folder / "second" / "checkpoints" / "best.ckpt")["lineage"]["parent"]
        == (first["checkpoint"]["digest"])
    )
    for name, written in (("first", first), ("second", second)):
        summary = json.loads((folder / name / "summary.json").read_text())
        assert written["finished"]
        assert written["checkpoint"]["digest"] == checkpoints.verify(folder / name / summary["checkpoint"])
        assert written["data"] == summary["lineage"]["data"]
        assert {key: written[key] for key in ("metrics", "versions", "git")} == {
            key: summary[key] for key in ("metrics", "versions", "git")
        }
    assert "init_from={first}" in second["overrides"]
    assert first["config"] != second["config"]


def test_a_command_is_run_and_what_it_prints_is_kept(whole: tuple[Path, Outcome]) -> None:
    folder, outcome = whole
    assert "task        pretraining" in (folder / "show" / "output.txt").read_text()
    assert (folder / "show" / "output.txt").read_text() in outcome.out
    assert manifest(folder / "show")["parents"] == {"second": manifest(folder / "second")["checkpoint"]["digest"]}


def test_a_command_of_no_verb_is_refused_before_anything_runs(tmp_path: Path) -> None:
    stages: dict[str, list[str] | str] = {"first": ["task=pretraining"], "page": "compere {first}"}
    outcome = train_here([*write_pipeline(tmp_path / "conf", "bad", stages), f"hydra.run.dir={tmp_path / 'chain'}"])
    assert outcome.code == 2
    assert "pipeline=bad: stage page: there is no llm-lightning compere; there are generate, " in outcome.err
    assert not (tmp_path / "chain").exists()


@pytest.mark.usefixtures("_here")
def test_the_second_time_nothing_is_run(words: list[str], chain: Path) -> None:
    # The chain was moved: where it lies makes no difference.
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.name != ".lock"}
    outcome = train_here([*words, f"hydra.run.dir={chain}"])
    assert outcome.code == 0
    for name in ("first", "second", "show"):
        assert f"stage {name} is unchanged and not run again" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.name != ".lock"} == before


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_changed_stage_makes_its_children_run_again(words: list[str], chain: Path) -> None:
    old = manifest(chain / "first")
    outcome = train_here([*words, f"hydra.run.dir={chain}", "+first.trainer.max_steps=6"])
    assert outcome.code == 0, outcome.err
    assert manifest(chain / "first")["steps"] == 6
    for name, parent in (("second", "first"), ("show", "second")):
        assert f"stage {name} was made from another {parent}" in outcome.out
        assert manifest(chain / f"{name}.old-1")["finished"]
        assert manifest(chain / name)["parents"] == {parent: manifest(chain / parent)["checkpoint"]["digest"]}
    assert manifest(chain / "second.old-1")["parents"]["first"] == old["checkpoint"]["digest"]


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_damaged_checkpoint_is_made_again(words: list[str], chain: Path) -> None:
    old, damaged = weights(chain / "second"), chain / "second" / "checkpoints" / "best.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    outcome = train_here([*words, f"hydra.run.dir={chain}"])
    assert outcome.code == 0, outcome.err
    assert "stage first is unchanged" in outcome.out
    assert "stage second has no valid checkpoint" in outcome.out
    assert_same(weights(chain / "second"), old)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_other_settings_are_refused_and_leave_everything(words: list[str], chain: Path) -> None:
    before = manifest(chain / "first")
    outcome = train_here([*words, f"hydra.run.dir={chain}", "seed=2"])
    assert outcome.code == 2
    assert manifest(chain / "first") == before
    assert "stage first is unchanged" in train_here([*words, f"hydra.run.dir={chain}"]).out


# --- how it stops --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_stage_ends_the_chain(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = [sys.executable, str(CONF.parent / "train.py")]
    monkeypatch.setattr(
        pipeline, "_exit_code", lambda words: words[:2] == forked and Forked(words[2:], tmp_path, pipes=False).wait()
    )
    missing = tmp_path / "missing.txt"
    stages = {"first": [f"data.path={missing}"], "second": ["init_from={first}"]}
    folder = tmp_path / "chain"
    named = write_pipeline(tmp_path, "failing", stages)
    outcome = train_here([*named, *TINY, f"hydra.run.dir={folder}"])
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        f"pipeline=failing: stage first ended with exit code 2 in {folder / 'first'}; "
        "see its output above; the same command continues there"
    ]
    assert str(missing) in capfd.readouterr().err
    assert not (folder / "second").exists()


def test_a_chain_in_use_is_refused(words: list[str], chain: Path) -> None:
    from filelock import FileLock

    with FileLock(chain / ".lock"):
        outcome = train_here([*words, f"hydra.run.dir={chain}"])
    assert outcome.code == 2
    assert "is running in another process" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_chain_that_is_stopped_or_killed_lets_its_stage_save(
    words: list[str], tmp_path: Path, signum: signal.Signals
) -> None:
    folder = tmp_path / "chain"
    longer = ["trainer.max_steps=100000", "trainer.max_epochs=-1", f"hydra.run.dir={folder}"]
    process = start([*(word for word in words if "max_steps" not in word), *longer], tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "first" / "metrics.csv").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    outcome = finish(process)  # once nobody writes to its pipes any more
    assert outcome.code == (-signum if signum == signal.SIGKILL else 128 + signum)
    # The system tells the stage of the death of its parent by SIGTERM.
    told = "SIGTERM" if signum == signal.SIGKILL else signum.name
    assert f"stopped by {told}; saved" in outcome.err
    assert list((folder / "first" / "checkpoints").glob("step_*.ckpt"))
    assert not living(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", ["first", "second"])
def test_a_killed_chain_ends_the_same(
    words: list[str], tmp_path: Path, killed_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = [*words, "trainer.max_steps=24", "callbacks.checkpoints.every_n_steps=4", "callbacks.samples=null"]
    longer = list({word.partition("=")[0]: word for word in longer[2:]}.values())
    command = [*words[:2], *longer]
    folder = tmp_path / "killed"
    process = start([*command, f"hydra.run.dir={folder}"], tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((folder / killed_in / "checkpoints").glob("step_*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the chain and the process of its stage
    process.communicate()
    assert not manifest(folder / killed_in)["finished"]
    if killed_in == "first":  # with all its processes; the other one goes on in this process
        assert finish(start([*command, f"hydra.run.dir={folder}"], tmp_path)).code == 0
    monkeypatch.setattr(pipeline, "_exit_code", stage_here)
    assert train_here([*command, f"hydra.run.dir={folder}"]).code == 0
    assert train_here([*command, f"hydra.run.dir={tmp_path / 'whole'}"]).code == 0
    assert not list(folder.glob("*.old-*"))
    for name in ("first", "second"):
        assert_same(weights(folder / name), weights(tmp_path / "whole" / name))


# --- what is refused before anything is run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": ["optimizer.lrr=1"]}, "pipeline=p: stage a: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ({"a": ["init_from={b}"], "b": []}, "stage a: init_from={b}: no earlier stage is named b; there are none"),
        ({"a": [], "b": "inspect {c}"}, "stage b: {c}: no earlier stage is named c; there are a"),
        ({"a": "inspect gpt2-small"}, "one at least is a run"),
        ({"a.b": []}, "a stage has a name"),
    ],
)
def test_a_wrong_pipeline_is_refused(tmp_path: Path, stages: dict[str, list[str] | str], message: str) -> None:
    named = write_pipeline(tmp_path, "p", stages)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        plan(named, CONF)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["pipeline=nan"], "pipeline=nan: no such pipeline; there are book, nano"),
        (["pipeline=nano", "task=sft"], r"write \+STAGE.task=sft for one"),
        (["pipeline=nano", "init_from=x"], r"init_from=x would be for every stage"),
        (["pipeline=nano", "-m", "seed=1,2"], "leave -m"),
        (["pipeline=nano", "run_name=../x y"], "names a folder"),
        (["pipeline=nano", "+sft.optimizer.lrr=1"], "stage sft: unknown key 'optimizer.lrr'"),
    ],
)
def test_a_wrong_command_line_is_refused(typed: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(typed, CONF)


def test_what_is_typed_wins_in_every_stage_or_in_one(tmp_path: Path) -> None:
    named = write_pipeline(tmp_path, "p", {"a": ["seed=1"], "b": ["init_from={a}"]})
    chain = plan([*named, "seed=2", "+b.seed=3", "run_name=x"], CONF)
    assert [stage.words for stage in chain.stages] == [("seed=2",), ("init_from={a}", "seed=3")]
    assert chain.folder == Path("outputs/pipeline/x").absolute()
    assert [stage.parents for stage in chain.stages] == [(), ("a",)]


@pytest.mark.slow
def test_settings_are_compared_not_words(tmp_path: Path) -> None:
    plain, same, other = (
        plan(write_pipeline(tmp_path / str(number), "p", {"a": words}), CONF).stages[0].settings
        for number, words in enumerate(([], ["task=pretraining", "seed=1234"], ["seed=1"]))
    )
    assert plain == same
    assert plain != other


def test_a_checkpoint_from_outside_can_be_the_beginning(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source.ckpt")
    named = write_pipeline(tmp_path, "p", {"a": [], "b": ["init_from={a}"]})
    chain = plan([*named, f"+a.init_from={source}"], CONF)
    assert chain.stages[0].words == (f"init_from={source}",)
    assert chain.stages[0].parents == ()
