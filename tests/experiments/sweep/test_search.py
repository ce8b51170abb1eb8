"""A search: its space, its study, what is pruned, and that a kill changes nothing. No job trains here."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from forked import jobs_are_forks
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import MedianPruner
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tiny_run import ROOT, SETTINGS, fit_here, train_here, write_corpus

from llm_lightning.experiments.failures import Failure
from llm_lightning.experiments.run_list import runs
from llm_lightning.experiments.settings.compose import PLUGINS, config_dirs, prepare_hydra
from llm_lightning.experiments.sweep.attempt import Attempt
from llm_lightning.experiments.sweep.runner import Runner
from llm_lightning.experiments.sweep.search import searcher, trial
from llm_lightning.experiments.sweep.search.judge import Judge, Rows, pruner_of, validations
from llm_lightning.experiments.sweep.search.plan import Plan, keep_plan
from llm_lightning.experiments.sweep.search.searcher import Limits
from llm_lightning.experiments.sweep.search.space import Space, space_of
from llm_lightning.experiments.sweep.search.study import JOURNAL, Study
from llm_lightning.tasks.base import TaskModule

OPTIONS: dict[str, Any] = {
    "sampler": "tpe",
    "n_trials": 12,
    "timeout": None,
    "pruner": "median",
    "pruner_startup": 3,
    "pruner_warmup": 1,
    "seed": 1,
    "n_jobs": None,
}
WORDS = ["model.n_layer=2", "lr=tag(log, interval(1e-5, 1e-1))", "dropout=interval(0, 0.5)", "size=8,16"]


def space(*words: str) -> Space:
    prepare_hydra()
    return space_of(words, config_dirs(None, ROOT / "conf"))


def plan(*words: str, seeds: int = 2, mode: str = "min") -> Plan:
    return Plan(space(*(words or WORDS)), {"seed": 5}, {"data.path": "b"}, "val/loss", mode, range(5, 5 + seeds))


# --- the space -------------------------------------------------------------------------------------------------------


def test_a_space_is_typed_in_the_words_of_hydras_optuna_sweeper() -> None:
    made = space(
        "optimizer.lr=tag(log, interval(1e-5, 1e-2))",
        "model.dropout=interval(0, 0.3)",
        "model.n_layer=int(interval(1, 4))",
        "model.n_embd=range(16, 65, 16)",
        "optimizer.weight_decay=range(0.1, 0.35, 0.1)",
        "data.batch_size=2,4,8",
        "optimizer.fused=true,null,auto",
        "+task.extra=[1,2],[3]",
        "seed=7",
    )
    assert made.fixed == ["seed=7"]
    assert made.distributions == {
        "optimizer.lr": FloatDistribution(1e-5, 1e-2, log=True),
        "model.dropout": FloatDistribution(0.0, 0.3),
        "model.n_layer": IntDistribution(1, 4),
        "model.n_embd": IntDistribution(16, 64, step=16),
        "optimizer.weight_decay": FloatDistribution(0.1, 0.3, step=0.1),
        "data.batch_size": CategoricalDistribution((2, 4, 8)),
        "optimizer.fused": CategoricalDistribution((True, None, "auto")),
        "task.extra": CategoricalDistribution(("[1, 2]", "[3]")),
    }
    values = {"model.n_layer": 2, "model.n_embd": 48, "data.batch_size": 4, "optimizer.fused": None}
    more = {
        "optimizer.lr": 1e-3,
        "model.dropout": 0.25,
        "optimizer.weight_decay": 0.1 + 2 * 0.1,
        "task.extra": "[1, 2]",
    }
    assert made.words(values | more) == [
        "seed=7",
        "optimizer.lr=0.001",
        "model.dropout=0.25",
        "model.n_layer=2",
        "model.n_embd=48",
        "optimizer.weight_decay=0.3",
        "data.batch_size=4",
        "optimizer.fused=null",
        "+task.extra=[1,2]",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1"], "nothing to search"),
        (["lr=tag(log, interval(0, 1))"], r"'lr=tag\(log, interval\(0, 1\)\)' cannot be searched"),
        (["lr=interval(2, 1)"], "cannot be searched"),
        (["lr=tag(log, range(1, 4))"], "log applies to an interval"),
        (["n=range(4, 4)"], "range is empty"),
    ],
)
def test_what_describes_no_space_is_refused_by_its_word(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space(*words)


# --- judging ---------------------------------------------------------------------------------------------------------


def test_pruning_is_optunas_own_decision_whenever_the_rows_are_read() -> None:
    """Beside a study that is asked, reported and told by Optuna's own calls, row by row."""
    theirs = optuna.create_study(pruner=MedianPruner(n_startup_trials=2, n_warmup_steps=2))
    curves = [[3 - row * slope for row in range(6)] for slope in (0.1, 0.3, 0.2, 0.05, 0.4, 0.01, 0.25)]
    n_pruned = 0
    for curve in curves:
        whole, parts = (Judge(min, pruner_of(theirs, theirs.pruner)) for _ in range(2))
        whole.begin_job()
        parts.begin_job()
        whole.judge(curve)
        for end in (1, 4, 2, 5, 6):
            parts.judge(curve[:end])
        optunas = theirs.ask()
        for validation, value in enumerate(curve, start=1):
            optunas.report(value, validation)
            if optunas.should_prune():
                theirs.tell(optunas, state=TrialState.PRUNED)
                break
        else:
            theirs.tell(optunas, curve[-1])
        told = theirs.trials[-1]
        assert whole.values == parts.values == told.intermediate_values, "rows after the decision do not count"
        assert whole.is_pruned == parts.is_pruned == (told.state is TrialState.PRUNED)
        n_pruned += whole.is_pruned
    assert n_pruned == 4


