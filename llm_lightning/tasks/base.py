"""TaskModule implements every Lightning hook once; a task adds the loss of one batch.

To add a task, copy `pretraining.py` (text) or `sft.py` (records):

- a subclass with `task`, `item` and `step_output`; `metric_names` and `eval_metrics` if it has metrics of its own,
  `options_from` for constructor arguments that come from the data. `losses.token_log_probs` gives the loss per token;
- `task/NAME.yaml`, as in `conf/`, which picks `/data` and sets `_target_`, `monitor` and `monitor_mode` (and
  `callbacks.samples: null` if it generates no text). Other keys below `task:` are arguments of the constructor, which
  passes the rest on: `def __init__(self, *, gamma: float, **common)`.

It may be outside this project: `python train.py --config-dir=FOLDER task=NAME 'allow_targets=[MODULE]'`, with
`FOLDER/task/NAME.yaml` and the module installed or on PYTHONPATH. `tests/scenarios/test_own_task.py` is a whole one.

Records may be packed, several in a row: hand `Context.of(batch.packing)` to the model, as `sft.py` does, or set
`data.packing=false`; else tokens of one record attend to those of another.

Only for other data or another model:

- a data module (`data/base.py`) whose constructor takes `tokenizer` (or a function that trains one), `context_length`,
  `seed` and the keys of its YAML (`data/NAME.yaml`, with a sentence for every key). Its batches are named tuples with
  `n_targets` and `sample_ids`; the batch of a process that ran out of samples has `n_targets` 0, and its loss must be 0
  and differentiable;
- `TASKS` in `weights/checks/header.py`: its checkpoints' weights are then checked as those of the tasks here; for a
  model with a head of its own also `described_model` in `weights/load.py` and `weights/checks/tensors.py`;
- for `evaluate --split`, `respond` and `compare` on its data: `CONVERSATIONS` in `data/of_checkpoint.py` and `TASKS` in
  `experiments/evaluation.py`.

A metric of gradients: override `configure_gradient_clipping`. Before it, and in `on_before_optimizer_step`, gradients
are sums over the targets of the update (averaged over processes); `on_train_batch_end` is too late, they are freed.

Gradients are token-exact: an optimizer step uses the sum of the loss over all targets of its accumulation window on
all processes, divided by their number. Lightning alone averages micro-batch means, which weighs a target in a short
micro-batch more (its issue 20350). So a task returns a *sum*, Lightning accumulates sums, and the division happens
once per step, folded into the multiplication that clips.

Steps are numbered from 0: row s of the logs belongs to update s, and a checkpoint after N updates covers rows 0..N-1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.order import limited
from llm_lightning.malloc import disable_malloc_trim, trim_malloc
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import LoRAConfig, apply_lora
from llm_lightning.models.sharding import shard
from llm_lightning.optim.base import OptimizerConfig, keep_kernels
from llm_lightning.optim.clipping import scale_and_clip_gradients
from llm_lightning.optim.schedules import ScheduleConfig
from llm_lightning.tasks.accounting import Accumulation, EvaluationSums, StepOutput, Totals, averages
from llm_lightning.tasks.layout import layout_of
from llm_lightning.tasks.memory import freeze_in_bfloat16, leave_fresh_memory_unfilled
from llm_lightning.tasks.sharded_strategy import ShardedStrategy
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.weights import checkpoint as checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """A loss or gradient is inf or nan."""


class TaskModule(L.LightningModule):
    """Optimizer, schedule, token-exact gradients, clipping, exact metrics and the checkpoint's header.

    Args:
        model: the model to train.
        tokenizer: for samples, and written into checkpoints.
        optimizer, scheduler: settings, see `optim/base.py` and `optim/schedules.py`.
        lora: adapters to train instead of the weights.
        header: plain values for the checkpoint's header (resolved config, lineage).
    """

    task: str
    item: str
    """The unit of the loss, a noun of your choice (token, sequence, pair); its count is logged as `{item}s_seen`."""
    uses_lm_head: bool = True
    """Whether the language-model head is run."""

    def __init__(
        self,
        *,
        model: GPT | Classifier,
        tokenizer: Tokenizer,
        optimizer: OptimizerConfig,
        scheduler: ScheduleConfig,
        lora: LoRAConfig | None = None,
        header: dict[str, Any] | None = None,
    ) -> None:
        missing = [name for name in ("task", "item") if not hasattr(type(self), name)]
        missing += ["step_output"] if type(self).step_output is TaskModule.step_output else []
        if missing:
            raise ValueError(f"the task class {type(self).__name__} does not define {', '.join(missing)}")
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
        self._window = Accumulation()
        self._step_means: dict[str, float] = {}
        self._earlier_metrics: dict[str, float] = {}
        self._epoch_sums: Totals = {}
        self._evaluations: dict[str, EvaluationSums] = {}

    def step_output(self, batch: Any) -> StepOutput:
        """Loss and metrics of `batch`. Required, as are `task` and `item`."""
        raise NotImplementedError

    @property
    def local_outputs(self) -> frozenset[str]:
        """The `StepOutput.outputs` that are too large to be gathered from all processes. Tasks may override."""
        return frozenset()

    def eval_metrics(self, stage: str, means: dict[str, float], outputs: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of a whole evaluation: `means` and what follows from all `StepOutput.outputs`. Tasks may override.

        `local_outputs` hold the rows of this process only; see `accounting.gather_rows`.
        """
        return means

    def metric_names(self) -> tuple[str, ...]:
        """The names that `eval_metrics` returns, known before training: these can be monitored. Tasks extend."""
        return ("loss",)

    @classmethod
    def options_from(cls, datamodule: Any) -> dict[str, Any]:
        """Constructor arguments that come from the data, such as the names of the classes. Tasks may override."""
        return {}

    @property
    def trunk(self) -> GPT:
        """The GPT inside the model."""
        return self.model.trunk

    @property
    def datamodule(self) -> BaseDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined, no-any-return]

    def describe_model(self) -> dict[str, Any]:
        """Entries of a checkpoint's header beside `GPTConfig`. Tasks may extend."""
        return {"lora": asdict(self.lora)} if self.lora is not None else {}

    def figures(self) -> dict[str, Figure]:
        """Figures of the latest evaluations, by name. Tasks may override."""
        return {}

    def results(self) -> dict[str, Any]:
        """Plain values for `summary.json` beside the metrics. Tasks may override."""
        return {}

    def compile_model(self) -> None:
        """Compile the method that training calls, as an attribute of the instance: the weights keep their names."""
        trunk = self.trunk
        trunk.hidden_states = torch.compile(trunk.hidden_states)  # type: ignore[method-assign]

    # --- one micro-batch, one update -------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.step_output(batch)
        if self.global_step == 0 and not self._window:
            self._fit_loss_scale(output.n_items)
        self._window.add(output, batch_idx, batch.sample_ids)
        return output.loss_sum * self.trainer.accumulate_grad_batches  # Lightning divides by it

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Turn accumulated sums into the exact mean, check that it is finite, clip. Runs once per update."""
        totals = self._window.sums.totals(self.trainer)
        loss_sum, count = totals["loss"]
        if count == 0:
            raise ValueError(f"update {self.global_step} has no target at all: {self._where()}")
        # Data-parallel training averages gradients over processes; the mean over targets needs their sum.
        scale = self.trainer.world_size / count
        norm = scale_and_clip_gradients(self.parameters(), scale, self._max_norm())
        self._check_finite(loss_sum, norm)
        self.items_seen += int(count)
        self.last_gradient_norm, self.last_lr = norm, optimizer.param_groups[0]["lr"]
        self._step_means = averages(totals)
        for name, (total, number) in totals.items():
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
            self.trainer.should_stop = True  # inside an epoch, too: a validation then follows the last update
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
        self.datamodule.set_epoch(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.log_row({f"train/{name}_epoch": mean for name, mean in averages(self._epoch_sums).items()})
        done = self.trainer.fit_loop.epoch_loop.batch_idx + 1
        taken = self.datamodule.taken_per_source(self.current_epoch, done, self.trainer.world_size)
        if taken:
            self.log_row({f"mixture/{name}": n for name, n in taken.items()})

    def log_row(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send metrics to every logger under a step; default: the last update's, from `on_train_batch_end` on."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.global_step - 1 if step is None else step)

    # --- evaluation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        trim_malloc()  # batches of different widths have fragmented the memory
        self._begin_evaluation(self.datamodule.eval_samples)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation(dataloader_idx).add(self.step_output(batch))

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation(step=self.global_step - 1)
        for logger in self.trainer.loggers:
            logger.save()  # a search, and whoever watches metrics.csv, sees each validation at once

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation(self.datamodule.test_samples)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluation(dataloader_idx).add(self.step_output(batch))

    def on_test_epoch_end(self) -> None:
        # Test metrics get a row one step after the last update; a run that is extended drops it and tests again.
        self._end_evaluation(step=self.global_step)

    def _begin_evaluation(self, stages: Mapping[str, Any]) -> None:
        size = self.datamodule.batch_size
        batches = {stage: -(-len(samples) // (size * self.trainer.world_size)) for stage, samples in stages.items()}
        self._evaluations = {stage: EvaluationSums(n * size) for stage, n in batches.items()}

    def _evaluation(self, dataloader_idx: int) -> EvaluationSums:
        return list(self._evaluations.values())[dataloader_idx]

    def _end_evaluation(self, step: int) -> None:
        for stage in list(self._evaluations):
            evaluation = self._evaluations.pop(stage)
            means = averages(evaluation.sums.totals(self.trainer))
            outputs = evaluation.outputs(self.trainer, self.local_outputs)
            prefix = "train/eval_" if stage == "train_eval" else f"{stage}/"
            values = self.eval_metrics(stage, means, outputs)
            metrics = {f"{prefix}{name}": value for name, value in values.items()}
            self.log_dict(metrics, logger=False)
            if stage == "val":
                self.log("val_loss", means["loss"], prog_bar=True, logger=False)
            if not self.trainer.sanity_checking:
                self.log_row(metrics, step)

    # --- optimizer, devices, checkpoint ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.trainer.precision == "64-true":
            self.double()  # before a checkpoint is loaded, or its weights would be rounded to float32
        # Under autocast a frozen matrix would be cast at every step; kept in bfloat16 it also takes half the memory.
        if self.trainer.precision == "bf16-mixed" and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            freeze_in_bfloat16(self.model)
            trim_malloc()

    def check_plan(self, trainer: L.Trainer, total_steps: int) -> None:
        """Refuse a schedule or an optimizer that does not fit the run, before its processes start.

        Raises:
            ValueError: naming the setting to change.
        """
        self.schedule.check(total_steps)
        is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if is_sharded and not isinstance(trainer.strategy, ShardedStrategy):
            raise ValueError("trainer.strategy is Lightning's ModelParallelStrategy; use accelerator=fsdp")
        self.optimizer_config.check(is_sharded=is_sharded)

    def configure_optimizers(self) -> Any:
        # From the data module: trainer.estimated_stepping_batches would make the loader before its position is
        # restored (Lightning's issue 20550).
        self.total_steps = planned_steps(self.trainer, self.datamodule)
        self.schedule.check(self.total_steps)
        optimizer = self.optimizer_config.build(
            self.model.named_parameters(),
            is_scaled=self._loss_scaler is not None,
            is_sharded=self.is_sharded,
            qkv_rows=self.trunk.config.qkv_rows,
        )
        peak = self.optimizer_config.lr

        def factor(step: int) -> float:
            return self.schedule.lr_at(step, peak, self.total_steps) / peak

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        leave_fresh_memory_unfilled()
        if self.device.type == "cpu":
            disable_malloc_trim()

    def on_train_start(self) -> None:
        # The rate in a checkpoint belongs to the length that the run had when it was saved.
        schedule: Any = self.lr_schedulers()
        keep_kernels(schedule.optimizer)
        factor = schedule.lr_lambdas[0](schedule.last_epoch)
        for group, peak in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = peak * factor
        before, now = schedule.get_last_lr()[0], schedule.base_lrs[0] * factor
        if before != now and self.trainer.is_global_zero:
            log.info(
                "Step %d goes on at learning rate %.3g instead of %.3g: the schedule is now %d steps long%s",
                schedule.last_epoch, now, before, self.total_steps, self.schedule.note_on_restart(),
            )  # fmt: skip

    def configure_model(self) -> None:
        """Shard every model that the task holds, under FSDP2."""
        self.is_sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        if self.is_sharded:
            for model in self.children():
                if isinstance(model, (GPT, Classifier)):
                    shard(model, self.trainer.strategy.root_device.type, self.trainer.world_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[checkpoints.HEADER] = checkpoints.describe(
            task=self.task,
            model_config=self.trunk.config,
            tokenizer=self.tokenizer,
            step=self.global_step,
            epoch=self.current_epoch,
            metrics=self.latest_metrics(),
            layout=layout_of(self.trainer, self.datamodule)._asdict(),
            **{f"{self.item}s_seen": self.items_seen},
            **self.describe_model(),
            **self._covered_rows(),
            **self.header,
        )
        checkpoint["task_module"] = {"items_seen": self.items_seen, "epoch_sums": self._epoch_sums}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":  # for the test of the best weights, keep the counts of this run
            return
        if self.strict_loading:
            checkpoints.check_fits(str(self.trainer.ckpt_path), checkpoint, self, self.model)
        self._earlier_metrics = dict(checkpoint[checkpoints.HEADER]["metrics"])
        state = checkpoint["task_module"]
        self.items_seen, self._epoch_sums = state["items_seen"], state["epoch_sums"]

    def load_trained(self, path: Path) -> None:
        """Load the trained weights of a checkpoint of this run; the frozen ones have not changed and are not read."""
        trim_malloc()
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
        """The rows of the metrics file that this checkpoint covers, compared on resume; empty without such a file."""
        rows = [logger.covered(self.global_step) for logger in self.trainer.loggers if hasattr(logger, "covered")]
        return {"rows": rows[0]} if rows and rows[0] is not None else {}  # None: not the first process

    @property
    def _loss_scaler(self) -> torch.amp.GradScaler | None:
        """What multiplies the loss under fp16; None in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _fit_loss_scale(self, n_items: int) -> None:
        """Begin fp16 with the scale that suits a mean, divided by the items of a micro-batch.

        The scaler's own is meant for means. Times a sum it overflows, and the first ten updates of a batch of 1,024
        tokens were skipped.
        """
        scaler = self._loss_scaler
        if scaler is None or not scaler.is_enabled():
            return
        if self.trainer.world_size > 1:  # the same scale for the gradients of all processes
            counts = torch.tensor(float(n_items), device=self.device)
            n_items = int(self.trainer.strategy.reduce(counts, reduce_op="sum")) // self.trainer.world_size
        state = scaler.state_dict()
        scaler.load_state_dict(state | {"scale": state["scale"] / 2 ** math.ceil(math.log2(max(n_items, 1)))})

    def _max_norm(self) -> float | None:
        config = self.optimizer_config
        warming_up = self.global_step < self.schedule.warmup_steps(self.total_steps)
        return None if config.clip_after_warmup and warming_up else config.max_grad_norm

    def _check_finite(self, loss_sum: float, norm: float) -> None:
        # The fp16 scaler skips an update that overflows, and halves its scale. If no scale is small enough, it is nan.
        scaler = self._loss_scaler
        overflows = scaler is not None and scaler.get_scale() > 2**-14
        if math.isfinite(loss_sum) and (math.isfinite(norm) or overflows):
            return
        what = "loss" if not math.isfinite(loss_sum) else "gradient"
        raise NonFiniteError(
            f"non-finite {what} (loss {loss_sum}, gradient norm {norm}) at step {self.global_step}, "
            f"{self._where()}: stopped before the update, the last checkpoint is finite; "
            "lower optimizer.lr, or look at these samples with data.preview=true"
        )

    def _where(self) -> str:
        return f"epoch {self.current_epoch}, {self._window.describe()}"


def batches_per_epoch(trainer: L.Trainer, datamodule: BaseDataModule) -> int:
    """Micro-batches of one epoch and process, within the trainer's limit."""
    return limited(datamodule.batches_per_epoch(trainer.world_size), trainer.limit_train_batches)


def planned_steps(trainer: L.Trainer, datamodule: BaseDataModule) -> int:
    """Optimizer updates of the whole run, from the data module's sizes and the trainer's limits."""
    per_epoch = math.ceil(batches_per_epoch(trainer, datamodule) / trainer.accumulate_grad_batches)
    steps = per_epoch * trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    if trainer.max_steps != -1:
        steps = min(steps, trainer.max_steps)
    if steps == math.inf:
        raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
    return int(steps)
