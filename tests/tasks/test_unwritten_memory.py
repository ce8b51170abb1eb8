"""Nothing reads memory that nobody wrote: with every fresh tensor full of nan, each task gives the same bits."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import SETTINGS, assert_same, fit_here, write_corpus
from torch import Tensor
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from llm_lightning import losses
from llm_lightning.inference.generation import generate
from llm_lightning.losses import IGNORE_INDEX, causal_lm_loss
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tasks import base
from llm_lightning.weights import checkpoint as checkpoints

# Under inference_mode PyTorch does not take the larger ones apart.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_linear_pointwise")
ATTENTION = "scaled_dot_product"
# 64 rows and more reach the kernels that read whole tiles, where a CPU has them.
TINY = [
    *(word for word in SETTINGS if not word.startswith(("trainer.precision", "trainer.max_steps", "callbacks."))),
    "trainer.precision=bf16-mixed",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=2",
    "data.eval_batches=2",
    "model.context_length=64",
    "callbacks.plots=null",
]
WRITTEN = ["callbacks.samples.max_new_tokens=9"]
ANSWERS = [*WRITTEN, "callbacks.responses.max_records=9", "callbacks.responses.max_new_tokens=9"]
RUNS = {
    "pretraining": ["data.batch_size=3", "model.dropout=0.1", *WRITTEN],
    "sft": ["task=sft", "model.context_length=320", "data.batch_size=2", *ANSWERS],
    "lora": [
        "task=lora", "model.context_length=320", "data.batch_size=2", "lora.qkv=split", "lora.dropout=0.1", *ANSWERS,
    ],
    "dpo": ["task=dpo", "model.context_length=400", "data.batch_size=2", "task.reference=copy", *WRITTEN],
    "classification": ["task=classification", "data.batch_size=8", "task.trained_blocks=0"],
}  # fmt: skip


class FiniteOperands(TorchDispatchMode):
    """Refuse products of matrices whose rows have nan or inf between them, or are not finite themselves.

    A kernel may read to the end of a row's stride and multiply what it finds there by zero. Only some processors
    have such kernels; this finds the operand on all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.poisoned = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS or ATTENTION in name:
            self.products += 1
            self.poisoned += torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory
            for operand in [value for value in args[:3] if isinstance(value, Tensor) and not value.is_mkldnn]:
                assert with_gaps(operand).isfinite().all(), f"{name}: {tuple(operand.shape)}, {operand.stride()}"
        return function(*args, **(kwargs or {}))


def with_gaps(tensor: Tensor) -> Tensor:
    """Everything that lies between the first element of a tensor and the end of its last row, padding included."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    reach = max((size * stride for size, stride in sizes), default=1)
    behind = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((min(reach, behind),), (1,), tensor.storage_offset())


@contextmanager
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[FiniteOperands]:
    """Fill all fresh memory with nan, and look at the operands of all products."""
    with monkeypatch.context() as patch, FiniteOperands() as seen:
        patch.setattr(base, "leave_fresh_memory_unfilled", lambda: None)
        patch.setattr(deterministic, "fill_uninitialized_memory", True)
        yield seen
        assert deterministic.fill_uninitialized_memory, "something switched the filling off"
        assert seen.poisoned == seen.products > 0, "some products ran without it"


@pytest.mark.slow
@pytest.mark.parametrize("task", RUNS)
def test_every_task_gives_the_same_bits_with_poisoned_memory(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt", 300)
    arguments = [*TINY, *RUNS[task], *([f"data.path={corpus}"] if task == "pretraining" else [])]
    outcome = fit_here([*arguments, f"hydra.run.dir={tmp_path / 'plain'}"])
    assert outcome.code == 0, outcome.err
    with poisoned_memory(monkeypatch):
        outcome = fit_here([*arguments, f"hydra.run.dir={tmp_path / 'poisoned'}"])
    assert outcome.code == 0, outcome.err
    plain, poisoned = (tmp_path / name / "checkpoints" / "last.ckpt" for name in ("plain", "poisoned"))
    for part in ("state_dict", "optimizer_states"):
        assert_same(checkpoints.load(plain)[part], checkpoints.load(poisoned)[part], part)
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "poisoned")


def metrics_of(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock or the allocator decides."""
    decided = ("_per_second", "peak_memory_gib", "mfu")
    with (run / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if not key.endswith(decided)} for row in csv.DictReader(file)]


def test_the_head_gives_the_same_bits_with_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary in (80, 100, 144, 257, 258):  # none is a multiple of what a row is padded to
        hidden = torch.randn(4, 50, 24, generator=generator).bfloat16().requires_grad_()
        weight = torch.randn(vocabulary, 24, generator=generator).bfloat16().requires_grad_()
        labels = torch.randint(0, vocabulary, (4, 50), generator=generator)
        labels[0, :9] = IGNORE_INDEX
        for chunk in (1024, 70):
            monkeypatch.setattr(losses, "CHUNK_POSITIONS", chunk)
            plain = loss_and_gradients(hidden, weight, labels)
            torch.use_deterministic_algorithms(True)
            try:
                with poisoned_memory(monkeypatch):
                    poisoned = loss_and_gradients(hidden, weight, labels)
            finally:
                torch.use_deterministic_algorithms(False)
            assert_same(plain, poisoned, f"vocabulary {vocabulary}, {chunk} positions at once")


def loss_and_gradients(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    loss = causal_lm_loss(hidden, weight, labels)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def test_generation_gives_the_same_ids_with_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, context_length=160, n_layer=2, n_head=2, n_embd=24)).bfloat16().eval()
    prompts = [list(range(length)) for length in (3, 100, 70)]
    # Of 3 rows that end apart, the cache is cut to the running ones; from 32 steps on, weights are packed.
    for options in ({"max_new_tokens": 6}, {"max_new_tokens": 40, "temperature": 1.0, "top_k": 50, "seed": 1}):
        plain = generate(model, prompts, **options, stop_ids=[7])
        torch.use_deterministic_algorithms(True)
        try:
            with poisoned_memory(monkeypatch):
                poisoned = generate(model, prompts, **options, stop_ids=[7])
        finally:
            torch.use_deterministic_algorithms(False)
        assert plain == poisoned
