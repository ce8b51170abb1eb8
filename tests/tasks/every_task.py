"""Every task with a tiny model and data in memory, trained in turn by the same processes: test_many_processes.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from model_kinds import of_kind
from ragged import RaggedDataModule, tiny_trainer
from record_gradients import AnswersDataModule

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.batches import ClassificationBatch, LabelledSample, collate_classification
from llm_lightning.data.pairs import PairSample, PreferenceBatch, collate_packed_pairs
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.models.sharding import whole
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.schedules import ConstantConfig
from llm_lightning.tasks.base import TaskModule
from llm_lightning.tasks.classification import ClassificationModule
from llm_lightning.tasks.dpo import DPOModule
from llm_lightning.tasks.pretraining import PretrainingModule
from llm_lightning.tasks.sft import SFTModule
from llm_lightning.tasks.sharded_strategy import ShardedStrategy
from llm_lightning.tokenizers.build import build_tokenizer

STEPS, SHORT = 100, 14
"""Updates of a training, and of one with sharded weights, which take ten times longer, but for the soak."""
SAMPLES, GLOBAL_BATCH = 40, 6
"""The last of seven batches holds four samples: with three processes one of them has none."""
LORA = {"rank": 2, "targets": ("qkv_proj", "down_proj")}


class InMemory(BaseDataModule):
    """Random samples, the same in every process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer = build_tokenizer("byte")
        self.train_samples = self.samples(SAMPLES, seed=0)
        self.eval_samples = {"val": self.samples(7, seed=1)}
        self.data_digest = "random"

    def samples(self, n: int, seed: int) -> list[Any]:
        raise NotImplementedError

    def build(self) -> None: ...

    def preview(self, n: int) -> str:
        return ""

    def describe(self) -> str:
        return "random"


class Pairs(InMemory):
    def samples(self, n: int, seed: int) -> list[PairSample]:
        draw = np.random.default_rng(seed)
        sizes = draw.integers(1, 5, (n, 3))
        return [PairSample(i, *(draw.integers(0, 257, size) for size in row)) for i, row in enumerate(sizes)]

    def collate(self, samples: Sequence[PairSample]) -> PreferenceBatch:
        return collate_packed_pairs(samples, pad_id=0)


class Texts(InMemory):
    labels, pad_to, pad_id = ["ham", "spam"], None, 256

    def samples(self, n: int, seed: int) -> list[LabelledSample]:
        draw = np.random.default_rng(seed)
        return [LabelledSample(i, draw.integers(0, 257, draw.integers(2, 17)), i % 2) for i in range(n)]

    def collate(self, samples: Sequence[LabelledSample]) -> ClassificationBatch:
        return collate_classification(samples, pad_id=self.pad_id)


def model(kind: str = "gpt2", n_layer: int = 1) -> GPT:
    torch.manual_seed(0)
    sizes = GPTConfig(vocab_size=257, context_length=16, n_layer=n_layer, n_head=2, n_embd=16)
    return GPT(of_kind(sizes, kind)).double()


def classifier(*, n_layer: int = 2) -> Classifier:
    return Classifier(model(n_layer=n_layer), 2).double()


def task(kind: type[TaskModule], model: Any, *, lora: bool = False, **options: Any) -> TaskModule:
    torch.manual_seed(1)
    return kind(
        model=model,
        tokenizer=build_tokenizer("byte"),
        optimizer=AdamWConfig(lr=3e-3, max_grad_norm=0.5),
        scheduler=ConstantConfig(),
        lora=LoRAConfig(**LORA) if lora else None,
        **options,
    )


def classify(data: Texts, **options: Any) -> TaskModule:
    return task(ClassificationModule, classifier(), **ClassificationModule.options_from(data), **options)


def texts(**options: Any) -> RaggedDataModule:
    return RaggedDataModule(n_train=SAMPLES, **options)


def answers(**options: Any) -> AnswersDataModule:
    return AnswersDataModule(n_train=SAMPLES, packed=True, **options)


