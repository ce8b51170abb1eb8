"""One run: from its resolved settings to a trained model and its run folder."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from llm_lightning.callbacks.checkpoints import Checkpoints
from llm_lightning.callbacks.endings import stays_stopped, stopped_by
from llm_lightning.callbacks.exact_resume import refusing_damage
from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.callbacks.summaries import flat
from llm_lightning.callbacks.throughput import Throughput
from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.templates.choose import template_in
from llm_lightning.experiments import failures, whereabouts
from llm_lightning.experiments.adapters import continued_lineage, mend_adapter, refuse_lost_adapters, write_adapter
from llm_lightning.experiments.build import (
    build,
    build_datamodule,
    build_module,
    build_optimizer,
    build_trainer,
    choose_tokenizer,
    model_config,
    task_of,
)
from llm_lightning.experiments.compiler import compile_model
from llm_lightning.experiments.devices import refuse_missing_device
from llm_lightning.experiments.hparams import best_tag, shown_settings
from llm_lightning.experiments.monitors import fill_modes, refuse_unknown
from llm_lightning.experiments.open_settings import take_from_run, take_from_weights, take_rate
from llm_lightning.experiments.plot_lr import plot_lr
from llm_lightning.experiments.precision import choose_precision
from llm_lightning.experiments.quarantine import write_bad_records
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.agreement import facts_of
from llm_lightning.experiments.ranks.counts import counts
from llm_lightning.experiments.ranks.launcher import is_main_process
from llm_lightning.experiments.ranks.meeting import compare_when_met
from llm_lightning.experiments.run_folder import RunFolder, leaving_nothing, open_run
from llm_lightning.experiments.run_records import COMMAND, PRUNED, Settings, Start, damaged_summary
from llm_lightning.experiments.settings.changes import refuse_changes
from llm_lightning.experiments.summary import build_summary, closing_lines, sample_words, write_summary
from llm_lightning.experiments.threads import divide_cores
from llm_lightning.files.atomic import write_atomically
from llm_lightning.tasks.base import TaskModule, batches_per_epoch, planned_steps
from llm_lightning.tasks.layout import Layout, layout_before, share, validation_every
from llm_lightning.terminal import say, say_lines
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import LoadedModel, load_model

log = logging.getLogger(__name__)


def train(settings: Settings, run_dir: Path, start: Start) -> float | None:
    """Build everything that `settings` name, fit it in `run_dir`, and return the best monitored metric.

    Args:
        settings: a checked configuration as nested dicts, every value resolved; open modes and `precision=auto` are
            filled in.
        start: how this session of the run was started.

    Raises:
        ValueError, OSError: if the settings, the data, a checkpoint or the disk are at fault.
    """
    settings["resume"] = None  # the run's location is not one of its settings
    trainer = settings["trainer"]
    refuse_missing_device(trainer["accelerator"])
    trainer["precision"] = choose_precision(trainer["precision"], trainer["accelerator"], trainer["devices"])
    fill_modes(settings)
    counts(trainer)  # refuses numbers that the launcher contradicts, before the data are read
    _quieten()
    try:
        if show := what_to_show(settings, start):
            with leaving_nothing(run_dir):
                show(settings, run_dir, start)
            return None
        with open_run(run_dir, settings) as run:
            if run.checkpoint is not None:
                keep_template(settings, run.header)
                take_from_run(settings, run.header)
                refuse_changes(run.header["config"], settings)
                whereabouts.refuse_other_parent(run, settings["init_from"])
            best_value = fit(settings, run, start, whereabouts.find_weights(settings, run, start))
            if is_main_process():
                (run.path / "traceback.txt").unlink(missing_ok=True)  # of an earlier session, which failed
            return best_value
    except MisconfigurationException as error:  # Lightning's error for conflicting settings
        raise ValueError(str(error)) from error


def fit(settings: Settings, run: RunFolder, start: Start, init_from: str | None) -> float | None:
    """Train, continuing from the folder's newest checkpoint if there is one, and write a summary.

    Args:
        init_from: the current place of the first weights.
    """
    started = time.monotonic()
    L.seed_everything(settings["seed"], workers=True, verbose=False)
    is_new = run.checkpoint is None  # else the checkpoint has everything: the first weights may be missing
    # Cast as they are read: both types of the weights together would take half as much memory again.
    parent = load_model(init_from, dtype=torch.float32) if init_from and is_new else None
    continued = None if is_new else {**run.header, "lineage": continued_lineage(run)}
    tokenizer, template = choose_tokenizer(settings, run, parent), template_before(run, parent)
    if parent is not None:
        take_from_weights(settings, parent.model.trunk.config, parent.tokenizer)
    make_data = partial(build_datamodule, settings, tokenizer, template=template)
    datamodule, data = whereabouts.read_data(settings, run, start, make_data)
    take_rate(settings, start.rates, task_of(settings), model_config(settings, task_of(settings), datamodule.tokenizer))
    module = build_module(settings, datamodule, parent, init_from, continued)
    lineage = module.header["lineage"]
    lineage["places"] = whereabouts.places_of(settings, run, lineage, data, init_from)
    del parent  # or its weights stay in memory, besides the cast ones
    if continued is not None:
        refuse_other_data(continued["lineage"]["data"], datamodule.data_digest)
    refuse_unknown(settings, module, datamodule)
    refuse_lost_adapters(settings, module)
    trainer = build_trainer(settings, run)
    share(trainer, datamodule, layout_of_run(run))
    divide_cores(trainer, datamodule.num_workers)
    refuse_validation_inside_a_window(trainer, batches_per_epoch(trainer, datamodule))
    if is_main_process():
        failures.forget(run.path)
        causes.forget(run.path)
        (run.path / PRUNED).unlink(missing_ok=True)
    total_steps = planned_steps(trainer, datamodule)
    module.check_plan(trainer, total_steps)
    if is_finished(run, trainer, total_steps):
        mend_adapter(run, lineage)
        return say_finished(settings, run, start)
    if is_main_process():
        run.write_config(settings)
        write_bad_records(run.path, datamodule.quarantined)
        command = start.record(lineage["places"], total_steps)
        write_atomically(run.path / COMMAND, json.dumps(command, indent=2) + "\n")
    announce(trainer, datamodule, module, run)
    for line in start.notes if is_main_process() else ():
        log.info(line)
    if settings["compile"]:
        compile_model(module, trainer)
    compare_when_met(trainer, run, partial(facts_of, settings, run, lineage))
    with refusing_damage(run.checkpoint):
        trainer.fit(module, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
    seconds = throughput.wall_seconds if throughput else time.monotonic() - started
    stopped = stopped_by(trainer, module.total_steps)
    if datamodule.test_samples:
        test_best(trainer, module, datamodule, run.checkpoints / "best.ckpt")
    if trainer.is_global_zero and not settings["trainer"]["fast_dev_run"]:
        conclude(run, trainer, module, start, seconds=seconds, stopped=stopped)
    kept = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
    return kept.best_value if kept is not None else None


def test_best(trainer: L.Trainer, module: TaskModule, datamodule: BaseDataModule, best: Path) -> None:
    """Measure the test split with the weights of `best`, or with the final ones if no best ones were kept."""
    trainer.strategy.barrier()  # until the first process has given the best checkpoint its name
    if best.is_file() and not module.is_sharded:
        module.load_trained(best)
    path = best if best.is_file() and module.is_sharded else None  # only the strategy can load sharded weights
    trainer.test(module, datamodule=datamodule, ckpt_path=path, weights_only=True, verbose=False)


def conclude(
    run: RunFolder,
    trainer: L.Trainer,
    module: TaskModule,
    start: Start,
    *,
    seconds: float,
    stopped: str | None,
) -> None:
    """Write the summary and the adapter, close the logs, and log the results."""
    write_adapter(run, module.header["lineage"])
    left_out = len(module.datamodule.quarantined)
    data = {**module.datamodule.report(), **({"quarantined": left_out} if left_out else {})}
    summary = build_summary(run, trainer, module, data=data, seconds=seconds, stopped=stopped)
    write_summary(run.path, summary)
    best = {best_tag(summary["monitor"]): summary["best_value"]} if summary["best_value"] is not None else {}
    shown = shown_settings(flat(module.header["config"]), module.task, start.overrides)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoard):
            logger.log_hyperparams(shown, best, step=trainer.global_step)
        logger.finalize("success")
    for line in closing_lines(summary, run.path, Path(start.folder)):
        log.info(line)


def refuse_other_data(before: str, now: str) -> None:
    """Refuse to continue on other data: they have changed under their name, or have another one."""
    if before != now:
        raise ValueError(
            f"cannot resume: the data that data.* names changed since the run began (digest {before}, now {now}); "
            "give the old data again, or start a new run under another run_name"
        )


def layout_of_run(run: RunFolder) -> Layout | None:
    """How the run shared the samples of an update when it wrote the checkpoint that it continues from."""
    if run.checkpoint is None:
        return None
    processes = 1
    if "layout" not in run.header:  # an earlier version: each process left its generators
        processes = len(checkpoints.load(run.checkpoint, mmap=True, opened=run.opened)["rng"])
    return layout_before(run.header, processes)


def refuse_validation_inside_a_window(trainer: L.Trainer, batches: int) -> None:
    """Refuse validation between the micro-batches of one update, where no checkpoint can be written."""
    window, every = trainer.accumulate_grad_batches, validation_every(trainer, batches)
    if window == 1 or every is None:
        return
    if every % window:
        raise ValueError(
            f"trainer.val_check_interval={trainer.val_check_interval} is every {every} batches, inside a window of "
            f"trainer.accumulate_grad_batches={window}; make it a multiple"
        )
    if trainer.check_val_every_n_epoch is None and batches % window:
        raise ValueError(
            f"an epoch has {batches} batches, not a multiple of trainer.accumulate_grad_batches={window}, so that "
            "validation counted across epochs would fall inside a window; set trainer.check_val_every_n_epoch=1"
        )


def is_finished(run: RunFolder, trainer: L.Trainer, total: int) -> bool:
    """Whether nothing is left to do: all steps are done, or what stopped the run early would stop it again."""
    if run.state(total) != "finished":
        return False
    if run.previous_summary["steps"] >= total or run.checkpoint is None:
        return True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return stays_stopped(checkpoints.load(run.checkpoint, mmap=True, opened=run.opened), callbacks)


def say_finished(settings: Settings, run: RunFolder, start: Start) -> float | None:
    """Print that the run is finished, and its results; change no file."""
    summary = run.previous_summary
    trainer = settings["trainer"]
    limits = f"trainer.max_epochs={trainer['max_epochs']} and trainer.max_steps={trainer['max_steps']}"
    try:
        if summary["steps"] >= summary["total_steps"]:
            why = f"it ends at the first of {limits}. To train on, raise the one that was reached."
        else:
            early = settings["callbacks"].get("early_stopping")
            patience = f"callbacks.early_stopping.patience={early['patience']}, or " if early else ""
            why = f"it was stopped early. To train on, raise {patience}the lower of {limits}."
        lines = closing_lines(summary, run.path, Path(start.folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # written by someone else or another version
        raise damaged_summary(run.path, f"it does not say what was reached: {error!r}") from error
    if is_main_process():
        say(f"This run is finished: {why}")
        say_lines(lines)
    return summary["best_value"]


def _quieten() -> None:
    """Silence advertisements, the list of absent accelerators, and advice meant for Lightning's authors."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What we log is summed over all processes already, and the first and the last step are logged at any interval; a
    # machine may have srun without being used by SLURM.
    advice = ".*smaller than the logging interval.*"
    frozen = r".*module\(s\) in eval mode at the start.*"  # the reference of preference tuning
    for message in (frozen, ".*LeafSpec.*", ".*sync_dist=True.*", advice, ".*`srun` command is available.*"):
        warnings.filterwarnings("ignore", message=message)


