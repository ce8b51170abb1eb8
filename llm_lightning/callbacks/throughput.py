"""Training speed: target tokens (or sequences) per second, share of the hardware's peak, peak memory."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import lightning as L
import torch

# Dense 16-bit tensor-core peaks in TFLOP/s, fp32 accumulation, from NVIDIA's data sheets and architecture white
# papers (figures "with sparsity" halved). bf16, but fp16 for V100 and T4, which have no bf16. The first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,  # SXM reports itself as "H100 80GB HBM3"
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


class Throughput(L.Callback):
    """Log `train/tokens_per_second` (or `sequences`), `train/mfu` and `train/peak_memory_gib` in the task's rows.

    Items of the loss (target tokens, sequences) of all processes are counted, and the time between updates including
    the wait for data; validation, sampling, saving and the first update, which compiles and allocates, are left out.

    Args:
        peak_tflops: of one device, in 1e12 floating-point operations a second; default: looked up by name, and MFU
            (model FLOPs utilization, PaLM appendix B) is not logged where the name is unknown, as on CPUs.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"callbacks.throughput.peak_tflops={peak_tflops} must be positive; null: look it up")
        self.peak_tflops = peak_tflops
        self.total_items, self.total_seconds = 0, 0.0  # timed items of this session
        self._earlier_wall_seconds = 0.0
        self._session_start = time.monotonic()
        self._since: float | None = None  # the timer is paused while this is None
        self._updates = self._items_seen = 0
        self._in_update = True  # a micro-batch of the next update has begun; True at first: the first update compiles
        self._is_whole = False  # the timer has run for the whole of the next update
        self._logged = (0, 0.0)

    @property
    def items_per_second(self) -> float | None:
        """The rate of this session; None before the second update."""
        return self.total_items / self.total_seconds if self.total_seconds else None

    @property
    def wall_seconds(self) -> float:
        """Seconds of all sessions of the run, each up to the checkpoint that the next one continued from."""
        return self._earlier_wall_seconds + time.monotonic() - self._session_start

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._updates, self._items_seen = trainer.global_step, pl_module.items_seen
        if self.peak_tflops is None and pl_module.device.type == "cuda":
            self.peak_tflops = known_peak(torch.cuda.get_device_name(pl_module.device))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._since = time.monotonic()
        self._in_update = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._updates:  # an accumulation window is open
            return
        now, items = time.monotonic(), pl_module.items_seen
        if self._is_whole and self._since is not None:
            self.total_items += items - self._items_seen
            self.total_seconds += now - self._since
        self._updates, self._items_seen = trainer.global_step, items
        self._since, self._is_whole, self._in_update = now, True, False
        is_last = trainer.global_step == pl_module.total_steps
        if (trainer.global_step - 1) % trainer.log_every_n_steps == 0 or is_last:  # type: ignore[attr-defined]
            self._log(trainer, pl_module, batch.input_ids.size(1))

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._pause()

    def state_dict(self) -> dict[str, float]:
        return {"wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._earlier_wall_seconds = state_dict["wall_seconds"]

    def _pause(self) -> None:
        self._since = None
        if self._in_update:
            self._is_whole = False

    def _log(self, trainer: L.Trainer, pl_module: Any, sequence_length: int) -> None:
        metrics = {"train/peak_memory_gib": peak_memory(pl_module.device) / 2**30}
        items, seconds = self.total_items - self._logged[0], self.total_seconds - self._logged[1]
        self._logged = (self.total_items, self.total_seconds)
        if seconds > 0:
            rate = metrics[f"train/{pl_module.item}s_per_second"] = items / seconds
            if self.peak_tflops is not None and pl_module.item == "token":
                flops = rate * pl_module.trunk.flops_per_token(sequence_length)
                metrics["train/mfu"] = flops / (self.peak_tflops * 1e12 * trainer.world_size)
        pl_module.log_row(metrics)


def known_peak(device_name: str) -> float | None:
    """Peak TFLOP/s of a device by its name; laptop versions are other chips."""
    if "Laptop" in device_name:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a CUDA device, elsewhere resident in the process (0: unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
