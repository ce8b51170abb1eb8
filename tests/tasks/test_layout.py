"""The same samples in each update, however processes and micro-batches share them; limits count the same samples."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ragged import RaggedDataModule

from llm_lightning.data.order import epoch_order, limited, spread_sample
from llm_lightning.experiments.run import refuse_validation_inside_a_window
from llm_lightning.tasks.base import batches_per_epoch, planned_steps
from llm_lightning.tasks.layout import Layout, layout_before, layout_of, micro_batch, refuse_other_step, share

N_TRAIN, N_VAL, SEED = 103, 97, 5


def trainer_of(processes: int, rank: int = 0, **options: Any) -> Any:
    """What share() and a data module use of a Trainer."""
    defaults = {f"limit_{stage}_batches": 1.0 for stage in ("train", "val", "test")}
    defaults |= {"accumulate_grad_batches": 1, "val_check_interval": 1.0, "fast_dev_run": False, "max_epochs": 2}
    defaults |= {"max_steps": -1, "check_val_every_n_epoch": 1, "is_global_zero": rank == 0}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(global_rank=rank, world_size=processes, strategy=strategy, **{**defaults, **options})


def shared(
    processes: int, rank: int, trainer_options: dict[str, Any], before: Layout | None = None, **options: Any
) -> tuple[Any, RaggedDataModule]:
    data = RaggedDataModule(N_TRAIN, N_VAL, seed=SEED, eval_batches=2, **options)
    data.measure_training(data.train_samples)
    data.trainer = trainer_of(processes, rank, **trainer_options)
    share(data.trainer, data, before)
    return data.trainer, data


def read(loader: Any, limit: Any) -> list[list[int]]:
    """The samples of each batch that Lightning takes of a loader within a limit."""
    return [list(batch.sample_ids) for batch in islice(loader, limited(len(loader), limit))]


def updates(ranks: Sequence[tuple[Any, RaggedDataModule]]) -> list[list[int]]:
    """The samples of each update of an epoch, of all processes."""
    trainer, data = ranks[0]
    window = trainer.accumulate_grad_batches
    batches = [read(one.train_dataloader(), trainer.limit_train_batches) for _, one in ranks]
    assert {len(of_rank) for of_rank in batches} == {batches_per_epoch(trainer, data)}
    together = [[one for of_rank in batches for one in of_rank[k]] for k in range(len(batches[0]))]
    found = [[one for batch in together[k : k + window] for one in batch] for k in range(0, len(together), window)]
    assert planned_steps(trainer, data) == 2 * len(found)
    return found


def measured(ranks: Sequence[tuple[Any, RaggedDataModule]]) -> dict[str, list[int]]:
    """split -> the samples that are evaluated, of all processes."""
    found: dict[str, list[int]] = {}
    for trainer, data in ranks:
        for split, loader in zip(data.eval_samples, data.val_dataloader(), strict=True):
            found.setdefault(split, []).extend(chain(*read(loader, trainer.limit_val_batches)))
    return {split: sorted(ids) for split, ids in found.items()}


LAYOUTS = [(1, 24), (1, 5), (2, 24), (2, 4), (3, 3), (8, 16)]
"""(processes, data.batch_size)"""


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("limit", [1.0, 3, 0.5])
def test_a_global_batch_is_the_same_on_any_processes(drop_last: bool, limit: Any) -> None:
    order = epoch_order(N_TRAIN, seed=SEED, epoch=0, shuffle=True).tolist()
    steps = [order[first : first + 24] for first in range(0, N_TRAIN, 24)]  # 4 of 24, and one of 7
    steps = steps[:4] if drop_last else steps
    steps = {1.0: steps, 3: steps[:3], 0.5: steps[:2]}[limit]
    val = {1.0: list(range(N_VAL)), 3: spread_sample(N_VAL, 72).tolist(), 0.5: spread_sample(N_VAL, 48).tolist()}[limit]
    options = {"limit_train_batches": limit, "limit_val_batches": limit, "val_check_interval": 2}
    for processes, batch_size in LAYOUTS:
        ranks = [
            shared(processes, rank, options, batch_size=batch_size, global_batch_size=24, drop_last=drop_last)
            for rank in range(processes)
        ]
        trainer, data = ranks[0]
        assert layout_of(trainer, data).samples_per_step == 24
        assert data.batch_size <= batch_size
        assert updates(ranks) == steps
        found = measured(ranks)
        assert found["val"] == val
        assert len(found["train_eval"]) == {1.0: 48, 3: 48, 0.5: 24}[limit]  # within the limit, of 2 batches of 24
        assert trainer.val_check_interval == 2 * trainer.accumulate_grad_batches
        refuse_validation_inside_a_window(trainer, batches_per_epoch(trainer, data))
        sampled = {} if limit == 1.0 else {"val": {"measured": len(val), "of": N_VAL, "what": "samples"}}
        assert data.sampled(trainer) == sampled


def test_without_it_batches_are_as_before() -> None:
    """The trainer's settings are untouched, and train_eval has as many samples on two processes as on one."""
    options = {"limit_val_batches": 0.3, "val_check_interval": 0.5, "accumulate_grad_batches": 2}
    trainer, data = shared(1, 0, options, batch_size=8)
    assert (trainer.limit_val_batches, trainer.val_check_interval, trainer.accumulate_grad_batches) == (0.3, 0.5, 2)
    assert (data.counted_batch, data.batch_size, len(data.eval_samples["train_eval"])) == (None, 8, 16)  # type: ignore[arg-type]
    _, two = shared(2, 0, options, batch_size=4)
    assert two.eval_samples["train_eval"].indices == data.eval_samples["train_eval"].indices  # type: ignore[attr-defined]


