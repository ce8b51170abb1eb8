"""Every task on a pretended Apple GPU. `test_mps.py` runs this file in a process of its own, which can no longer fork.

Forward, loss, metrics, clipping and optimizer run on tensors without content that say they are on `mps`
(`FakeTensorMode`), and a dispatch mode refuses float64, which the device lacks. PyTorch's autograd engine wants the
device itself: the hand-written gradients are called by hand, and a whole step with its backward pass runs on the CPU,
where the same mode refuses float64.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_kinds import KINDS, of_kind
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llm_lightning.data.batches import ClassificationBatch, Example, collate_packed, collate_padded
from llm_lightning.data.pairs import PairSample, collate_packed_pairs
from llm_lightning.losses import _HeadLoss
from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.models.lora import LoRAConfig
from llm_lightning.models.rope import _Rotate
from llm_lightning.optim.adamw import AdamWConfig
from llm_lightning.optim.clipping import scale_and_clip_gradients
from llm_lightning.optim.muon import MuonConfig
from llm_lightning.optim.schedules import ConstantConfig
from llm_lightning.tasks.accounting import Sums
from llm_lightning.tasks.classification import ClassificationModule
from llm_lightning.tasks.dpo import DPOModule
from llm_lightning.tasks.pretraining import PretrainingModule
from llm_lightning.tasks.sft import SFTModule
from llm_lightning.tokenizers.build import build_tokenizer

MODEL = GPTConfig(vocab_size=257, context_length=24, n_layer=2, n_head=2, n_embd=16)
TASKS = ("pretraining", "packed", "lora", "classification", "dpo")


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS>;
C10_REGISTER_GUARD_IMPL(MPS, Guard);
"""
"""PyTorch asks every device for its current stream, and builds without MPS have nobody to answer."""


@pytest.fixture(scope="module")
def mps_guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.backends.mps.is_built():
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, to pretend the device")
    folder, torch_folder = tmp_path_factory.mktemp("guard"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    library = str(folder / "guard.so")
    paths = ["-I", str(torch_folder / "include"), "-L", str(torch_folder / "lib"), "-lc10"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", str(folder / "guard.cpp"), "-o", library, *paths]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)


class LackingError(TypeError):
    """The device does not have it."""


class Device(TorchDispatchMode):
    """Refuse float64 on a device. On the pretended one masks are full, and a number that is read back is 1."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.device == "mps" and function is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if self.device == "mps" and function is torch.ops.aten.index.Tensor:
            args = (args[0], [one for index in args[1] for one in whole(index)])
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self.calls += 1
                if tensor.dtype in (torch.float64, torch.complex128):
                    raise LackingError(f"{function}: {self.device} has no float64")
        return result


def whole(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the positions of all its places; their number would depend on its content."""
    if index is None or index.dtype is not torch.bool:
        return [index]
    return [index.new_zeros(index.numel(), dtype=torch.int64) for _ in range(index.dim())]


@contextmanager
def pretended() -> Iterator[Device]:
    with FakeTensorMode(allow_non_fake_inputs=True), Device("mps") as seen, torch.device("mps"):
        yield seen
    assert seen.calls > 0, "nothing ran on the device"


def built(task: str, kind: str = "gpt2") -> tuple[Any, Any]:
    """A module with random weights on the current device, and a batch on the CPU."""
    config = of_kind(MODEL, kind)
    common: dict[str, Any] = {
        "model": GPT(replace(config, tied_head=True) if task == "classification" else config),
        "tokenizer": build_tokenizer("byte"),
        "optimizer": AdamWConfig(),
        "scheduler": ConstantConfig(),
        "lora": LoRAConfig(rank=2, alpha=2) if task == "lora" else None,
    }
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 257, length) for length in (9, 5, 7)]
    with torch.device("cpu"):
        if task == "dpo":
            pairs = [PairSample(number, row[:3], row[3:], row[2:4]) for number, row in enumerate(rows)]
            batch: Any = collate_packed_pairs(pairs, pad_id=0)
        elif task == "classification":
            ids = torch.from_numpy(np.stack([row[:5] for row in rows]))
            batch = ClassificationBatch(ids, torch.tensor([5, 3, 4]), torch.tensor([0, 1, 2]), 3, (0, 1, 2))
        else:
            collate = collate_padded if task == "pretraining" else collate_packed
            batch = collate(
                [Example(number, row, np.arange(len(row)) > 1) for number, row in enumerate(rows)], pad_id=0
            )
    if task == "dpo":
        return DPOModule(**common), batch
    if task == "classification":
        labels = {"labels": ["a", "b", "c"], "class_counts": [1, 1, 1], "class_weights": "balanced"}
        return ClassificationModule(**common, **labels), batch
    return {"pretraining": PretrainingModule}.get(task, SFTModule)(**common), batch


