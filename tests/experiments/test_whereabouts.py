"""A project folder is moved, copied or renamed: its runs find their data and first weights by their digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import SETTINGS, train_here, write_corpus

from llm_lightning.cli.lineage import trace
from llm_lightning.data.of_checkpoint import conversations_of, labelled_texts_of, tokens_of
from llm_lightning.experiments.run_folder import RunFolder
from llm_lightning.experiments.run_records import Start
from llm_lightning.experiments.whereabouts import places_of, read_data
from llm_lightning.files.data_paths import data_path_of, data_paths, with_data_paths
from llm_lightning.files.places import candidates, existing, place_of, read_data_again
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import load_model

BASE = [word for word in SETTINGS if "samples." not in word and "max_steps" not in word]
QUIET = [*BASE, "trainer.max_steps=2", "callbacks.samples=null", "callbacks.plots=null", "logger=csv"]
LAST = Path("checkpoints", "last.ckpt")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of one's own, every path in it relative: pretraining, and preference tuning that begins with it."""
    folder = tmp_path_factory.mktemp("there") / "mine"
    folder.mkdir()
    write_corpus(folder / "corpus.txt")
    names = [f"{first} {second}" for first in ("red", "green", "blue", "old") for second in "abcdefg"]
    pairs = [{"instruction": name, "input": "", "chosen": "yes", "rejected": "no"} for name in names]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    rows = [f"{'good' if index % 2 else 'bad'} {name}\t{index % 2}" for index, name in enumerate(names)]
    (folder / "texts.tsv").write_text("\n".join(["text\tlabel", *rows, ""]))
    more = ["data.template='{instruction}[{input}]:{response}'", "data.val_fraction=0.2"]
    parents = ["init_from=outputs/pretraining/first"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ["run_name=first", "data.path=corpus.txt"],
            ["run_name=second", "task=dpo", "data.path=pairs.json", *parents, *more],
            ["run_name=third", "task=classification", "data.path=texts.tsv", "data.split_seed=1"],
        ):
            outcome = train_here([*QUIET, *words])
            assert outcome.code == 0, outcome.err
    return folder


def go_on(run: Path | str, *more: str, steps: int = 3) -> str:
    outcome = train_here([f"resume={run}", f"trainer.max_steps={steps}", *more])
    assert (outcome.code, outcome.err) == (0, "")
    assert "Resuming from " in outcome.out
    return outcome.out


def lineage(run: Path) -> dict[str, Any]:
    return checkpoints.read_header(run / LAST)["lineage"]


@pytest.mark.slow
def test_a_moved_project_goes_on_and_is_evaluated(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project, tmp_path / "before")
    moved = (tmp_path / "before").rename(tmp_path / "it's moved, too")
    hidden = project.rename(project.with_name("hidden"))  # nothing is where it was
    try:
        first, second, third = (
            moved / "outputs" / name for name in ("pretraining/first", "dpo/second", "classification/third")
        )
        loaded = load_model(first)
        assert tokens_of(loaded, "val", instead="")[0].n_tokens > 0
        assert len(conversations_of(load_model(second), instead="").records["test"]) > 0
        assert len(labelled_texts_of(load_model(third), "test", instead="")) > 0
        assert [link["state"] for link in trace(str(second))] == ["same", "same"]
        out = go_on(Path("it's moved, too/outputs/dpo/second"))
        assert "is read from" not in out
        places = lineage(second)["places"]
        assert places["data.path"]["found"] == [str(moved / "pairs.json")]
        assert places["init_from"]["from_run"] == ["../../pretraining/first"]
        go_on(first)
        monkeypatch.chdir(moved)  # the same command is typed where the project is now
        assert train_here([*QUIET, "run_name=first", "data.path=corpus.txt", "trainer.max_steps=4"]).code == 0
        assert lineage(first)["places"]["data.path"]["found"] == [str(moved / "corpus.txt")]
        assert json.loads((first / "summary.json").read_text())["steps"] == 4
    finally:
        hidden.rename(project)