def test_the_value_is_the_mean_of_each_seeds_best_and_a_loss_that_is_not_finite_is_none() -> None:
    judge = Judge(max, lambda _: False)
    judge.begin_job()
    judge.judge([math.nan, 0.5, 0.75, 0.25])
    judge.begin_job()
    judge.judge([0.25, 0.125])
    assert judge.value() == 0.5
    assert judge.values == {2: 0.5, 3: 0.75, 4: 0.75, 5: 0.5, 6: 0.5}


def test_a_row_that_is_being_written_waits_for_the_next_look(tmp_path: Path) -> None:
    file, rows = tmp_path / "metrics.csv", Rows(tmp_path, "val/loss")
    assert rows.settled() == []
    file.write_text("step,val/loss\n1,2.5\n2,1.2\n")
    assert rows.settled() == []
    file.write_text("step,val/loss\n1,2.5\n2,1.25\n3,")
    assert rows.settled() == [2.5]
    assert rows.settled() == [2.5, 1.25]


@pytest.mark.slow
def test_each_validation_can_be_read_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no checkpoint is written, before which the logs are."""
    seen: list[int] = []

    def look(_: TaskModule) -> None:
        seen.append(len(validations(tmp_path / "run", "val/loss")))

    monkeypatch.setattr(TaskModule, "on_validation_end", look)
    words = [word for word in SETTINGS if not word.startswith("callbacks.")]
    corpus = write_corpus(tmp_path / "corpus.txt", 60)
    words += ["callbacks=none", "trainer.val_check_interval=1", "trainer.max_steps=3", f"data.path={corpus}"]
    outcome = fit_here([*words, f"hydra.run.dir={tmp_path / 'run'}"])
    assert outcome.code == 0, outcome.err
    assert seen == [1, 2, 3]


# --- searches whose jobs do not train --------------------------------------------------------------------------------


class Killed(BaseException):
    """SIGKILL of the sweep."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