@pytest.mark.parametrize(("processes", "batch_size", "accumulated"), [(1, 4, 4), (1, 16, 1), (2, 4, 2), (4, 2, 2)])
def test_a_continued_run_counts_batches_as_it_began(processes: int, batch_size: int, accumulated: int) -> None:
    """It began with (4 x 2 accumulated x 2 processes), so a batch of its settings has 8 samples, an update 16."""
    began, settings = Layout(4, 2, 2, 8), {"limit_train_batches": 10, "limit_val_batches": 3, "val_check_interval": 4}
    settings["accumulate_grad_batches"] = accumulated
    ranks = [shared(processes, rank, settings, began, batch_size=batch_size) for rank in range(processes)]
    order = epoch_order(N_TRAIN, seed=SEED, epoch=0, shuffle=True).tolist()
    assert updates(ranks) == [order[first : first + 16] for first in range(0, 80, 16)]
    assert measured(ranks) == {
        "val": spread_sample(N_VAL, 24).tolist(),
        "train_eval": measured(ranks)["train_eval"],
    }
    trainer, data = ranks[0]
    assert len(data.eval_samples["train_eval"]) == 16  # type: ignore[arg-type]
    assert trainer.val_check_interval * data.batch_size * processes == 32


def test_the_micro_batch_divides_the_share_of_a_process(caplog: pytest.LogCaptureFixture) -> None:
    found = {(total, n, most): micro_batch(total, n, most) for total, n, most in ((64, 2, 16), (24, 2, 16), (10, 1, 4))}
    assert found == {(64, 2, 16): 16, (24, 2, 16): 12, (10, 1, 4): 2}
    assert [micro_batch(7, 1, 4), micro_batch(8, 8, 4), micro_batch(6, 1, 100)] == [1, 1, 6]
    for total, remedy in ((10, "8 or 12"), (3, "4")):
        with pytest.raises(ValueError, match=f"global_batch_size={total} cannot be shared evenly by 4.*to {remedy},"):
            micro_batch(total, 4, 16)
    with pytest.raises(ValueError, match="global_batch_size=0 must be at least 1"):
        RaggedDataModule(batch_size=1, global_batch_size=0)
    with caplog.at_level(logging.INFO):
        shared(2, 0, {}, batch_size=16, global_batch_size=24)
    line = "data.batch_size=16 is 12 here: the largest micro-batch that divides the 12 samples of a process"
    assert caplog.messages == [line]


def test_a_limit_that_leaves_nothing_is_refused() -> None:
    options = {"limit_train_batches": 0.1}
    with pytest.raises(ValueError, match=r"limit_train_batches=0\.1 leaves none of 5 batches of 24 samples"):
        batches_per_epoch(*shared(2, 0, options, batch_size=4, global_batch_size=24))
    with pytest.raises(ValueError, match=r"103 training samples do not fill one batch of data\.global_batch_size=104"):
        batches_per_epoch(*shared(2, 0, {}, batch_size=4, global_batch_size=104, drop_last=True))


def test_the_layout_of_earlier_versions_follows_from_the_settings() -> None:
    settings = {"data": {"batch_size": 4}, "trainer": {"accumulate_grad_batches": 3}}
    assert layout_before({"config": settings}, 2) == Layout(4, 3, 2, 8)
    assert layout_before({"layout": Layout(2, 2, 2, 8)._asdict(), "config": settings}, 2) == Layout(2, 2, 2, 8)
    assert layout_before({}, 2) is None


@pytest.mark.parametrize(
    ("now", "remedy"),
    [
        (
            Layout(4, 1, 1, 4),
            "here 4 (4 x 1 accumulated x 1 process); set data.batch_size=8 or data.global_batch_size=8",
        ),
        (Layout(4, 4, 4, 16), "here 64 (4 x 4 accumulated x 4 processes); set data.global_batch_size=8"),
        (Layout(4, 1, 3, 12), "here 12 (4 x 1 accumulated x 3 processes); set another number of processes"),
    ],
)
def test_updates_of_another_size_are_refused(now: Layout, remedy: str) -> None:
    before = Layout(4, 1, 2, 8)
    refuse_other_step(before, Layout(2, 2, 2, 4))
    line = f"cannot resume: an update had 8 samples (4 x 1 accumulated x 2 processes), {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        refuse_other_step(before, now)
