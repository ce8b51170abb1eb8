"""What is shown of a batch, to the letter."""

from __future__ import annotations

import re

import numpy as np

from llm_lightning.data.batches import Example, LMBatch, collate_padded
from llm_lightning.data.inspection import PAD, as_html, as_text
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.tokenizers.byte import ByteTokenizer

BYTES = build_tokenizer("byte")
END = 256


def batch_of(*rows: tuple[list[int], list[int]]) -> LMBatch:
    """(ids, indices of what is learnt) of each row."""
    samples = []
    for index, (ids, learnt) in enumerate(rows):
        is_target = np.zeros(len(ids), bool)
        is_target[learnt] = True
        samples.append(Example(index, np.array(ids), is_target))
    return collate_padded(samples, pad_id=END, context_length=64)


BATCH = batch_of(([*b"ab<cd&", END], [4, 5, 6]), ([*b"a", END, *b"bc", END], [1, 3, 4]))
"""8 columns: the ids but the last, which is only a label, and padding."""


def test_text_marks_what_is_learnt() -> None:
    assert as_text(BYTES, BATCH) == (
        f"--- record 0: 7 tokens, loss on 3\nab<c>>d&<|endoftext|><<{PAD * 2}\n"
        f"--- record 1: 5 tokens, loss on 3\na>><|endoftext|><<b>>c<|endoftext|><<{PAD * 4}"
    )


def test_colours_instead_of_marks() -> None:
    green, grey, plain = "\x1b[32m", "\x1b[90m", "\x1b[0m"
    first = as_text(BYTES, BATCH, colour=True).split("\n")[1]
    assert first == f"ab<c{plain}{green}d&<|endoftext|>{plain}{grey}{PAD * 2}{plain}"
    without = re.sub(r"\x1b\[\d+m", "", as_text(BYTES, BATCH, colour=True))
    assert without == as_text(BYTES, BATCH).replace(">>", "").replace("<<", "")


def test_the_page_escapes_what_it_shows() -> None:
    page = as_html(BYTES, BATCH, "a <title> & more")
    assert page.count("a &lt;title&gt; &amp; more") == 2
    assert (
        '<h2>Record 0: 7 tokens, loss on 3</h2><pre><span class="prompt">ab&lt;c</span>'
        f'<span class="target">d&amp;&lt;|endoftext|&gt;</span><span class="pad">{PAD * 2}</span></pre>'
    ) in page
    assert '<span class="target">&lt;|endoftext|&gt;</span><span class="prompt">b</span>' in page
    assert "<|endoftext|>" not in page
    script = as_html(BYTES, batch_of(([*b"<script>", END], [7, 8])), "x")
    assert "&lt;script</span>" in script
    assert "<script" not in script


def test_a_row_without_padding_and_signs_that_cannot_be_shown() -> None:
    full = batch_of(([*b"\x1b[0m\n\tab", END], [8]))
    assert as_text(BYTES, full) == "--- record 0: 9 tokens, loss on 1\n\\x1b[0m\n\tab>><|endoftext|><<"
    assert 'class="pad">\u00b7<' not in as_html(BYTES, full, "x")


def test_a_spelt_out_end_of_text_is_text() -> None:
    """Both look alike, but the text is several tokens, of which some may be learnt."""
    ids = BYTES.encode("<|endoftext|>")
    assert as_text(BYTES, batch_of(([*ids, END], [13]))).endswith(
        f"14 tokens, loss on 1\n<|endoftext|>>><|endoftext|><<{PAD * 3}"
    )


class ModelTokenizer(ByteTokenizer):
    @property
    def controls(self) -> dict[str, int]:
        return {"<|end_of_text|>": END, "<|user|>": 1}


def test_control_tokens_are_shown_by_their_own_names() -> None:
    shown = as_text(ModelTokenizer(), batch_of(([1, 1, *b"ab", END], [3, 4])))
    assert shown.split("\n")[1].rstrip(PAD) == "<|user|><|user|>a>>b<|end_of_text|><<"
