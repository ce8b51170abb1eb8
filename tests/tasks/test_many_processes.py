"""The same training by one, two and three processes, with whole and with sharded weights, for every task."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import CASES, GOES_ON, SHORT, STEPS, go_on, train_all
from forked import finish_two
from tiny_run import SETTINGS, fit_here

from llm_lightning.weights import checkpoint as checkpoints


def run(processes: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in the first of several processes, which call it together."""
    folder: Path = arguments[0]
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # forks start in no time; each is told its rank, as by a launcher
    ranks = [fork.Process(target=be, args=(rank, processes, port, work, arguments)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(900)
    assert [process.exitcode for process in ranks] == [0] * processes
    return torch.load(folder / "found.pt", weights_only=True)


def be(rank: int, processes: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ["LLM_LIGHTNING_CACHE"] = str(arguments[0] / "cache")  # what is stored is computed by these processes
    found = work(*arguments)
    if rank == 0:
        torch.save(found, arguments[0] / "found.pt")


def assert_equal(one: dict[str, Any], other: dict[str, Any], steps: int) -> None:
    """To 1e-10: sums of another order differ by 1e-16 in float64, and Adam divides by small numbers in between."""
    assert len(other["losses"]) == steps
    torch.testing.assert_close(other["losses"], one["losses"][:steps], rtol=1e-10, atol=0)
    assert_near(other["weights"][steps], one["weights"][steps], 1e-10)
    assert len(other["val"]) >= 1
    for theirs, ours in zip(other["val"], one["val"], strict=False):
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():  # metrics are kept in float32
            assert theirs[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = run(1, train_all, tmp_path_factory.mktemp("alone") / "run", ["one"], 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_is_one(tmp_path: Path, alone: dict[str, Any], processes: int) -> None:
    found = run(processes, train_all, tmp_path / "run", ["fsdp", "ddp"], processes)
    for case in CASES:
        assert_equal(alone[f"one {case}"], found[f"ddp {case}"], STEPS)
        assert_equal(alone[f"one {case}"], found[f"fsdp {case}"], SHORT)
        for held in found[f"fsdp {case}"]["held"]:
            assert_parts(held, processes)
        assert any(name.startswith("weight reference") for name in held) == case.startswith("dpo copy")
    # What sharded weights have computed is found by whole ones: log-probabilities, vectors, output of a block.
    assert len(list((tmp_path / "run" / "cache").rglob("*.rows"))) == 3


def assert_parts(held: dict[str, tuple[int, int]], processes: int) -> None:
    """Rows are dealt out whole, so that a matrix of 257 rows may give one more to a process."""
    assert {name.split()[0] for name in held} == {"weight", "gradient", "exp_avg", "exp_avg_sq"}
    for name, (local, total) in held.items():
        assert local <= total / processes + 16 * 4, name  # a row of the widest matrix
    everything = sum(total for _, total in held.values())
    assert sum(local for local, _ in held.values()) <= 1.1 * everything / processes


@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_training_stays_equal_for_long(tmp_path: Path, alone: dict[str, Any], processes: int) -> None:
    found = run(processes, train_all, tmp_path / "run", ["fsdp"], processes, STEPS)
    for case in CASES:
        assert_equal(alone[f"one {case}"], found[f"fsdp {case}"], STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "starts", [(("ddp", 2), ("fsdp", 2), ("ddp", 2)), (("one", 1), ("fsdp", 2), ("one", 1)), (("fsdp", 3), ("ddp", 2))]
)
def test_a_checkpoint_goes_on_under_another_strategy(tmp_path: Path, starts: tuple[tuple[str, int], ...]) -> None:
    """Two updates by each start."""
    strategy, processes = starts[0]
    straight = run(processes, go_on, tmp_path / "run", tmp_path / "straight", strategy, processes, 2 * len(starts))
    for number, (strategy, processes) in enumerate(starts, 1):
        parts = run(processes, go_on, tmp_path / f"run{number}", tmp_path / "parts", strategy, processes, 2 * number)
    for case in GOES_ON:
        assert_near(parts[case], straight[case], 1e-12)  # another order of sums, and another kernel of AdamW
        written = sorted((tmp_path / "parts" / case.replace(" ", "_") / "checkpoints").glob("step_*.ckpt"))
        forms = [form(checkpoints.load(path)) for path in written]
        assert len(forms) == len(starts)
        assert all(one == forms[0] for one in forms)


def form(state: dict[str, Any]) -> Any:
    """Names, types and shapes of weights and optimizer, and its settings but the kernel."""
    tied = state["state_dict"]["model.token_embedding.weight"].data_ptr()
    weights = {
        name: (tensor.dtype, tensor.shape, tensor.data_ptr() == tied) for name, tensor in state["state_dict"].items()
    }
    optimizer = state["optimizer_states"][0]
    kept = {
        number: {name: (value.dtype, value.shape) for name, value in one.items()}
        for number, one in optimizer["state"].items()
    }
    groups = [{key: value for key, value in group.items() if key != "fused"} for group in optimizer["param_groups"]]
    return weights, kept, groups


@pytest.mark.slow
def test_sharded_weights_write_the_same_texts(tmp_path: Path) -> None:
    """Samples from before the first step on, which gather the weights for the first time, and answers at the end."""
    settings = [word for word in SETTINGS if not word.startswith(("callbacks.samples.prompts", "model.context_length"))]
    settings += [
        "task=sft",
        "model.context_length=320",
        "trainer.max_steps=2",
        "callbacks.samples.beside_start=true",
        "callbacks.responses.max_records=3",
        "callbacks.responses.max_new_tokens=4",
    ]
    one = [*settings, "data.batch_size=4", f"hydra.run.dir={tmp_path / 'one'}"]
    assert fit_here(one).code == 0
    two = ["accelerator=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]
    words = [word for word in settings if word != "accelerator=cpu"]
    outcome = finish_two([*words, *two, f"hydra.run.dir={tmp_path / 'two'}"], tmp_path)
    assert outcome.code == 0, outcome.err[-3000:]
    for name in ("samples.md", "responses.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
