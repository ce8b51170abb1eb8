"""Checkpoints: self-describing, written atomically, verified before anything in them is used.

A checkpoint is one file: PyTorch's zip archive with a digest in the archive's comment, so it can be copied, renamed
and linked without losing its proof. Inside, a plain-dict header (key `llm_lightning`) beside Lightning's keys says how
to rebuild the model and the tokenizer. It holds tensors and plain values only, and is loaded with `weights_only=True`
always. PyTorch itself does not check the archive's contents when it loads: a flipped bit becomes a wrong weight.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llm_lightning.files.frozen_cache import weights_digest
from llm_lightning.files.places import parent_names
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
from llm_lightning.tokenizers import Tokenizer, from_description
from llm_lightning.weights import checkpoint_checks as checks
from llm_lightning.weights.checkpoint_checks import HEADER
from llm_lightning.weights.peft_format import base_name_of, import_peft, is_peft_folder

FORMAT_VERSION = 1
_MARK = b"llm-lightning checkpoint sha256:"
_COMMENT_LENGTH = len(_MARK) + 64
_REMEDY = "use another checkpoint of the run, or train again"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, foreign, or does not fit."""


def save(path: str | Path, state: dict[str, Any]) -> str:
    """Write `state` to `path`, all or nothing, and return its digest.

    A temporary file beside the target is written, flushed to the disk and renamed: whatever happens in between, the
    file that stood there before is intact.

    Raises:
        OSError: if it cannot be written; names the path, the bytes needed and the bytes free.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            digest = _write(file, state)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in _tensors(state))
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"cannot write checkpoint {path}: {error.strerror or error} ({needed:,} bytes needed, {free:,} free); "
            "earlier checkpoints are intact: make room and continue with resume=RUN_FOLDER"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def verify(path: str | Path) -> str:
    """Return the digest of the checkpoint at `path` after comparing it with every byte of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not one of ours, or was changed after it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _COMMENT_LENGTH))
        comment = file.read()
        if not comment.startswith(_MARK):
            raise CheckpointError(
                f"{path} is not a complete llm-lightning checkpoint (truncated, or written by another program); "
                f"{_REMEDY}. Weights of GPT-2 are read from .safetensors files"
            )
        file.seek(0)
        actual = _digest(file, size - _COMMENT_LENGTH - 2)
    expected = comment[len(_MARK) :].decode("ascii", errors="replace")
    if actual != expected:
        raise CheckpointError(f"{path} is corrupt: its digest is {actual}, but it was written as {expected}; {_REMEDY}")
    return actual