def placed(module: nn.Module, *, trained: bool = False) -> nn.Module:
    """`module` with tensors of the pretended device in place of its own; a tied one stays tied."""
    known: dict[int, Any] = {}
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None and id(own) not in known:
                known[id(own)] = nn.Parameter(torch.empty(own.shape, dtype=own.dtype, device="mps"), trained)
            part._parameters[name] = own if own is None else known[id(own)]
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else torch.empty(value.shape, dtype=value.dtype, device="mps")
    return module


def moved(batch: Any, device: str) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)


@pytest.mark.usefixtures("mps_guard")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_forward_loss_and_metrics_need_no_float64(
    task: str, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch asks the device itself which of its kernels of attention to take; the result is like the query.
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: query * 1.0)
    module, batch = built(task, kind)
    with pretended(), torch.no_grad():
        placed(module)
        for mode in (True, False):
            with torch.autocast("mps", torch.bfloat16, enabled=precision == "bf16-mixed"):
                output = module.train(mode).step_output(moved(batch, "mps"))
            assert output.loss_sum.device.type == "mps"
            sums = Sums()
            sums.add(output)
            assert all(pair.dtype is torch.float32 for pairs in sums._pairs.values() for pair in pairs)


@pytest.mark.usefixtures("mps_guard")
def test_hand_written_gradients_need_no_float64() -> None:
    class Context:
        needs_input_grad = (True, True, False)

        def save_for_backward(self, *tensors: Tensor) -> None:
            self.saved_tensors = tensors

    with pretended(), torch.no_grad():
        hidden, weight, labels = torch.randn(6, 16), torch.randn(257, 16), torch.zeros(6, dtype=torch.int64)
        of_loss, of_rotation = Context(), Context()
        loss = _HeadLoss.forward(of_loss, hidden, weight, labels)
        found = _HeadLoss.backward(of_loss, torch.ones_like(loss))
        assert [one.shape for one in found[:2]] == [hidden.shape, weight.shape]
        heads, table = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
        _Rotate.forward(of_rotation, heads, table, table, 2)
        assert _Rotate.backward(of_rotation, heads)[0].shape == heads.shape


@pytest.mark.parametrize(
    "config", [AdamWConfig(), AdamWConfig(fused=False), MuonConfig()], ids=["fused", "plain", "muon"]
)
@pytest.mark.usefixtures("mps_guard")
def test_clipping_and_optimizers_need_no_float64(config: Any) -> None:
    model = GPT(MODEL)
    with pretended():
        placed(model, trained=True)
        optimizer = config.build(model.named_parameters())
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            scale_and_clip_gradients(model.parameters(), 0.5, 1.0)
            optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        assert any(value.device.type == "mps" for value in states)


@pytest.mark.usefixtures("mps_guard")
def test_float64_is_refused() -> None:
    """Else the tests above could not fail."""
    with pytest.raises(LackingError, match="mps has no float64"), pretended():
        torch.ones(2).double()
    with pytest.raises(LackingError), Device("cpu"):
        torch.ones(2).double()
