"""The state that a resumed run needs: optimizer, schedule, position in the data, random generators, counters."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from llm_lightning.weights.checks.header import HEADER
from llm_lightning.weights.checks.kinds import (
    COUNT,
    DICT,
    FLAG,
    LIST,
    NUMBER,
    TEXT,
    Check,
    check_keys,
    dict_of,
    is_int,
    is_number,
    is_tensor,
    list_of,
    or_none,
    refuse_unknown,
    shape_of,
    word,
)

_ONE: Check = (lambda value: isinstance(value, list) and [type(v) for v in value] == [dict], "a list of one dict")
_PROGRESS = {"epoch": COUNT, "batches_done": COUNT}
_RESUMED: dict[str, Check] = {
    "epoch": COUNT,
    "global_step": COUNT,
    "loops": DICT,
    "callbacks": DICT,
    "optimizer_states": _ONE,
    "lr_schedulers": _ONE,
    "position": DICT,
    "stopped_of": or_none(COUNT),
    "rng": list_of(DICT),
    "task_module": DICT,
}
_CALLBACKS: dict[str, dict[str, Check]] = {
    "Checkpoints": {"best_value": or_none(NUMBER), "best_step": or_none(COUNT)},
    "Samples": {"at_start": list_of(TEXT)},
    "Throughput": {"wall_seconds": NUMBER},
}
_SCHEDULE: dict[str, Check] = {"last_epoch": COUNT, "_step_count": COUNT, "base_lrs": list_of(NUMBER)}
_SCHEDULE_MORE = {
    "_is_initial": FLAG,
    "_get_lr_called_within_step": FLAG,
    "_last_lr": list_of(NUMBER),
    "lr_lambdas": list_of((lambda value: value is None, "null")),
    "verbose": FLAG,
}
_PYTHON_RNG: dict[str, Check] = {"version": COUNT, "gauss": or_none(NUMBER)}
_NUMPY_RNG: dict[str, Check] = {
    "kind": (lambda value: value == "MT19937", "MT19937"),
    "index": (lambda value: is_int(value) and value <= 624, "a whole number up to 624"),
    "has_gauss": COUNT,
    "cached": NUMBER,
}

_EPS: Check = (
    lambda value: is_number(value) or (isinstance(value, (list, tuple)) and all(map(or_none(NUMBER)[0], value))),
    "a number, or Adafactor's two",
)
_STATES = {"amsgrad": ("step", "exp_avg", "exp_avg_sq"), "ns_steps": ("momentum_buffer",)}
"""An option that only groups of AdamW (or of Muon's matrices) have -> what is kept for each of their parameters."""
_NUMBERS = ("step", "mu_product", "eta", "mu")
"""What the optimizers of torch.optim keep as one number for a parameter."""
_LIKE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "step_size", "ax"),
)
"""What they keep in the shape of the parameter. Adafactor and other packages' optimizers may keep something else."""


def check_resumable(state: Mapping[str, Any]) -> None:
    """Check the state beside the weights, in a checkpoint that `check_state` has passed."""
    check_keys(state, "", {"state_dict": DICT})
    for key in _RESUMED:
        if key not in state:
            raise ValueError(f"it cannot be resumed: {key} is missing (weights alone, or an old version's)")
    check_keys(state, "", _RESUMED)
    header = state[HEADER]
    if "step" in header and header["step"] != state["global_step"]:
        raise ValueError(f"{HEADER}.step={header['step']}, but global_step={state['global_step']}")
    if "metrics" not in header:
        raise ValueError(f"it cannot be resumed: {HEADER}.metrics is missing")
    check_keys(state["position"], "position", _PROGRESS)
    processes = header.get("layout", {}).get("processes", max(1, len(state["rng"])))
    if processes != len(state["rng"]):
        raise ValueError(
            f"rng holds {len(state['rng'])} states of generators, those of {processes} process(es) belong here"
        )
    check_keys(state["task_module"], "task_module", {"items_seen": COUNT, "epoch_sums": dict_of(list_of(NUMBER))})
    for name, sums in state["task_module"]["epoch_sums"].items():
        if len(sums) != 2:
            raise ValueError(f"task_module.epoch_sums.{short(name)} must be a sum and a count")
    for name, checks in _CALLBACKS.items():
        if name in state["callbacks"]:
            check_keys({"": state["callbacks"][name]}, f"callbacks.{name}", {"": DICT})
            check_keys(state["callbacks"][name], f"callbacks.{name}", checks)
    for number, schedule in enumerate(state["lr_schedulers"]):
        check_keys(schedule, f"lr_schedulers.{number}", _SCHEDULE)
        check_keys(schedule, f"lr_schedulers.{number}", _SCHEDULE_MORE, is_optional=True)
        refuse_unknown(schedule, f"lr_schedulers.{number}", {**_SCHEDULE, **_SCHEDULE_MORE})
    for number, generators in enumerate(state["rng"]):
        _check_generators(generators, f"rng.{number}")
    _check_counters(state["loops"], "loops")


