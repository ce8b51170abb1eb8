"""The base weights of a run's adapters, identified by their digest, and `adapter.ckpt`, the adapter alone.

An adapter belongs to the weights it was trained on; its file records their digest as `lineage.base`. The digest is
computed once, at the start of the run, and passed from checkpoint to checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llm_lightning.experiments.ranks.launcher import is_main_process
from llm_lightning.experiments.run_folder import RunFolder
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT
from llm_lightning.models.lora import merge_and_unload
from llm_lightning.tasks.base import TaskModule
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.adapters import save_adapter
from llm_lightning.weights.digests import base_digest, digest_under
from llm_lightning.weights.load import LoadedModel, load_model, resolve

ADAPTER = "adapter.ckpt"
EXACT = ("32-true", "64-true", "16-mixed")
"""Precisions whose checkpoints hold the frozen weights unchanged; others round them."""

log = logging.getLogger(__name__)


def adapter_lineage(model: GPT | Classifier, parent: LoadedModel) -> dict[str, Any]:
    """Digests of the weights under a run's adapters, and of the file that they came from."""
    return {"base": base_digest(model), "base_of": parent.header["digest"]}


def continued_lineage(run: RunFolder) -> dict[str, Any]:
    """The lineage of a continued run, with the true base of its adapters.

    Earlier versions recorded the run's own weights as the base whenever it continued, and wrote no `base_of`: only
    then is the checkpoint loaded here.
    """
    header = run.header
    lineage = dict(header["lineage"])
    lineage.setdefault("base", None)
    began_with_weights = header["config"].get("init_from") is not None
    if run.checkpoint is None or not (header.get("lora") and began_with_weights) or lineage.get("base_of") is not None:
        return lineage
    frozen = base_digest(load_model(run.checkpoint).model)
    if header["config"]["trainer"]["precision"] in EXACT:
        lineage["base"] = frozen
    elif frozen != lineage["base"]:
        lineage["base"] = _digest_of_parent(header) or lineage["base"]
    return lineage | {"base_of": lineage["parent"]}


def _digest_of_parent(header: Mapping[str, Any]) -> str | None:
    """The digest of the weights that the run started from; None, with a warning, if they are missing or changed."""
    lineage = header["lineage"]
    try:
        parent = load_model(lineage["parent_name"])
        if parent.header["digest"] != lineage["parent"]:
            raise ValueError("they have changed since")
    except (OSError, ValueError) as error:
        log.warning(
            "The adapter of this run may be refused: its checkpoint is of an earlier version, and the weights of %s, "
            "which it belongs to, cannot be read (%s)",
            lineage["parent_name"],
            error,
        )
        return None
    return digest_under(dict(header), merge_and_unload(parent.model).trunk)


def refuse_lost_adapters(settings: dict[str, Any], module: TaskModule) -> None:
    """Refuse to train adapters that no checkpoint would keep.

    Raises:
        ValueError: if `callbacks.checkpoints` is null and adapters are trained on given weights.
    """
    kept = settings["callbacks"].get("checkpoints") is not None or settings["trainer"]["fast_dev_run"]
    if module.lora is not None and module.header["lineage"]["base"] is not None and not kept:
        raise ValueError(
            "callbacks.checkpoints=null keeps nothing of the adapters that lora trains; leave it out, or set lora=none"
        )


def write_adapter(run: RunFolder, lineage: Mapping[str, Any]) -> None:
    """Write `adapter.ckpt`, the best adapter alone, if the base of the run's adapters is known."""
    source = resolve(run.path)
    if lineage["base"] is not None and source is not None:
        save_adapter(source, run.checkpoints / ADAPTER, lineage)


def mend_adapter(run: RunFolder, lineage: Mapping[str, Any]) -> None:
    """Rewrite the adapter of a finished run if it is damaged, or an earlier version wrote it for other weights."""
    target = run.checkpoints / ADAPTER
    if lineage["base"] is None or not target.is_file() or not is_main_process():
        return
    try:
        is_right = checkpoints.read_header(target)["base"] == lineage["base"]
    except (checkpoints.CheckpointError, KeyError):
        is_right = False
    if not is_right:
        write_adapter(run, lineage)
        log.info("%s could not be loaded, and is written again", target)
