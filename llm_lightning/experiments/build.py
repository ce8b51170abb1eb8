"""The parts of a run, built from its settings: data, tokenizer, model, task and Trainer.

`settings` are nested dicts with every value resolved, as in config.yaml and the checkpoints' headers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_object, instantiate
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from llm_lightning.callbacks.checkpoints import VerifiedCheckpointIO
from llm_lightning.callbacks.core_waits import CoreWaits
from llm_lightning.callbacks.exact_resume import ExactResume
from llm_lightning.callbacks.signals import Signals
from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.conversations import ConversationDataModule
from llm_lightning.data.packing import may_share_prefix
from llm_lightning.data.templates.choose import template_in
from llm_lightning.experiments.adapters import adapter_lineage
from llm_lightning.experiments.monitors import missing_mode
from llm_lightning.experiments.ranks.counts import counts
from llm_lightning.experiments.ranks.environments import environments
from llm_lightning.experiments.ranks.heartbeat import Heartbeat
from llm_lightning.experiments.ranks.supervisor import refuse_other_size
from llm_lightning.experiments.run_folder import RunFolder
from llm_lightning.experiments.run_records import Settings
from llm_lightning.experiments.whereabouts import OtherDataError, lasting_name
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import merge_and_unload
from llm_lightning.models.surgery import adapt, config_for, with_head_of
from llm_lightning.optim.base import OptimizerConfig
from llm_lightning.optim.torch_optim import TorchOptimConfig
from llm_lightning.tasks.base import TaskModule
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.build import build_tokenizer, from_description
from llm_lightning.weights.load import LoadedModel

TRAINED_TOKENIZERS = ("bpe", "word")
LEAVE_FILES = ("Checkpoints", "Plots", "Samples", "Responses")
"""Callbacks that `trainer.fast_dev_run` leaves out."""

log = logging.getLogger(__name__)


def build(node: Mapping[str, Any], **arguments: Any) -> Any:
    """Hydra's `instantiate` of a resolved node, but raising the constructor's own error, not Hydra's wrapper.

    Raises:
        ValueError: also if a foreign class needs a missing package or rejects its arguments.
    """
    target = str(node.get("_target_"))
    try:
        return instantiate(_escaped(node), **arguments)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ImportError):  # such as the logger of an online service
            raise ValueError(f"{target} needs a package that is not installed: {cause}") from cause
        is_foreign = target.startswith(("lightning.", "torchmetrics.", "torch."))  # it checks few of its arguments
        if is_foreign and isinstance(cause, (TypeError, AttributeError, KeyError)):
            raise ValueError(f"{target} cannot be built with these arguments: {cause}") from cause
        raise cause from None


def _escaped(value: Any) -> Any:
    """A resolved value with every `${` escaped, because it is text."""
    if isinstance(value, Mapping):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def build_datamodule(
    settings: Settings,
    tokenizer: Any,
    data: Mapping[str, Any],
    digest: str | None = None,
    *,
    template: Mapping[str, Any] | None = None,
) -> BaseDataModule:
    """The data module, built: read, checked and tokenised.

    Args:
        tokenizer: from `choose_tokenizer`.
        data: the settings of `data`, with the current values of the paths in them.
        digest: the digest that the data must have.
        template: the description of the model's own template, from `template_in`.

    Raises:
        OtherDataError: if the data are known to have another digest before they are read.
    """
    options = {key: value for key, value in data.items() if key != "preview"}
    if "template" in options:
        options["own_template"] = template
    if "packing" in options:
        options["share_prefix"] = may_share_prefix(settings["model"], settings.get("lora"))
    datamodule: BaseDataModule = build(
        options,
        tokenizer=tokenizer,
        context_length=settings["model"]["context_length"],
        seed=settings["seed"],
        _convert_="all",
    )
    if digest is not None and datamodule.digest_of_source() not in (None, digest):
        raise OtherDataError("other data")
    datamodule.build()
    return datamodule


def choose_tokenizer(settings: Settings, run: RunFolder | None = None, parent: LoadedModel | None = None) -> Any:
    """A tokenizer, or a function that trains one on texts; a checkpoint or given weights bring their own."""
    name, vocab_size = settings["tokenizer"]["name"], settings["tokenizer"].get("vocab_size")
    if run is not None and run.checkpoint is not None:
        return from_description(run.header["tokenizer"])
    if parent is not None:
        return parent.tokenizer
    if name in TRAINED_TOKENIZERS:
        return partial(_train_tokenizer, name, vocab_size)
    return build_tokenizer(name, vocab_size=vocab_size)


def _train_tokenizer(name: str, vocab_size: int | None, texts: Any) -> Tokenizer:
    return build_tokenizer(name, vocab_size=vocab_size, texts=texts)


def build_module(
    settings: Settings,
    datamodule: BaseDataModule,
    parent: LoadedModel | None,
    init_from: str | None,
    continued: Mapping[str, Any] | None = None,
) -> TaskModule:
    """The task's module around its model; its header describes the run in checkpoints and the summary.

    Args:
        parent: the first weights.
        init_from: their current place; the settings have it as it was typed.
        continued: the header of the checkpoint that the run continues from; Lightning loads its weights.
    """
    task = task_of(settings)
    options = {key: value for key, value in settings["task"].items() if key != "_target_"}
    options |= task.options_from(datamodule)
    trunk = build_model(settings, task, datamodule.tokenizer, parent, continued)
    model: GPT | Classifier = trunk
    if parent and isinstance(parent.model, Classifier) and options.get("labels") == parent.labels:
        log.info("The head comes with the weights of init_from: the classes are the same")
        model = with_head_of(parent.model, trunk, pooling=options["pooling"], causal=options["causal"])
    lora = build(settings["lora"]) if settings.get("lora") else None
    if continued is not None:
        lineage = continued["lineage"]
    else:
        lineage = {
            "data": datamodule.data_digest,
            "parent": parent.header["digest"] if parent else None,
            "parent_name": lasting_name(init_from, parent) if parent and init_from else None,
            **(adapter_lineage(model, parent) if parent and lora is not None else {"base": None}),
            **({"parent_files": files} if (files := _header_of(parent).get("lineage", {}).get("files")) else {}),
        }
    # Not through instantiate(), which would build the targets in the header's copy of the settings.
    return task(
        model=model,
        tokenizer=datamodule.tokenizer,
        optimizer=build_optimizer(settings["optimizer"]),
        scheduler=build(settings["scheduler"]),
        lora=lora,
        header={"config": settings, "lineage": lineage, **_chat_of(datamodule, continued or _header_of(parent))},
        **options,
    )


def _chat_of(datamodule: BaseDataModule, before: Mapping[str, Any]) -> dict[str, Any]:
    """The template of the data, else that of the weights, and what the weights state about generation."""
    template = datamodule.template.describe() if isinstance(datamodule, ConversationDataModule) else template_in(before)
    stated = {"template": template, "generation": before.get("generation")}
    return {key: value for key, value in stated.items() if value}


def _header_of(parent: LoadedModel | None) -> dict[str, Any]:
    return parent.header if parent is not None else {}


def task_of(settings: Settings) -> type[TaskModule]:
    """The class of the task."""
    task: type[TaskModule] = get_class(settings["task"]["_target_"])
    return task


def build_optimizer(node: Mapping[str, Any]) -> OptimizerConfig:
    """The settings of an optimizer: a class of ours, or the arguments of a class of torch.optim."""
    named = get_object(node["_target_"])
    if isinstance(named, type) and issubclass(named, torch.optim.Optimizer):
        return TorchOptimConfig.of(named, node)
    config: OptimizerConfig = build(node)
    return config


def build_model(
    settings: Settings,
    task: type[TaskModule],
    tokenizer: Tokenizer,
    parent: LoadedModel | None,
    continued: Mapping[str, Any] | None = None,
) -> GPT:
    """A new GPT, or one with the weights of `parent`, adapters merged.

    With `continued`, the header of a checkpoint, the model has the checkpoint's sizes.
    """
    chosen = settings["model"]
    wanted, checkpointing = model_config(settings, task, tokenizer), chosen["activation_checkpointing"]
    if parent is None:
        if continued is not None and settings["init_from"]:
            wanted = config_for(GPTConfig(**continued["model"]), wanted, keep_head=task.uses_lm_head)
        return GPT(wanted, init=chosen["init"], activation_checkpointing=checkpointing)
    if isinstance(parent.model, Classifier) and task.uses_lm_head:
        raise ValueError(f"init_from={settings['init_from']} is a classifier without a language-model head; give a GPT")
    trunk = merge_and_unload(parent.model).trunk
    return adapt(trunk, wanted, activation_checkpointing=checkpointing, keep_head=task.uses_lm_head)


def model_config(settings: Settings, task: type[TaskModule], tokenizer: Tokenizer) -> GPTConfig:
    """The architecture that the settings of the model describe."""
    chosen = settings["model"]
    sizes = {field.name: chosen[field.name] for field in fields(GPTConfig) if field.name in chosen}
    sizes["vocab_size"] = _vocabulary(chosen["vocab_size"], tokenizer)
    if not task.uses_lm_head:
        sizes["tied_head"] = True  # costs nothing
    return GPTConfig(**sizes)


def _vocabulary(wanted: int | None, tokenizer: Tokenizer) -> int:
    if wanted is not None and wanted < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            "leave it null, or raise it"
        )
    return wanted or tokenizer.vocab_size


def build_trainer(settings: Settings, run: RunFolder) -> L.Trainer:
    """The Trainer with our checkpoints, callbacks and loggers."""
    nodes = [node for node in settings["callbacks"].values() if node is not None]
    first = [Heartbeat(run.path, settings["allow_targets"]), ExactResume(), Signals(), CoreWaits()]
    callbacks = [*first, *(build(node, **missing_mode(settings, node)) for node in nodes)]
    if settings["trainer"]["fast_dev_run"]:  # one batch of everything leaves no files
        callbacks = [callback for callback in callbacks if type(callback).__name__ not in LEAVE_FILES]
    ours = {"run_dir": run.path, "resumed_step": run.header["step"] if run.checkpoint else 0}
    loggers = [
        build(logger, **ours if logger["_target_"].startswith("llm_lightning.") else {})
        for logger in settings["logger"].values()
        if logger is not None
    ]
    trainer: L.Trainer = build(
        {**settings["trainer"], **counts(settings["trainer"])},
        default_root_dir=run.path,
        callbacks=callbacks,
        logger=loggers,
        plugins=[VerifiedCheckpointIO(run.opened), *environments()],
        enable_checkpointing=False,  # Checkpoints does it
        enable_model_summary=False,
        _convert_="all",
    )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # whatever chose it: a class, a notebook
        raise ValueError("trainer.strategy trains in processes that return nothing; use trainer.strategy=ddp")
    leave_requeueing_to_signals(trainer)
    refuse_other_size(trainer.world_size)
    return trainer


def leave_requeueing_to_signals(trainer: L.Trainer) -> None:
    """Turn off Lightning's own requeueing, which writes a second checkpoint and requeues what was cancelled."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False
