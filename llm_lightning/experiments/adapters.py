"""The weights under the adapters of a run, recognised by their digest, and `adapter.ckpt`, the adapter alone.

An adapter belongs to the weights that it was trained on; its file names them by their digest, `lineage.base`. The
digest is computed once, at the start of the run, and passed on from checkpoint to checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llm_lightning.experiments.run_folder import RunFolder, is_main_process
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
"""Precisions in which a checkpoint holds the frozen weights unchanged; in others they are rounded."""

log = logging.getLogger(__name__)


def adapter_lineage(model: GPT | Classifier, parent: LoadedModel) -> dict[str, Any]:
    """The weights under the adapters of a run: their digest, and that of the file they came from."""
    return {"base": base_digest(model), "base_of": parent.header["digest"]}


def continued_lineage(run: RunFolder) -> dict[str, Any]:
    """The lineage of a run that continues, with the base that its adapters really have.

    Earlier versions took the run's own weights for the base whenever it continued, and did not write `base_of`: only
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
    """The digest of the weights that the run began with; None, with a warning, if they are gone or changed."""
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
        ValueError: if `callbacks.checkpoints` is null beside adapters on given weights.
    """
    kept = settings["callbacks"].get("checkpoints") is not None or settings["trainer"]["fast_dev_run"]
    if module.lora is not None and module.header["lineage"]["base"] is not None and not kept:
        raise ValueError(
            "callbacks.checkpoints=null keeps nothing of the adapters that lora trains; leave it out, or set lora=none"
        )


def write_adapter(run: RunFolder, lineage: Mapping[str, Any]) -> None:
    """Write `adapter.ckpt`, the best adapter alone, if the run has adapters for known weights."""
    source = resolve(run.path)
    if lineage["base"] is not None and source is not None:
        save_adapter(source, run.checkpoints / ADAPTER, lineage)


def mend_adapter(run: RunFolder, lineage: Mapping[str, Any]) -> None:
    """Write the adapter of a finished run again if an earlier version left one for other weights, or it is damaged."""
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