def what_to_show(settings: Settings, start: Start) -> Callable[[Settings, Path, Start], None] | None:
    """What to print or draw instead of training, if the settings ask for it."""
    for key, wanted, show in (
        ("data.preview", settings["data"].get("preview"), preview),
        ("plot_lr", settings.get("plot_lr"), preview_lr),
    ):
        if wanted and start.resume:
            raise ValueError(f"{key}=true shows what a new run would do; leave resume= or {key} out")
        if wanted:
            return show
    return None


def preview(settings: Settings, run_dir: Path, start: Start) -> None:
    """Show the first training samples as the model will see them."""
    say(read_new_data(settings).preview(3), colours=sys.stdout.isatty())


def preview_lr(settings: Settings, run_dir: Path, start: Start) -> None:
    """Draw the learning rate of every step of the run beside its folder."""
    datamodule = read_new_data(settings)
    take_rate(settings, start.rates, task_of(settings), model_config(settings, task_of(settings), datamodule.tokenizer))
    options = {**settings["trainer"], **counts(settings["trainer"])}
    trainer = build(options, logger=False, enable_checkpointing=False, enable_model_summary=False, _convert_="all")
    share(trainer, datamodule)
    steps, peak = planned_steps(trainer, datamodule), build_optimizer(settings["optimizer"]).lr
    say_lines(plot_lr(build(settings["scheduler"]), peak, steps, run_dir.parent / "lr.png"))


