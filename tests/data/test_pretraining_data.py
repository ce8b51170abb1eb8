"""Windows by hand; the book's numbers; what is too short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_lightning.data.base import evenly_spaced
from llm_lightning.data.pretraining import PretrainingDataModule, Windows
from llm_lightning.tokenizers.build import build_tokenizer


@pytest.mark.parametrize(
    ("length", "stride", "last", "starts"),
    [
        (4, 4, "drop", [[0, 4], [4, 8]]),  # 10 tokens: (0..4) and (4..8); the target 9 is dropped
        (4, 4, "keep", [[0, 4], [4, 8], [8, 9]]),
        (3, 3, "keep", [[0, 3], [3, 6], [6, 9]]),  # nothing left over
        (4, 2, "drop", [[0, 4], [2, 6], [4, 8]]),
        (4, 2, "keep", [[0, 4], [2, 6], [4, 8], [6, 9]]),
        (9, 9, "drop", [[0, 9]]),
        (20, 20, "keep", [[0, 9]]),
        (20, 20, "drop", []),
        (4, 20, "keep", [[0, 4]]),  # what lies between the starts is left out
    ],
)
def test_windows(length: int, stride: int, last: str, starts: list[list[int]]) -> None:
    windows = Windows(np.arange(10), length, stride, last=last)
    rows = [windows[i].token_ids for i in range(len(windows))]
    assert [[row[0], row[-1]] for row in rows] == starts


def module(path: Path, **options: Any) -> PretrainingDataModule:
    data = PretrainingDataModule(
        **{"tokenizer": build_tokenizer("byte"), "context_length": 8, "batch_size": 2, "path": str(path), **options}
    )
    data.build()
    return data


def test_every_token_is_a_target_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij" * 10)
    data = module(tmp_path / "text.txt", split="character")
    assert sum(len(data.train_samples[i].token_ids) - 1 for i in range(len(data.train_samples))) == 90 - 1
    assert data.bytes_per_token("val") == 1.0
    assert "window 0: 8 targets\nabcdefghi" in data.preview(1)


def test_the_book(data_dir: Path) -> None:
    """Chapter 5: 4,612 training and 534 validation tokens, 18 and 2 windows, 9 batches of 2 an epoch."""
    data = module(
        data_dir / "the-verdict.txt",
        tokenizer=build_tokenizer("gpt2"),
        context_length=256,
        split="character",
        last_window="drop",
        drop_last=True,
        add_eot=False,
    )
    assert data.train_file.n_tokens == 4612
    assert data.val_file is not None
    assert data.val_file.n_tokens == 534
    assert (len(data.train_samples), len(data.eval_samples["val"])) == (18, 2)
    assert data.batches_per_epoch(1) == 9
    assert data.train_samples[0].token_ids[:4].tolist() == [40, 367, 2885, 1464]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("abc" * 3, {"val_fraction": 0.2}, r"train part .* 7 tokens.*window of 8.*lower model.context_length"),
        ("abc" * 30, {"val_fraction": 0.05, "last_window": "drop"}, r"val part .* 5 tokens.*raise data.val_fraction"),
        ("abc" * 30, {"last_window": "cut"}, r"data.last_window='cut' must be keep or drop"),
        ("abc" * 30, {"stride": -1}, r"data.stride=-1"),
        ("abc" * 30, {"batch_size": 0}, r"data.batch_size=0"),
    ],
)
def test_refused(tmp_path: Path, text: str, options: dict[str, Any], words: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        module(tmp_path / "text.txt", **{"split": "character", **options})


def test_evenly_spaced_is_fixed_and_spread() -> None:
    windows = Windows(np.arange(101), 1, 1)
    assert list(evenly_spaced(windows, 3).indices) == [0, 49, 99]
    assert len(evenly_spaced(windows, 1000)) == 100
