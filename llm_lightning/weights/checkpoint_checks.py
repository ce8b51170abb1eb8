"""What a checkpoint says of itself, compared with what is in it, before anything is built.

The digest of a checkpoint proves that nobody has changed it since it was written. It does not prove that its author
was honest: whoever writes a file can write any digest. So types, ranges and keys of the header are checked here, and
the shapes of all tensors are compared with it by arithmetic. Nothing as large as a wrong number says is ever made.

Every function raises ValueError with the key and what is wrong with it; `checkpoint.py` adds file and remedy.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from llm_lightning.models.classifier import POOLINGS
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.weights.gpt2_names import shapes_of

HEADER = "llm_lightning"
TASKS = ("pretraining", "classification", "sft", "dpo")
"""Tasks of ours, of which a checkpoint holds one model of ours, and nothing else under that name."""
_MOST = 1 << 63  # of an integer in a header, digits of larger ones cannot be printed
_DEEPEST = 100  # level of nested values; the settings of a run have six
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (str, int, float, bool, type(None))
_OTHER = (bytes, set, complex, torch.dtype, torch.device)
"""Values beside plain ones and tensors that a callback may save."""
_ALLOCATES = re.compile(r"(__builtin__|builtins) bytearray|torch[\w.]* \w*Tensor")
"""Names in a pickle that make something as large as a number beside them says."""
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")

Check = tuple[Callable[[Any], bool], str]


def _is_int(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < _MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_DICT: Check = (lambda value: isinstance(value, dict), "a dict")
_LIST: Check = (lambda value: isinstance(value, (list, tuple)), "a list")
_TEXT: Check = (lambda value: isinstance(value, str), "a text")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_COUNT: Check = (_is_int, "a whole number of at least 0")
_SIZE: Check = (lambda value: _is_int(value, 1), "a whole number of at least 1")
_NUMBER: Check = (_is_number, "a number")


def _or_none(check: Check) -> Check:
    return (lambda value: value is None or check[0](value)), f"{check[1]} or null"


def _list_of(check: Check) -> Check:
    return (
        lambda value: isinstance(value, (list, tuple)) and all(map(check[0], value)),
        f"a list, of which each is {check[1]}",
    )


def _dict_of(check: Check) -> Check:
    return (
        lambda value: isinstance(value, dict) and all(isinstance(k, str) and check[0](v) for k, v in value.items()),
        f"a dict, of which each value is {check[1]}",
    )


_ONE: Check = (lambda value: isinstance(value, list) and [type(v) for v in value] == [dict], "a list of one dict")
_NEEDED: dict[str, Check] = {"task": _TEXT, "model": _DICT, "tokenizer": _DICT}
_OPTIONAL: dict[str, Check] = {
    "step": _COUNT,
    "epoch": _COUNT,
    "tokens_seen": _COUNT,
    "sequences_seen": _COUNT,
    "pairs_seen": _COUNT,
    "metrics": _dict_of(_NUMBER),
    "config": _DICT,
    "lineage": _DICT,
    "classifier": _DICT,
    "lora": _DICT,
    "base": _TEXT,
    "rows": _DICT,
}
_LINEAGE: dict[str, Check] = {
    **dict.fromkeys(("data", "parent", "parent_name", "base", "base_of"), _or_none(_TEXT)),
    "places": _DICT,
}
_CLASSIFIER: dict[str, Check] = {
    "labels": _list_of(_TEXT),
    "pooling": (lambda value: value in POOLINGS, f"one of {', '.join(POOLINGS)}"),
    "causal": _FLAG,
    "pad_to": _or_none(_SIZE),
    "pad_id": _COUNT,
}
_PROGRESS = {"epoch": _COUNT, "batches_done": _COUNT}
_RESUMED: dict[str, Check] = {
    "epoch": _COUNT,
    "global_step": _COUNT,
    "loops": _DICT,
    "callbacks": _DICT,
    "optimizer_states": _ONE,
    "lr_schedulers": _ONE,
    "position": _DICT,
    "stopped_of": _or_none(_COUNT),
    "rng": _list_of(_DICT),
    "task_module": _DICT,
}
_CALLBACKS: dict[str, dict[str, Check]] = {
    "Checkpoints": {"best_value": _or_none(_NUMBER), "best_step": _or_none(_COUNT)},
    "Samples": {"at_start": _list_of(_TEXT)},
    "Throughput": {"wall_seconds": _NUMBER},
}
_SCHEDULE: dict[str, Check] = {"last_epoch": _COUNT, "_step_count": _COUNT, "base_lrs": _list_of(_NUMBER)}
_SCHEDULE_MORE = {
    "_is_initial": _FLAG,
    "_get_lr_called_within_step": _FLAG,
    "_last_lr": _list_of(_NUMBER),
    "lr_lambdas": _list_of((lambda value: value is None, "null")),
    "verbose": _FLAG,
}
_PYTHON_RNG: dict[str, Check] = {"version": _COUNT, "gauss": _or_none(_NUMBER)}
_NUMPY_RNG: dict[str, Check] = {
    "kind": (lambda value: value == "MT19937", "MT19937"),
    "index": (lambda value: _is_int(value) and value <= 624, "a whole number up to 624"),
    "has_gauss": _COUNT,
    "cached": _NUMBER,
}


# --- the file ------------------------------------------------------------------------------------------------------


def check_archive(path: Path) -> None:
    """Refuse an archive that could grow when it is read: compressed, or with a size written where data should be."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise ValueError(f"{short(entry.filename)} in the archive is compressed, a checkpoint's never is")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its archive states more bytes than the file has")
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it is no archive of PyTorch's")
            with archive.open(pickles[0]) as file:
                names = {str(argument) for opcode, argument, _ in pickletools.genops(file) if opcode.name == "GLOBAL"}
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError(f"its archive is damaged: {error}") from error
    if wrong := sorted(name for name in names if _ALLOCATES.fullmatch(name)):
        raise ValueError(f"it calls {wrong[0]}, which no checkpoint does")


