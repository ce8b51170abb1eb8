"""What `trainer.precision=auto` means on hardware of every kind, pretended."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_lightning.experiments.precision import choose_precision

VOLTA, TURING, AMPERE, ADA, HOPPER = (7, 0), (7, 5), (8, 0), (8, 9), (9, 0)


class Machine:
    """Pretends hardware; by default a CPU with AVX2 and nothing else."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.has()

    def has(
        self, *, gpus: list[tuple[int, int]] | None = None, mps: bool = False, hip: str | None = None, **cpu: bool
    ) -> None:
        gpus = gpus or []
        self.patch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        self.patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        self.patch.setattr(torch.cuda, "get_device_capability", lambda one: gpus[one])
        self.patch.setattr(torch.version, "hip", hip)
        self.patch.setattr(torch.backends.mps, "is_available", lambda: mps)
        found = {"avx2": True, **cpu}
        self.patch.setattr(torch.cpu, "get_capabilities", lambda: found)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("hardware", "accelerator", "devices", "expected"),
    [
        ({"amx_tile": True, "avx512_bf16": True}, "cpu", 1, "bf16-mixed"),  # Sapphire Rapids
        ({"avx512_bf16": True}, "cpu", 1, "bf16-mixed"),  # Zen 4, Cooper Lake
        ({"avx512_f": True, "avx512_vnni": True}, "cpu", 1, "32-true"),  # Cascade Lake
        ({}, "auto", "auto", "32-true"),
        ({"mps": True}, "auto", "auto", "32-true"),
        ({"mps": True}, "gpu", 1, "32-true"),
        ({"mps": True}, "mps", 1, "32-true"),
        ({"gpus": [AMPERE]}, "auto", "auto", "bf16-mixed"),
        ({"gpus": [ADA, HOPPER]}, "gpu", -1, "bf16-mixed"),
        ({"gpus": [TURING]}, "gpu", 1, "32-true"),
        ({"gpus": [VOLTA], "avx512_bf16": True}, "auto", 1, "32-true"),
        ({"gpus": [HOPPER, TURING]}, "cuda", "auto", "32-true"),  # one precision for all ranks
        ({"gpus": [HOPPER, TURING]}, "cuda", "1", "bf16-mixed"),
        ({"gpus": [HOPPER, TURING]}, "cuda", [1], "32-true"),
        ({"gpus": [TURING, HOPPER]}, "cuda", "1,", "bf16-mixed"),
        ({"gpus": [(9, 0)], "hip": "6.2"}, "gpu", 1, "bf16-mixed"),
        ({"gpus": [HOPPER]}, "cpu", 2, "32-true"),
        ({"gpus": [VOLTA], "avx512_bf16": True}, "cpu", 2, "bf16-mixed"),
    ],
)
def test_auto_is_bf16_where_the_hardware_has_it(
    hardware: dict[str, Any], accelerator: str, devices: Any, expected: str, machine: Machine
) -> None:
    machine.has(**hardware)
    assert choose_precision("auto", accelerator, devices) == expected


def test_a_typed_precision_stays(machine: Machine) -> None:
    machine.has(gpus=[HOPPER])
    for setting in ("32-true", "16-mixed", "bf16-true", "nonsense"):
        assert choose_precision(setting, "gpu", 1) == setting