def template_before(run: RunFolder, parent: LoadedModel | None) -> dict[str, Any] | None:
    """The description of the template that a run had before, or that comes with its first weights."""
    header = run.header if run.checkpoint is not None else parent.header if parent else {}
    return template_in(header)


def keep_template(settings: Settings, header: Mapping[str, Any]) -> None:
    """Give an open `data.template` the value of a run of earlier versions, whose default was a name."""
    before = header["config"].get("data", {}).get("template")
    if before is not None and settings["data"].get("template", before) is None:
        settings["data"]["template"] = before


def read_new_data(settings: Settings) -> BaseDataModule:
    """The data of a run that has not begun."""
    parent = load_model(settings["init_from"]) if settings["init_from"] else None
    template = template_in(parent.header) if parent else None
    if parent is not None:
        take_from_weights(settings, parent.model.trunk.config, parent.tokenizer)
    tokenizer = choose_tokenizer(settings, parent=parent)
    return build_datamodule(settings, tokenizer, settings["data"], template=template)


def announce(trainer: L.Trainer, datamodule: Any, module: TaskModule, run: RunFolder) -> None:
    """Log the data, precision, model, batch and steps before training."""
    if not trainer.is_global_zero:
        return
    steps = planned_steps(trainer, datamodule)
    accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
    effective = datamodule.batch_size * accumulate * world
    log.info("Data: %s", datamodule.describe())
    log.info("Precision: %s", trainer.precision)
    total = sum(parameter.numel() for parameter in module.model.parameters())
    trained = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    share = f", {trained:,} of them trained" if trained < total else ""
    log.info("Model: %s parameters%s, vocabulary %s", f"{total:,}", share, module.trunk.config.vocab_size)
    log.info(
        "Batch: %d a step = %d samples x %d accumulated x %d processes; %d steps",
        effective,
        datamodule.batch_size,
        accumulate,
        world,
        steps,
    )
    for split, facts in datamodule.sampled(trainer).items():
        log.info("Limited evaluation: a fixed sample, %s", sample_words(split, facts))
    if run.checkpoint is not None:
        log.info("Resuming from %s", run.checkpoint)
    elif run.began:
        log.info("Starting again from step 0: the earlier run in %s left no checkpoint", run.path)