# --- everything in it ----------------------------------------------------------------------------------------------


def check_state(state: Any, n_bytes: int) -> None:
    """Check what was loaded from a checkpoint of `n_bytes`: forms, the header, the tensors against the header.

    Values of tensors are not read; `check_values` does that.
    """
    if not isinstance(state, dict) or not isinstance(state.get(HEADER), dict):
        raise ValueError(f"it has no header {HEADER!r}: another program has written it")
    header = state[HEADER]
    _check_forms(header, HEADER, n_bytes, is_header=True)
    _check_forms({key: value for key, value in state.items() if key != HEADER}, "", n_bytes)
    if "format" not in header or not _is_int(header["format"], 1):
        raise ValueError(f"{HEADER}.format={short(header.get('format'))} must be a whole number of at least 1")


def check_header(header: Mapping[str, Any]) -> None:
    """Check types, ranges and keys of a header of our own format."""
    _check_keys(header, HEADER, _NEEDED)
    _check_keys(header, HEADER, _OPTIONAL, is_optional=True)
    if not isinstance(header["tokenizer"].get("name"), str):
        raise ValueError(f"{HEADER}.tokenizer.name={short(header['tokenizer'].get('name'))} must be a text")
    _config_of(header)
    _check_keys(header.get("lineage", {}), f"{HEADER}.lineage", _LINEAGE, is_optional=True)
    settings = {"data": _DICT, "monitor": _or_none(_TEXT)}
    _check_keys(header.get("config", {}), f"{HEADER}.config", settings, is_optional=True)
    if "rows" in header:
        _check_keys(header["rows"], f"{HEADER}.rows", {"count": _COUNT, "sha256": _TEXT})
    if "base" in header and "lora" not in header:
        raise ValueError(f"{HEADER}.base names the weights under an adapter, but {HEADER}.lora describes none")
    if "classifier" in header:
        _check_classifier(header)
    _lora_of(header)


def check_weights(header: Mapping[str, Any], tensors: Any, n_bytes: int) -> None:
    """Compare the names, shapes and types of a checkpoint's `state_dict` with its header, without building a model."""
    if not isinstance(tensors, dict):
        raise ValueError("it does not hold what a model needs: state_dict is missing")
    if strange := [name for name, value in tensors.items() if not isinstance(name, str) or not _is_tensor(value)]:
        raise ValueError(f"state_dict: {short(strange[0])} is no tensor with a name")
    own = of_model(tensors)
    largest = sum(tensor.nbytes for name, tensor in own.items() if not name.endswith("lm_head.weight"))
    if largest > n_bytes:
        raise ValueError(f"state_dict: its tensors would take {largest:,} bytes, the file has {n_bytes:,}")
    for name, tensor in own.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"state_dict.model.{name} is {tensor.dtype}, no floating-point type that models have")
    plain = {name: tensor for name, tensor in own.items() if "lora_" not in name}
    _check_plain(header, plain)
    lora = {name.removesuffix(".default"): tensor for name, tensor in own.items() if "lora_" in name}
    _check_lora(header, lora)


