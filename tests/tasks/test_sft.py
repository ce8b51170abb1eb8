"""Instruction tuning against transformers, TRL and the book's code; packed batches against padded ones.

Everything is drawn at random, biases and norms included, so that no swap can hide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_kinds import of_kind
from models.test_book_parity import book_model, ours_from
from record_gradients import AnswersDataModule, tiny_sft_module, train
from test_base import assert_close, record
from torch import Tensor, nn

from llm_lightning.data.batches import Example, LMBatch, collate_packed, collate_padded, shared_prefix
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.packing import may_share_prefix
from llm_lightning.losses import IGNORE_INDEX
from llm_lightning.models.attention import Context
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import WarmupCosineConfig
from llm_lightning.tasks.sft import SFTModule
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights.families.gpt2 import config_to_hf, to_hf
from llm_lightning.weights.hf_export import export_hf

GPT2 = build_tokenizer("gpt2")
CONFIG = GPTConfig(vocab_size=50257, context_length=128, n_layer=2, n_head=2, n_embd=32)
SMALL = GPTConfig(vocab_size=61, context_length=25, n_layer=2, n_head=2, n_embd=16)
"""A context that is no multiple of 8, as which batches are rounded up."""
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n"
)
RECORDS = [
    ("Name a colour.", "", "Blue"),
    ("Spell the number.", "12", "twelve, which is a dozen"),
    ("Repeat the line\nword by word.", "one\ntwo", "one\ntwo"),
    ("Say nothing but \u00e9\u00e8.", "", "\u00e9\u00e8"),
    ("What is the opposite of the word?", "wet (of weather)", "The opposite of wet is dry."),
    ("Why?", "", "Because a longer answer than the others makes this batch ragged, and padding shows what it does."),
    ("Add the numbers and explain it.", "17 and 4", "17 + 4 = 21: ten and seven and four."),
    ("Write code.", "", "    return x  # indented"),
    ("Only for testing.", "", "no"),
    ("Only for validation.", "", "no"),
]
"""The last two are the other splits'."""
FP64 = {"dtype": "float64", "precision": "64-true"}


@torch.no_grad()
def randomize(model: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=std, generator=generator)
    return model


def task(model: GPT, lora: LoRAConfig | None = None, seed: int = 0) -> SFTModule:
    module = SFTModule(
        model=model, tokenizer=GPT2, optimizer=AdamWConfig(lr=1.0), scheduler=WarmupCosineConfig(), lora=lora
    )
    randomize(module, seed)
    return module


def records_data(folder: Path, **options: Any) -> InstructionDataModule:
    """The first eight records are for training, in their order."""
    path = folder / "records.json"
    path.write_text(json.dumps([dict(zip(("instruction", "input", "output"), row, strict=True)) for row in RECORDS]))
    settings = {"split": "order", "val_fraction": 0.1, "test_fraction": 0.1, "shuffle": False, "bucket": False}
    settings |= {"batch_size": 8, "eval_batches": 0, "packing": False, "max_dropped": 1.0, **options}
    data = InstructionDataModule(tokenizer=GPT2, context_length=CONFIG.context_length, path=str(path), **settings)
    data.build()
    return data


def training_batch(folder: Path, **options: Any) -> LMBatch:
    batch = next(iter(records_data(folder, **options).train_dataloader()))
    assert batch.sample_ids == tuple(range(8))
    return batch


def prompt_and_answer(row: tuple[str, str, str]) -> tuple[str, str]:
    """The alpaca template by hand."""
    instruction, context, output = row
    given = f"\n\n### Input:\n{context}" if context else ""
    return f"{PREAMBLE}{instruction}{given}\n\n### Response:\n", output