def test_what_has_the_recorded_digest_is_used_the_nearest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a copied project its own; of what a folder names, nothing else than what the run was made from."""
    there, copy, here = (tmp_path / name for name in ("there", "copy", "here"))
    run = copy / "outputs" / "run"
    run.mkdir(parents=True)
    for folder in (there, copy, here):
        folder.mkdir(exist_ok=True)
        (folder / "a.txt").write_text("same")
    monkeypatch.chdir(here)
    place = place_of("a.txt", [str(there / "a.txt")], there / "outputs" / "run", digest_of(there / "a.txt"))
    command = {
        "folder": str(there),
        "config_dir": None,
        "overrides": ["data.path=a.txt"],
        "places": {"data.path": place},
    }
    resumed = Start(str(here), None, [], resume=str(run))
    opened = RunFolder(run, None, {})
    log = []
    for change in (None, copy, there, here):  # they take another text one after the other
        if change is not None:
            (change / "a.txt").write_text("other")
        (run / "command.json").write_text(json.dumps(command))
        try:
            log.append(read_data({"data": {"path": "a.txt"}}, opened, resumed, built)[1]["path"])
        except ValueError as error:
            log.append(str(error))
    assert log[:3] == [str(folder / "a.txt") for folder in (copy, there, here)]
    assert log[3].startswith(
        "cannot resume: data.path changed since the run began: digest 0967115f2813 is not that of "
    )
    assert [str(folder / "a.txt") in log[3] for folder in (copy, there, here)] == [True] * 3
    typed_again = {"data": {"path": "b.txt"}}  # means what it says
    again = {"path": "b.txt"}
    assert read_data(typed_again, opened, resumed, lambda *given: given) == ((again, None), again)
    for folder in (copy, there, here):
        (folder / "a.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"data.path=a.txt of the run is not there \(looked for .*type data.path="
    ):
        read_data({"data": {"path": "a.txt"}}, opened, resumed, built)


def built(data: dict[str, Any], digest: str | None) -> Any:
    return SimpleNamespace(data_digest=digest_of(Path(data["path"])))


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_copied_project_reads_its_own_data_and_no_other_text(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(project, tmp_path / "copy")
    run = copy / "outputs" / "pretraining" / "first"
    assert "is read from" not in go_on(run)
    assert lineage(run)["places"]["data.path"]["found"] == [str(copy / "corpus.txt")]
    text = (copy / "corpus.txt").read_text()
    (copy / "corpus.txt").write_text(text + "more")
    outcome = train_here([f"resume={run}", "trainer.max_steps=4"])
    assert outcome.code == 2
    assert outcome.err.startswith("error: cannot resume: data.path changed since the run began: digest ")
    assert str(copy / "corpus.txt") in outcome.err
    (tmp_path / "elsewhere.txt").write_text(text)
    go_on(run, "data.path=elsewhere.txt", steps=4)
    assert lineage(run)["places"]["data.path"]["from_run"] == ["../../../../elsewhere.txt"]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_takes_first_weights_by_their_digest(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that was killed early: its first weights are not in a checkpoint of its own yet."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(project, tmp_path / "copy")
    run, parent = copy / "outputs" / "dpo" / "second", copy / "outputs" / "pretraining" / "first"
    digest = lineage(run)["parent"]
    for file in (*(run / "checkpoints").iterdir(), run / "summary.json", run / "metrics.csv"):
        file.unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = train_here([f"resume={run}"])
    assert (outcome.code, outcome.err) == (0, "")
    assert lineage(run)["parent"] == digest
    assert lineage(run)["parent_name"] == str(parent)
    shutil.rmtree(run)
    for path, content in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    go_on(parent)  # it is another one now, and the one of the original is taken
    outcome = train_here([f"resume={run}"])
    assert (outcome.code, outcome.err) == (0, "")
    assert "init_from=outputs/pretraining/first is read from " in outcome.out
    assert lineage(run)["parent_name"] == str(project / "outputs" / "pretraining" / "first")


@pytest.mark.slow
def test_other_first_weights_are_refused_and_the_same_ones_elsewhere_are_not(project: Path, tmp_path: Path) -> None:
    run = shutil.copytree(project / "outputs" / "dpo" / "second", tmp_path / "run")
    shutil.copy(project / "outputs" / "pretraining" / "first" / LAST, tmp_path / "same.ckpt")
    shutil.copy(project / "outputs" / "classification" / "third" / LAST, tmp_path / "other.ckpt")
    typed = [f"data.path={project / 'pairs.json'}"]
    outcome = train_here([f"resume={run}", f"init_from={tmp_path / 'other.ckpt'}", *typed, "trainer.max_steps=3"])
    assert outcome.code == 2
    assert "init_from was 'outputs/pretraining/first' and is " in outcome.err
    go_on(run, f"init_from={tmp_path / 'same.ckpt'}", *typed)
    assert lineage(run)["places"]["init_from"]["from_run"] == ["../same.ckpt"]


@pytest.mark.slow
def test_folders_of_an_earlier_version_go_on(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold an absolute data.path in the settings of their checkpoints, and no places."""
    run = shutil.copytree(project / "outputs" / "pretraining" / "first", tmp_path / "run")
    for path in {file.resolve() for file in (run / "checkpoints").iterdir()}:
        state = checkpoints.load(path)
        header = state[checkpoints.HEADER]
        header.pop("digest")
        header["lineage"].pop("places")
        header["config"]["data"]["path"] = str(project / "corpus.txt")
        checkpoints.save(path, state)
    command = json.loads((run / "command.json").read_text())
    command.pop("places")
    (run / "command.json").write_text(json.dumps(command))
    assert tokens_of(load_model(run), "val", instead="")[0].n_tokens > 0
    monkeypatch.chdir(tmp_path)
    go_on(run)
    header = checkpoints.read_header(run / LAST)
    assert header["config"]["data"]["path"] == "corpus.txt"
    assert header["lineage"]["places"]["data.path"]["found"] == [str(project / "corpus.txt")]