def check_values(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Refuse weights that are not finite, and a head that differs from the embedding to which it is tied."""
    own = of_model(tensors)
    for name, tensor in own.items():
        if not _is_finite(tensor):
            raise ValueError(f"state_dict.model.{name} has values that are not finite")
    for prefix in ("", "trunk."):
        head, embedding = own.get(f"{prefix}lm_head.weight"), own.get(f"{prefix}token_embedding.weight")
        if head is None or embedding is None or not header["model"]["tied_head"]:
            continue
        if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
            raise ValueError(f"{HEADER}.model.tied_head=true, but lm_head differs from the token embedding")


def of_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model itself, by its own names; not of a reference that it was trained against."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if is_of_model(name)}


def is_of_model(name: str) -> bool:
    """Whether a tensor belongs to the model itself, and not to a reference that it was trained against."""
    return name.startswith("model.") and ("lora_" not in name or name.endswith(".default"))


def n_parameters(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Parameters of the model that a checked checkpoint describes, a tied weight counted once."""
    config = _config_of(header)
    one, two = (sum(_sizes(config, n_layer)) for n_layer in (1, 2))
    number = one + (config.n_layer - 1) * (two - one)
    if "classifier" in header:
        number += len(header["classifier"]["labels"]) * (config.n_embd + 1)
    return number + sum(tensor.numel() for name, tensor in of_model(tensors).items() if "lora_" in name)


def check_base(header: Mapping[str, Any], base: GPTConfig) -> None:
    """Refuse an adapter whose header describes another model than the weights that it is put on."""
    config = _config_of(header)
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "qkv_bias", "layer_norm_eps"):
        if getattr(config, name) != getattr(base, name):
            raise ValueError(
                f"{HEADER}.model.{name}={getattr(config, name)}, but the weights under the adapter have "
                f"{getattr(base, name)}"
            )
    if config.context_length > base.context_length:
        raise ValueError(
            f"{HEADER}.model.context_length={config.context_length}, but the weights under the adapter have "
            f"{base.context_length} positions"
        )


# --- what a run continues from -------------------------------------------------------------------------------------


def check_resumable(state: Mapping[str, Any]) -> None:
    """Check what a run needs beside the weights, in a checkpoint that `check_state` has passed."""
    _check_keys(state, "", {"state_dict": _DICT})
    for key in _RESUMED:
        if key not in state:
            raise ValueError(f"it cannot be resumed: {key} is missing (weights alone, or an old version's)")
    _check_keys(state, "", _RESUMED)
    header = state[HEADER]
    if "step" in header and header["step"] != state["global_step"]:
        raise ValueError(f"{HEADER}.step={header['step']}, but global_step={state['global_step']}")
    if "metrics" not in header:
        raise ValueError(f"it cannot be resumed: {HEADER}.metrics is missing")
    _check_keys(state["position"], "position", _PROGRESS)
    _check_keys(state["task_module"], "task_module", {"items_seen": _COUNT, "epoch_sums": _dict_of(_list_of(_NUMBER))})
    for name, sums in state["task_module"]["epoch_sums"].items():
        if len(sums) != 2:
            raise ValueError(f"task_module.epoch_sums.{short(name)} must be a sum and a count")
    for name, checks in _CALLBACKS.items():
        if name in state["callbacks"]:
            _check_keys({"": state["callbacks"][name]}, f"callbacks.{name}", {"": _DICT})
            _check_keys(state["callbacks"][name], f"callbacks.{name}", checks)
    for number, schedule in enumerate(state["lr_schedulers"]):
        _check_keys(schedule, f"lr_schedulers.{number}", _SCHEDULE)
        _check_keys(schedule, f"lr_schedulers.{number}", _SCHEDULE_MORE, is_optional=True)
        _refuse_unknown(schedule, f"lr_schedulers.{number}", {**_SCHEDULE, **_SCHEDULE_MORE})
    for number, generators in enumerate(state["rng"]):
        _check_generators(generators, f"rng.{number}")
    _check_counters(state["loops"], "loops")


def check_run(header: Mapping[str, Any]) -> None:
    """Check that a header, checked already, says what is needed to compare a run with what is typed now."""
    _check_keys(header, HEADER, {"step": _COUNT, "config": _DICT, "lineage": _DICT})
    _check_keys(header["lineage"], f"{HEADER}.lineage", {"data": _TEXT, "parent": _or_none(_TEXT)})