def load(path: str | Path, *, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Verify and load a checkpoint of ours.

    Raises:
        CheckpointError: if it is corrupt, foreign, or of a newer format.
    """
    path, digest = Path(path), verify(path)
    size = path.stat().st_size
    with _refusing(path):
        try:
            checks.check_archive(path)
            state = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
        except Exception as error:  # whatever a forged archive makes the unpickler raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"it cannot be loaded safely ({reason})") from error
        checks.check_state(state, size)
        header = state[HEADER]
        if header["format"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {header['format']}, this version reads up to {FORMAT_VERSION}; update llm-lightning"
            )
        checks.check_header(header)
        if header["task"] in checks.TASKS:  # a task of someone else's may train more than our models have
            checks.check_weights(header, state.get("state_dict"), size)
    header["digest"] = digest
    return state


def _load_weights(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """`load`, for a model to be built: whatever the task, the weights are those of a model of ours, and finite."""
    state = load(path, mmap=mmap)
    with _refusing(path):
        checks.check_weights(state[HEADER], state.get("state_dict"), Path(path).stat().st_size)
        checks.check_values(state["state_dict"], state[HEADER])
    return state


def load_to_resume(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint that a run continues from.

    Raises:
        CheckpointError: as `load`, or if weights are not finite, or what a run needs beside the weights is damaged.
    """
    state = load(path, map_location=map_location)
    with _refusing(path):
        checks.check_resumable(state)
        if state[HEADER]["task"] in checks.TASKS:
            checks.check_values(state["state_dict"], state[HEADER])
    return state


def check_fits(path: str | Path, state: Mapping[str, Any], module: torch.nn.Module, trained: torch.nn.Module) -> None:
    """Compare a loaded checkpoint with the module that continues from it, of which `trained` is optimized.

    Raises:
        CheckpointError: if a tensor of the weights or the optimizer is missing, unknown or of another shape.
    """
    parameters = {name: tensor for name, tensor in trained.named_parameters() if tensor.requires_grad}
    with _refusing(path):
        checks.check_fits(state, module.state_dict(), parameters)


@contextlib.contextmanager
def _refusing(path: str | Path) -> Iterator[None]:
    """Put the file before a complaint about what is in it, and the remedy behind it."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; {_REMEDY}") from error


def read_header(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: task, step, model, tokenizer, config, lineage."""
    return load(path, mmap=True)[HEADER]


def read_run_header(path: str | Path) -> dict[str, Any]:
    """`read_header` of a checkpoint that a run continues from.

    Raises:
        CheckpointError: as `load`, or if it does not say what the run was: step, settings, data.
    """
    header = read_header(path)
    with _refusing(path):
        checks.check_run(header)
    return header


def examine(path: str | Path) -> tuple[dict[str, Any], int]:
    """The header of a checkpoint all of whose values were looked at, and the model's number of parameters.

    Raises:
        CheckpointError: as `load`, or if weights are not finite.
    """
    state = _load_weights(path, mmap=True)
    return state[HEADER], checks.n_parameters(state[HEADER], state["state_dict"])


def newest_valid(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in `folder` that passes `verify`; damaged ones are passed over, saying so."""
    damaged: list[str] = []
    for path in sorted(Path(folder).glob("step_*.ckpt"), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            log.warning("%s. Falling back to %s", message, path)
        return path
    if damaged:
        raise CheckpointError(damaged[0])
    return None


def link(source: Path, target: Path) -> None:
    """Make `target` another name of the file `source`, atomically (a copy where the file system has no hard links)."""
    if target.is_file() and target.samefile(source):
        return  # renaming one name of a file to another of its names does nothing, and would leave the temporary one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
    _sync_folder(target.parent)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use, and what it needs."""

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
            folder or .safetensors file of GPT-2 weights, or `gpt2-small`, `gpt2-medium`, `gpt2-large`, `gpt2-xl`.
        device: where to put the model.
        dtype: of the weights; default: as stored.
        base: where the weights under an adapter are now; default: where they were in training.
        adapters: name -> an adapter for the model, ours or PEFT's. The first is used, until `models.lora.use_adapter`
            chooses another, or none.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        CheckpointError, ValueError: if what is there is damaged or not a GPT, or an adapter is for another model.
    """
    loaded = _load_model(name_or_path, base, adapters or {}, ())
    return replace(loaded, model=loaded.model.to(device=device, dtype=dtype).eval())


def _load_model(
    name_or_path: str | Path, base: str | Path | None, adapters: Mapping[str, str | Path], above: tuple[str, ...]
) -> LoadedModel:
    """`load_model`; `above`: the adapters whose base this is, by their real paths."""
    above = _with(above, name_or_path)
    if is_peft_folder(name_or_path):
        return _load_model(base or base_name_of(name_or_path), None, {"default": name_or_path} | dict(adapters), above)
    path = resolve(name_or_path)
    if path is None:
        header, state, tokenizer = _from_pretrained(str(name_or_path))
    else:
        checkpoint = _load_weights(path, mmap=True)
        header = checkpoint[HEADER]
        with _refusing(path):
            tokenizer = from_description(header["tokenizer"])
            if tokenizer.vocab_size > header["model"]["vocab_size"]:
                raise ValueError(
                    f"its tokenizer has {tokenizer.vocab_size} tokens, but "
                    f"{HEADER}.model.vocab_size={header['model']['vocab_size']}"
                )
        state = checks.of_model(checkpoint["state_dict"])
        if "base" in header:
            state |= _base_state(path, header, base, above)
        elif base is not None:
            raise ValueError(f"{path} is no adapter, so it needs no base; leave base= out")
    model = build_model(header, state)
    for name, adapter in adapters.items():
        header = header | {"lora": _add_adapter(model, adapter, name)}
    if adapters:
        use_adapter(model, next(iter(adapters)))
    return LoadedModel(model, tokenizer, header, path)


def _with(above: tuple[str, ...], name_or_path: str | Path) -> tuple[str, ...]:
    """`above` and this one, which must not be its own base."""
    place = os.path.realpath(resolve(name_or_path) or name_or_path)
    if place in above:
        raise CheckpointError(f"{name_or_path} names itself as the weights under its adapter; say which with base=")
    return (*above, place)


def resolve(name_or_path: str | Path) -> Path | None:
    """The checkpoint file of ours that is meant, the best one of a run folder; None for GPT-2 weights."""
    path = Path(name_or_path)
    if path.is_dir():
        for candidate in (path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"):
            if candidate.is_file():
                return candidate
        return None
    if path.suffix == ".ckpt" and not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path if path.is_file() and path.suffix != ".safetensors" else None


def described_model(header: dict[str, Any]) -> GPT | Classifier:
    """The model that a header describes, on the meta device: names and shapes, no values."""
    with torch.device("meta"):
        model: GPT | Classifier = GPT(GPTConfig(**header["model"]), init="torch")
        if head := header.get("classifier"):
            assert isinstance(model, GPT)
            model = Classifier(model, len(head["labels"]), pooling=head["pooling"], causal=head["causal"])
        if header.get("lora"):
            apply_lora(model, LoRAConfig(**header["lora"]))
    return model


def build_model(header: dict[str, Any], state: dict[str, torch.Tensor]) -> GPT | Classifier:
    """The model that `header` describes, taking over the tensors of `state` without a copy.

    Weights that were trained with a frozen part in a narrower type come all in the widest one.

    Raises:
        CheckpointError: if a tensor is missing, unknown or of another shape.
    """
    model = described_model(header)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"weights do not fit the model: {' '.join(str(error).split())}") from error
    trunk = model.trunk if isinstance(model, Classifier) else model
    if trunk.config.tied_head:
        trunk.lm_head.weight = trunk.token_embedding.weight  # assigning broke the tie
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return model.to(functools.reduce(torch.promote_types, dtypes)) if len(dtypes) > 1 else model


def base_digest(model: GPT | Classifier) -> str:
    """The digest of a trunk's own weights, which an adapter belongs to, whatever file they come from."""
    trunk = model.trunk if isinstance(model, Classifier) else model
    return _digest_of({name: tensor for name, tensor in trunk.state_dict().items() if "lora_" not in name})


def _digest_of(state: dict[str, torch.Tensor]) -> str:
    # A tied head stands in some files and not in others.
    return weights_digest((name, state[name].float()) for name in sorted(state) if name != "lm_head.weight")


def digest_under(header: dict[str, Any], trunk: GPT) -> str:
    """The digest by which the adapter of `header` knows the weights of `trunk`, which may have more positions."""
    return _digest_of(_cut_like(header, trunk))


def _place_of_base(path: Path, header: dict[str, Any], above: tuple[str, ...]) -> str:
    """Where the weights under an adapter are: where they were in training, or where they went with its folder."""
    names = parent_names(header, path)
    if not names:
        raise CheckpointError(
            f"{path} is an adapter and does not name the weights that it is for; say where with base="
        )
    for name in names[:-1]:
        with contextlib.suppress(OSError, ValueError):
            if digest_under(header, merged_trunk(_load_model(name, None, {}, above).model)) == header["base"]:
                return name
    return names[-1]


def _base_state(
    path: Path, header: dict[str, Any], base: str | Path | None, above: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The weights that the adapter at `path` belongs to, by the names they have in its model."""
    name = base or _place_of_base(path, header, above)
    try:
        trunk = merged_trunk(_load_model(name, None, {}, above).model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is an adapter for the weights of {name}, which are not there ({error}); say where with base="
        ) from error
    with _refusing(path):
        checks.check_base(header, trunk.config)
    state = _cut_like(header, trunk)
    if header["model"]["tied_head"]:
        state["lm_head.weight"] = state["token_embedding.weight"]
    _refuse_other_base(path, header["base"], state)
    prefix = "trunk." if "classifier" in header else ""
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def _add_adapter(model: GPT | Classifier, source: str | Path, name: str) -> dict[str, Any]:
    """Put the adapter at `source` on a GPT; return its settings."""
    if not isinstance(model, GPT):
        raise ValueError(f"{source}: an adapter goes on a GPT, not on a classifier; give the adapter alone instead")
    if is_peft_folder(source):
        config, state = import_peft(source)
    else:
        path = resolve(source)
        checkpoint = _load_weights(path) if path is not None else {HEADER: {}, "state_dict": {}}
        header = checkpoint[HEADER]
        if not header.get("lora") or "classifier" in header:
            what = "a classifier's: give it alone, and its base with --base" if header.get("lora") else "none"
            raise ValueError(f"{source} should be an adapter for a GPT, but is {what}")
        with _refusing(source):
            checks.check_base(header, model.config)
        _refuse_other_base(source, header.get("lineage", {}).get("base"), _cut_like(header, model))
        config = LoRAConfig(**header["lora"])
        ours = checks.of_model(checkpoint["state_dict"])
        state = {key.removesuffix(".default"): tensor for key, tensor in ours.items() if "lora_" in key}
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter named {name!r} already; merge it first, with llm-lightning export")
    try:
        load_adapter_state(model, state, config, name)
    except ValueError as error:
        raise CheckpointError(f"{source} does not fit the model: {error}") from error
    return asdict(config)


def _cut_like(header: dict[str, Any], trunk: GPT) -> dict[str, torch.Tensor]:
    """The weights of a GPT without adapters, as many positions as the model of `header` has."""
    state = {name: tensor for name, tensor in trunk.state_dict().items() if "lora_" not in name}
    state["position_embedding.weight"] = state["position_embedding.weight"][: header["model"]["context_length"]]
    return state


def _refuse_other_base(adapter: str | Path, expected: str | None, state: dict[str, torch.Tensor]) -> None:
    if expected is None:
        raise CheckpointError(
            f"{adapter} was trained together with its own weights, from none that are stored elsewhere; load it alone"
        )
    found = _digest_of(state)
    if found != expected:
        raise CheckpointError(
            f"{adapter} is an adapter for other weights than these (their digest is {found[:12]}, it was trained on "
            f"{expected[:12]}); give the right ones"
        )


def save_adapter(source: str | Path, target: str | Path, lineage: Mapping[str, Any] | None = None) -> str:
    """Write what was trained of a LoRA checkpoint: adapters and, of a classifier, the head. Megabytes.

    `load_model(target)` puts it on the weights that `lineage.parent_name` names, and checks their digest.

    Args:
        lineage: of the run, where that of the checkpoint may be an older one.
    """
    state = load(source, mmap=True)
    known = dict(lineage or state[HEADER]["lineage"])
    header = state[HEADER] | {"lineage": known, "base": known["base"]}
    small = {name: tensor for name, tensor in state["state_dict"].items() if _is_of_adapter(name)}
    return save(target, {HEADER: header, "state_dict": small})


def _is_of_adapter(name: str) -> bool:
    return ("lora_" in name and checks.is_of_model(name)) or name.startswith(("model.head.", "model.threshold"))


def merged_trunk(model: GPT | Classifier) -> GPT:
    """The GPT inside a model, its adapters merged into its weights. Changes `model`."""
    return merge_and_unload(model).trunk


def describe(*, task: str, model_config: GPTConfig, tokenizer: Tokenizer, **more: Any) -> dict[str, Any]:
    """The header of a checkpoint. `more`: plain values (step, resolved config, lineage, metrics)."""
    return {
        "format": FORMAT_VERSION,
        "task": task,
        "model": asdict(model_config),
        "tokenizer": tokenizer.describe(),
        **more,
    }


def _from_pretrained(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer]:
    from llm_lightning.weights.pretrained import load_pretrained

    config, state, description, info = load_pretrained(name)
    if description is None:
        raise ValueError(
            f"{name} does not say which tokenizer its {config.vocab_size:,} tokens belong to; "
            "export the model with llm-lightning export, which writes the tokenizer beside the weights"
        )
    tokenizer = from_description(description)
    header = describe(task="pretraining", model_config=config, tokenizer=tokenizer, lineage=info, digest=info["digest"])
    return header, state, tokenizer


class _Writer:
    """Passes bytes on and keeps the first OSError, which torch.save would hide behind one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(file: BinaryIO, state: dict[str, Any]) -> str:
    writer = _Writer(file)
    try:
        torch.save(state, writer)  # type: ignore[arg-type]
    except Exception:
        if writer.error is not None:
            raise writer.error from None
        raise
    # torch.save ends with a bare end-of-archive record: 22 bytes, the last two are the length of the comment, 0.
    # The digest covers everything before those two.
    length = file.tell() - 2
    file.seek(length - 20)
    assert file.read(4) == b"PK\x05\x06", "torch.save no longer ends with a bare end-of-archive record"
    file.seek(0)
    digest = _digest(file, length)
    file.seek(length)
    file.write(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK + digest.encode())
    return digest


def _digest(file: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    while length > 0 and (chunk := file.read(min(length, 1 << 22))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # a folder cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
