"""Answers to the questions of records, in batches of prompts of similar length."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm_lightning.data.files.find import PathWords
from llm_lightning.data.files.options import AS_THEY_ARE, FileOptions
from llm_lightning.data.of_checkpoint import settings_of
from llm_lightning.data.records.like_training import Columns, read_like_training
from llm_lightning.data.templates.base import Template
from llm_lightning.data.templates.conversation import Conversation
from llm_lightning.files.atomic import naming, write_atomically
from llm_lightning.inference.defaults import ANSWER_TEMPERATURE, ANSWER_TOKENS, RECORDS_AT_ONCE
from llm_lightning.inference.generation import generate
from llm_lightning.inference.template import template_of
from llm_lightning.models.gpt import GPT
from llm_lightning.terminal import inline
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights.load import LoadedModel

OnResponse = Callable[[int, str], None]
"""Called with (index, response) as each response is known."""

log = logging.getLogger(__name__)


def respond(
    loaded: LoadedModel,
    records: str | Path | Sequence[Conversation],
    *,
    template: str | Template | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int = RECORDS_AT_ONCE,
    temperature: float = ANSWER_TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    progress_file: Path | None = None,
    title: str | None = None,
) -> list[str]:
    """Answer the last question of every record, with the defaults of `llm-lightning respond`.

    Args:
        loaded: what `load_model` returns.
        records: files of records, or what `read_records` or `ConversationDataModule.conversations_of` returns.
        template: see `template.template_of`.
        max_new_tokens: per answer; an answer also ends at the end of text and at the model's context length.
        batch_size: records at once.
        temperature, top_k, top_p, seed: see `generation.Sampling`; default: greedy.
        progress_file: keeps each answer as it is known; an interrupted call with the same file continues from it.
        title: of a progress bar on a terminal; default: no bar.

    Returns:
        the answers, trimmed, in the order of the records.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: naming the record, if it is malformed or its prompt leaves no room for an answer.
    """
    conversations = read_records(records, loaded) if isinstance(records, (str, Path)) else records
    chosen = template_of(loaded, template)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    key = [loaded.header.get("digest"), chosen.digest_values(), max_new_tokens, sampling, str(loaded.gpt.dtype)]
    keys = [_key(key, chosen.prompt_ids(loaded.tokenizer, one)) for one in conversations]
    known = {} if progress_file is None else _read_progress(progress_file)
    missing = [index for index, one in enumerate(keys) if one not in known]
    if len(missing) < len(keys):
        log.warning("%d of %d answers are in %s already", len(keys) - len(missing), len(keys), progress_file)

    def keep(index: int, response: str) -> None:
        known[keys[missing[index]]] = response
        if progress_file is not None:
            with naming(progress_file), progress_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([keys[missing[index]], response]) + "\n")
        bar.update()

    with tqdm(total=len(missing), desc=inline(title or ""), disable=True if title is None else None) as bar:
        answer(
            loaded.gpt,
            loaded.tokenizer,
            chosen,
            [conversations[index] for index in missing],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_response=keep,
        )
    return [known[one] for one in keys]


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int = RECORDS_AT_ONCE,
    temperature: float = ANSWER_TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    on_response: OnResponse | None = None,
) -> list[str]:
    """Answer the last question of every conversation; see `respond`.

    The longest prompts come first, so that too little memory shows at once.
    """
    prompts = [template.prompt_ids(tokenizer, one) for one in conversations]
    for prompt, one in zip(prompts, conversations, strict=True):
        if len(prompt) >= model.config.context_length:
            raise ValueError(
                f"{one.place or 'a record'}: the prompt of {len(prompt)} tokens leaves no room for an answer within "
                f"context_length={model.config.context_length}; shorten it or use a model with a longer context"
            )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    never = tokenizer.ids_without_token(model.config.vocab_size)
    responses: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        new_ids = generate(
            model,
            [prompts[index] for index in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_ids=template.stop_ids(tokenizer),
            never=never,
        )
        for index, ids in zip(batch, new_ids, strict=True):
            responses[index] = tokenizer.decode(ids).strip()
            if on_response is not None:
                on_response(index, responses[index])
    return [responses[index] for index in range(len(conversations))]


def answered(conversation: Conversation, responses: Mapping[str, str]) -> dict[str, Any]:
    """The record with its responses, in the book's file shape: instruction, input, output, model_response."""
    last = conversation.turns[-1]
    shape = {"instruction": last.instruction, "input": last.input, "output": last.response}
    return {**shape, **conversation.record, **shape, **responses}


def read_records(
    path: PathWords, loaded: LoadedModel, *, options: FileOptions | None = None, columns: Columns | None = None
) -> list[Conversation]:
    """Read records as the training of a model reads its own; see `read_like_training`.

    Args:
        path: files, folders or globs; see `find_files`.
        options: how the files are read.
        columns: names of fields, where they differ from those of the training.
    """
    return read_like_training(path, options or AS_THEY_ARE, settings_of(loaded), columns)


def _key(settings: list[Any], prompt_ids: list[int]) -> str:
    return hashlib.sha256(json.dumps([settings, prompt_ids]).encode()).hexdigest()


def _read_progress(file: Path) -> dict[str, str]:
    """The answers that an interrupted call has kept; an unfinished last line is removed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file), file.open("a"):
        pass
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    write_atomically(file, whole + "\n" if whole else "")
    return dict(json.loads(line) for line in whole.splitlines())