def check_fits(state: Mapping[str, Any], mine: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a checkpoint with those of the module that continues from it.

    Args:
        mine: the module's `state_dict()`.
        trained: parameters by the names that the optimizer knows.
    """
    theirs = state["state_dict"]
    for what, names in (("missing", mine.keys() - theirs.keys()), ("unknown", theirs.keys() - mine.keys())):
        if names:
            raise ValueError(f"state_dict.{sorted(names)[0]} is {what} in the checkpoint of this run")
    for name, tensor in theirs.items():
        if tensor.shape != mine[name].shape:
            raise ValueError(f"state_dict.{name} has shape {_shape(tensor)}, this run's has {_shape(mine[name])}")
    for number, optimizer in enumerate(state["optimizer_states"]):
        _check_optimizer(optimizer, f"optimizer_states.{number}", trained)


# --- details -------------------------------------------------------------------------------------------------------


def _check_forms(value: Any, key: str, n_bytes: int, *, is_header: bool = False) -> None:
    """Check that only plain values and dense real tensors are there, and not more than a file of `n_bytes` can hold."""
    left = [(value, key, 0)]
    number = 0
    while left:
        value, key, depth = left.pop()
        number += 1 + (len(value) if isinstance(value, (list, tuple)) else 0)
        if number > 2 * n_bytes:  # the same list in many places takes memory only where it is walked through
            raise ValueError(f"{key or 'it'} holds more values than {n_bytes:,} bytes can")
        if depth > _DEEPEST:
            raise ValueError(f"{key[:60]}... is nested more than {_DEEPEST} levels deep")
        if isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(name, str if is_header else (*_PLAIN, tuple)):
                    raise ValueError(f"{key}: the key {short(name)} is not a text")
                left.append((inner, f"{key}.{_word(name)}" if key else _word(name), depth + 1))
        elif type(value) in (list, tuple):
            if not all(type(inner) is str for inner in value):
                left.extend((inner, f"{key}.{index}", depth + 1) for index, inner in enumerate(value))
        elif isinstance(value, Tensor) and not is_header:
            _check_tensor(value, key)
        elif type(value) is int and is_header and not -_MOST <= value < _MOST:
            raise ValueError(f"{key} is a whole number of {value.bit_length()} bits")
        elif type(value) not in _PLAIN and (is_header or not isinstance(value, (*_OTHER, torch.Size))):
            raise ValueError(f"{key} is of the type {type(value).__name__}, which a checkpoint does not hold")


def _check_tensor(tensor: Tensor, key: str) -> None:
    """Refuse what is not a plain tensor whose every element has its own place in the file."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        raise ValueError(f"{key} is a sparse, nested or quantized tensor, which a checkpoint does not hold")
    if tensor.is_meta:
        raise ValueError(f"{key} is a tensor without values (on the meta device)")
    if tensor.is_complex():
        raise ValueError(f"{key} is a tensor of complex numbers, which a checkpoint does not hold")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"{key} states {_shape(tensor)}, but only {tensor.untyped_storage().nbytes():,} bytes stand")


def _check_keys(
    facts: Mapping[str, Any], where: str, checks: Mapping[str, Check], *, is_optional: bool = False
) -> None:
    for key, (is_right, what) in checks.items():
        name = ".".join(part for part in (where, key) if part)
        if key not in facts:
            if is_optional:
                continue
            raise ValueError(f"it does not hold what a model needs: {name} is missing")
        if not is_right(facts[key]):
            raise ValueError(f"{name}={short(facts[key])} must be {what}")


