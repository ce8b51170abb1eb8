"""The files of conf/sweep: how many jobs each has, that all of them pass the checks, and what the book's are."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny_run import ROOT, train_here

from llm_lightning.experiments.settings.checks import checked_settings
from llm_lightning.experiments.settings.compose import SharedCompositions, config_dirs
from llm_lightning.experiments.settings.nodes import dotted, plain
from llm_lightning.experiments.settings.yaml_files import group_options, load
from llm_lightning.experiments.sweep.identity import Identity
from llm_lightning.experiments.sweep.search.plan import plan_of
from llm_lightning.experiments.sweep.search.searcher import Limits
from llm_lightning.experiments.sweep.words import Listed, list_jobs

CONF = ROOT / "conf"
JOBS = {
    "book_ch06_table": 19,
    "book_hparams": 48,
    "dpo_beta": 6,
    "lora_rank_by_alpha": 9,
    "lr_by_warmup": 12,
    "optimizers": 9,
}
SEARCHES = {
    "book_hparams_search": [
        "optimizer.lr",
        "optimizer.weight_decay",
        "model.dropout",
        "data.batch_size",
        "scheduler.warmup",
        "scheduler.initial_lr",
        "scheduler.min_lr",
    ]
}
GIVEN = {"dpo_beta": ["init_from=outputs/sft/first"], "lora_rank_by_alpha": ["init_from=outputs/pretraining/first"]}


def jobs_of(name: str, *typed: str) -> list[Listed]:
    words = [f"sweep={name}", *GIVEN.get(name, []), *typed]
    options = OmegaConf.to_container(checked_settings(words, CONF).full.hydra.sweeper)
    assert isinstance(options, dict)
    return list_jobs({str(key): value for key, value in options.items()}, words, config_dirs(None, CONF))


@functools.cache
def settings_of(words: tuple[str, ...]) -> dict[str, Any]:
    return dotted(plain(checked_settings(words, CONF).config))


def test_every_sweep_is_counted_here() -> None:
    assert sorted([*JOBS, *SEARCHES]) == group_options(CONF, "sweep")


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_passes_the_checks_with_each_of_its_values(name: str) -> None:
    words = [f"sweep={name}"]
    options = OmegaConf.to_container(checked_settings(words, CONF).full.hydra.sweeper)
    assert isinstance(options, dict)
    plan = plan_of({str(key): value for key, value in options.items()}, words, SharedCompositions((CONF,)))
    assert list(plan.space.dimensions) == SEARCHES[name]
    assert Limits.of(options).n_trials == 25  # type: ignore[arg-type]


@pytest.mark.parametrize("name", JOBS)
def test_a_sweep_lists_its_jobs_under_names_of_their_own(name: str) -> None:
    jobs = jobs_of(name)
    assert len(jobs) == JOBS[name]
    assert len({job.name for job in jobs}) == len(jobs)
    assert len(jobs_of(name, "seed=1,2,3")) == 3 * len(jobs_of(name, "seed=1"))


@pytest.mark.parametrize("name", JOBS)
def test_a_sweep_sets_nothing_but_the_keys_of_its_jobs(name: str) -> None:
    settings = load(CONF / "sweep" / f"{name}.yaml")
    sweeper = settings["hydra"].pop("sweeper")
    assert settings == {"hydra": {"mode": "MULTIRUN"}}
    assert sweeper["params"]
    assert set(sweeper) <= {"params", "jobs"}


@pytest.mark.parametrize("name", JOBS)
def test_every_job_passes_the_checks_and_gets_its_values(name: str) -> None:
    """Of a grid: some of its jobs, which have all of its values."""
    seen: set[str] = set()
    for job in jobs_of(name):
        if job.swept and seen.issuperset(job.words):
            continue
        seen |= set(job.words)
        settings = settings_of(job.words)
        for key, _, value in (word.partition("=") for word in job.words):
            is_group = (CONF / key).is_dir()
            assert is_group or settings[key] == OmegaConf.create(f"value: {value}").value, f"{job.name}: {key}"


@pytest.mark.parametrize("name", GIVEN)
def test_a_sweep_of_tuning_says_that_it_needs_a_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = train_here([f"sweep={name}"])
    assert outcome.code == 2
    assert outcome.err == "error: init_from has no default in this sweep: add init_from=VALUE\n"
    assert not list(tmp_path.iterdir())


# --- the book's ------------------------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "01_last_block": {"task.pooling": "last_position", "task.trained_blocks": 1, "init_from": "gpt2-small"},
    "02_first_token": {"task.pooling": "first", "data.pad_to": "longest_train", "optimizer.lr": 5e-5, "seed": 123},
    "03_head_alone": {"task.trained_blocks": 0},
    "04_last_two_blocks": {"task.trained_blocks": 2},
    "05_all": {"task.trained_blocks": "all"},
    "06_medium": {"init_from": "gpt2-medium"},
    "07_large": {"init_from": "gpt2-large"},
    "08_xl": {"init_from": "gpt2-xl", "task.trained_blocks": 1},
    "09_xl_all": {"init_from": "gpt2-xl", "task.trained_blocks": "all"},
    "10_random_weights": {"init_from": None, "model.init": "torch", "task.trained_blocks": "all"},
    "11_lora": {"lora.rank": 16, "lora.alpha": 256},
    "12_xl_lora": {"lora.rank": 16, "lora.alpha": 128, "init_from": "gpt2-xl"},
    "13_full_context": {"data.pad_to": "context"},
    "14_no_padding": {"data.pad_to": None, "data.batch_size": 1, "trainer.accumulate_grad_batches": 1},
    "15_no_padding_accumulated": {"data.batch_size": 1, "trainer.accumulate_grad_batches": 8, "task.pooling": "last"},
    "16_last_real_token": {"task.pooling": "last", "data.pad_to": "longest_train"},
    "17_no_causal_mask": {"task.causal": False},
    "18_ignore_index": {"task.pooling": "last_position", "task.causal": True},
    "19_mean_of_positions": {"task.pooling": "mean_position"},
}


def test_the_rows_of_chapter_6_are_the_books_and_only_the_18th_repeats_another() -> None:
    digests: dict[str, list[str]] = {}
    for job in jobs_of("book_ch06_table"):
        settings = settings_of(job.words)
        assert {key: settings[key] for key in ROWS[job.name]} == ROWS[job.name]
        digests.setdefault(Identity(settings, {}, job.swept).digest(), []).append(job.name)
    assert len(digests) == 18
    assert ["01_last_block", "18_ignore_index"] in digests.values()


def test_the_full_grid_of_the_book_is_the_command_in_its_file() -> None:
    text = (CONF / "sweep" / "book_hparams.yaml").read_text()
    [command] = re.findall(r"# The full grid.*\n((?:#   .*\n)+)", text)
    _, _, name, *words = command.replace("#", "").split()
    assert name == "sweep=book_hparams"
    *values, limit = words
    assert limit == "hydra.sweeper.max_jobs=12960"
    with pytest.raises(ValueError, match=r"has 12,960 jobs, more than hydra\.sweeper\.max_jobs=1000"):
        jobs_of("book_hparams", *values)
