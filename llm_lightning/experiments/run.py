"""One run: from the composed configuration to a trained model and its run folder."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from llm_lightning.callbacks.checkpoints import Checkpoints, VerifiedCheckpointIO
from llm_lightning.callbacks.endings import stays_stopped, stopped_by
from llm_lightning.callbacks.exact_resume import ExactResume, refusing_damage
from llm_lightning.callbacks.run_logs import TensorBoard
from llm_lightning.callbacks.signals import Signals
from llm_lightning.callbacks.throughput import Throughput
from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.conversations import may_share_prefix
from llm_lightning.experiments.adapters import (
    adapter_lineage,
    continued_lineage,
    mend_adapter,
    refuse_lost_adapters,
    write_adapter,
)
from llm_lightning.experiments.foreign import COMMAND, damaged_summary
from llm_lightning.experiments.monitors import fill_modes, refuse_unknown
from llm_lightning.experiments.run_folder import RunFolder, is_main_process, leaving_nothing, open_run
from llm_lightning.experiments.settings.checks import refuse_changes
from llm_lightning.experiments.settings.ignored import ignored_settings
from llm_lightning.experiments.summary import build_summary, closing_lines, sample_words, write_summary
from llm_lightning.experiments.whereabouts import (
    OtherDataError,
    find_weights,
    places_of,
    read_data,
    refuse_other_parent,
)
from llm_lightning.files.atomic import write_atomically
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import merge_and_unload
from llm_lightning.tasks.base import TaskModule, batches_per_epoch, total_steps
from llm_lightning.terminal import say, say_lines
from llm_lightning.tokenizers import Tokenizer, build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import LoadedModel, load_model, rebuild_model

log = logging.getLogger(__name__)

TRAINED_TOKENIZERS = ("bpe", "word")


def train(cfg: DictConfig, run_dir: Path, command: Mapping[str, Any]) -> float | None:
    """Build everything that `cfg` names, fit it in `run_dir`, and return the best monitored metric.

    `command` is what was typed, and where; it is kept for `resume=FOLDER`.

    Raises:
        ValueError, OSError: for whatever is wrong with the settings, the data, a checkpoint or the disk.
    """
    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings["resume"] = None  # where the run lies now is no setting of it
    settings["trainer"]["precision"] = choose_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    fill_modes(cfg, settings)
    _quieten()
    try:
        if cfg.data.preview and cfg.resume:
            raise ValueError("data.preview=true shows the data of a new run; leave resume= or data.preview out")
        if cfg.data.preview:
            with leaving_nothing(run_dir):
                preview(cfg)
            return None
        with open_run(run_dir, settings) as run:
            if run.checkpoint is not None:
                refuse_changes(run.header["config"], settings)
                refuse_other_parent(run, settings["init_from"])
            find_weights(cfg, run)
            best_value = fit(cfg, settings, run, command)
            if is_main_process():
                (run.path / "traceback.txt").unlink(missing_ok=True)  # of an earlier session, which failed
            return best_value
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise ValueError(str(error)) from error


def fit(cfg: DictConfig, settings: dict[str, Any], run: RunFolder, command: Mapping[str, Any]) -> float | None:
    """Train, from the folder's newest checkpoint on if there is one, and leave a summary."""
    started = time.monotonic()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    # A run that continues has all it needs in its own checkpoint: the first weights may be gone, or trained on.
    parent = load_model(run.checkpoint or cfg.init_from) if cfg.init_from else None
    lineage: dict[str, Any] | None = None
    if run.checkpoint is not None:
        lineage = continued_lineage(run.header, parent)
        if parent is not None:
            parent.header["digest"] = lineage["parent"]
    datamodule = read_data(cfg, run, partial(build_datamodule, cfg, parent))
    module = build_module(cfg, settings, datamodule, parent, lineage)
    module.header["lineage"]["places"] = places = places_of(cfg, settings, run, module.header["lineage"])
    del parent  # or its weights stay, beside those that are cast
    if run.checkpoint is not None:
        refuse_other_data(run.header["lineage"]["data"], datamodule.data_digest)
    refuse_unknown(cfg, module, datamodule)
    refuse_lost_adapters(cfg, module)
    trainer = build_trainer(cfg, settings, run)
    refuse_validation_inside_a_window(trainer, batches_per_epoch(trainer, datamodule))
    if is_finished(run, trainer, total_steps(trainer, datamodule)):
        mend_adapter(run, module.header["lineage"])
        return say_finished(cfg, run)
    if is_main_process():
        run.write_config(settings)
        write_atomically(run.path / COMMAND, json.dumps({**command, "places": places}, indent=2) + "\n")
    announce(trainer, datamodule, module, run)
    say_ignored(cfg, settings, command)
    if cfg.compile:
        module.compile_model()
    with refusing_damage(run.checkpoint):
        trainer.fit(module, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
    throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
    seconds = throughput.wall_seconds if throughput else time.monotonic() - started
    stopped = stopped_by(trainer, module.total_steps)
    if datamodule.test_samples:
        test_best(trainer, module, datamodule, run.checkpoints / "best.ckpt")
    if trainer.is_global_zero and not cfg.trainer.fast_dev_run:
        conclude(run, trainer, module, datamodule, seconds=seconds, stopped=stopped)
    kept = next((c for c in trainer.callbacks if isinstance(c, Checkpoints)), None)  # type: ignore[attr-defined]
    return kept.best_value if kept is not None else None


def say_ignored(cfg: DictConfig, settings: dict[str, Any], command: Mapping[str, Any]) -> None:
    """Name what was typed and has no effect, a line each."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    for line in ignored_settings(settings, raw, command["overrides"]) if is_main_process() else ():
        log.info(line)


def test_best(trainer: L.Trainer, module: TaskModule, datamodule: BaseDataModule, best: Path) -> None:
    """Measure the test split with the weights of `best`, or with those of the end if no best ones were kept."""
    trainer.strategy.barrier()  # until the first process has given the best checkpoint its name
    if best.is_file() and not module.is_sharded:
        module.load_trained(best)
    path = best if best.is_file() and module.is_sharded else None  # only the strategy can load sharded weights
    trainer.test(module, datamodule=datamodule, ckpt_path=path, weights_only=True, verbose=False)


def conclude(
    run: RunFolder,
    trainer: L.Trainer,
    module: TaskModule,
    datamodule: BaseDataModule,
    *,
    seconds: float,
    stopped: str | None,
) -> None:
    """Write the summary and the adapter alone, close the logs, and say what was reached."""
    write_adapter(run, module.header["lineage"])
    summary = build_summary(run, trainer, module, data=datamodule.report(), seconds=seconds, stopped=stopped)
    write_summary(run.path, summary)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoard):
            logger.log_hyperparams(module.header["config"], summary["metrics"], step=trainer.global_step)
        logger.finalize("success")
    for line in closing_lines(summary, run.path):
        log.info(line)


def refuse_other_data(before: str, now: str) -> None:
    """Refuse to continue on a text that has changed under its name."""
    if before != now:
        raise ValueError(
            f"cannot resume: the text of data.* changed since the run began (digest {before}, now {now}); "
            "put the old text back, or start a new run under another run_name"
        )


def refuse_validation_inside_a_window(trainer: L.Trainer, batches: int) -> None:
    """Refuse validation between the micro-batches of one update, where no checkpoint can be written."""
    window, interval = trainer.accumulate_grad_batches, trainer.val_check_interval
    if window == 1 or interval in (None, 1.0):
        return
    every = interval if isinstance(interval, int) else max(1, int(batches * interval))
    if every % window:
        raise ValueError(
            f"trainer.val_check_interval={interval} is every {every} batches, inside a window of "
            f"trainer.accumulate_grad_batches={window}; make it a multiple"
        )
    if trainer.check_val_every_n_epoch is None and batches % window:
        raise ValueError(
            f"an epoch has {batches} batches, no multiple of trainer.accumulate_grad_batches={window}, so that "
            "validation counted across epochs would fall inside a window; set trainer.check_val_every_n_epoch=1"
        )


def is_finished(run: RunFolder, trainer: L.Trainer, total: int) -> bool:
    """Whether there is nothing to do: the last step was made, or what ended the run before it would do so again."""
    if run.state(total) != "finished":
        return False
    if run.previous_summary["steps"] >= total or run.checkpoint is None:
        return True
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return stays_stopped(checkpoints.load(run.checkpoint, mmap=True), callbacks)


def say_finished(cfg: DictConfig, run: RunFolder) -> float | None:
    """Say that there is nothing to do, and what was reached; leave every file as it is."""
    summary = run.previous_summary
    limits = f"trainer.max_epochs={cfg.trainer.max_epochs} and trainer.max_steps={cfg.trainer.max_steps}"
    try:
        if summary["steps"] >= summary["total_steps"]:
            why = f"it ends at the first of {limits}. To train on, raise the one that was reached."
        else:
            early = cfg.callbacks.get("early_stopping")
            patience = f"callbacks.early_stopping.patience={early.patience}, or " if early else ""
            why = f"it was stopped early. To train on, raise {patience}the lower of {limits}."
        lines = closing_lines(summary, run.path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of someone else's, or another version's
        raise damaged_summary(run.path, f"it does not say what was reached: {error!r}") from error
    say(f"This run is finished: {why}")
    say_lines(lines)
    return summary["best_value"]


def _quieten() -> None:
    """No advertisements, no list of absent accelerators, no advice that is meant for Lightning's authors."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*LeafSpec.*", ".*sync_dist=True.*"):  # what we log is summed over all processes already
        warnings.filterwarnings("ignore", message=message)


def build(node: DictConfig | dict[str, Any], **arguments: Any) -> Any:
    """`instantiate`, but with the error of the constructor itself, not Hydra's around it.

    Raises:
        ValueError: also where a package is missing that a class of others needs, or arguments do not suit it.
    """
    target = str(node.get("_target_"))
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ImportError):  # a logger of a service
            raise ValueError(f"{target} needs a package that is not installed: {cause}") from cause
        is_foreign = target.startswith(("lightning.", "torchmetrics."))  # it checks few of its arguments
        if is_foreign and isinstance(cause, (TypeError, AttributeError, KeyError)):
            raise ValueError(f"{target} cannot be built with these arguments: {cause}") from cause
        raise cause from None