def _refuse_unknown(facts: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
    if unknown := sorted(facts.keys() - set(known)):
        raise ValueError(f"{where}.{_word(unknown[0])} is unknown to this version of llm-lightning")


def _config_of(header: Mapping[str, Any]) -> GPTConfig:
    names = [field.name for field in fields(GPTConfig)]
    _check_keys(header["model"], f"{HEADER}.model", dict.fromkeys(names, (lambda value: True, "")))
    _refuse_unknown(header["model"], f"{HEADER}.model", names)
    with _below_header():
        return GPTConfig(**header["model"])


def _lora_of(header: Mapping[str, Any]) -> LoRAConfig | None:
    if "lora" not in header:
        return None
    names = [field.name for field in fields(LoRAConfig)]
    checks: dict[str, Check] = {**dict.fromkeys(names, (lambda value: True, "")), "targets": _list_of(_TEXT)}
    _check_keys(header["lora"], f"{HEADER}.lora", checks)
    _refuse_unknown(header["lora"], f"{HEADER}.lora", names)
    with _below_header():
        return LoRAConfig(**header["lora"])


class _below_header:  # noqa: N801 (a context manager)
    """Put the header's name before a complaint of one of its dataclasses."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{HEADER}.{error}") from None


def _check_classifier(header: Mapping[str, Any]) -> None:
    described, where, model = header["classifier"], f"{HEADER}.classifier", header["model"]
    _check_keys(described, where, _CLASSIFIER)
    _refuse_unknown(described, where, _CLASSIFIER)
    labels = described["labels"]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"{where}.labels={short(labels)} must be at least two different names")
    if not model["tied_head"]:
        raise ValueError(f"{HEADER}.model.tied_head=false, which no classifier has")
    if described["pad_id"] >= model["vocab_size"]:
        raise ValueError(
            f"{where}.pad_id={described['pad_id']} must be below {HEADER}.model.vocab_size={model['vocab_size']}"
        )


def _check_plain(header: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Compare all but the adapters with the header."""
    config, expected = _config_of(header), dict[str, tuple[int, ...]]()
    prefix = "trunk." if "classifier" in header else ""
    if "base" not in header:
        blocks = len({match[1] for name in found if (match := _BLOCK.match(name.removeprefix(prefix)))})
        if blocks != config.n_layer:  # before as many names as a wrong number says are made
            raise ValueError(f"{HEADER}.model.n_layer={config.n_layer}, but its weights have {blocks} blocks")
        expected = {f"{prefix}{name}": shape for name, shape in _shapes(config).items()}
    if prefix:
        labels = header["classifier"]["labels"]
        expected |= {"head.weight": (len(labels), config.n_embd), "head.bias": (len(labels),), "threshold": ()}
    _check_shapes(found, expected)


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"it does not hold what a model needs: state_dict.model.{missing[0]} is missing")
    _refuse_unknown(found, "state_dict.model", expected)
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"weights do not fit the model: state_dict.model.{name} has shape {_shape(found[name])}, but by "
                f"{HEADER} it is {shape}"
            )