class Machine:
    """Searches in one folder, with jobs that write the records of a run, and kills at the lines of the journal."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        folder.mkdir()
        self.launched: list[str] = []
        self.lines_left: int | None = None
        patch.setattr(searcher, "settings_of", lambda words, _: {"words": list(words)})
        patch.setattr(trial, "LOOK_SECONDS", 0.001)
        append = JournalFileBackend.append_logs

        def dying(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
            if self.lines_left is not None and self.lines_left <= 0:
                file = Path(backend._file_path)
                file.with_name(f"{file.name}.lock").touch()  # it held its lock, and had written half a line
                with file.open("a") as journal:
                    journal.write(json.dumps(logs[0])[:20])
                raise Killed
            self.lines_left = None if self.lines_left is None else self.lines_left - 1
            append(backend, logs)

        patch.setattr(JournalFileBackend, "append_logs", dying)

    def run(
        self, plan: Plan, *, at_a_time: int = 1, seed: int = 1, die_after: int | None = None, **options: Any
    ) -> list[Any]:
        """One start of the search; its trials as Optuna reads them."""
        self.lines_left = die_after
        limits = Limits.of(OPTIONS | options)
        keep_plan(self.folder, plan)
        study = Study.open(self.folder, plan.mode, plan.space, sampler=limits.sampler, seed=seed)
        searcher._Search(self, plan, study, limits, None, at_a_time).run()  # type: ignore[arg-type]
        return trials_in(self.folder)

    def last_report(self, *, has_run: bool) -> None:
        """Of a runner: these jobs leave nothing to report."""

    def killed_often(self, plan: Plan, lines: int, **options: Any) -> tuple[list[Any], int]:
        """Starts that each die after some lines, until one ends."""
        for kills in range(1000):
            try:
                return self.run(plan, die_after=lines, **options), kills
            except Killed:
                continue
        raise AssertionError("it never ends")

    # What a search needs of a `Runner`.

    name = "study"
    attempt = Attempt("train.py", ())

    def record(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            job.folder.mkdir(exist_ok=True)

    def launch(self, jobs: Sequence[Any], *_: Any, announces: bool) -> None:
        for job in jobs:
            self.launched.append(job.name)
            values = dict(word.split("=") for word in job.listed.words)
            train(job.folder, float(values["lr"]), float(values["dropout"]), int(values.get("seed", 5)))


def train(folder: Path, lr: float, dropout: float, seed: int) -> None:
    """The records of a run of six validations; a large rate is never finite, and a stopped run goes on."""
    rows = [3 - step / 3 + abs(math.log10(lr) + 2.5) + dropout - 0.01 * seed for step in range(6)]
    if lr > 0.04:
        Failure("error", "ValueError", "loss is not finite at step 3", 2).write(folder)
        rows = rows[:1]
    lines = [f"{step},{value!r},\n" for step, value in enumerate(rows)]
    (folder / "metrics.csv").write_text("step,val/loss,lr\n" + "".join(lines))
    if lr <= 0.04:
        (folder / "summary.json").write_text(json.dumps({"finished": True, "total_steps": 6}))


def trials_in(folder: Path) -> list[Any]:
    """What Optuna's own reader finds, without the times."""
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    return [
        (one.number, one.state, one.params, one.value, one.intermediate_values, one.user_attrs)
        for one in optuna.load_study(study_name=None, storage=storage).trials
    ]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Machine]:
    return lambda name: Machine(tmp_path / name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("at_a_time", [1, 3])
def test_a_search_that_is_killed_at_any_line_is_the_undisturbed_one(
    machine: Callable[[str], Machine], at_a_time: int
) -> None:
    options = {"at_a_time": at_a_time, "n_trials": 9, "pruner_startup": 2, "seed": 3}
    undisturbed = machine("whole").run(plan(), **options)
    assert [one[0] for one in undisturbed] == list(range(9))
    assert {one[1] for one in undisturbed} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    trials, kills = machine("killed").killed_often(plan(), 3, **options)
    assert kills > 20
    assert trials == undisturbed


def test_n_trials_is_a_total_and_a_larger_one_goes_on(machine: Callable[[str], Machine]) -> None:
    long = machine("long").run(plan(), n_trials=9)
    short = machine("short")
    assert short.run(plan(), n_trials=5) == long[:5]
    short.launched.clear()
    assert short.run(plan(), n_trials=5) == long[:5]
    assert short.launched == []
    assert short.run(plan(), n_trials=9) == long
    assert short.run(plan(), n_trials=None, timeout=1e-9) == long


def test_a_value_is_the_mean_of_the_seeds_and_one_seed_may_end_a_trial(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    trials = one.run(plan(), n_trials=20)
    for number, state, _, value, _, facts in trials:
        folders = [one.folder / f"trial_{number}-seed_{seed}" for seed in (5, 6)]
        best = [min(rows) for folder in folders if (rows := validations(folder, "val/loss"))]
        if state is TrialState.COMPLETE:
            assert value == pytest.approx(sum(best) / 2, rel=1e-15)
            assert list(facts["jobs"].values()) == best
        if state is TrialState.PRUNED and not folders[1].exists():
            assert folders[0].joinpath("summary.json").is_file(), "it had finished when it was judged, and stays PRUNED"
            assert json.loads((folders[0] / "pruned.json").read_text())["reason"] == facts["reason"]
    assert any(one[1] is TrialState.PRUNED for one in trials)


def test_a_running_job_is_stopped_when_it_is_pruned_and_shown_as_stopped(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("one")
    one.run(plan(seeds=1), n_trials=4, pruner=None)
    stopped: list[Path] = []

    def slowly(folder: Path, *_: Any) -> None:
        lines = [f"{step},9.5,\n" for step in range(6)]
        (folder / "metrics.csv").write_text("step,val/loss,lr\n" + "".join(lines[:3]))
        deadline = time.monotonic() + 20
        while not (folder / "stop").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        (folder / "metrics.csv").write_text("step,val/loss,lr\n" + "".join(lines))
        (folder / "config.json").write_text("{}")
        (folder / ".lock").touch()
        stopped.append(folder)

    monkeypatch.setattr(sys.modules[__name__], "train", slowly)
    with monkeypatch.context() as patch:
        patch.setattr(Study, "tell", killed)
        with pytest.raises(Killed):
            one.run(plan(seeds=1), n_trials=5)
    *_, last = one.run(plan(seeds=1), n_trials=5)
    assert len(stopped) == 1, "what its rows say needs no further look at the job"
    assert last[1] is TrialState.PRUNED
    assert last[4] == {1: 9.5, 2: 9.5}, "the rows until the stop do not count"
    assert not (stopped[0] / "stop").exists()
    [record] = runs(stopped[0])
    assert (record["status"], record["reason"]) == ("stopped", "pruned at validation 2: val/loss 9.5000")


def test_what_failed_counts_and_a_search_in_which_all_fails_ends(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = machine("one")
    trials = one.run(plan("lr=interval(0.03, 0.06)", "dropout=0"), n_trials=8)
    assert len(trials) == 8
    failed = [facts["reason"] for _, state, *_, facts in trials if state is TrialState.FAIL]
    assert f"8 trials: {8 - len(failed)} complete, {len(failed)} failed" in capsys.readouterr().out
    assert {reason.partition(": ")[2] for reason in failed} == {"loss is not finite at step 3"}
    other = machine("other")
    hopeless = plan("lr=interval(0.05, 0.06)", "dropout=0")
    with pytest.raises(
        ChildProcessError, match=r"3 failed, the last: trial_2-seed_5: loss is not finite.*same command continues"
    ):
        other.run(hopeless)
    assert len(trials_in(other.folder)) == 3
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"4 failed, .*and a larger hydra.sweeper.n_trials"):
            other.run(hopeless, n_trials=4)


def test_an_error_of_the_system_ends_the_search_and_leaves_its_trial_open(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machine("one")
    undisturbed = machine("other").run(plan(), n_trials=4)
    one.run(plan(), n_trials=2)
    with monkeypatch.context() as patch:
        full = Failure("os", "OSError", "No space left on device", 2)
        patch.setattr(one, "launch", lambda jobs, *_, **__: full.write(jobs[0].folder))
        with pytest.raises(ChildProcessError, match="trial_2-seed_5: No space left on device; mend the cause"):
            one.run(plan(), n_trials=4)
    assert [state.is_finished() for _, state, *_ in trials_in(one.folder)] == [True, True, False]
    assert one.run(plan(), n_trials=4) == undisturbed


def test_a_job_that_a_person_stopped_leaves_its_trial_open(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = machine("one")
    with monkeypatch.context() as patch:
        patch.setattr(one, "launch", lambda *_, **__: None)
        assert one.run(plan())[0][1] is TrialState.RUNNING
    assert "trial 0 was stopped before its end; the same command continues" in capsys.readouterr().out
    assert one.run(plan())[0][1].is_finished()


def test_a_grid_ends_with_its_last_point(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    grid = plan("lr=0.001,0.003", "dropout=range(0, 3)", seeds=1)
    limits = Limits.of(OPTIONS | {"sampler": "grid", "n_trials": None})
    study = Study.open(one.folder, "min", grid.space, sampler="grid")
    searcher._Search(one, grid, study, limits.of_grid(6), None, 1).run()  # type: ignore[arg-type]
    points = [tuple(params.values()) for _, _, params, *_ in trials_in(one.folder)]
    assert sorted(points) == [(lr, dropout) for lr in (0.001, 0.003) for dropout in (0, 1, 2)]
    with pytest.raises(ValueError, match=r"'lr=interval\(0,1\)' lists no values for hydra.sweeper.sampler=grid"):
        Study.open(one.folder, "min", space("lr=interval(0,1)"), sampler="grid").grid()


def test_a_larger_metric_may_be_better(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    one.run(plan(mode="max"), pruner=None)
    best = Study.open(one.folder, "max", plan().space).best()
    values = [value for *_, value, _, _ in trials_in(one.folder) if value is not None]
    assert isinstance(best, FrozenTrial)
    assert best.value == max(values)


def test_another_search_in_the_same_folder_is_refused_by_its_key(machine: Callable[[str], Machine]) -> None:
    folder = machine("one").folder
    keep_plan(folder, plan())
    keep_plan(folder, plan())
    for key, other in {
        "lr": plan(*WORDS[:1], "lr=interval(1e-5, 1e-1)", *WORDS[2:]),
        "dropout": plan(*WORDS[:2], *WORDS[3:]),
        "monitor_mode": plan(mode="max"),
        "hydra.sweeper.seeds": plan(seeds=3),
        "seed": Plan(plan().space, {"seed": 6}, {"data.path": "b"}, "val/loss", "min", [5, 6]),
        "data.path": Plan(plan().space, {"seed": 5}, {"data.path": "a"}, "val/loss", "min", [5, 6]),
    }.items():
        with pytest.raises(ValueError, match=rf"^{key}: .*begin another search with run_name=NAME") as error:
            keep_plan(folder, other)
        assert "\n" not in str(error.value)


def test_a_folder_of_another_trial_is_refused(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    trials = one.run(plan(), n_trials=2)
    for job in one.folder.glob("trial_*"):
        words = plan().words(trials[int(job.name[6])][2], int(job.name[-1]))
        record = {"words": list(words), "settings": {}, "content": {}, "swept": []}
        (job / "job.json").write_text(json.dumps(record))
    one.launched.clear()
    (one.folder / JOURNAL).rename(one.folder / "moved")
    assert one.run(plan(), n_trials=2) == trials, "the same suggestions, whose jobs have ended"
    assert one.launched == []
    (one.folder / JOURNAL).unlink()
    with pytest.raises(ValueError, match=r"trial_0-seed_5 holds another trial \(dropout=.* size=.*\); move it away"):
        one.run(plan(), n_trials=2, seed=2)


def test_a_damaged_journal_is_named_with_its_line(machine: Callable[[str], Machine]) -> None:
    one = machine("one")
    one.run(plan(), n_trials=1)
    journal = one.folder / JOURNAL
    journal.write_text(journal.read_text().replace("\n", "\n{\n", 1))
    with pytest.raises(ValueError, match=rf"{JOURNAL}, line 2 is damaged"):
        one.run(plan(), n_trials=2)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_searches_and_says_how_to_repeat_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def launch(_: Runner, jobs: Sequence[Any], *__: Any, announces: bool) -> None:
        for job in jobs:
            train(job.folder, job.identity.settings["optimizer.lr"], 0, job.identity.settings["seed"])

    monkeypatch.setattr(Runner, "launch", launch)
    words = [*SETTINGS, f"data.path={write_corpus(tmp_path / 'corpus.txt', 60)}", "-m", "hydra/sweeper=optuna"]
    words += ["optimizer.lr=tag(log, interval(1e-5, 1e-2))", "seed=3", "hydra.sweeper.seeds=2", "run_name=study"]
    outcome = train_here([*words, "hydra.sweeper.n_trials=2"])
    assert outcome.code == 0, outcome.err
    trials = trials_in(tmp_path / "outputs" / "sweeps" / "study")
    best = min(trials, key=lambda one: one[3])
    assert "2 trials: 2 complete" in outcome.out
    assert f"Best: trial {best[0]}, val/loss {best[3]:.4f}, the mean of 2 seeds. To repeat it:" in outcome.out
    assert f"optimizer.lr={best[2]['optimizer.lr']!r} seed=3,4\n" in outcome.out
    assert "optuna-dashboard outputs/sweeps/study/study.journal" in outcome.out
    job = json.loads((tmp_path / "outputs/sweeps/study/trial_0-seed_4/job.json").read_text())
    assert job["settings"]["seed"] == 4


@pytest.mark.slow
def test_a_search_that_trains_counts_what_its_runs_say_of_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = jobs_are_forks(monkeypatch)
    words = [
        *(word for word in SETTINGS if "samples" not in word),
        f"data.path={write_corpus(tmp_path / 'corpus.txt', 60)}",
        "trainer.val_check_interval=1",
    ]
    words += ["-m", "hydra/sweeper=optuna", "optimizer.lr=1e-3,1e30", "hydra.sweeper.sampler=grid", "seed=3"]
    words += ["hydra.sweeper.seeds=2", "run_name=study", "callbacks.samples=null"]
    outcome = train_here(words)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "outputs" / "sweeps" / "study"
    of_rate = {params["optimizer.lr"]: (number, state, value) for number, state, params, value, *_ in trials_in(folder)}
    number, state, value = of_rate[1e-3]
    summaries = [json.loads((folder / f"trial_{number}-seed_{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    assert state is TrialState.COMPLETE
    mean = sum(summary["best_value"] for summary in summaries) / 2
    assert value == pytest.approx(mean, rel=1e-6), "Lightning rounds a logged value to fp32, metrics.csv does not"
    assert of_rate[1e30][1] is TrialState.FAIL
    assert len(started) == 3, "the second seed of the failed trial does not run"
    assert train_here(words).code == 0
    assert len(started) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "tpee"}, "hydra.sweeper.sampler=tpee: did you mean tpe"),
        ({"pruner": "hyperband"}, "hydra.sweeper.pruner=hyperband: there are median and null"),
        ({"n_trials": 0}, "hydra.sweeper.n_trials=0 must be a number above 0"),
        ({"n_trials": None}, "a search needs an end"),
        ({"n_jobs": -1}, "hydra.sweeper.n_jobs=-1 must be a number above 0, or null"),
        ({"pruner_warmup": -1}, "hydra.sweeper.pruner_warmup=-1 must not be negative"),
    ],
)
def test_a_wrong_limit_is_refused_by_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits.of(OPTIONS | options)


@pytest.mark.parametrize("word", ["hydra.sweeper.seeds=3", "hydra.sweeper.n_jobs=2", "hydra.sweeper.pruner=median"])
def test_options_of_a_search_are_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train_here(["-m", "optimizer.lr=1e-3,2e-3", word])
    assert outcome.code != 0
    assert f"{word.partition('=')[0]} has no effect without a search: add hydra/sweeper=optuna" in outcome.err


def test_a_drawing_of_the_schedule_is_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train_here(["-m", "optimizer.lr=1e-3,2e-3", "plot_lr=true"])
    assert outcome.code != 0
    assert "plot_lr=true draws the schedule of one run" in outcome.err


def test_without_optuna_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGINS)
    plugin = pytest.importorskip("hydra_plugins.llm_lightning_sweeper")
    monkeypatch.setattr(plugin.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"hydra/sweeper=optuna needs Optuna: pip install 'llm-lightning\[sweep\]'"):
        plugin.ResumableSweeper(sampler="tpe").sweep([])
