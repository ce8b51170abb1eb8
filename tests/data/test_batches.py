"""The one label shift, by hand."""

from __future__ import annotations

import numpy as np

from llm_lightning.data.batches import Sample, collate_lm
from llm_lightning.losses import IGNORE_INDEX


def test_labels_are_the_next_tokens_and_pads_have_none() -> None:
    batch = collate_lm([Sample(4, np.array([10, 11, 12, 13])), Sample(9, np.array([20, 21]))], pad_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 0, 0]]
    assert batch.labels.tolist() == [[11, 12, 13], [21, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.n_targets == 4 == (batch.labels != IGNORE_INDEX).sum()
    assert batch.sample_ids == (4, 9)


def test_no_samples_make_a_batch_without_targets() -> None:
    batch = collate_lm([], pad_id=7)
    assert batch.input_ids.tolist() == [[7]]
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.n_targets == 0