def _check_lora(header: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Compare the adapters with the header. Layers are never listed: in an adapter's file nothing bounds `n_layer`."""
    lora, config = _lora_of(header), _config_of(header)
    paths = sorted({name.rpartition(".lora_")[0] for name in found})
    if lora is None:
        if paths:
            raise ValueError(f"state_dict.model.{_word(paths[0])} has an adapter, but {HEADER}.lora is missing")
        return
    for target in lora.targets:
        if not any(_ends_with(path, target) for path in paths):
            raise ValueError(f"{HEADER}.lora.targets: {short(target)} matches none of the adapters in state_dict")
    expected: dict[str, tuple[int, ...]] = {}
    for path in paths:
        out, inputs = _linear_shape(path, header)
        if not any(_ends_with(path, target) for target in lora.targets):
            raise ValueError(f"state_dict.model.{path} has an adapter, but {HEADER}.lora.targets does not name it")
        parts = 3 if lora.qkv == "split" and path.endswith("qkv_proj") else 1
        expected |= {f"{path}.lora_A": (parts * lora.rank, inputs), f"{path}.lora_B": (out, lora.rank)}
    _check_shapes(found, expected)
    for part in _linear_shapes(config):
        number = sum(_ends_with(path, part) for path in paths)
        if number != config.n_layer and any(_ends_with(part, target) for target in lora.targets):
            raise ValueError(f"{HEADER}.model.n_layer={config.n_layer}, but {number} blocks have an adapter on {part}")


def _linear_shape(path: str, header: Mapping[str, Any]) -> tuple[int, int]:
    """(outputs, inputs) of the linear layer at `path` of the model that the header describes."""
    config, is_classifier = _config_of(header), "classifier" in header
    if is_classifier and path == "head":
        return len(header["classifier"]["labels"]), config.n_embd
    if not is_classifier and path == "lm_head":
        return config.vocab_size, config.n_embd
    shapes = _linear_shapes(config)
    found = re.fullmatch(r"(trunk\.)?blocks\.(0|[1-9]\d{0,8})\.(.+)", path)
    if found and bool(found[1]) == is_classifier and int(found[2]) < config.n_layer and found[3] in shapes:
        return shapes[found[3]]
    raise ValueError(f"state_dict.model.{_word(path)} has an adapter, but {HEADER}.model has no such layer")


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _linear_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of a block."""
    width = config.n_embd
    return {
        "attn.qkv_proj": (3 * width, width),
        "attn.out_proj": (width, width),
        "mlp.up_proj": (4 * width, width),
        "mlp.down_proj": (width, 4 * width),
    }


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model without adapters."""
    shapes = shapes_of(config)
    return {n: shape for n, shape in shapes.items() if config.qkv_bias or not n.endswith("qkv_proj.bias")}


def _sizes(config: GPTConfig, n_layer: int) -> Iterable[int]:
    """Elements of each parameter of a model of so many blocks."""
    for name, shape in _shapes(replace(config, n_layer=n_layer)).items():
        if name != "lm_head.weight" or not config.tied_head:
            yield shape[0] * (shape[1] if len(shape) > 1 else 1)


def _check_optimizer(state: Mapping[str, Any], where: str, trained: Mapping[str, Tensor]) -> None:
    _check_keys(state, where, {"state": _DICT, "param_groups": _list_of(_DICT)})
    names: list[Any] = []
    for number, group in enumerate(state["param_groups"]):
        numbers = dict.fromkeys(("lr", "weight_decay", "eps"), _NUMBER) | {"betas": _list_of(_NUMBER)}
        _check_keys(group, f"{where}.param_groups.{number}", {"params": _list_of(_COUNT)})
        _check_keys(group, f"{where}.param_groups.{number}", numbers, is_optional=True)
        if "param_names" not in group:
            return  # older versions of PyTorch do not write the names
        _check_keys(group, f"{where}.param_groups.{number}", {"param_names": _list_of(_TEXT)})
        names += zip(group["params"], group["param_names"], strict=False)
    if sorted(name for _, name in names) != sorted(trained):
        raise ValueError(f"{where}.param_groups names other parameters than this run trains")
    for index, name in names:
        of_one = state["state"].get(index, {})
        _check_keys({"": of_one}, f"{where}.state.{index}", {"": _DICT})
        for kind in ("step", "exp_avg", "exp_avg_sq") if of_one else ():
            shape = () if kind == "step" else tuple(trained[name].shape)
            if not _is_tensor(of_one.get(kind)) or tuple(of_one[kind].shape) != shape:
                raise ValueError(f"{where}.state.{index}.{kind} must be a tensor of the shape {shape}, like {name}")


def _check_generators(generators: Mapping[str, Any], where: str) -> None:
    anything: Check = (lambda value: True, "")
    _check_keys(generators, where, {"python": _DICT, "numpy": _DICT, "cuda": _LIST, "mps": anything})
    _check_keys(generators["python"], f"{where}.python", _PYTHON_RNG)
    _check_keys(generators["numpy"], f"{where}.numpy", _NUMPY_RNG)
    for key, value, shape in (
        ("python.words", generators["python"].get("words"), (625,)),
        ("numpy.keys", generators["numpy"].get("keys"), (624,)),
    ):
        if not _is_tensor(value) or value.dtype != torch.int64 or tuple(value.shape) != shape:
            raise ValueError(f"{where}.{key} must be {shape[0]} whole numbers")
        if not 0 <= int(value.min()) <= int(value.max()) < 1 << 32:
            raise ValueError(f"{where}.{key} must be numbers of 32 bits")
    own = torch.get_rng_state()
    if not _is_tensor(generators.get("torch")) or generators["torch"].dtype != own.dtype:
        raise ValueError(f"{where}.torch must be the state of a generator")
    if generators["torch"].shape != own.shape or not all(map(_is_tensor, generators["cuda"])):
        raise ValueError(f"{where}.torch and .cuda must be states of generators")


def _check_counters(value: Any, key: str) -> None:
    """Lightning takes the counters of its loops as they stand."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_counters(inner, f"{key}.{_word(name)}")
    elif not _is_int(value) and not isinstance(value, bool) and not key.rpartition(".state_dict")[1]:
        raise ValueError(f"{key}={short(value)} must be a whole number of at least 0")


def _is_finite(tensor: Tensor) -> bool:
    """The least and the largest value tell: nan wins either way, and nothing as large as the weights is made."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _word(name: Any) -> str:
    """A key as part of a dotted name; what would not be one is quoted and cut."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,80}", name) else short(name)
