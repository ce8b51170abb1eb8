"""The one label shift, by hand."""

from __future__ import annotations

import numpy as np

from llm_lightning.data.batches import Example, collate_padded
from llm_lightning.losses import IGNORE_INDEX


def test_labels_are_the_next_tokens_and_pads_have_none() -> None:
    batch = collate_padded([Example(4, np.array([10, 11, 12, 13])), Example(9, np.array([20, 21]))], pad_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 0, 0]]
    assert batch.labels.tolist() == [[11, 12, 13], [21, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.n_targets == 4 == (batch.labels != IGNORE_INDEX).sum()
    assert batch.sample_ids == (4, 9)


def test_no_samples_make_a_batch_without_targets() -> None:
    batch = collate_padded([], pad_id=7)
    assert batch.input_ids.tolist() == [[7]]
    assert batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.n_targets == 0


def test_a_token_that_is_no_target_is_no_label_and_widths_are_rounded_within_the_context() -> None:
    examples = [Example(0, np.arange(10, 21), np.arange(11) > 8), Example(1, np.array([1, 2]), np.array([True, True]))]
    batch = collate_padded(examples, pad_id=0, context_length=12)
    assert batch.input_ids.shape == (2, 12)
    assert batch.input_ids[0].tolist() == [*range(10, 20), 0, 0]
    assert batch.labels[0].tolist() == [IGNORE_INDEX] * 8 + [19, 20] + [IGNORE_INDEX] * 2
    assert batch.labels[1].tolist() == [2] + [IGNORE_INDEX] * 11
    assert batch.n_targets == 3, "the first token of a sequence is no label"
    assert collate_padded(examples, pad_id=0, context_length=64).input_ids.shape == (2, 16)
    assert collate_padded(examples, pad_id=0).input_ids.shape == (2, 10)
