"""The data that a checkpoint was trained on, read again from where it is now and compared with its digest.

The header names the settings, never the class: what is built depends on the task alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.classification import ClassificationDataModule
from llm_lightning.data.conversations import ConversationDataModule
from llm_lightning.data.corpus.token_files import TokenFile
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.preference import PreferenceDataModule
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.data.templates.choose import template_in
from llm_lightning.files.data_paths import data_paths
from llm_lightning.files.places import read_data_again
from llm_lightning.weights.load import LoadedModel

CONVERSATIONS: dict[str, Any] = {"sft": InstructionDataModule, "dpo": PreferenceDataModule}
SPLIT_SETTINGS = ("split", "val_fraction", "add_eot")

Data = TypeVar("Data")


def settings_of(loaded: LoadedModel) -> dict[str, Any]:
    """The settings `data.*` of the run that trained a model; empty where the checkpoint does not hold them."""
    return dict(loaded.header.get("config", {}).get("data") or {})


def conversations_of(
    loaded: LoadedModel, *, instead: str, texts_only: bool = False, split: str | None = None
) -> ConversationDataModule[Any]:
    """Rebuild the data of a model of task=sft or task=dpo.

    Args:
        texts_only: read and split the records without tokenising them.
        split: the split that is wanted, `train`, `val`, `val/NAME` or `test`; refused at once if there is none.
        instead: what to use where that is impossible, for messages.

    Raises:
        ValueError: if the checkpoint names no such data, or the data has changed since.
    """
    task = loaded.header.get("task")
    if task not in CONVERSATIONS and "template" in settings_of(loaded):
        raise ValueError(f"only the data of task=sft and task=dpo is read again, not that of task={task}; {instead}")
    if task not in CONVERSATIONS or "template" not in settings_of(loaded):
        raise ValueError(f"this model was not trained on questions and answers (task=sft, task=dpo); {instead}")
    _refuse_unknown_set(loaded, split)
    data: ConversationDataModule[Any] = _module(loaded, CONVERSATIONS[task], instead, texts_only)
    return data


def labelled_texts_of(loaded: LoadedModel, split: str, *, instead: str) -> list[tuple[str, str]]:
    """The (text, label) pairs of a split of a classifier's data; see `conversations_of`."""
    if not settings_of(loaded):
        raise ValueError(f"this model does not say which texts it was trained on; {instead}")
    _refuse_unknown_set(loaded, split)
    data: ClassificationDataModule = _module(loaded, ClassificationDataModule, instead, texts_only=True)
    return data.split_of(split)


def tokens_of(loaded: LoadedModel, split: str, *, instead: str) -> list[TokenFile]:
    """The text of a split that a GPT was pretrained on, one file for each source; see `conversations_of`."""
    settings = settings_of(loaded)
    task = loaded.header.get("task")
    if task != "pretraining" and settings and not set(SPLIT_SETTINGS) <= settings.keys():
        raise ValueError(f"the data of task={task} cannot be read again from a checkpoint; {instead}")
    if split == "test" and not any(settings.get(key) for key in ("test_path", "hf_test_split")):
        raise ValueError(f"this pretraining data has no test split; use --split val, or {instead}")
    if not set(SPLIT_SETTINGS) <= settings.keys():
        raise ValueError(f"this model does not say which text it was pretrained on; {instead}")
    _refuse_unknown_set(loaded, split)
    data = _same(loaded, lambda found: _corpus(loaded, found), PretrainingDataModule.digest_of_source, instead)
    data.build()
    if split not in data.files:
        raise ValueError("the model was trained without validation data (data.val_fraction=0); use --split train")
    return data.files[split]


def _corpus(loaded: LoadedModel, settings: dict[str, Any]) -> PretrainingDataModule:
    """The text that settings name, not yet tokenised."""
    known = (PretrainingDataModule, BaseDataModule)
    names = {name for cls in known for name in inspect.signature(cls.__init__).parameters}
    options: dict[str, Any] = {"newlines": "keep", "batch_size": 1}
    options |= {key: settings[key] for key in settings.keys() & names}
    options |= {"context_length": loaded.longest_input, "eval_batches": 0}
    return PretrainingDataModule(tokenizer=loaded.tokenizer, **options)


def _refuse_unknown_set(loaded: LoadedModel, split: str | None) -> None:
    """Refuse `val/NAME` if the run had no validation set of that name."""
    named = settings_of(loaded).get("val_sets") or {}
    sets = [f"val/{name}" for name, path in named.items() if path is not None]
    if split is not None and "/" in split and split not in sets:
        raise ValueError(f"the model's data has no validation set {split}; there are {', '.join(['val', *sets])}")


def _module(loaded: LoadedModel, make: Callable[..., Any], instead: str, texts_only: bool) -> Any:
    """A data module with the settings of the run, read or built."""

    def build(settings: dict[str, Any]) -> Any:
        options = {key: value for key, value in settings.items() if key not in ("_target_", "preview")}
        options = {"newlines": "keep"} | options  # of a run from before there was this setting
        if "template" in options:
            options["columns"] = _unread_before(make) | dict(options.get("columns") or {})
            options |= (
                {"repeated_prompt": options.get("repeated_prompt", "keep")} if make is PreferenceDataModule else {}
            )
            options |= {"template": None, "template_date": None, "own_template": template_in(loaded.header)}
        data = make(tokenizer=loaded.tokenizer, context_length=loaded.longest_input, **options)
        data.read() if texts_only else data.build()
        return data

    return _same(loaded, build, lambda data: data.data_digest, instead)


def _unread_before(make: Callable[..., Any]) -> dict[str, None]:
    """Columns that runs did not read before they had a setting for them."""
    return dict.fromkeys(("history", "tools", *(["weight"] if make is InstructionDataModule else [])))


def _same(
    loaded: LoadedModel, build: Callable[[dict[str, Any]], Data], digest_of: Callable[[Data], str], instead: str
) -> Data:
    """What `build` makes of the settings, if it has the digest that the run wrote down."""
    data = read_data_again(loaded.header, loaded.path, build, digest_of)
    now, in_training = digest_of(data), loaded.header.get("lineage", {}).get("data")
    if in_training not in (None, now):
        settings = settings_of(loaded)
        paths = [
            path for value in data_paths(settings).values() for path in (value if isinstance(value, list) else [value])
        ]
        named = ", ".join(paths) or settings.get("hf_dataset") or settings.get("name")
        raise ValueError(
            f"{named} is not the data that the model was trained with "
            f"(sha256 {now[:12]}, in training {in_training[:12]}); {instead}"
        )
    return data