def preview(cfg: DictConfig) -> None:
    """Show the first training samples as the model will see them."""
    datamodule = build_datamodule(cfg, load_model(cfg.init_from) if cfg.init_from else None)
    say(datamodule.preview(3), colours=sys.stdout.isatty())


def build_datamodule(cfg: DictConfig, parent: LoadedModel | None, digest: str | None = None) -> BaseDataModule:
    """The data module, built: read, checked and tokenised.

    Raises:
        OtherDataError: if it can tell beforehand that the data has not the given digest.
    """
    options = {key: value for key, value in cfg.data.items() if key != "preview"}
    if "packing" in options:
        options["share_prefix"] = may_share_prefix(cfg.model, cfg.get("lora"))
    datamodule: BaseDataModule = build(
        options,
        tokenizer=choose_tokenizer(cfg, parent),
        context_length=cfg.model.context_length,
        seed=cfg.seed,
        _convert_="all",
    )
    if digest is not None and datamodule.digest_of_source() not in (None, digest):
        raise OtherDataError("other data")
    datamodule.build()
    return datamodule


def choose_tokenizer(cfg: DictConfig, parent: LoadedModel | None) -> Any:
    """A tokenizer, or a function that trains one on texts. Weights bring their own."""
    name, vocab_size = cfg.tokenizer.name, cfg.tokenizer.get("vocab_size")
    if parent is not None:
        own = parent.tokenizer.describe()["name"]
        if own != name:
            log.info("Tokenizer %s comes with the weights of init_from; tokenizer=%s is ignored", own, name)
        return parent.tokenizer
    if name in TRAINED_TOKENIZERS:
        return partial(_train_tokenizer, name, vocab_size)
    return build_tokenizer(name, vocab_size=vocab_size)


