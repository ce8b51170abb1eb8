"""Pretraining data: a text corpus, tokenised once into flat files, read as windows of the context length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from llm_lightning.data.base import BaseDataModule, evenly_spaced
from llm_lightning.data.batches import Example, LMBatch, collate_padded
from llm_lightning.data.control_words import described
from llm_lightning.data.corpus.sources import open_source
from llm_lightning.data.corpus.token_files import TokenFile, build_token_files
from llm_lightning.data.files.find import PathWords
from llm_lightning.data.samples import Windows
from llm_lightning.terminal import counted, visible
from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer

log = logging.getLogger(__name__)


class PretrainingDataModule(BaseDataModule):
    """Windows of a corpus for next-token prediction.

    Args:
        tokenizer: or a function that trains one on the training documents.
        context_length: tokens per window.
        name, path, hf_dataset and what belongs to them: the corpus (see `open_source`).
        split: `document`, `character` (the book's) or `auto` (see `build_token_files`).
        val_fraction: of the documents or characters.
        stride: distance between the starts of two training windows, in tokens; default: `context_length`.
        last_window: `keep` or `drop` the rest that does not fill a window.
        add_eot: put `<|endoftext|>` between documents.
        split_on_eot: make documents of a text in which `<|endoftext|>` stands between them.
    """

    samples_are = "windows"
    train_file: TokenFile
    val_file: TokenFile | None

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | Callable[[Iterable[str]], Tokenizer],
        context_length: int,
        name: str | None = None,
        path: PathWords | None = None,
        text_field: str = "text",
        hf_dataset: str | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_revision: str | None = None,
        split: str = "auto",
        val_fraction: float = 0.1,
        stride: int | None = None,
        last_window: str = "keep",
        add_eot: bool = True,
        split_on_eot: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self._make_tokenizer = tokenizer
        self.context_length, self.stride, self.last_window = (
            context_length,
            stride or context_length,
            last_window,
        )
        self._split, self._val_fraction, self._add_eot = split, val_fraction, add_eot
        self._source = open_source(
            name=name,
            path=path,
            text_field=text_field,
            hf_dataset=hf_dataset,
            hf_config=hf_config,
            hf_split=hf_split,
            hf_revision=hf_revision,
            split_on_eot=split_on_eot,
            options=self.file_options,
        )

    def build(self) -> None:
        files = build_token_files(
            self._source,
            self._make_tokenizer,
            split=self._split,
            val_fraction=self._val_fraction,
            add_eot=self._add_eot,
        )
        self.train_file, self.val_file = files["train"], files.get("val")
        self.tokenizer = self.train_file.tokenizer
        self.data_digest = self._source.digest()
        self._warn_of_control_words()
        train = self._windows("train", self.train_file, self.stride)
        self.train_samples = train
        self.eval_samples = {}
        if self.val_file is not None:
            # Evaluation windows never overlap: every token counts once.
            self.eval_samples["val"] = self._windows("val", self.val_file, self.context_length)
        if self.eval_batches > 0:
            self.eval_samples["train_eval"] = evenly_spaced(train, self.eval_batches * self.batch_size)

    def digest_of_source(self) -> str:
        return self._source.digest()

    def collator(self) -> Callable[[Sequence[Example]], LMBatch]:
        return partial(collate_padded, pad_id=0)

    def preview(self, n: int) -> str:
        lines = []
        for index in range(min(n, len(self.train_samples))):  # type: ignore[arg-type]
            ids = self.train_samples[index].token_ids
            lines += [f"--- window {index}: {len(ids) - 1} targets", visible(self.tokenizer.decode(ids.tolist()))]
        return "\n".join(lines)

    def describe(self) -> str:
        val = f", {self.val_file.n_tokens:,} validation" if self.val_file is not None else ""
        return (
            f"{self._source.describe()}: {self.train_file.n_tokens:,} training{val} tokens "
            f"({self.train_file.n_bytes / self.train_file.n_tokens:.2f} bytes each), "
            f"{len(self.train_samples):,} windows of {self.context_length}"  # type: ignore[arg-type]
        )

    def bytes_per_token(self, stage: str) -> float:
        """Mean UTF-8 bytes per token in the text of a stage, which turn nats per token into bits per byte."""
        file = self.val_file if stage == "val" and self.val_file is not None else self.train_file
        return file.n_bytes / file.n_tokens

    def _warn_of_control_words(self) -> None:
        if found := self._source.survey().control_words:
            remedy = "; data.split_on_eot=true makes documents of what is between them" if END_OF_TEXT in found else ""
            log.warning("The text spells out control tokens, which are read as text: %s%s", described(found), remedy)

    def _windows(self, stage: str, file: TokenFile, stride: int) -> Windows:
        windows = Windows(file.tokens, self.context_length, stride, last=self.last_window)
        short = file.n_tokens <= self.context_length if stage == "train" else len(windows) == 0
        if short:
            remedy = "use more text, or lower model.context_length"
            if stage == "val":
                remedy += ", or raise data.val_fraction"
            raise ValueError(
                f"the {stage} part of {self._source.describe()} has {counted(file.n_tokens, 'token')} and does "
                f"not fill one window of {self.context_length} and its last label; {remedy}"
            )
        return windows