def compare_with_run(state: Mapping[str, Any], mine: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a checkpoint with those of the module that resumes from it.

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
            raise ValueError(f"state_dict.{name} has shape {shape_of(tensor)}, this run's has {shape_of(mine[name])}")
    for number, optimizer in enumerate(state["optimizer_states"]):
        _check_optimizer(optimizer, f"optimizer_states.{number}", trained)


def _check_optimizer(state: Mapping[str, Any], where: str, trained: Mapping[str, Tensor]) -> None:
    check_keys(state, where, {"state": DICT, "param_groups": list_of(DICT)})
    names: list[Any] = []
    kept: dict[int, tuple[str, ...]] = {}
    for number, group in enumerate(state["param_groups"]):
        numbers = dict.fromkeys(("lr", "weight_decay"), NUMBER) | {"eps": _EPS, "betas": list_of(NUMBER)}
        check_keys(group, f"{where}.param_groups.{number}", {"params": list_of(COUNT)})
        check_keys(group, f"{where}.param_groups.{number}", numbers, is_optional=True)
        if "param_names" not in group:
            return  # older versions of PyTorch do not write the names
        check_keys(group, f"{where}.param_groups.{number}", {"param_names": list_of(TEXT)})
        names += zip(group["params"], group["param_names"], strict=False)
        kept |= dict.fromkeys(group["params"], _kept(state["state"], group))
    if sorted(name for _, name in names) != sorted(trained):
        raise ValueError(f"{where}.param_groups names other parameters than this run trains")
    for index, name in names:
        of_one = state["state"].get(index, {})
        check_keys({"": of_one}, f"{where}.state.{index}", {"": DICT})
        for kind in kept[index] if of_one else ():
            shape = () if kind in _NUMBERS else tuple(trained[name].shape)
            if not is_tensor(of_one.get(kind)) or tuple(of_one[kind].shape) != shape:
                raise ValueError(f"{where}.state.{index}.{kind} must be a tensor of the shape {shape}, like {name}")


def _kept(states: Mapping[Any, Any], group: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that must be kept for every parameter of a group that was updated.

    Of a class without an entry in `_STATES`: those that are kept for any of them.
    """
    known = next((names for option, names in _STATES.items() if option in group), None)
    if known is not None:
        return known
    of_group = [one for one in map(states.get, group["params"]) if isinstance(one, dict)]
    return tuple(name for name in (*_NUMBERS, *_LIKE_PARAMETER) if any(is_tensor(one.get(name)) for one in of_group))


def _check_generators(generators: Mapping[str, Any], where: str) -> None:
    anything: Check = (lambda value: True, "")
    check_keys(generators, where, {"python": DICT, "numpy": DICT, "cuda": LIST, "mps": anything})
    check_keys(generators["python"], f"{where}.python", _PYTHON_RNG)
    check_keys(generators["numpy"], f"{where}.numpy", _NUMPY_RNG)
    for key, value, shape in (
        ("python.words", generators["python"].get("words"), (625,)),
        ("numpy.keys", generators["numpy"].get("keys"), (624,)),
    ):
        if not is_tensor(value) or value.dtype != torch.int64 or tuple(value.shape) != shape:
            raise ValueError(f"{where}.{key} must be {shape[0]} whole numbers")
        if not 0 <= int(value.min()) <= int(value.max()) < 1 << 32:
            raise ValueError(f"{where}.{key} must be numbers of 32 bits")
    own = torch.get_rng_state()
    if not is_tensor(generators.get("torch")) or generators["torch"].dtype != own.dtype:
        raise ValueError(f"{where}.torch must be the state of a generator")
    if generators["torch"].shape != own.shape or not all(map(is_tensor, generators["cuda"])):
        raise ValueError(f"{where}.torch and .cuda must be states of generators")


def _check_counters(value: Any, key: str) -> None:
    """Lightning does not check the counters of its loops."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_counters(inner, f"{key}.{word(name)}")
    elif not is_int(value) and not isinstance(value, bool) and not key.rpartition(".state_dict")[1]:
        raise ValueError(f"{key}={short(value)} must be a whole number of at least 0")