def _train_tokenizer(name: str, vocab_size: int | None, texts: Any) -> Tokenizer:
    return build_tokenizer(name, vocab_size=vocab_size, texts=texts)


def build_module(
    cfg: DictConfig,
    settings: dict[str, Any],
    datamodule: BaseDataModule,
    parent: LoadedModel | None,
    lineage: dict[str, Any] | None = None,
) -> TaskModule:
    """The task's module around its model; its header is what checkpoints and summary say of the run.

    `lineage` is that of a run which continues: `parent` is then the run's own checkpoint.
    """
    task: type[TaskModule] = get_class(cfg.task._target_)
    options = {key: value for key, value in settings["task"].items() if key != "_target_"}
    if "reference" in options:
        options["reference"] = cfg.task.reference  # where it is now
    options |= task.options_from(datamodule)
    trunk = build_model(cfg, task, datamodule.tokenizer, parent)
    model: GPT | Classifier = trunk
    if parent and isinstance(parent.model, Classifier) and options.get("labels") == parent.labels:
        model = with_head_of(parent, trunk, options)
    lora = build(cfg.lora) if cfg.get("lora") else None
    if lineage is None:
        lineage = {
            "data": datamodule.data_digest,
            "parent": parent.header["digest"] if parent else None,
            "parent_name": _place(cfg.init_from) if parent else None,
            **(adapter_lineage(model, parent) if parent and lora is not None else {"base": None}),
        }
    header = {"config": settings, "lineage": lineage}
    # Not through instantiate(): it would look for targets to build inside the header's copy of the settings.
    return task(
        model=model,
        tokenizer=datamodule.tokenizer,
        optimizer=build(cfg.optimizer),
        scheduler=build(cfg.scheduler),
        lora=lora,
        header=header,
        **options,
    )


