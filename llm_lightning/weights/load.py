"""A model ready for use, from a path or a name alone."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_lightning.files.places import parent_names
from llm_lightning.malloc import returning_large_blocks
from llm_lightning.models.classifier import Classifier
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import (
    LoRAConfig,
    adapter_names,
    apply_lora,
    load_adapter_state,
    merge_and_unload,
    use_adapter,
)
from llm_lightning.models.skeleton import skeleton
from llm_lightning.tokenizers.base import Tokenizer
from llm_lightning.tokenizers.build import from_description
from llm_lightning.weights.adapters import refuse_other_base
from llm_lightning.weights.checkpoint import HEADER, CheckpointError, describe, load_weights, refusing
from llm_lightning.weights.checks.header import check_base
from llm_lightning.weights.checks.tensors import of_model
from llm_lightning.weights.digests import base_weights, digest_under
from llm_lightning.weights.peft_format import base_name_of, import_peft, is_peft_folder, template_beside


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, with its tokenizer and header."""

    model: GPT | Classifier
    """In eval mode."""
    tokenizer: Tokenizer
    header: dict[str, Any]
    path: Path | None = None
    """The checkpoint file, if it came from one of ours."""

    @property
    def gpt(self) -> GPT:
        """The model that continues text.

        Raises:
            ValueError: if the model is a classifier.
        """
        if isinstance(self.model, Classifier):
            raise ValueError("this model classifies and cannot continue text; use llm-lightning classify, or a GPT")
        return self.model

    @property
    def classifier(self) -> Classifier:
        """The model that classifies text.

        Raises:
            ValueError: if it only continues text.
        """
        if not isinstance(self.model, Classifier):
            raise ValueError(
                "this model has no classification head; train one: python train.py task=classification init_from=..."
            )
        return self.model

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's classes."""
        labels: list[str] = self.header["classifier"]["labels"]
        return labels

    @property
    def longest_input(self) -> int:
        """The context length of the run; with rotary positions the model itself keeps the longer one of its weights."""
        most = self.model.trunk.config.context_length
        chosen = (self.header.get("config", {}).get("model") or {}).get("context_length")
        return min(chosen, most) if isinstance(chosen, int) else most


