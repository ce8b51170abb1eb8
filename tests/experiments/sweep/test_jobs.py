"""Which jobs a command line has, what they are called, and which of them are the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_run import ROOT

from llm_lightning.experiments.settings.checks import check_job, checked_settings
from llm_lightning.experiments.settings.compose import ConfigDirs, SharedCompositions, config_dirs, prepare_hydra
from llm_lightning.experiments.settings.nodes import leaves, plain
from llm_lightning.experiments.settings.overrides import parsed
from llm_lightning.experiments.sweep.identity import Identity, changed_limits, content_of
from llm_lightning.experiments.sweep.words import Listed, list_jobs, sweep_name
from llm_lightning.weights.renamed import MOVED

CONF = ROOT / "conf"


def jobs_of(*typed: str, **options: Any) -> list[Listed]:
    prepare_hydra()
    return list_jobs({"max_jobs": 1000, **options}, typed, config_dirs(None, CONF))


def names(*typed: str, **options: Any) -> list[str]:
    return [job.name for job in jobs_of(*typed, **options)]


def identity(*words: str, swept: tuple[str, ...] = ()) -> Identity:
    settings = leaves(plain(checked_settings(list(words), CONF).config))
    return Identity(settings, content_of(settings, {}), swept)


def test_a_job_for_each_combination_named_by_what_varies() -> None:
    listed = jobs_of("task=sft,dpo", "optimizer.lr=1e-4,3e-4", "model.dropout=0", "run_name=study")
    assert [job.name for job in listed] == [
        "task_sft-lr_1e-4",
        "task_sft-lr_3e-4",
        "task_dpo-lr_1e-4",
        "task_dpo-lr_3e-4",
    ]
    assert listed[1].words == ("task=sft", "optimizer.lr=0.0003", "model.dropout=0", "run_name=study")
    assert names("seed=range(1,4)") == ["seed_1", "seed_2", "seed_3"]
    assert names("seed=1") == ["job"]
    assert names("optimizer.lr=1,-1") == ["lr_1", "lr_-1"]


def test_two_keys_with_the_same_end_are_told_apart() -> None:
    one, *_ = names("trainer.max_steps=1,2", "callbacks.samples.max_new_tokens=8,9")
    assert one == "max_steps_1-max_new_tokens_8"
    one, *_ = names("optimizer.lr=1,2", "++callbacks.other.lr=1,2")
    assert one == "optimizer_lr_1-other_lr_1"


@pytest.mark.parametrize("value", ["a=b", "x y", "it's", "../up", "[a,b]", "ü", "-", "''", "A" * 300])
def test_a_name_has_only_letters_that_hydra_and_paths_take(value: str) -> None:
    quoted = value if value.startswith(("[", "'")) else '"' + value + '"'
    for name in names(f"data.path={quoted},other"):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name), name


def test_a_mixture_is_named_by_its_shares() -> None:
    mixtures = [f"[{{name: web, path: data/web.txt, weight: {one}}}, {{name: books, path: b}}]" for one in (0.7, 3)]
    listed = jobs_of(f"data.mixture={','.join(mixtures)}", "seed=1,2")
    assert [job.name for job in listed[::2]] == ["mixture_web_0.7_books_1-seed_1", "mixture_web_3_books_1-seed_1"]
    assert names("data.mixture.0.weight=0.1,0.2") == ["weight_0.1", "weight_0.2"]
    assert names("data.mixture=[],null") == ["mixture_empty", "mixture_null"]
    assert jobs_of("data.val_sets.hard=1984,b.txt")[0] == Listed(
        "hard_1984", ("++data.val_sets.hard='1984'",), ("data.val_sets.hard",)
    )


def test_listed_jobs_take_shared_settings_and_what_is_typed_beats_both() -> None:
    jobs = {"small": {"model.n_layer": 1}, "large": {"model.n_layer": 2, "optimizer.lr": 0.5}}
    params = {"optimizer.lr": 0.25, "model.dropout": 0}
    listed = jobs_of("seed=1,2", params=params, jobs=jobs)
    assert [job.name for job in listed] == ["small-seed_1", "small-seed_2", "large-seed_1", "large-seed_2"]
    assert {"optimizer.lr=0.25", "model.n_layer=1"} <= set(listed[0].words)
    assert {"optimizer.lr=0.5", "model.dropout=0"} <= set(listed[2].words)
    assert "optimizer.lr=0.25" not in listed[2].words
    for job in jobs_of("optimizer.lr=0.125", params=params, jobs=jobs):
        assert [word for word in job.words if word.startswith("optimizer.lr")] == ["optimizer.lr=0.125"]
    assert names(params=params, jobs=jobs, only="l*") == ["large"]
    with pytest.raises(ValueError, match=r"hydra.sweeper.only=lage: no such job; did you mean 'large'"):
        jobs_of(params=params, jobs=jobs, only=["lage"])


def test_what_cannot_vary_is_refused_before_anything_is_composed() -> None:
    for word in (
        "run_name=a,b",
        "sweep=dpo_beta,lr_by_warmup",
        "hydra.sweep.dir=a,b",
        "hydra/launcher=basic,joblib",
        "allow_targets=[a],[b]",
    ):
        key = word.partition("=")[0]
        with pytest.raises(ValueError, match=f"{re.escape(key)} cannot vary in a sweep"):
            jobs_of(word)
    with pytest.raises(ValueError, match="lists no values"):
        jobs_of("optimizer.lr=interval(0,1)")
    with pytest.raises(ValueError, match="cannot read 'seed=1,,2'"):
        jobs_of("seed=1,,2")
    with pytest.raises(ValueError, match=r"1,001 jobs, more than hydra.sweeper.max_jobs=1000.*max_jobs=1001"):
        jobs_of("seed=range(0,1001)")
    with pytest.raises(ValueError, match="1,000,000,000 jobs"):  # at once: none of them is listed
        jobs_of("seed=range(0,100000)", "optimizer.lr=range(1,10001)")
    assert len(jobs_of("seed=range(0,20)", max_jobs=20)) == 20


def test_a_sweep_without_a_name_is_named_by_its_jobs_in_any_order() -> None:
    def named(*typed: str, option: str | None = None) -> str:
        return sweep_name(jobs_of(*typed), option, typed)

    assert named("seed=1,2", "optimizer.lr=1,2").startswith("lr-seed-")
    assert named("seed=1,2", "model.dropout=0") == named("model.dropout=0", "seed=2,1")
    assert named("seed=1,2", "optimizer.lr=1,2") == named("optimizer.lr=2,1", "seed=2,1")
    assert named("seed=1,2") != named("seed=1,3")
    assert named("seed=1,2", "model.dropout=0") != named("seed=1,2")
    assert named("sweep=lr_by_warmup", option="lr_by_warmup") == "lr_by_warmup"
    assert named("sweep=lr_by_warmup", "seed=1,2", option="lr_by_warmup").startswith("lr_by_warmup-")


@pytest.mark.slow
def test_a_job_is_its_settings_and_the_content_of_its_files(tmp_path: Path) -> None:
    here, there = tmp_path / "here.txt", tmp_path / "there.txt"
    here.write_text("to be or not to be")
    there.write_text("to be or not to be")
    one = identity("model.n_layer=2", f"data.path={here}", "run_name=a", "trainer.max_epochs=1")
    assert one.digest() == identity("trainer.max_epochs=9", f"data.path={there}", "model.n_layer=2").digest()
    assert one.digest() != identity("model.n_layer=3", f"data.path={here}").digest()
    there.write_text("to be or not")
    assert one.digest() != identity("model.n_layer=2", f"data.path={there}").digest()
    assert identity("optimizer.lr=1").digest() == identity("optimizer.lr=1.0").digest()


def test_a_job_is_the_content_of_every_path_of_its_data(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        for name in "abcd":
            (folder / f"{name}.txt").write_text(f"text of {name}")

    def one(folder: Path, weight: float = 1, **more: Any) -> Identity:
        mixture = [{"name": "web", "path": f"{folder}/a.txt", "weight": weight}, {"name": "hub", "hf_dataset": "x"}]
        paths = {"path": f"{folder}/a.txt,{folder}/b.txt", "val_path": f"{folder}/b.txt", "test_path": None}
        paths |= {"val_sets.hard": f"{folder}/c.txt", "mixture": mixture}
        settings = {f"data.{key}": value for key, value in (paths | more).items()}
        return Identity(settings, content_of(settings, {}), ())

    before = one(here)
    assert before.digest() == one(there, weight=1.0).digest()
    assert before.is_same(one(there), {}.get)
    others = [one(there, weight=2), one(there, test_path=f"{there}/d.txt"), one(there, mixture=None)]
    others.append(one(there, **{"val_sets.hard": None, "val_sets.easy": f"{there}/c.txt"}))
    for name in "abc":
        (there / f"{name}.txt").write_text("changed")
        others.append(one(there))
        (there / f"{name}.txt").write_text(f"text of {name}")
    assert before.digest() not in [other.digest() for other in others]
    assert not any(before.is_same(other, {}.get) or other.is_same(before, {}.get) for other in others)


def test_a_setting_that_changes_no_result_counts_where_it_is_swept() -> None:
    short, long = (identity(f"trainer.max_epochs={n}") for n in (1, 2))
    assert short.digest() == long.digest()
    assert short.digest(["trainer.max_epochs"]) != long.digest(["trainer.max_epochs"])
    assert changed_limits(long.settings, short.settings) == ["trainer.max_epochs"]
    assert changed_limits(long.settings, identity("run_name=x", "trainer.max_epochs=2").settings) == []


def test_a_class_counts_by_its_name_of_today() -> None:
    for old, new in MOVED.items():
        earlier, now = (Identity({"optimizer._target_": name}, {}, ()) for name in (old, new))
        assert now.is_same(earlier, {}.get)
        assert now.digest() == earlier.digest()


def test_a_key_that_an_old_job_does_not_have_counts_as_its_default() -> None:
    now = identity("model.dropout=0.5")
    older = {key: value for key, value in now.settings.items() if key != "model.dropout"}
    assert now.is_same(Identity(older, {}, ()), {"model.dropout": 0.5}.get)
    assert not now.is_same(Identity(older, {}, ()), {"model.dropout": 0.1}.get)
    assert not now.is_same(Identity(now.settings | {"model.gone": 1}, {}, ()), {}.get)


def test_what_a_run_filled_in_does_not_make_it_another_job() -> None:
    now = identity("accelerator=cpu")
    assert now.settings["trainer.precision"] == "auto"
    ran = now.settings | {"trainer.precision": "32-true"}
    assert now.is_same(Identity(ran, {}, (), is_recorded=False), {}.get)
    assert not now.is_same(Identity(ran, {}, ()), {}.get)


def test_a_job_of_before_that_knows_its_rate_and_its_model_is_the_same() -> None:
    now = identity("init_from=gpt2-small", "seed=2")
    assert (now.settings["optimizer.lr"], now.settings["model.n_layer"]) == ("auto", None)
    gone = {"model.peak_lr": 6e-4, "model.finetune_lr": 5e-5, "optimizer.lr": 6e-4, "model.n_layer": 12}
    before = {key: value for key, value in now.settings.items() if not key.startswith("optimizer.rates.")} | gone
    assert now.is_same(Identity(before, {}, ()), now.settings.get)
    assert not now.is_same(Identity(before | {"seed": 3}, {}, ()), now.settings.get)
    assert not identity("init_from=gpt2-small", "optimizer.lr=1e-4").is_same(Identity(before, {}, ()), now.settings.get)


def test_first_weights_are_those_of_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "last.ckpt").write_bytes(b"last")
    (tmp_path / "b.ckpt").write_bytes(b"last")
    first, second = (content_of({"init_from": str(tmp_path / name)}, {}) for name in ("a", "b.ckpt"))
    assert first == second != {}
    (tmp_path / "a" / "checkpoints" / "best.ckpt").write_bytes(b"best")
    assert content_of({"init_from": str(tmp_path / "a")}, {}) != first
    assert content_of({"init_from": "gpt2-small", "data.path": None}, {}) == {}


@pytest.mark.parametrize(
    "words",
    [
        ["task=dpo", "task.beta=0.3", "optimizer={lr:0.5}", "lora=default", "lora.rank=3", "seed=7"],
        ["experiment=book/ch06", "+trainer.profiler=simple", "~callbacks.plots", "trainer.devices=2"],
        ["task=sft", "init_from=x", "model=gpt2_small", "tokenizer=byte", "model.context_length=64"],
        ["optimizer.lrr=1"],
        ["+optimizer.lr=1"],
        ["task=dppo"],
        ["seed=many"],
    ],
)
def test_compositions_that_share_their_files_are_those_of_hydra(words: list[str]) -> None:
    prepare_hydra()
    alone = config_dirs(None, CONF)
    shared = SharedCompositions(alone.folders)
    for values in (words, [*words, "model.dropout=0.25"], words):  # the first is not changed by what follows
        assert outcome(values, shared) == outcome(values, alone)


def outcome(words: list[str], dirs: ConfigDirs) -> Any:
    try:
        return plain(check_job([parsed(word) for word in words], dirs).config)
    except ValueError as error:
        return str(error)