def build_model(cfg: DictConfig, task: type[TaskModule], tokenizer: Tokenizer, parent: LoadedModel | None) -> GPT:
    """A fresh GPT, or one with the weights of `parent`, adapters merged."""
    chosen = {field.name: cfg.model[field.name] for field in fields(GPTConfig) if field.name in cfg.model}
    chosen["vocab_size"] = _vocabulary(cfg.model.vocab_size, tokenizer)
    if not task.uses_lm_head:
        chosen["tied_head"] = True  # costs nothing
    if parent is None:
        return GPT(
            GPTConfig(**chosen),
            init=cfg.model.init,
            activation_checkpointing=cfg.model.activation_checkpointing,
        )
    if isinstance(parent.model, Classifier) and task.uses_lm_head:
        raise ValueError(f"init_from={cfg.init_from} is a classifier without a language-model head; give a GPT")
    return adapt(
        merge_and_unload(parent.model).trunk, GPTConfig(**chosen), cfg.model.activation_checkpointing, task.uses_lm_head
    )


def with_head_of(parent: LoadedModel, trunk: GPT, options: Mapping[str, Any]) -> Classifier:
    """`trunk` with the head of a classifier of the same classes, which is then trained on."""
    log.info("The head comes with the weights of init_from: the classes are the same")
    classifier = Classifier(trunk, len(parent.labels), pooling=options["pooling"], causal=options["causal"])
    classifier.head.load_state_dict(parent.classifier.head.state_dict())
    return classifier


