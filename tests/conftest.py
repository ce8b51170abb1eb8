"""What every test has: one thread, a cache of its own, no words of Lightning's; tiny offline parts of a training."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from compose_once import compose_once

from llm_lightning.experiments import unforeseen

if TYPE_CHECKING:  # the process that hands the tests out to others reads this file as well, and needs no torch
    import lightning as L

    from llm_lightning.data.base import BaseDataModule
    from llm_lightning.tasks.pretraining import PretrainingModule


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As in the processes that tests start: sums over threads would differ in their last bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _compose_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        compose_once(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def _entry_points_once() -> Iterator[None]:
    """Each Trainer looks through all installed packages for callbacks; here they stay the same."""
    registry = sys.modules.get("lightning.fabric.utilities.registry")
    with pytest.MonkeyPatch.context() as patch:
        if registry is not None:
            patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and until files would survive that, each test would wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
    if request.node.get_closest_marker("mps"):
        import torch

        if not torch.backends.mps.is_available():
            pytest.skip("needs the GPU of an Apple computer (MPS)")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True)
def _nothing_unforeseen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command of a test falls into the net, but in tests of the net itself, which have the marker `reaches_net`."""
    caught: list[BaseException] = []

    def report(error: BaseException, **options: Any) -> int:
        caught.append(error)
        return original(error, **options)

    original = unforeseen.report
    monkeypatch.setattr(unforeseen, "report", report)
    yield
    if caught and "reaches_net" not in request.keywords:
        raise caught[0]


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data; without it the test is skipped."""
    folder = os.environ.get("LLM_LIGHTNING_DATA")
    if not folder:
        pytest.skip("needs real data: set LLM_LIGHTNING_DATA to the folder that holds it")
    return Path(folder)


@pytest.fixture
def make_module() -> Callable[..., PretrainingModule]:
    from ragged import tiny_module

    return tiny_module


@pytest.fixture
def make_trainer() -> Callable[..., L.Trainer]:
    from ragged import tiny_trainer

    return tiny_trainer


@pytest.fixture
def make_data() -> Callable[..., BaseDataModule]:
    from ragged import RaggedDataModule

    return RaggedDataModule