def load_model(
    name_or_path: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> LoadedModel:
    """Rebuild a model and its tokenizer from a path or name alone.

    Args:
        name_or_path: a checkpoint of ours, an adapter alone (`adapter.ckpt`, or a folder of PEFT's), a run folder, a
            folder or file of published weights (safetensors or GGUF), a repository of the hub (`hf:ORG/NAME`), or a
            short name of `releases.RELEASES`, such as `gpt2-small`.
        device: where to put the model.
        dtype: of the weights; default: as stored.
        base: where the weights under an adapter are now; default: where they were in training.
        adapters: name -> an adapter for the model, ours or PEFT's. The first is used, until `models.lora.use_adapter`
            chooses another, or none.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        CheckpointError, ValueError: if what is there is damaged or not a GPT, or an adapter is for another model.
    """
    with returning_large_blocks():
        loaded = _load_model(name_or_path, base, adapters or {}, ())
        return replace(loaded, model=loaded.model.to(device=device, dtype=dtype).eval())


def _load_model(
    name_or_path: str | Path, base: str | Path | None, adapters: Mapping[str, str | Path], above: tuple[str, ...]
) -> LoadedModel:
    """`load_model`; `above`: the real paths of the adapters whose base this is."""
    above = _with(above, name_or_path)
    if is_peft_folder(name_or_path):
        under = base or base_name_of(name_or_path)
        return _load_model(under, None, {"default": name_or_path} | dict(adapters), above)
    path = resolve(name_or_path)
    if path is None:
        header, state, tokenizer = _from_pretrained(str(name_or_path))
    else:
        checkpoint = load_weights(path, mmap=True)
        header = checkpoint[HEADER]
        with refusing(path):
            tokenizer = from_description(header["tokenizer"])
            if tokenizer.vocab_size > header["model"]["vocab_size"]:
                raise ValueError(
                    f"its tokenizer has {tokenizer.vocab_size} tokens, but "
                    f"{HEADER}.model.vocab_size={header['model']['vocab_size']}"
                )
        state = of_model(checkpoint["state_dict"])
        if "base" in header:
            state |= _base_state(path, header, base, above)
        elif base is not None:
            raise ValueError(f"{path} is not an adapter, so it needs no base; leave base= out")
    model = rebuild_model(header, state)
    added = {name: _add_adapter(model, adapter, name) for name, adapter in adapters.items()}
    if added:
        used = next(iter(added))
        use_adapter(model, used)
        header = header | added[used]
    return LoadedModel(model, tokenizer, header, path)


def _with(above: tuple[str, ...], name_or_path: str | Path) -> tuple[str, ...]:
    """`above` and this path, which must not be its own base."""
    place = os.path.realpath(resolve(name_or_path) or name_or_path)
    if place in above:
        raise CheckpointError(f"{name_or_path} names itself as the weights under its adapter; say which with base=")
    return (*above, place)


def resolve(name_or_path: str | Path) -> Path | None:
    """The checkpoint file, the best one of a run folder; None for published weights.

    Raises:
        FileNotFoundError: if a .ckpt file does not exist.
    """
    path = Path(name_or_path)
    if path.is_dir():
        for candidate in (path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"):
            if candidate.is_file():
                return candidate
        return None
    if path.suffix == ".ckpt" and not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path if path.is_file() and path.suffix not in (".safetensors", ".gguf") else None


def described_model(header: dict[str, Any]) -> GPT | Classifier:
    """The model that a header describes, on the meta device: names and shapes, no values."""
    with skeleton():
        model: GPT | Classifier = GPT(GPTConfig(**header["model"]), init="torch")
        if head := header.get("classifier"):
            assert isinstance(model, GPT)
            model = Classifier(model, len(head["labels"]), pooling=head["pooling"], causal=head["causal"])
        if header.get("lora"):
            apply_lora(model, LoRAConfig(**header["lora"]))
    return model


def rebuild_model(header: dict[str, Any], state: dict[str, torch.Tensor]) -> GPT | Classifier:
    """Build the model that `header` describes from the tensors of `state`, without copying them.

    Weights of several types, as a frozen part in bfloat16 leaves them, are all cast to the widest.

    Raises:
        CheckpointError: if a tensor is missing, unknown or of another shape.
    """
    model = described_model(header)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"weights do not fit the model: {' '.join(str(error).split())}") from error
    if model.trunk.config.tied_head:
        model.trunk.lm_head.weight = model.trunk.token_embedding.weight  # assigning broke the tie
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return model.to(functools.reduce(torch.promote_types, dtypes)) if len(dtypes) > 1 else model


def _place_of_base(path: Path, header: dict[str, Any], above: tuple[str, ...]) -> str:
    """The place of the weights under an adapter: where they were in training, or where they moved with its folder."""
    names = parent_names(header, path)
    if not names:
        raise CheckpointError(f"{path} is an adapter and does not name its base; give the weights with base=")
    for name in names[:-1]:
        with contextlib.suppress(OSError, ValueError):
            if digest_under(header, merge_and_unload(_load_model(name, None, {}, above).model).trunk) == header["base"]:
                return name
    return names[-1]


def _base_state(
    path: Path, header: dict[str, Any], base: str | Path | None, above: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The weights under the adapter at `path`, by their names in its model."""
    name = base or _place_of_base(path, header, above)
    try:
        trunk = merge_and_unload(_load_model(name, None, {}, above).model).trunk
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is an adapter for the weights of {name}, which are not there ({error}); say where with base="
        ) from error
    with refusing(path):
        check_base(header, trunk.config)
    state = base_weights(header, trunk)
    if header["model"]["tied_head"]:
        state["lm_head.weight"] = state["token_embedding.weight"]
    refuse_other_base(path, header["base"], state)
    prefix = "trunk." if "classifier" in header else ""
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def _add_adapter(model: GPT | Classifier, source: str | Path, name: str) -> dict[str, Any]:
    """Add the adapter at `source` to a GPT; return its settings and the template of its training, for the header."""
    if not isinstance(model, GPT):
        raise ValueError(f"{source}: an adapter goes on a GPT, not on a classifier; load the adapter alone instead")
    if is_peft_folder(source):
        config, state = import_peft(source, model.config)
        template = template_beside(source)
    else:
        path = resolve(source)
        checkpoint = load_weights(path) if path is not None else {HEADER: {}, "state_dict": {}}
        header = checkpoint[HEADER]
        if not header.get("lora") or "classifier" in header:
            what = "a classifier's: give it alone, and its base with --base" if header.get("lora") else "none"
            raise ValueError(f"{source} should be an adapter for a GPT, but is {what}")
        with refusing(source):
            check_base(header, model.config)
        refuse_other_base(source, header.get("lineage", {}).get("base"), base_weights(header, model))
        config, template = LoRAConfig(**header["lora"]), header.get("template")
        ours = of_model(checkpoint["state_dict"])
        state = {key.removesuffix(".default"): tensor for key, tensor in ours.items() if "lora_" in key}
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter named {name!r} already; merge it first, with llm-lightning export")
    try:
        load_adapter_state(model, state, config, name)
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit the model: {error}") from error
    return {"lora": asdict(config)} | ({"template": template} if template else {})


def _from_pretrained(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer]:
    from llm_lightning.weights.pretrained import load_pretrained

    contents = load_pretrained(name)
    config, info = contents.config, contents.info
    if contents.tokenizer is None:
        raise ValueError(
            f"{name} does not say which tokenizer its {config.vocab_size:,} tokens belong to; "
            "export the model with llm-lightning export, which writes the tokenizer beside the weights"
        )
    tokenizer = from_description(contents.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{name} has {config.vocab_size:,} rows for the {tokenizer.vocab_size:,} tokens of its tokenizer; they are "
            "not from the same model"
        )
    more = {"template": contents.template, "generation": contents.generation}
    more = {key: value for key, value in more.items() if value is not None}
    header = describe(
        task="pretraining", model_config=config, tokenizer=tokenizer, lineage=info, digest=info["digest"], **more
    )
    return header, contents.state, tokenizer
