"""Pretraining data: a text corpus, tokenised once into flat files, read as windows of the context length."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import Example, LMBatch, collate_padded
from llm_lightning.data.control_words import described
from llm_lightning.data.corpus.corpus import bytes_per_token, leaked_documents, open_corpus, token_files
from llm_lightning.data.corpus.sources import Source, open_source
from llm_lightning.data.corpus.split import Split
from llm_lightning.data.corpus.token_files import TokenFile
from llm_lightning.data.files.find import PathWords
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.mixture import Mixture
from llm_lightning.data.own_splits import own_splits
from llm_lightning.data.samples import Joined, Windows
from llm_lightning.terminal import counted, visible
from llm_lightning.tokenizers.base import END_OF_TEXT, Tokenizer

log = logging.getLogger(__name__)


class PretrainingDataModule(BaseDataModule):
    """Windows of a corpus for next-token prediction.

    Args:
        tokenizer: or a function that trains one on the training documents.
        context_length: tokens per window.
        name, path, hf_dataset and what belongs to them: the corpus (see `open_source`).
        mixture: several sources with the shares of the windows of an epoch that each gives (see `mixture_entries`).
        val_path, test_path: text of its own for validation, and for a test at the end.
        hf_val_split, hf_test_split: splits of `hf_dataset` instead.
        val_sets: name -> path of text that is measured as `val/<name>/...` too.
        split: `document`, `character` (the book's) or `auto` (see `build_token_files`).
        val_fraction: of the documents or characters; not used with validation text of its own.
        stride: distance between the starts of two training windows, in tokens; default: `context_length`.
        last_window: `keep` or `drop` the rest that does not fill a window.
        add_eot: put `<|endoftext|>` between documents.
        split_on_eot: make documents of a text in which `<|endoftext|>` stands between them.
    """

    samples_are = "windows"
    files: dict[str, list[TokenFile]]
    """stage -> the token files of its sources"""

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
        hf_val_split: str | None = None,
        hf_test_split: str | None = None,
        val_path: PathWords | None = None,
        test_path: PathWords | None = None,
        val_sets: Mapping[str, PathWords] | None = None,
        mixture: Sequence[Mapping[str, Any]] | None = None,
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
        self._report: dict[str, Any] = {}
        hub = {"hf_dataset": hf_dataset, "hf_config": hf_config, "hf_split": hf_split, "hf_revision": hf_revision}
        open_one = partial(
            open_source,
            text_field=text_field,
            split_on_eot=split_on_eot,
            options=self.file_options,
            policy=self.bad_records_policy,
            verify=self.verify,
        )
        own = own_splits(
            val_path=val_path, test_path=test_path, val_sets=val_sets,
            hub=HubDataset(hf_dataset, hf_config, hf_split, hf_revision) if hf_dataset is not None else None,
            hf_val_split=hf_val_split, hf_test_split=hf_test_split,
        )  # fmt: skip
        self._corpus = open_corpus(open_one, {"name": name, "path": path, **hub}, own, mixture=mixture)

    @property
    def train_file(self) -> TokenFile:
        """The training tokens of the only, or the first, source."""
        return self.files["train"][0]

    @property
    def val_file(self) -> TokenFile | None:
        """The validation tokens of the only, or the first, source."""
        return self.files["val"][0] if "val" in self.files else None

    def build(self) -> None:
        splits = self._corpus.splits(self._split, self._val_fraction)
        self.files = token_files(self._corpus, splits, self._make_tokenizer, add_eot=self._add_eot, verify=self.verify)
        self.tokenizer = self.train_file.tokenizer
        self.data_digest = self._corpus.digest()
        self._say_what_was_read(splits)
        windows = {stage: self._joined_windows(stage) for stage in self.files}
        self.train_samples = windows["train"]
        self.eval_samples = {stage: windows[stage] for stage in windows if stage.partition("/")[0] == "val"}
        self.eval_samples = dict(sorted(self.eval_samples.items(), key=lambda item: item[0] != "val"))
        self.test_samples = {"test": windows["test"]} if "test" in windows else {}
        self.measure_training(self.train_samples)

    def digest_of_source(self) -> str:
        return self._corpus.digest()

    def collator(self) -> Callable[[Sequence[Example]], LMBatch]:
        return partial(collate_padded, pad_id=0)

    def preview(self, n: int) -> str:
        first = range(min(n, len(self.train_samples)))  # type: ignore[arg-type]
        indices = first if self.mixture is None else self.mixture.chosen(0)[:n].tolist()
        lines = []
        for number, index in enumerate(indices):
            ids = self.train_samples[index].token_ids.tolist()
            source = "" if self.mixture is None else f" of {self.mixture.names[int(self.mixture.source_of(index))]}"
            lines += [f"--- window {number}{source}: {len(ids) - 1} targets", visible(self.tokenizer.decode(ids))]
        return "\n".join(lines)

    def describe(self) -> str:
        sizes = {stage: sum(file.n_tokens for file in files) for stage, files in self.files.items()}
        val = f", {sizes['val']:,} validation" if "val" in sizes else ""
        others = "".join(f", {size:,} {stage}" for stage, size in sizes.items() if stage not in ("train", "val"))
        return (
            f"{self._name()}: {sizes['train']:,} training{val}{others} tokens "
            f"({bytes_per_token(self.files['train']):.2f} bytes each), "
            f"{len(self.train_samples):,} windows of {self.context_length}"  # type: ignore[arg-type]
        )

    def report(self) -> dict[str, Any]:
        return self._report

    def bytes_per_token(self, stage: str) -> float:
        """Mean UTF-8 bytes per token in the text of a stage, which turn nats per token into bits per byte."""
        return bytes_per_token(self.files.get(stage, self.files["train"]))

    def _name(self) -> str:
        sources = self._corpus.train
        return f"a mixture of {', '.join(sources)}" if self._corpus.is_mixture else sources[""].describe()

    def _say_what_was_read(self, splits: Mapping[str, Split]) -> None:
        """Print and report what was left out, spelt out, or is in two splits."""
        surveys = [source.survey() for source in self._corpus.sources]
        self.quarantined = [bad for survey in surveys for bad in survey.quarantined]
        self.say_quarantined()
        if self.quarantined:
            self._report["quarantined"] = len(self.quarantined)
        if found := sum((survey.control_words for survey in surveys), Counter[str]()):
            remedy = "; data.split_on_eot=true makes documents of what is between them" if END_OF_TEXT in found else ""
            log.warning("The text spells out control tokens, which are read as text: %s%s", described(found), remedy)
        if self._corpus.own or self._corpus.is_mixture:
            self._report["leaks"] = leaked_documents(self._corpus, splits)
            for stage, leak in self._report["leaks"].items():
                log.info("Documents of %s also in training: %d of %d", stage, leak["documents"], leak["of"])

    def _joined_windows(self, stage: str) -> Dataset:
        """The windows of a stage; those for training may overlap, and of a mixture each epoch chooses."""
        sources = self._corpus.train if stage in ("train", "val") and stage not in self._corpus.own else None
        named = sources or {"": self._corpus.own[stage]}
        rows = zip(named.values(), self.files[stage], strict=True)
        parts = [self._windows(stage, source, file) for source, file in rows]
        if stage == "train" and self._corpus.is_mixture:
            self.mixture = Mixture(
                list(named), list(map(len, parts)), self._corpus.weights, self.seed, shuffle=self.shuffle
            )
            self._report["mixture"] = self.mixture.report()
            for line in self.mixture.lines(self.samples_are):
                log.info("Mixture: %s", line)
        return parts[0] if len(parts) == 1 else Joined(parts)

    def _windows(self, stage: str, source: Source, file: TokenFile) -> Windows:
        # Evaluation windows never overlap: every token counts once.
        stride = self.stride if stage == "train" else self.context_length
        windows = Windows(file.tokens, self.context_length, stride, last=self.last_window)
        short = file.n_tokens <= self.context_length if stage == "train" else len(windows) == 0
        if short:
            remedy = "use more text, or lower model.context_length"
            if stage == "val" and "val" not in self._corpus.own:
                remedy += ", or raise data.val_fraction"
            raise ValueError(
                f"the {stage} part of {source.describe()} has {counted(file.n_tokens, 'token')} and does "
                f"not fill one window of {self.context_length} and its last label; {remedy}"
            )
        return windows
