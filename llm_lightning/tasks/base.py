"""TaskModule: every Lightning hook, once. A task adds only what one batch costs.

Gradients are token-exact: an optimizer step uses the sum of the loss over all targets of its accumulation window on
all processes, divided by their number. Lightning alone averages micro-batch means, which weighs a target in a short
micro-batch more (its issue 20350). So a task returns a *sum*, Lightning accumulates sums, and the division happens
once per step, folded into the multiplication that clips.

Steps are numbered from 0: row s of the logs belongs to update s, and a checkpoint after N updates covers rows 0..N-1.
"""

from __future__ import annotations

import ctypes
import math
import sys
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.order import limited
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import LoRAConfig, apply_lora
from llm_lightning.optim import AdamWConfig, ScheduleConfig, scale_and_clip_gradients
from llm_lightning.tokenizers import Tokenizer
from llm_lightning.weights import checkpoint as checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class StepOutput(NamedTuple):
    """What one batch costs."""

    loss_sum: Tensor
    """() summed over `n_items` items."""
    n_items: int
    """Target tokens, sequences or pairs, known on the CPU."""
    metrics: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012
    """name -> (sum, count), each over whatever items that metric counts."""
    outputs: dict[str, Tensor] = {}  # noqa: RUF012
    """What metrics of a whole evaluation need, such as logits and labels: (items, ...) each."""


class GrowingRows:
    """The rows of many batches in one tensor on the CPU.

    A list of batches and their concatenation would be there at once: twice as much, which counts where a row holds a
    logit for each of 10,000 classes.

    Args:
        expected: rows to make room for; where there are more, they are moved.
    """

    def __init__(self, expected: int) -> None:
        self._expected, self._n = expected, 0
        self._rows = torch.empty(0)

    def append(self, rows: Tensor) -> None:
        end = self._n + len(rows)
        if end > len(self._rows) or rows.dtype != self._rows.dtype or rows.shape[1:] != self._rows.shape[1:]:
            room = torch.empty((max(self._expected, 2 * end), *rows.shape[1:]), dtype=rows.dtype)
            if self._n:
                room[: self._n] = self._rows[: self._n]
            self._rows = room
        self._rows[self._n : end] = rows
        self._n = end

    def all(self) -> Tensor:
        """(n, ...) what was appended."""
        return self._rows[: self._n]


class NonFiniteError(ValueError):
    """A loss or gradient that is inf or nan."""