def test_places_are_kept_relative_to_the_run_folder(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    run = tmp_path / "outputs" / "run"
    kept = place_of("a.txt,b.txt", [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], run, "0")
    assert kept["from_run"] == ["../../a.txt", "../../b.txt"]
    there = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert candidates(kept, run) == [there, there]
    assert existing(candidates(kept, run)) == [there]
    assert candidates(kept, tmp_path / "x" / "y" / "z") == [
        [str(tmp_path / "x" / name) for name in ("a.txt", "b.txt")],
        there,
    ]
    assert candidates(kept, None) == [there]
    assert existing([["nowhere.txt"], [], [str(tmp_path / "*.txt")]]) == [[str(tmp_path / "*.txt")]]
    for damaged in (None, 3, [], {"from_run": "x"}, {"from_run": [3], "found": [None]}):
        assert candidates(damaged, run) == []


# --- several paths ---------------------------------------------------------------------------------------------------

TYPED = {
    "path": "a.txt",
    "val_path": "b.txt",
    "val_sets": {"hard": "c.txt"},
    "mixture": [{"name": "web", "path": "d.txt", "weight": 0.5}, {"name": "hub", "hf_dataset": "x", "weight": 0.5}],
}
FILES = ("a.txt", "b.txt", "c.txt", "d.txt")
KEYS = ("data.path", "data.val_path", "data.val_sets.hard", "data.mixture.0.path")


def built_of_all(data: dict[str, Any], digest: str | None) -> Any:
    texts = [Path(path).read_text() for path in data_paths(data).values()]
    return SimpleNamespace(data_digest=hashlib.sha256("|".join(texts).encode()).hexdigest())


def write_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(f"text of {name}")


def started(there: Path, run: Path, here: Path) -> Start:
    """`resume=run` typed `here`, of a run that was started `there`, when the project was there."""
    settings = {"data": TYPED, "init_from": None}
    lineage = {"data": built_of_all(with_data_paths(TYPED, absolute(there)), None).data_digest, "parent": None}
    places = places_of(
        settings,
        RunFolder(there / "outputs" / "run", None, {}),
        lineage,
        with_data_paths(TYPED, absolute(there)),
        None,
    )
    run.mkdir(parents=True, exist_ok=True)
    command = {"folder": str(there), "config_dir": None, "overrides": [], "places": places}
    (run / "command.json").write_text(json.dumps(command))
    return Start(str(here), None, [], resume=str(run))


def absolute(folder: Path) -> dict[str, str]:
    return dict(zip(KEYS, (str(folder / name) for name in FILES), strict=True))


def test_path_settings_are_listed_and_replaced() -> None:
    assert data_paths(TYPED) == dict(zip(KEYS, FILES, strict=True))
    other = with_data_paths(TYPED, {"data.val_path": "z", "data.mixture.0.path": ["y", "x"]})
    assert data_paths(other) == data_paths(TYPED) | {"data.val_path": "z", "data.mixture.0.path": ["y", "x"]}
    assert other["mixture"][1] == TYPED["mixture"][1]
    assert data_paths(TYPED) == dict(zip(KEYS, FILES, strict=True))  # unchanged
    assert [*map(data_path_of, ("data.val_sets.hard[0]", "data.mixture[10].path", "data.mixture.1.path.0"))] == [
        "data.val_sets.hard",
        "data.mixture.10.path",
        "data.mixture.1.path",
    ]
    assert [*map(data_path_of, ("data.mixture[0].name", "data.name", "x.data.path", "data.val_sets"))] == [None] * 4
    for damaged in (
        None,
        [],
        {"val_sets": 3, "mixture": "x"},
        {"mixture": [1]},
        {"path": None, "val_sets": {"a": None}},
    ):
        assert data_paths(damaged) == {}


def test_all_paths_of_a_moved_project_are_found_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, moved, here = (tmp_path / name for name in ("there", "moved", "here"))
    for folder in (there, moved, here):
        write_all(folder)
    monkeypatch.chdir(here)
    start = started(there, moved / "outputs" / "run", here)
    opened = RunFolder(moved / "outputs" / "run", None, {})

    def found() -> dict[str, str]:
        return data_paths(read_data({"data": TYPED}, opened, start, built_of_all)[1])

    assert found() == absolute(moved)
    (moved / "b.txt").write_text("other")  # that folder as a whole is another project's now
    assert found() == absolute(there)
    for name in ("a.txt", "c.txt"):
        (there / name).unlink()
    assert found() == absolute(here)
    for name in FILES:
        (here / name).unlink()
    assert found() == absolute(moved) | {"data.val_path": str(there / "b.txt")}
    (there / "b.txt").write_text("other, too")
    with pytest.raises(ValueError, match=r"^cannot resume: data.path, data.val_path, .* changed since the run began"):
        found()
    for folder in (there, moved):
        (folder / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"^data.val_path=b.txt of the run is not there \(looked for "):
        found()


def test_a_path_typed_anew_must_be_the_same_data_beside_recorded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "run"
    start, opened = started(tmp_path, run, tmp_path), RunFolder(run, None, {})
    (tmp_path / "same.txt").write_text("text of b.txt")
    (tmp_path / "other.txt").write_text("another text")
    anew = {"data": TYPED | {"val_path": "same.txt"}}
    found = data_paths(read_data(anew, opened, start, built_of_all)[1])
    assert found == absolute(tmp_path) | {"data.val_path": "same.txt"}
    with pytest.raises(ValueError, match=r"^cannot resume: data.path, data.val_path, "):
        read_data({"data": TYPED | {"val_path": "other.txt"}}, opened, start, built_of_all)


def test_the_data_of_a_checkpoint_are_read_again_at_all_their_places(tmp_path: Path) -> None:
    there, moved = tmp_path / "there", tmp_path / "moved"
    for folder in (there, moved):
        write_all(folder)
    started(there, moved / "outputs" / "run", there)
    places = json.loads((moved / "outputs" / "run" / "command.json").read_text())["places"]
    digest = places["data.path"]["digest"]
    header = {"config": {"data": TYPED}, "lineage": {"data": digest, "places": places}}
    checkpoint = moved / "outputs" / "run" / "checkpoints" / "last.ckpt"

    def read() -> dict[str, str]:
        read: list[dict[str, Any]] = []
        build = lambda settings: read.append(settings) or built_of_all(settings, None)  # noqa: E731
        assert read_data_again(header, checkpoint, build, lambda data: data.data_digest).data_digest == digest
        return data_paths(read[-1])

    assert read() == absolute(moved)
    (moved / "d.txt").unlink()
    assert read() == absolute(there)
    (there / "a.txt").unlink()
    assert read() == absolute(moved) | {"data.mixture.0.path": str(there / "d.txt")}