def adapt(model: GPT, wanted: GPTConfig, activation_checkpointing: bool, keep_head: bool = True) -> GPT:
    """`model` with the dropouts and the (at most as long) context of `wanted`; the rest comes with the weights.

    Without `keep_head` the language-model head is left behind.

    Raises:
        ValueError: if the wanted context is longer than the weights have positions for.
    """
    own = model.config
    if wanted.context_length > own.context_length:
        raise ValueError(
            f"model.context_length={wanted.context_length} exceeds the {own.context_length} positions of the weights "
            f"in init_from; set model.context_length={own.context_length} or less"
        )
    if wanted.context_length < own.context_length:
        log.info("model.context_length=%d cuts the %d of the weights", wanted.context_length, own.context_length)
    kept = ["vocab_size", "n_layer", "n_head", "n_embd", "qkv_bias", "layer_norm_eps"]
    is_untied = keep_head and own.tied_head and not wanted.tied_head
    if is_untied:
        log.info("model.tied_head=false: the head starts as a copy of the token embedding")
    elif keep_head:
        kept.append("tied_head")
    for name in kept[1:]:
        if getattr(own, name) != getattr(wanted, name):
            log.info(
                "model.%s=%s is ignored: the weights of init_from have %s",
                name,
                getattr(wanted, name),
                getattr(own, name),
            )
    config = replace(wanted, **{name: getattr(own, name) for name in kept})
    state = dict(model.state_dict())
    state["position_embedding.weight"] = state["position_embedding.weight"][: config.context_length].clone()
    if not keep_head:
        state["lm_head.weight"] = state["token_embedding.weight"]
    if is_untied:
        state["lm_head.weight"] = state["token_embedding.weight"].clone()
    adapted = rebuild_model({"model": asdict(config)}, {name: tensor.float() for name, tensor in state.items()})
    assert isinstance(adapted, GPT)
    adapted.activation_checkpointing = activation_checkpointing
    return adapted.train()


def _place(init_from: str) -> str:
    """Where weights are, in words that mean the same from any folder."""
    return str(Path(init_from).absolute()) if Path(init_from).exists() else str(init_from)


def _vocabulary(wanted: int | None, tokenizer: Tokenizer) -> int:
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "leave it null, or raise it"
        )
    return wanted or tokenizer.vocab_size


def build_trainer(cfg: DictConfig, settings: dict[str, Any], run: RunFolder) -> L.Trainer:
    """The Trainer with our checkpoints, callbacks and loggers."""
    fast = bool(cfg.trainer.fast_dev_run)
    callbacks = [ExactResume(), Signals()] + [build(c) for c in cfg.callbacks.values() if c is not None]
    if fast:  # one batch of everything leaves no files
        callbacks = [c for c in callbacks if type(c).__name__ not in ("Checkpoints", "Plots", "Samples", "Responses")]
    ours = {"run_dir": run.path, "resumed_step": run.header["step"] if run.checkpoint else 0}
    loggers = [
        build(logger, **ours if logger._target_.startswith("llm_lightning.") else {})
        for logger in cfg.logger.values()
        if logger is not None
    ]
    options = {key: value for key, value in cfg.trainer.items() if key != "precision"}
    trainer: L.Trainer = build(
        options,
        precision=settings["trainer"]["precision"],
        default_root_dir=run.path,
        callbacks=callbacks,
        logger=loggers,
        plugins=[VerifiedCheckpointIO()],
        enable_checkpointing=False,  # Checkpoints does it
        enable_model_summary=False,
        _convert_="all",
    )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # whatever chose it: a class, a notebook
        raise ValueError("trainer.strategy trains in processes that hand nothing back; use trainer.strategy=ddp")
    return trainer


def choose_precision(setting: str, accelerator: str) -> str:
    """Resolve `auto`: bf16 with fp32 master weights where the hardware multiplies it faster, fp32 elsewhere."""
    if setting != "auto":
        return setting
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        fast = False  # bf16 saves memory there, but was measured slower
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if fast else "32-true"


def announce(trainer: L.Trainer, datamodule: Any, module: TaskModule, run: RunFolder) -> None:
    """Say what is about to happen, in a few lines."""
    if not trainer.is_global_zero:
        return
    steps = total_steps(trainer, datamodule)
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
