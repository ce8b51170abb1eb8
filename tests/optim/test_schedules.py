"""Schedules as tables: published rates, those of transformers, and what does not depend on the length of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llm_lightning.experiments.plot_lr import plot_lr
from llm_lightning.optim.schedules import (
    ConstantConfig,
    InverseSqrtConfig,
    LinearConfig,
    ScheduleConfig,
    WarmupCosineConfig,
    WSDConfig,
)

APPENDIX_D = WarmupCosineConfig(initial_lr=1e-5, min_lr=1e-5, warmup=0.2)
PEAK = 0.5


def rates(schedule: ScheduleConfig, total_steps: int, steps: int | None = None) -> list[float]:
    schedule.check(total_steps)
    return [schedule.lr_at(step, PEAK, total_steps) for step in range(steps or total_steps)]


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 1e-5),
        (1, 1e-5 + (1e-3 - 1e-5) / 27),
        (26, 9.6333e-4),  # published
        (27, 1e-3),  # the peak, published
        (81, 1e-5 + 0.5 * (1e-3 - 1e-5)),  # halfway down: cos(pi / 2) = 0
        (134, 1.0209e-5),  # the last, published
        (135, 1e-5),
        (999, 1e-5),
    ],
)
def test_appendix_d_schedule(step: int, lr: float) -> None:
    assert APPENDIX_D.lr_at(step, peak_lr=1e-3, total_steps=135) == pytest.approx(lr, rel=1e-4)


def test_warmup_as_fraction_steps_or_none() -> None:
    assert APPENDIX_D.warmup_steps(135) == 27
    assert WarmupCosineConfig(warmup=20).warmup_steps(135) == 20
    no_warmup = WarmupCosineConfig(warmup=0)
    assert no_warmup.lr_at(0, peak_lr=0.1, total_steps=10) == 0.1
    assert ConstantConfig().lr_at(7, peak_lr=0.1, total_steps=10) == 0.1


@pytest.mark.parametrize(
    ("schedule", "name", "options"),
    [
        (LinearConfig(0.0, warmup=10), "linear_schedule_with_warmup", {"num_training_steps": 100}),
        (LinearConfig(0.0, warmup=0), "linear_schedule_with_warmup", {"num_training_steps": 100}),
        (InverseSqrtConfig(0.0, warmup=10), "inverse_sqrt_schedule", {}),
        (WarmupCosineConfig(0.0, warmup=10, min_lr=0.0), "cosine_schedule_with_warmup", {"num_training_steps": 100}),
        (WSDConfig(0.0, warmup=10, decay=0.3, decay_shape="linear"), "wsd_schedule", {"num_decay_steps": 30}),
        (WSDConfig(0.0, warmup=10, decay=30, decay_shape="1-sqrt"), "wsd_schedule", {"num_decay_steps": 30}),
        (WSDConfig(0.0, warmup=0, decay=30, min_lr=0.05), "wsd_schedule", {"num_decay_steps": 30}),
    ],
    ids=str,
)
def test_schedules_are_those_of_transformers(schedule: Any, name: str, options: dict[str, Any]) -> None:
    import torch
    from transformers import optimization

    if isinstance(schedule, WSDConfig):
        shape = {"decay_type": schedule.decay_shape, "min_lr_ratio": schedule.min_lr / PEAK}
        options = options | shape | {"num_training_steps": 100}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = getattr(optimization, f"get_{name}")(optimizer, num_warmup_steps=int(schedule.warmup), **options)
    factors = [theirs.lr_lambdas[0](step) for step in range(101)]
    assert rates(schedule, 100, 101) == pytest.approx([PEAK * factor for factor in factors], rel=1e-12, abs=1e-15)


def test_wsd_by_hand() -> None:
    found = rates(WSDConfig(initial_lr=0.1, warmup=2, decay=4, min_lr=0.1), 10, 12)
    assert found == pytest.approx([0.1, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    steep = rates(WSDConfig(warmup=0, decay=4, decay_shape="1-sqrt"), 4)
    assert steep == pytest.approx([0.5, 0.25, 0.5 * (1 - math.sqrt(0.5)), 0.5 * (1 - math.sqrt(0.75))])
    assert rates(WSDConfig(warmup=0, decay=0), 3) == [0.5] * 3


def test_before_its_decay_wsd_does_not_depend_on_the_length_nor_inverse_sqrt_ever() -> None:
    short, long = rates(WSDConfig(warmup=5, decay=0.2), 50), rates(WSDConfig(warmup=5, decay=0.2), 500)
    assert short[:41] == long[:41]
    assert short[41] < long[41]
    assert rates(InverseSqrtConfig(warmup=5), 50) == rates(InverseSqrtConfig(warmup=5), 500)[:50]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WarmupCosineConfig(warmup=10).check(10), "10 warmup steps.*only 10"),
        (lambda: WarmupCosineConfig(warmup=1.5), "scheduler.warmup=1.5 must be a fraction below 1 or a whole number"),
        (lambda: WarmupCosineConfig(min_lr=-1), "scheduler.min_lr=-1"),
        (lambda: LinearConfig(min_lr=-1), "scheduler.min_lr=-1"),
        (lambda: WSDConfig(decay=1.5), "scheduler.decay=1.5 must be a fraction below 1 or a whole number"),
        (lambda: WSDConfig(decay_shape="cosine"), "decay_shape='cosine' must be linear or 1-sqrt"),
        (lambda: WSDConfig(warmup=6, decay=5).check(10), r"6 \+ 5 steps, but the run has only 10"),
        (lambda: InverseSqrtConfig(warmup=0).check(10), "warmup=0 is no step of 10"),
        (lambda: InverseSqrtConfig(warmup=0.01).check(10), "warmup=0.01 is no step of 10"),
    ],
)
def test_wrong_values_name_the_key(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_schedule_is_drawn_and_told(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lr.png"
    lines = plot_lr(WSDConfig(warmup=10, decay=0.2), 3e-3, 10_000, file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [line.split() for line in lines[1:-1]] == [
        ["step", "0", "1e-05"],
        ["step", "10", "0.003"],
        ["step", "2,500", "0.003"],
        ["step", "5,000", "0.003"],
        ["step", "7,500", "0.003"],
        ["step", "9,999", "1.5e-06"],
    ]
    assert [path.name for path in file.parent.iterdir()] == ["lr.png"]
