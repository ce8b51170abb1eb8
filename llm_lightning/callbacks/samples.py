"""Samples of text during training: fixed prompts, continued after each validation."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch

from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.data.templates.base import Template
from llm_lightning.files.atomic import naming, write_atomically
from llm_lightning.inference.generation import generate
from llm_lightning.models.sharding import whole
from llm_lightning.terminal import one_line, visible

TERMINAL_WIDTH = 100


class Samples(L.Callback):
    """Continue `prompts` after a validation: one line on the terminal, all in `samples.md` and TensorBoard.

    The same settings and weights give the same text; the global random generators are not touched. The metric
    `samples/repetition` is the share of token 4-grams that occur earlier in the same continuation.

    Args:
        prompts: beginnings of text; None: prompts of the validation data.
        n_prompts: number of prompts of the validation data.
        max_new_tokens: longest continuation, in tokens.
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; null: from all.
        seed: of the sampling, the same at every validation, so that only the model changes the text.
        every_n_epochs: write after the validations of every n-th epoch.
        beside_start: show the continuations of the model before its first step, too.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None,
        *,
        n_prompts: int = 3,
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 1234,
        every_n_epochs: int = 1,
        beside_start: bool = False,
    ) -> None:
        if (prompts is not None and not prompts) or n_prompts < 1:
            raise ValueError("callbacks.samples.prompts is empty; give at least one, or set callbacks.samples=null")
        if every_n_epochs < 1:
            raise ValueError(f"callbacks.samples.every_n_epochs={every_n_epochs} must be at least 1")
        self.prompts = None if prompts is None else list(prompts)
        self.n_prompts, self.every_n_epochs = n_prompts, every_n_epochs
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "seed": seed,
        }
        self.beside_start = beside_start
        self._prompt_ids: list[list[int]] = []
        self._at_start: list[str] = []
        self._template: Template | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._template = getattr(trainer.datamodule, "template", None)  # type: ignore[attr-defined]
        if self.prompts is None:
            self._prompt_ids = _prompts_of(trainer, self.n_prompts)
            return
        context_length = pl_module.model.config.context_length
        self._prompt_ids = [pl_module.tokenizer.encode_document(prompt).tolist() for prompt in self.prompts]
        for number, ids in enumerate(self._prompt_ids):
            if not 0 < len(ids) < context_length:
                raise ValueError(
                    f"callbacks.samples.prompts[{number}] has {len(ids)} tokens, but a sample needs between 1 and "
                    f"model.context_length - 1 = {context_length - 1}; change the prompt or raise the context length"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Not in on_fit_start: the step of the checkpoint is restored in between.
        if trainer.is_global_zero:
            drop_sections_from(self.path(trainer), trainer.global_step)
        if self.beside_start and trainer.global_step == 0:
            self._at_start = [text for _, text in self.write(pl_module)[0]]

    def state_dict(self) -> dict[str, Any]:
        return {"at_start": self._at_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at_start = state_dict["at_start"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        pairs, repetition = self.write(pl_module)  # in every process: sharded weights need them all
        if not trainer.is_global_zero:
            return
        step = trainer.global_step - 1
        title = f"step {step}, val/loss {float(trainer.callback_metrics.get('val/loss', float('nan'))):.4f}"
        # Of an instruction, print only the answer: the line has no room for both.
        first = "".join(pairs[0]) if self.prompts is not None else pairs[0][1]
        pl_module.print(_one_line(f"{title} | {first}"))
        body = "\n\n".join(_indented(text) for text in self._texts(pairs))
        pl_module.log_row({"samples/repetition": repetition}, step)
        append_section(self.path(trainer), f"## {title}\n\n{body}\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoard):
                logger.log_text("samples", body, step)

    def _texts(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        if not self.beside_start:
            return ["".join(pair) for pair in pairs]
        return [
            f"{prompt.rstrip()}\n\nat the start: {before}\n\nnow: {after}"
            for (prompt, after), before in zip(pairs, self._at_start, strict=True)
        ]

    def write(self, pl_module: Any) -> tuple[list[tuple[str, str]], float]:
        """Each prompt and its continuation, and the repetition rate of the continuations."""
        model, tokenizer = pl_module.model, pl_module.tokenizer
        room = model.config.context_length - max(map(len, self._prompt_ids))
        options = {**self.options, "max_new_tokens": min(self.options["max_new_tokens"], room)}
        stop_ids = tokenizer.stop_ids if self._template is None else self._template.stop_ids(tokenizer)
        never = tokenizer.ids_without_token(model.config.vocab_size)
        # A compiled model would be compiled once more for every length.
        is_compiling = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if is_compiling else nullcontext()
        # Frozen weights may be in bfloat16 under trained ones in float32, which go together under autocast only.
        is_mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
        with eager, pl_module.trainer.precision_plugin.forward_context() if is_mixed else nullcontext():
            try:
                continuations = generate(model, self._prompt_ids, stop_ids=stop_ids, never=never, **options)
            except RuntimeError as error:  # sampling from probabilities that are nan
                if all(bool(whole(parameter).isfinite().all()) for parameter in model.parameters()):
                    raise
                reason = "the weights are no longer finite, and no text can be sampled; lower optimizer.lr"
                raise ValueError(f"non-finite weights after {pl_module.global_step} updates: {reason}") from error
        pairs = zip(self._prompt_ids, continuations, strict=True)
        # Decoded together, because words may be joined by a space.
        whole = [(tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])) for prompt, new in pairs]
        texts = [(visible(prompt), visible(text[len(prompt) :])) for prompt, text in whole]
        return texts, repetition_rate(continuations)

    def path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "samples.md"


def repetition_rate(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """The share of n-grams that occur earlier in their sequence, over all sequences; 0 if none has n tokens.

    Seq-rep-n of Welleck et al. 2019, "Neural text generation with unlikelihood training", section 6.1.
    """
    grams = [[tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)] for ids in sequences]
    total = sum(map(len, grams))
    return 1 - sum(len(set(one)) for one in grams) / total if total else 0.0


def _prompts_of(trainer: L.Trainer, n: int) -> list[list[int]]:
    sample_prompts = getattr(trainer.datamodule, "sample_prompts", None)  # type: ignore[attr-defined]
    prompts = sample_prompts(n) if sample_prompts is not None else []
    if not prompts:
        raise ValueError(
            "callbacks.samples.prompts=null takes prompts of the validation data, and there are none that leave room "
            "for an answer; give some, or set callbacks.samples=null"
        )
    return prompts


def append_section(path: Path, section: str) -> None:
    """Append `section` and wait until it is on the disk, because the next checkpoint covers it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(section)
        file.flush()
        os.fsync(file.fileno())


def drop_sections_from(path: Path, step: int) -> None:
    """Drop the sections of `step` and later, which a killed process wrote, and an unfinished one."""
    if not path.is_file():
        return
    lines = re.findall(r"[^\n]*\n", path.read_bytes().decode(errors="replace"))
    kept: list[str] = []
    for line in lines:
        heading = re.fullmatch(r"## step (\d+), .*\n", line)
        if int(heading[1]) >= step if heading else line != "\n" and not line.startswith("    "):
            break
        kept.append(line)
    content = "".join(kept).encode()
    if content != path.read_bytes():
        write_atomically(path, content)


def _indented(text: str) -> str:
    """A Markdown code block, so that no line of the text can be taken for a heading."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _one_line(text: str) -> str:
    line = one_line(text, TERMINAL_WIDTH)
    encoding = sys.stdout.encoding or "ascii"  # a terminal that cannot show a character must not end the run
    return line.encode(encoding, errors="replace").decode(encoding)