class TaskModule(L.LightningModule):
    """Optimizer, schedule, token-exact gradients, clipping, exact metrics and the checkpoint's header.

    Args:
        model: what to train.
        tokenizer: kept for samples and written into checkpoints.
        optimizer, scheduler: settings, see `optim.py`.
        lora: adapters to train instead of the weights.
        header: plain values for the checkpoint's header (resolved config, lineage).
    """

    task: str
    item: str
    """What a loss is the mean over: token, sequence, pair."""
    uses_lm_head: bool = True
    """Whether the language-model head is run."""

    def __init__(
        self,
        *,
        model: GPT | Classifier,
        tokenizer: Tokenizer,
        optimizer: AdamWConfig,
        scheduler: ScheduleConfig,
        lora: LoRAConfig | None = None,
        header: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.lora = model, tokenizer, lora
        if lora is not None:
            apply_lora(model, lora)
        self.optimizer_config, self.schedule = optimizer, scheduler
        self.header = header or {}
        self.items_seen = 0
        self.last_gradient_norm = math.nan
        self.last_lr = math.nan
        self.total_steps = 0
        self.is_sharded = False
        self._must_stop = False
        self._window: list[tuple[StepOutput, int, tuple[int, ...]]] = []
        self._step_means: dict[str, float] = {}
        self._earlier_metrics: dict[str, float] = {}
        self._epoch_sums: dict[str, list[float]] = {}
        self._eval_sums: dict[str, dict[str, list[Tensor]]] = {}
        self._eval_outputs: dict[str, dict[str, GrowingRows]] = {}

    @abstractmethod
    def step_output(self, batch: Any) -> StepOutput:
        """What `batch` costs."""

    @property
    def outputs_kept_apart(self) -> frozenset[str]:
        """Which `StepOutput.outputs` are too large to be gathered from all processes. Tasks may override."""
        return frozenset()

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of a whole evaluation, from the means and all `StepOutput.outputs` of it. Tasks may override.

        Of `outputs_kept_apart` only the rows of this process are there; see `rows_of_all_processes`.
        """
        return means

    def metric_names(self) -> tuple[str, ...]:
        """What `eval_metrics` returns, known before training: these can be monitored. Tasks extend."""
        return ("loss",)

    @classmethod
    def options_from(cls, datamodule: Any) -> dict[str, Any]:
        """Constructor arguments that only the data can tell, such as the names of the classes. Tasks may override."""
        return {}

    @property
    def trunk(self) -> GPT:
        """The GPT inside the model."""
        return self.model.trunk if isinstance(self.model, Classifier) else self.model

    def describe_model(self) -> dict[str, Any]:
        """What a checkpoint's header says of the model beside its `GPTConfig`. Tasks may extend."""
        return {"lora": asdict(self.lora)} if self.lora is not None else {}

    def figures(self) -> dict[str, Figure]:
        """name -> what the last evaluations look like. Tasks may override."""
        return {}

    def results(self) -> dict[str, Any]:
        """Plain values for `summary.json` that are not one number each. Tasks may override."""
        return {}

    def compile_model(self) -> None:
        """Compile what training calls; an attribute of the instance leaves the names of the weights alone."""
        trunk = self.trunk
        trunk.hidden_states = torch.compile(trunk.hidden_states)  # type: ignore[method-assign]

    # --- one micro-batch, one update -------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.step_output(batch)
        detached = output._replace(loss_sum=output.loss_sum.detach(), outputs={})
        self._window.append((detached, batch_idx, batch.sample_ids))
        return output.loss_sum * self.trainer.accumulate_grad_batches  # Lightning divides by it

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Turn accumulated sums into the exact mean, check that it is finite, clip. Runs once per update."""
        sums = self._reduce_window()
        count = sums["loss"][1]
        if count == 0:
            raise ValueError(f"update {self.global_step} has no target at all: {self._window_samples()}")
        # Data-parallel training averages gradients over processes; the mean over targets needs their sum.
        scale = self.trainer.world_size / count
        norm = scale_and_clip_gradients(self.parameters(), scale, self._max_norm())
        self._check_finite(sums["loss"][0], norm)
        self.items_seen += int(count)
        self.last_gradient_norm, self.last_lr = norm, optimizer.param_groups[0]["lr"]
        self._step_means = {name: total / max(number, 1) for name, (total, number) in sums.items()}
        for name, (total, number) in sums.items():
            epoch = self._epoch_sums.setdefault(name, [0.0, 0.0])
            epoch[0] += total
            epoch[1] += number
        self._window.clear()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._window:  # the update is still to come, and a stop before it would lose these gradients
            self._must_stop |= self.trainer.should_stop
            self.trainer.should_stop = False
            return
        self.trainer.should_stop |= self._must_stop
        self._must_stop = False
        # Lightning would free them only after the next forward pass: 0.5 GB of 3 GB at the peak with 124M parameters.
        for parameter in self.parameters():
            parameter.grad = None
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # inside an epoch, too, the last update is then followed by a validation
        step = self.global_step - 1
        self.log("loss", self._step_means["loss"], prog_bar=True, logger=False)
        is_last = self.global_step == self.total_steps
        if step % self.trainer.log_every_n_steps == 0 or is_last:  # type: ignore[attr-defined]
            metrics = {f"train/{name}": value for name, value in self._step_means.items()}
            metrics |= {
                "lr": self.last_lr,
                "train/grad_norm": self.last_gradient_norm,
                "epoch": self.current_epoch,
            }
            self.log_row(metrics | {f"{self.item}s_seen": self.items_seen})

    def on_train_epoch_start(self) -> None:
        self._epoch_sums = {}
        self.trainer.datamodule.set_epoch(self.current_epoch)  # type: ignore[attr-defined]

    def on_train_epoch_end(self) -> None:
        self.log_row({f"train/{name}_epoch": s / max(n, 1) for name, (s, n) in self._epoch_sums.items()})

    def log_row(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send metrics to every logger under a step; default: the last update's."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step - 1 if step is None else step)

    # --- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        give_back_freed_memory()  # what varying batch widths have left between them
        self._begin_evaluation(self.trainer.datamodule.eval_samples)  # type: ignore[attr-defined]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation(step=self.global_step - 1)

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation(self.trainer.datamodule.test_samples)  # type: ignore[attr-defined]

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        # A row of its own behind the last update: a run that is trained on drops it, and tests again.
        self._end_evaluation(step=self.global_step)

    def _begin_evaluation(self, stages: Mapping[str, Any]) -> None:
        self._eval_sums = {stage: defaultdict(list) for stage in stages}
        size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        batches = {stage: -(-len(samples) // (size * self.trainer.world_size)) for stage, samples in stages.items()}
        self._eval_outputs = {stage: defaultdict(partial(GrowingRows, n * size)) for stage, n in batches.items()}

    def _evaluate(self, batch: Any, dataloader_idx: int) -> None:
        stage = list(self._eval_sums)[dataloader_idx]
        output = self.step_output(batch)
        for name, pair in _sums(output).items():
            self._eval_sums[stage][name].append(pair)
        for name, values in output.outputs.items():
            self._eval_outputs[stage][name].append(values.detach())

    def _end_evaluation(self, step: int) -> None:
        for stage, sums in self._eval_sums.items():
            totals = {name: torch.stack(pairs).cpu().double().sum(0) for name, pairs in sums.items()}
            reduced = self._all_reduce(totals)
            means = {name: total / max(number, 1) for name, (total, number) in reduced.items()}
            prefix = "train/eval_" if stage == "train_eval" else f"{stage}/"
            found = self.eval_metrics(stage, means, self._all_gather(self._eval_outputs.pop(stage)))
            metrics = {f"{prefix}{name}": value for name, value in found.items()}
            self.log_dict(metrics, logger=False)
            if stage == "val":
                self.log("val_loss", means["loss"], prog_bar=True, logger=False)
            if not self.trainer.sanity_checking:
                self.log_row(metrics, step)
        self._eval_sums, self._eval_outputs = {}, {}

    # --- optimizer, devices, checkpoint ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # Under autocast a frozen matrix would be cast at every step; kept in bfloat16 it also takes half the memory.
        if self.trainer.precision == "bf16-mixed" and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            freeze_in_bfloat16(self.model)
            give_back_freed_memory()

    def configure_optimizers(self) -> Any:
        # From the data module: trainer.estimated_stepping_batches would make the loader before its position is
        # restored (Lightning's issue 20550).
        self.total_steps = total_steps(self.trainer, self.trainer.datamodule)  # type: ignore[attr-defined]
        self.schedule.warmup_steps(self.total_steps)  # refuses a warmup that does not fit
        optimizer = self.optimizer_config.build(self.model.named_parameters(), fused=self._fused())
        peak = self.optimizer_config.lr

        def factor(step: int) -> float:
            return self.schedule.lr_at(step, peak, self.total_steps) / peak

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        leave_fresh_memory_unfilled()
        if self.device.type == "cpu":
            keep_freed_memory()

    def on_train_start(self) -> None:
        # The rate in a checkpoint belongs to the length that the run had when it was saved.
        schedule: Any = self.lr_schedulers()
        factor = schedule.lr_lambdas[0](schedule.last_epoch)
        for group, peak in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = peak * factor

    def configure_model(self) -> None:
        """Shard the model under FSDP2, block by block. Embeddings, final norm and head form the root's own group."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        self.is_sharded = True
        if isinstance(self.model, FSDPModule):
            return
        # Not the strategy's mesh: by default all processes of a node stand on its tensor-parallel axis.
        mesh = init_device_mesh(self.trainer.strategy.root_device.type, (self.trainer.world_size,))
        for block in self.trunk.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        for name in ("hidden_states", "finish"):
            if hasattr(self.model, name):
                register_fsdp_forward_method(self.model, name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[checkpoints.HEADER] = checkpoints.describe(
            task=self.task,
            model_config=self.trunk.config,
            tokenizer=self.tokenizer,
            step=self.global_step,
            epoch=self.current_epoch,
            metrics=self.latest_metrics(),
            **{f"{self.item}s_seen": self.items_seen},
            **self.describe_model(),
            **self._covered_rows(),
            **self.header,
        )
        checkpoint["task_module"] = {"items_seen": self.items_seen, "epoch_sums": self._epoch_sums}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":  # the best weights are tested, the run's own counts stand
            return
        if self.strict_loading and not self.is_sharded:
            checkpoints.check_fits(str(self.trainer.ckpt_path), checkpoint, self, self.model)
        self._earlier_metrics = dict(checkpoint[checkpoints.HEADER]["metrics"])
        state = checkpoint["task_module"]
        self.items_seen, self._epoch_sums = state["items_seen"], state["epoch_sums"]

    def load_trained(self, path: Path) -> None:
        """Take what was trained from a checkpoint of this run; what was frozen is there already, and not read."""
        give_back_freed_memory()
        frozen = {
            name for name, parameter in self.named_parameters(remove_duplicate=False) if not parameter.requires_grad
        }
        state = checkpoints.load(path, mmap=True)["state_dict"]
        self.load_state_dict({name: tensor for name, tensor in state.items() if name not in frozen}, strict=False)

    def on_fit_end(self) -> None:
        self._earlier_metrics = self.latest_metrics()  # a test that follows clears the trainer's

    def latest_metrics(self) -> dict[str, float]:
        """The newest value of every metric, those of earlier sessions of the run included."""
        return self._earlier_metrics | {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    # --- details ---------------------------------------------------------------------------------------------------

    def _covered_rows(self) -> dict[str, Any]:
        """What the metrics file holds up to here, for a start that continues; nothing where there is no such file."""
        found = [logger.covered(self.global_step) for logger in self.trainer.loggers if hasattr(logger, "covered")]
        return {"rows": found[0]} if found and found[0] is not None else {}  # None: not the first process

    def _fused(self) -> bool:
        setting = self.optimizer_config.fused
        # Under fp16 a fused optimizer would unscale only inside its step, after we measured and clipped the norm.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if setting is True and scaled:
            raise ValueError("optimizer.fused=true and trainer.precision=16-mixed do not go together; use fused=auto")
        if setting != "auto":
            return bool(setting)
        return not scaled and not isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _max_norm(self) -> float | None:
        config = self.optimizer_config
        warming_up = self.global_step < self.schedule.warmup_steps(self.total_steps)
        return None if config.clip_after_warmup and warming_up else config.max_grad_norm

    def _reduce_window(self) -> dict[str, list[float]]:
        sums: dict[str, list[Tensor]] = defaultdict(list)
        for output, _, _ in self._window:
            for name, pair in _sums(output).items():
                sums[name].append(pair)
        return self._all_reduce({name: torch.stack(pairs).cpu().double().sum(0) for name, pairs in sums.items()})

    def _all_reduce(self, sums: dict[str, Tensor]) -> dict[str, list[float]]:
        """(sum, count) pairs summed over all processes."""
        if self.trainer.world_size > 1 and sums:
            stacked = torch.stack(list(sums.values())).to(self.device)
            stacked = self.trainer.strategy.reduce(stacked, reduce_op="sum").cpu()
            sums = dict(zip(sums, stacked, strict=True))
        return {name: pair.tolist() for name, pair in sums.items()}

    def _all_gather(self, outputs: dict[str, GrowingRows]) -> dict[str, Tensor]:
        """What all batches of all processes put out; of `outputs_kept_apart`, those of this process."""
        mine = {name: rows.all() for name, rows in outputs.items()}
        return {
            name: rows if name in self.outputs_kept_apart else self.rows_of_all_processes(rows)
            for name, rows in mine.items()
        }

    def rows_of_all_processes(self, rows: Tensor) -> Tensor:
        """The rows of every process, in the order of the processes. All of them call it together."""
        if self.trainer.world_size == 1:
            return rows
        everyone: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everyone, rows.contiguous())
        return torch.cat(everyone)

    def _check_finite(self, loss_sum: float, norm: float) -> None:
        # The fp16 scaler skips an update that overflows, and halves its scale. If no scale is small enough, it is nan.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        overflows = scaler is not None and scaler.get_scale() > 2**-14
        if math.isfinite(loss_sum) and (math.isfinite(norm) or overflows):
            return
        what = "loss" if not math.isfinite(loss_sum) else "gradient"
        raise NonFiniteError(
            f"non-finite {what} (loss {loss_sum}, gradient norm {norm}) at step {self.global_step}, "
            f"{self._window_samples()}: stopped before the update, the last checkpoint is finite; "
            "lower optimizer.lr, or look at these samples with data.preview=true"
        )

    def _window_samples(self) -> str:
        parts = [f"batch {index} (samples {', '.join(map(str, ids))})" for _, index, ids in self._window]
        return f"epoch {self.current_epoch}, " + ", ".join(parts)


def batches_per_epoch(trainer: L.Trainer, datamodule: BaseDataModule) -> int:
    """Micro-batches of one epoch and process, within the trainer's limit."""
    return limited(datamodule.batches_per_epoch(trainer.world_size), trainer.limit_train_batches)


def total_steps(trainer: L.Trainer, datamodule: BaseDataModule) -> int:
    """Optimizer updates of the whole run, from the data module's sizes and the trainer's limits."""
    per_epoch = math.ceil(batches_per_epoch(trainer, datamodule) / trainer.accumulate_grad_batches)
    steps = per_epoch * trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps)
    if steps == math.inf:
        raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
    return int(steps)


def freeze_in_bfloat16(model: nn.Module) -> None:
    """Keep the frozen matrices, and the biases beside them, in bfloat16; norms stay as they are."""
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()


def leave_fresh_memory_unfilled() -> None:
    """Switch off what PyTorch does beside deterministic algorithms: to fill all fresh memory with nan.

    That shows who reads memory that nobody wrote, and took 8% of each step in a profile on a CPU.
    `tests/tasks/test_unwritten_memory.py` trains every task with it on, and gets the same bits.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def give_back_freed_memory() -> None:
    """Let glibc return what is free amid what is in use, such as the fp32 form of cast weights. Elsewhere: nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step instead of giving it back to the system. Elsewhere: nothing.

    By default every large tensor is mapped afresh and zeroed page by page at its first touch: at 124M parameters half
    a million page faults, and a third of the time, of each step on a CPU. Costs a few percent more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD in glibc's malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # as an unsigned size: never


def _sums(output: StepOutput) -> dict[str, Tensor]:
    """name -> (2,) sum and count."""
    loss = output.loss_sum.detach()
    pairs = {"loss": torch.stack([loss.float(), torch.tensor(float(output.n_items), device=loss.device)])}
    return pairs | {name: torch.stack([s.float(), n.float()]) for name, (s, n) in output.metrics.items()}
