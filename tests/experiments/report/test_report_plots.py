"""What the axes of a report's plots show."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_sweeps import make_job

from llm_lightning.experiments.report import drawing
from llm_lightning.experiments.report.entries import MOST_POINTS, read_entries, thinned
from llm_lightning.experiments.report.plots import is_log_spaced, limit_y, pictures_of, smoothed_if_long, unit
from llm_lightning.experiments.report.study import studies_of
from llm_lightning.files import pictures


class Axes:
    limits: Any = None

    def set_ylim(self, low: float, high: float) -> None:
        self.limits = (low, high)


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([1e-4, 3e-4, 1e-3], True),
        ([1e-5, 1e-2], True),
        ([8, 16, 32, 64], True),
        ([0, 0.1, 1], False),
        ([16, 32, 48, 64], False),
        ([10, 20, 30, 40, 50, 60, 70, 80], False),
        ([1.0], False),
    ],
)
def test_values_that_are_spaced_by_ratios_get_a_logarithmic_axis(values: list[float], is_log: bool) -> None:
    assert is_log_spaced(values) is is_log


def test_what_diverged_is_cut_and_what_converged_is_not() -> None:
    axes = Axes()
    assert limit_y(axes, [[0.1 + 5 * 0.5 ** (step / 4) for step in range(200)]]) == ""
    assert axes.limits is None
    assert limit_y(axes, [[2.0 - step / 200 for step in range(200)], [1e9]]).startswith("Values above ")
    assert axes.limits[1] < 3
    assert limit_y(axes, [[], [math.nan]]) == ""


def test_the_page_has_the_colours_of_all_other_plots() -> None:
    style = (Path(drawing.__file__).parent / "base.html").read_text("utf-8").partition("@media")[0]
    shared = {"training": pictures.TRAINING, "validation": pictures.VALIDATION, "rate": pictures.LEARNING_RATE}
    for name, colour in (shared | {"norm": pictures.GRADIENT_NORM}).items():
        assert f"--{name}: {colour};" in style


def test_thinned_and_smoothed_curves_keep_their_place() -> None:
    line = [(step, 2.0 * step) for step in range(1000)]
    thin = thinned(line)
    assert len(thin) == MOST_POINTS
    assert thin[-1][0] == 999
    assert smoothed_if_long([step for step, _ in line], [value for _, value in line]) == pytest.approx(
        [value for _, value in line]
    )
    assert thinned(line[:MOST_POINTS]) == line[:MOST_POINTS]


@pytest.mark.slow
def test_every_varying_setting_has_a_plot_and_two_numbers_a_heat_map(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-2):
        for width in (32, 64):
            for name in ("bpe", "$x$ $y"):
                changes = {"optimizer__lr": rate, "model__n_embd": width, "tokenizer__name": name, "seed": 1}
                make_job(tmp_path / f"{rate}{width}{name}", "finished", rate + width, rows=8, **changes)
    [study] = studies_of(read_entries(tmp_path, ""))
    titles = [picture.title for picture in pictures_of(study)]
    assert titles == [
        "train/loss over training",
        "val/loss by optimizer.lr",
        "val/loss by model.n_embd",
        "val/loss by tokenizer.name",
        "val/loss by optimizer.lr and model.n_embd",
    ], "one validation is no curve"
    texts = pictures_of(study)[3].svg
    assert "$x$ $y" in texts, "no formula"
    assert "val/loss (nats per token)" in texts


def test_units() -> None:
    assert unit("val/loss") == "val/loss (nats per token)"
    assert unit("val/loss", "sequence") == "val/loss (nats)"
    assert unit("train/eval_bits_per_byte") == "train/eval_bits_per_byte (bits per byte)"
    assert unit("val/accuracy") == "val/accuracy"


def test_values_without_room_for_labels_have_round_ticks_and_classes_short_names(tmp_path: Path) -> None:
    for number, rate in enumerate(1.0234567e-4 * 1.45**power for power in range(14)):
        target = f"llm_lightning.optim.{'muon.MuonConfig' if number % 2 else 'adamw.AdamWConfig'}"
        make_job(tmp_path / str(number), "finished", 1.0 + rate, optimizer__lr=rate, optimizer___target_=target, seed=1)
    [study] = studies_of(read_entries(tmp_path, ""))
    drawn = {picture.title: picture.svg for picture in pictures_of(study)}
    texts = {title: re.findall(r"<text[^>]*>([^<]*)</text>", svg) for title, svg in drawn.items()}
    assert {"0.0002", "0.001", "0.005"} <= set(texts["val/loss by optimizer.lr"])
    assert {"AdamWConfig", "MuonConfig"} <= set(texts["val/loss by optimizer"])
    assert not any("math" in text for found in texts.values() for text in found)
