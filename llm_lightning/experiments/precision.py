"""`trainer.precision=auto`: bf16 with fp32 master weights where the hardware multiplies it faster, fp32 elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

BF16, FP32 = "bf16-mixed", "32-true"


def choose_precision(setting: str, accelerator: str, devices: Any = "auto") -> str:
    """Resolve `auto`; anything else stays.

    - NVIDIA: bf16 if every chosen GPU is an Ampere or later (compute capability 8.0). Older ones have no such units
      and emulate them. AMD: bf16.
    - Apple: fp32. bf16 saves memory there, but was measured slower.
    - CPU: bf16 with AMX or AVX512-BF16 (2.3 times fp32 on a Zen 4, which has no AMX). With neither, each product is
      emulated: a tenth of fp32's rate was measured with AVX2.

    Args:
        accelerator, devices: as in the settings of the trainer.
    """
    if setting != "auto":
        return setting
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = _gpus_have_bf16(_numbers(devices, torch.cuda.device_count()))
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        fast = False
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return BF16 if fast else FP32


def _gpus_have_bf16(numbers: Sequence[int]) -> bool:
    return torch.version.hip is not None or all(torch.cuda.get_device_capability(one)[0] >= 8 for one in numbers)


def _numbers(devices: Any, present: int) -> list[int]:
    """The devices that `trainer.devices` names and this machine has: 2, [0, 3], "0,3", auto or -1 for all."""
    if isinstance(devices, (list, tuple)) or "," in str(devices):
        listed = devices.split(",") if isinstance(devices, str) else devices
        numbers = [int(one) for one in listed if str(one).strip()]
    else:
        numbers = list(range(present if str(devices) in ("auto", "-1") else int(devices)))
    return [one for one in numbers if one < present]