CASES: dict[str, tuple[Callable[..., Any], Callable[[Any], TaskModule]]] = {
    "pretraining": (texts, lambda data: task(PretrainingModule, model())),
    "sft packed, llama": (answers, lambda data: task(SFTModule, model("llama"))),
    "sft packed, lora": (answers, lambda data: task(SFTModule, model(), lora=True)),
    "dpo copy, untied": (Pairs, lambda data: task(DPOModule, model("qwen3"), reference="copy")),
    "dpo adapter_off": (Pairs, lambda data: task(DPOModule, model(), reference="adapter_off", lora=True)),
    "dpo cached": (Pairs, lambda data: task(DPOModule, model(), reference="cached")),
    "classification, store": (Texts, lambda data: classify(data, trained_blocks=1)),
    "classification, no store": (Texts, lambda data: classify(data, trained_blocks=1, frozen_cache=False)),
    "classification, head": (Texts, lambda data: classify(data, trained_blocks=0)),
    "classification, lora": (Texts, lambda data: classify(data, lora=True)),
}


class Recorder(L.Callback):
    """Losses over all processes, weights and metrics, and what of the tensors this process holds after an update."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        """updates made -> whole weights"""
        self.val: list[dict[str, float]] = []
        """Metrics of each validation."""
        self.held: dict[str, tuple[int, int]] = {}
        """name -> (values of this process, all)"""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        clip = pl_module.configure_gradient_clipping

        def record(*args: Any, **kwargs: Any) -> None:
            clip(*args, **kwargs)
            self.keep("gradient", pl_module.named_parameters(), of=lambda parameter: parameter.grad)

        pl_module.configure_gradient_clipping = record

    def keep(self, what: str, named: Any, of: Callable[[Any], Any] = lambda tensor: tensor) -> None:
        for name, owner in named:
            tensor = of(owner)
            if tensor is not None:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                self.held[f"{what} {name}"] = local.numel(), tensor.numel()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"].detach().double()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="sum")))
        self.keep("weight", pl_module.named_parameters())
        optimizer = trainer.optimizers[0]
        for name in ("exp_avg", "exp_avg_sq"):
            states = ((str(index), state[name]) for index, state in enumerate(optimizer.state.values()))
            self.keep(name, states)
        if trainer.global_step in (SHORT, trainer.max_steps):
            named = pl_module.named_parameters()
            self.weights[trainer.global_step] = {name: whole(parameter).clone() for name, parameter in named}

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.val.append({name: float(value) for name, value in metrics if name.startswith("val/")})


def strategy_of(name: str) -> Any:
    return {"one": "auto", "ddp": "ddp", "fsdp": None}[name] or ShardedStrategy()


def train(folder: Path, case: str, strategy: str, processes: int, steps: int, **options: Any) -> dict[str, Any]:
    """Train a case, and return what was measured."""
    make_data, make_task = CASES[case]
    data = make_data(batch_size=GLOBAL_BATCH // processes, seed=3)
    module, recorder = make_task(data), Recorder()
    own = options.pop("callbacks", [])
    trainer = tiny_trainer(
        folder, [recorder, *own], max_epochs=-1, max_steps=steps, devices=processes, strategy=strategy_of(strategy),
        check_val_every_n_epoch=2, precision="32-true",
    )  # fmt: skip
    module.check_plan(trainer, steps)
    trainer.fit(module, datamodule=data, weights_only=True, **options)
    held: list[Any] = [recorder.held]
    if processes > 1:
        held = [None] * processes
        torch.distributed.all_gather_object(held, recorder.held)
    return {"losses": recorder.losses, "val": recorder.val, "weights": recorder.weights, "held": held}


def train_all(folder: Path, strategies: Sequence[str], processes: int, sharded: int = SHORT) -> dict[str, Any]:
    """Strategy and case -> what `train` returns, for every task.

    Args:
        sharded: updates with sharded weights.
    """
    found = {}
    for strategy in strategies:
        for case in CASES:
            steps = sharded if strategy == "fsdp" else STEPS
            found[f"{strategy} {case}"] = train(folder, case, strategy, processes, steps)
    return found


GOES_ON = ("pretraining", "dpo copy, untied", "sft packed, lora")


def go_on(folder: Path, place: Path, strategy: str, processes: int, steps: int) -> dict[str, Any]:
    """The whole weights after `steps` updates of some tasks, each from the checkpoint in `place` if there is one."""
    found = {}
    for case in GOES_ON:
        own = place / case.replace(" ", "_")
        last = own / "checkpoints" / "last.ckpt"
        options = {"ckpt_path": last if last.exists() else None, "callbacks": [Checkpoints(keep=9)]}
        found[case] = train(own, case, strategy, processes, steps, **options)["weights"][steps]
    return found
