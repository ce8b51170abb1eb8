"""The sources of a run by their roles: training text from one source or a mixture, and validation and test text of
its own; their common digest, their token files, and the documents that they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_lightning.data.corpus.sources import Source
from llm_lightning.data.corpus.split import Split
from llm_lightning.data.corpus.token_files import TokenFile, TrainTokenizer, build_token_files, trained_tokenizer
from llm_lightning.data.files.find import PathWords
from llm_lightning.data.hugging_face import HubDataset
from llm_lightning.data.mixture import mixture_entries
from llm_lightning.data.own_splits import OwnSplit, check_one_source, named_by
from llm_lightning.tokenizers.base import Tokenizer

OpenSource = Callable[..., Source]
"""`open_source` with the settings that all sources share."""


@dataclass(frozen=True)
class Corpus:
    """Sources by role."""

    train: dict[str, Source]
    """name -> source; the only one of a run without a mixture has the name `` """
    weights: tuple[float, ...]
    """Of the sources of a mixture."""
    own: dict[str, Source] = field(default_factory=dict)
    """`val`, `test`, `val/<name>` -> what is read for it alone"""

    @property
    def is_mixture(self) -> bool:
        return "" not in self.train

    @property
    def sources(self) -> list[Source]:
        return [*self.train.values(), *self.own.values()]

    def digest(self) -> str:
        """sha256 of all texts with their roles and shares; of a single source, its own."""
        if not self.is_mixture and not self.own:
            return self.train[""].digest()
        rows = zip(self.train.items(), self.weights, strict=True)
        total = sum(self.weights)
        roles = [["train", name, round(weight / total, 9), source.digest()] for (name, source), weight in rows]
        roles += [["own", stage, source.digest()] for stage, source in self.own.items()]
        return hashlib.sha256(json.dumps(roles).encode()).hexdigest()

    def splits(self, kind: str, val_fraction: float) -> dict[str, Split]:
        """The split of each training source; with validation text of its own it is whole."""
        fraction = 0.0 if "val" in self.own else val_fraction
        return {name: Split.of(source, kind, fraction) for name, source in self.train.items()}


def open_corpus(
    open_one: OpenSource,
    main: Mapping[str, Any],
    own: Mapping[str, OwnSplit],
    *,
    mixture: Any = None,
) -> Corpus:
    """Open what the settings name.

    Args:
        open_one: opens a source by `name`, `path` and `hf_*`.
        main: these settings of the main source.
        own: from `own_splits`.
        mixture: instead of the main source.

    Raises:
        ValueError, OSError: settings that exclude each other; or from `open_source`, naming the setting.
    """
    check_one_source(path=main.get("path"), hf_dataset=main.get("hf_dataset"), mixture=mixture)
    opened = {stage: _opened(one.setting, open_one, one.source) for stage, one in own.items()}
    if mixture is None:
        return Corpus({"": open_one(**main)}, (1.0,), opened)
    entries = mixture_entries(mixture)
    sources = {one.name: _opened(f"data.mixture ({one.name})", open_one, one.hub or one.path or "") for one in entries}
    return Corpus(sources, tuple(one.weight for one in entries), opened)


def _opened(setting: str, open_one: OpenSource, source: PathWords | HubDataset) -> Source:
    """A source; its error begins with the setting that names it."""
    with named_by(setting):
        if isinstance(source, HubDataset):
            name, config, split, revision = source
            opened = open_one(hf_dataset=name, hf_config=config, hf_split=split, hf_revision=revision)
        else:
            opened = open_one(path=source)
    opened.setting = setting
    return opened


def token_files(
    corpus: Corpus,
    splits: Mapping[str, Split],
    tokenizer: Tokenizer | TrainTokenizer,
    *,
    add_eot: bool = True,
    verify: bool = False,
) -> dict[str, list[TokenFile]]:
    """stage -> the files of its sources, in their order: `train`, `val` unless it is empty, and those of its own.

    Args:
        tokenizer: or a function that trains one on the training texts of all sources.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = trained_tokenizer(tokenizer, list(splits.values()))
    options: dict[str, Any] = {"add_eot": add_eot, "verify": verify}
    files: dict[str, list[TokenFile]] = {}
    for split in splits.values():
        built = build_token_files(split.source, tokenizer, split=split.kind, val_fraction=split.val_fraction, **options)
        for stage, file in built.items():
            files.setdefault(stage, []).append(file)
    for stage, source in corpus.own.items():
        files[stage] = [build_token_files(source, tokenizer, val_fraction=0, **options)["train"]]
    return files


def leaked_documents(corpus: Corpus, splits: Mapping[str, Split]) -> dict[str, dict[str, int]]:
    """stage -> how many of its documents are, character by character, in training too, and of how many.

    Empty documents are left out, and of a validation part the one that a split by character cuts through; with texts
    of its own that one counts as in training.
    """
    training, partly = (
        np.unique(np.concatenate([split.contents("train", partly=cut) for split in splits.values()]))
        for cut in (False, True)
    )
    stages = {"val": np.concatenate([split.contents("val") for split in splits.values()])}
    stages |= {stage: _contents(source) for stage, source in corpus.own.items()}
    return {
        stage: {
            "documents": int(np.isin(contents, partly if stage in corpus.own else training).sum()),
            "of": len(contents),
        }
        for stage, contents in stages.items()
        if len(contents)
    }


def _contents(source: Source) -> np.ndarray:
    survey = source.survey()
    return np.asarray(survey.contents)[np.asarray(survey.lengths) > 0]


def bytes_per_token(files: Sequence[TokenFile]) -> float:
    """Mean UTF-8 bytes per token."""
    return sum(file.n_bytes for file in files) / sum(file.n_tokens for file in files)