def mean_loss(module: SFTModule, batch: LMBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over targets and its gradients."""
    module.zero_grad()
    output = module.step_output(batch)
    loss = output.loss_sum / output.n_items
    loss.backward()
    return loss.detach(), gradients(module.model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_their_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_hf({**found, "lm_head.weight": found["token_embedding.weight"]}, CONFIG)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Every difference as a share of the largest gradient of its tensor."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max()
        assert largest > 0, name
        assert (ours[name] - gradient).abs().max() <= tolerance * largest, name


# --- transformers and TRL ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_loss_and_gradients_are_those_of_transformers(tmp_path: Path, packing: bool) -> None:
    """From text on: their labels are the unshifted ids, the prompt masked by its own length."""
    transformers = pytest.importorskip("transformers", reason="needs the dev extra: transformers")
    module = task(GPT(CONFIG))
    batch = training_batch(tmp_path, packing=packing)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config_to_hf(CONFIG, GPT2.eot_id)))
    theirs.load_state_dict(to_hf(module.model.state_dict(), CONFIG), strict=False)  # the tied head is left out

    rows, labels = [], []
    for prompt, answer in map(prompt_and_answer, RECORDS[:8]):
        ids = [*GPT2.encode(prompt + answer), 50256]
        rows.append(torch.tensor(ids))
        labels.append(rows[-1].clone())
        labels[-1][: len(GPT2.encode(prompt))] = -100
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=50256)
    expected = theirs(input_ids=padded, labels=nn.utils.rnn.pad_sequence(labels, True, -100)).loss
    expected.backward()

    assert batch.n_targets == sum(len(GPT2.encode(answer)) + 1 for _, _, answer in RECORDS[:8])
    loss, found = mean_loss(module, batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
    assert_same_gradients(in_their_names(found), gradients(theirs), 1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_loss_and_gradients_are_those_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    """TRL ends every completion itself, as ours ends every answer: it gets none with an end, so that there is one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    module = task(GPT(CONFIG))
    export_hf(module.model, CONFIG, GPT2, tmp_path / "exported")
    records = [dict(zip(("prompt", "completion"), prompt_and_answer(row), strict=True)) for row in RECORDS[:8]]
    trainer = trl.SFTTrainer(
        model=transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "exported", dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "exported"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            completion_only_loss=True,
            per_device_train_batch_size=8,
            max_length=CONFIG.context_length,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(records),
    )
    given = next(iter(trainer.get_train_dataloader()))
    ends = ((given["input_ids"] == 50256) & (given["labels"] == 50256)).sum(1)
    assert ends.tolist() == [1] * 8, "one end of text is learnt of each record"
    expected = trainer.compute_loss(trainer.model, given)
    expected.backward()

    batch = training_batch(tmp_path, packing=packing)
    assert batch.n_targets == (given["labels"] != -100).sum()
    loss, found = mean_loss(module, batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
    assert_same_gradients(in_their_names(found), gradients(trainer.model), 1e-5)


# --- the book ---------------------------------------------------------------------------------------------------------


def book_batch(ch07: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What the book's loader gives of the training records."""
    entries = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in RECORDS[:8]]
    encoded = ch07.InstructionDataset(entries, GPT2)
    return ch07.custom_collate_fn([encoded[index] for index in range(8)], **options)


def assert_same_batch(batch: LMBatch, inputs: Tensor, targets: Tensor) -> None:
    """Ours may have more columns, of padding."""
    width = inputs.size(1)
    assert torch.equal(batch.input_ids[:, :width], inputs)
    assert torch.equal(batch.labels[:, :width], targets)
    assert (batch.input_ids[:, width:] == 50256).all()
    assert (batch.labels[:, width:] == IGNORE_INDEX).all()


@pytest.mark.peer
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_unmasked_batches_loss_and_gradients_are_those_of_the_book(tmp_path: Path, packing: bool) -> None:
    ch07 = pytest.importorskip("llms_from_scratch.ch07", reason="needs the bench extra: llms-from-scratch")
    inputs, targets = book_batch(ch07)
    assert_same_batch(training_batch(tmp_path, loss_on="all"), inputs, targets)

    config = GPTConfig(**{**CONFIG.__dict__, "tied_head": False})
    book = randomize(book_model(config), seed=1)
    module = task(GPT(config))
    module.model.load_state_dict(ours_from(book, config).state_dict())
    expected = F.cross_entropy(book(inputs).flatten(0, 1), targets.flatten())  # the book's calc_loss_batch
    expected.backward()
    loss, found = mean_loss(module, training_batch(tmp_path, loss_on="all", packing=packing))
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-5)
    for parameter in book.parameters():
        parameter.data = parameter.grad  # so that the gradients get our names as weights do
    assert_same_gradients(found, ours_from(book, config).state_dict(), 1e-5)


@pytest.mark.peer
def test_loss_on_header_is_the_mask_of_exercise_7_2(tmp_path: Path) -> None:
    ch07 = pytest.importorskip("llms_from_scratch.ch07", reason="needs the bench extra: llms-from-scratch")
    inputs, targets = book_batch(ch07)
    for row, (instruction, context, _) in zip(targets, RECORDS[:8], strict=True):
        instr_len = len(GPT2.encode(ch07.format_input({"instruction": instruction, "input": context})))
        row[: instr_len - 1] = -100
    assert_same_batch(training_batch(tmp_path, loss_on="header"), inputs, targets)


@pytest.mark.peer
def test_cut_answer_is_the_books_allowed_max_length(tmp_path: Path) -> None:
    ch07 = pytest.importorskip("llms_from_scratch.ch07", reason="needs the bench extra: llms-from-scratch")
    inputs, targets = book_batch(ch07, allowed_max_length=47)
    lengths = (targets != -100).sum(1)
    assert lengths.min() < lengths.max() == 47, "some are cut, some are not"
    assert_same_batch(training_batch(tmp_path, loss_on="all", too_long="cut_answer", max_length=47), inputs, targets)


def test_the_books_collate_example_to_the_letter() -> None:
    rows = [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
    pad = 50256
    samples = [Example(index, np.array([*ids, pad]), np.ones(len(ids) + 1, bool)) for index, ids in enumerate(rows)]
    batch = collate_padded(samples, pad_id=pad, context_length=1024)
    assert batch.input_ids[:, :5].tolist() == [[0, 1, 2, 3, 4], [5, 6, pad, pad, pad], [7, 8, 9, pad, pad]]
    assert batch.labels[:, :5].tolist() == [
        [1, 2, 3, 4, pad],
        [6, pad, -100, -100, -100],
        [8, 9, pad, -100, -100],
    ]
    assert (batch.input_ids[:, 5:] == pad).all()
    assert (batch.labels[:, 5:] == -100).all()
    assert batch.n_targets == 10


# --- packed and padded ------------------------------------------------------------------------------------------------


def random_samples(
    lengths: Sequence[int], seed: int = 0, vocab_size: int = SMALL.vocab_size, preamble: int = 0
) -> list[Example]:
    """Tokens of which about half are learnt, here and there as in conversations of several turns; the last always.

    They begin with the same `preamble` tokens, of which none is learnt.
    """
    draw = np.random.default_rng(seed)
    common = draw.integers(0, vocab_size, preamble)
    samples = []
    for index, length in enumerate(lengths):
        is_target = draw.random(length) < 0.5
        is_target[:preamble], is_target[-1] = False, True
        ids = draw.integers(0, vocab_size, length)
        ids[:preamble] = common[:length]
        samples.append(Example(index, ids, is_target))
    return samples


FORMS = {
    "full": (SMALL, None),
    "checkpointing": (SMALL, None),
    "lora_fused": (SMALL, LoRAConfig(rank=3)),
    "lora_split": (SMALL, LoRAConfig(rank=3, qkv="split")),
    "llama": (of_kind(SMALL, "llama"), LoRAConfig(rank=3, qkv="split")),
    "qwen3": (of_kind(SMALL, "qwen3"), None),
    "lora_head": (
        GPTConfig(**{**SMALL.__dict__, "tied_head": False}),
        LoRAConfig(rank=3, targets=("qkv_proj", "lm_head")),
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("lengths", "preamble"), [((9, 2, 26, 5, 17, 26), 0), ((11,), 0), ((9, 7, 26, 8, 17, 26), 6)],
    ids=["ragged", "one", "preamble"],
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_packed_is_padded(
    form: str, lengths: Sequence[int], preamble: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Both also against the plain mean cross-entropy of the whole model."""
    config, lora = FORMS[form]
    module = task(GPT(config, activation_checkpointing=form == "checkpointing").to(dtype), lora).train()
    samples = random_samples(lengths, preamble=preamble)
    padded = collate_padded(samples, pad_id=0, context_length=SMALL.context_length)
    packed = collate_packed(samples, pad_id=0)
    n_inputs = sum(lengths) - len(lengths)
    n_shared = shared_prefix(samples)
    assert n_shared >= preamble - 1 if preamble else n_shared == 0
    assert packed.input_ids.size(1) == -(-(n_inputs - (len(lengths) - 1) * n_shared) // 8) * 8
    assert packed.input_ids.size(0) == 1
    assert packed.n_targets == padded.n_targets == sum(sample.is_target[1:].sum() for sample in samples)

    module.zero_grad()
    logits = module.model(padded.input_ids)
    expected = F.cross_entropy(logits.flatten(0, 1), padded.labels.flatten(), ignore_index=-100)
    expected.backward()
    plain = gradients(module.model)
    assert all(("lora_" in name) == (lora is not None) for name in plain)
    for batch in (padded, packed):
        loss, found = mean_loss(module, batch)
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
        assert_same_gradients(found, plain, tolerance)


def test_checkpointed_blocks_are_recomputed_in_packed_batches() -> None:
    """Else the form above would test nothing."""
    model = GPT(SMALL, activation_checkpointing=True)
    calls = []
    model.blocks[0].attn_norm.register_forward_hook(lambda *_: calls.append(1))
    mean_loss(task(model).train(), collate_packed(random_samples((9, 4)), pad_id=0))
    assert len(calls) == 2


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_batch_without_samples_costs_nothing(packed: bool) -> None:
    """Of a process that ran out of data before the others; it still takes part in the backward pass."""
    batch = collate_packed([], pad_id=0) if packed else collate_padded([], pad_id=0, context_length=24)
    assert batch.n_targets == 0
    assert batch.sample_ids == ()
    assert (batch.labels == IGNORE_INDEX).all()
    module = task(GPT(SMALL)).train()
    output = module.step_output(batch)
    assert output.loss_sum.item() == 0
    output.loss_sum.backward()
    found = gradients(module.model)
    assert found.keys() == dict(module.model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def all_states(model: GPT, batch: LMBatch) -> Tensor:
    """(N, C): also of the tokens that no loss reads."""
    everything = batch.packing._replace(output_positions=torch.arange(batch.input_ids.size(1)))
    return model.hidden_states(batch.input_ids, Context.of(everything))[0]


def test_the_shared_prefix_ends_before_what_differs_or_is_learnt() -> None:
    def sample(ids: list[int], learnt: list[int]) -> Example:
        return Example(0, np.array(ids), np.isin(np.arange(len(ids)), learnt))

    one, other = sample([1, 2, 3, 4, 5], [3, 4]), sample([1, 2, 3, 9, 5, 6], [4, 5])
    assert shared_prefix([one, other]) == 2, "the third token's label is the fourth, which the first record learns"
    assert shared_prefix([one, one]) == 2
    assert shared_prefix([sample([1, 2, 3, 4], [3]), sample([1, 9, 3, 4], [3])]) == 1
    assert shared_prefix([sample([1, 2, 3, 4], [1]), sample([1, 2, 3, 4], [3])]) == 0
    assert shared_prefix([one]) == shared_prefix([]) == 0


@pytest.mark.parametrize(
    ("dropout", "lora_dropout", "shared"), [(0.0, 0.0, True), (0.1, 0.0, False), (0.0, 0.1, False)]
)
def test_with_dropout_each_record_has_its_own_preamble(
    tmp_path: Path, dropout: float, lora_dropout: float, shared: bool
) -> None:
    config = GPTConfig(**{**CONFIG.__dict__, "residual_dropout": dropout})
    lora = asdict(LoRAConfig(rank=2, dropout=lora_dropout)) if lora_dropout else None
    data = records_data(tmp_path, packing=True, share_prefix=may_share_prefix(asdict(config), lora))
    rows = [data.train_samples[index] for index in range(8)]
    n_inputs, n_shared = sum(len(row.token_ids) - 1 for row in rows), shared_prefix(rows)
    assert n_shared == len(GPT2.encode(PREAMBLE))
    expected = n_inputs - 7 * n_shared * shared
    assert data.collate(rows).input_ids.size(1) == -(-expected // 8) * 8


@torch.no_grad()
def test_a_record_never_sees_another_one() -> None:
    model = randomize(GPT(SMALL), seed=3).eval()
    samples = random_samples((9, 7, 24, 5))
    other = samples[1]._replace(token_ids=(samples[1].token_ids + 1) % SMALL.vocab_size)
    first, second = (collate_packed([samples[0], changed, *samples[2:]], pad_id=0) for changed in (samples[1], other))
    before, after = (all_states(model, batch) for batch in (first, second))
    changed = slice(8, 8 + 6)  # inputs are one token shorter than their record
    assert (before[changed] - after[changed]).abs().amax(1).min() > 0.01
    assert torch.equal(before[:8], after[:8])
    assert torch.equal(before[14:], after[14:])
    start = 0
    for sample in samples:  # and each is what it is alone
        ids = torch.from_numpy(sample.token_ids[:-1])[None]
        # Products of matrices of another height add up in another order: 1e-6 of what the final norm has scaled.
        torch.testing.assert_close(before[start : start + ids.size(1)], model.hidden_states(ids)[0], rtol=0, atol=1e-6)
        start += ids.size(1)


def test_no_gradient_reaches_another_record() -> None:
    """Tokens of their own for each record, an untied head, and a loss on the middle one alone."""
    model = randomize(GPT(GPTConfig(**{**SMALL.__dict__, "tied_head": False})), seed=3)
    rows = [np.arange(1, 10), np.arange(11, 20), np.arange(21, 30)]
    samples = [Example(index, ids, np.full(9, index == 1)) for index, ids in enumerate(rows)]
    mean_loss(task(model), collate_packed(samples, pad_id=0))
    touched = model.token_embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == list(range(11, 19))  # the last token is no input
    read = model.position_embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert read == list(range(8)), "positions start anew with each record"


# --- updates and evaluation -------------------------------------------------------------------------------------------


def recorded(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """What `record` gives, from this process."""
    (folder / name).mkdir()
    out = folder / name / "gradients.pt"
    train({**FP64, **options, "out": str(out)})
    return torch.load(out, weights_only=True)


def test_same_gradients_however_the_batch_is_cut_and_laid_out(tmp_path: Path) -> None:
    """(batch 8, padded) = (batch 2, accumulate 4, packed) = plain autograd."""
    whole = recorded(tmp_path, "whole", batch_size=8, packed=False)
    pieces = recorded(tmp_path, "pieces", batch_size=2, accumulate_grad_batches=4, packed=True)
    assert_close(whole, pieces, 1e-12)
    module, data = tiny_sft_module(torch.float64), AnswersDataModule(packed=False, batch_size=8, seed=3)
    batch = data.collate([data.train_samples[index] for index in data.expected_samples(0, 0)])
    logits = module.model(batch.input_ids)
    F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100).backward()
    assert_same_gradients(whole["updates"][0], gradients(module.model), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_processes_are_one(tmp_path: Path, packed: bool) -> None:
    """(batch 8) = (2 processes, batch 2, accumulate 2); at the end of the epoch one of them is out of samples."""
    whole = recorded(tmp_path, "whole", batch_size=8, packed=False)
    two = {"batch_size": 2, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp", "packed": packed}
    assert_close(whole, record(tmp_path, "ddp", **two, **FP64), 1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_perplexity_is_exp_of_the_mean_over_tokens(tmp_path: Path, make_trainer: Any, packed: bool) -> None:
    module, data = tiny_sft_module(), AnswersDataModule(packed=packed, batch_size=3, n_val=7)
    with torch.no_grad():
        module.model.token_embedding.weight.mul_(20)  # so that tokens differ in their loss
    trainer = make_trainer(tmp_path, [])
    trainer.validate(module, datamodule=data, verbose=False)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    batches = [data.collate([data.eval_samples["val"][i] for i in part]) for part in ((0, 1, 2), (3, 4, 5), (6,))]
    sums, counts = [], []
    with torch.no_grad():
        for batch in batches:
            output = module.step_output(batch)
            sums.append(output.loss_sum.double().item())
            counts.append(int((batch.labels != IGNORE_INDEX).sum()))
    mean = sum(sums) / sum(counts)
    of_means = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
    of_exps = sum(math.exp(total / count) for total, count in zip(sums, counts, strict=True)) / len(sums)
    assert found["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert abs(of_means / mean - 1) > 1e-3, "averages of averages would be something else"
    assert abs(of_exps / math.exp(mean) - 1) > 1e-3
