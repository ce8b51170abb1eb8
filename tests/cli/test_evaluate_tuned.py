"""`llm-lightning evaluate RUN --split ...` of tuned runs: to the bit what the run wrote in its summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import SETTINGS, fit_here, write_checkpoint

from llm_lightning.cli.main import main as cli
from llm_lightning.weights.checkpoint import HEADER, load, read_header, save
from llm_lightning.weights.load import resolve

TEMPLATE = "data.template='{instruction} {response}'"
WAYS = {
    "copy": [],
    "adapters_off": ["lora=default"],
    "cached": ["task.reference=cached"],
    "lora_copy": ["lora=default", "lora.qkv=split", "task.reference=copy"],
    "simpo": ["task.loss=simpo"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, records and pairs."""
    made = tmp_path_factory.mktemp("tuned")
    write_checkpoint(made / "base.ckpt", context_length=64)
    words = ["red", "green", "blue", "white", "black", "gold"]
    rows = [
        {"instruction": f"Say {word} {n * 'very '}now", "output": word, "chosen": f"{word}, please", "rejected": "no"}
        for word in words
        for n in range(10)
    ]
    (made / "rows.json").write_text(json.dumps(rows))
    return made


def run(folder: Path, name: str, task: str, *more: str) -> Path:
    """A finished run of the task."""
    if not (folder / name).is_dir():
        words = [word for word in SETTINGS if "samples" not in word and "context_length" not in word]
        given = [f"task={task}", f"init_from={folder / 'base.ckpt'}", f"data.path={folder / 'rows.json'}", TEMPLATE]
        sizes = [
            "model.context_length=64",
            "optimizer.lr=1e-2",
            "data.batch_size=4",
            "seed=7",
            "callbacks.samples=null",
        ]
        sizes += ["callbacks.responses.max_new_tokens=5"] if task == "sft" else ["data.max_cut=1"]
        outcome = fit_here([*words, *given, *sizes, *more, f"hydra.run.dir={folder / name}"])
        assert outcome.code == 0, outcome.err
    return folder / name


def evaluated(capsys: pytest.CaptureFixture, path: Path, split: str, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli(["evaluate", str(path), "--split", split, "--json", *more]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def written(path: Path, split: str) -> dict[str, float]:
    """What the run wrote: of the test split in its summary, of validation in its best checkpoint."""
    file = resolve(path)
    assert file is not None
    metrics = json.loads((path / "summary.json").read_text())["metrics"] if split == "test" else None
    metrics = read_header(file)["metrics"] if metrics is None else metrics
    return {name.removeprefix(f"{split}/"): value for name, value in metrics.items() if name.startswith(f"{split}/")}


def assert_as_written(capsys: pytest.CaptureFixture, path: Path) -> None:
    for split in ("test", "val"):
        found, wanted = evaluated(capsys, path, split), written(path, split)
        assert {name: found[name] for name in wanted} == wanted, split
        assert len(wanted) > 1


@pytest.mark.parametrize("way", ["full", "lora", pytest.param("packed", marks=pytest.mark.slow)])
def test_instruction_tuning(folder: Path, way: str, capsys: pytest.CaptureFixture) -> None:
    path = run(
        folder, f"sft_{way}", "sft", *{"full": [], "lora": ["lora=default"], "packed": ["data.packing=true"]}[way]
    )
    assert_as_written(capsys, path)
    found = evaluated(capsys, path, "test")
    assert {"loss", "perplexity", "exact_match", "exact_match_low", "exact_match_high"} <= found.keys()
    assert (found["task"], found["split"], found["records"], found["answers"]) == ("sft", "test", 6, 6)
    train = evaluated(capsys, path, "train")
    assert train["records"] == 51
    assert train["loss"] != found["loss"]
    if way == "lora":
        assert evaluated(capsys, path / "checkpoints" / "adapter.ckpt", "test") == found
    assert cli(["evaluate", str(path), "--split", "test"]) == 0
    printed = capsys.readouterr().out
    assert f"exact match                 {found['exact_match']:.4f} (95% interval" in printed
    assert f"{found['loss']:.4f} nats per target token" in printed


@pytest.mark.slow
@pytest.mark.parametrize("way", ["copy", "adapters_off"])
def test_preference_tuning(folder: Path, way: str, capsys: pytest.CaptureFixture) -> None:
    path = run(folder, f"dpo_{way}", "dpo", *WAYS[way])
    assert_as_written(capsys, path)
    found = evaluated(capsys, path, "test")
    assert {"loss", "reward_accuracy", "reward_accuracy_low", "reward_accuracy_high", "reward_margin"} <= found.keys()
    assert found["pairs"] == 6
    assert "exact_match" not in found
    if way == "adapters_off":
        assert evaluated(capsys, path / "checkpoints" / "adapter.ckpt", "test") == found
        assert cli(["evaluate", str(path), "--split", "test"]) == 0
        assert f"reward accuracy             {found['reward_accuracy']:.4f} (95% interval" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lora_copy", "simpo", "cached"])
def test_every_reference(folder: Path, way: str, capsys: pytest.CaptureFixture) -> None:
    path = run(folder, f"dpo_{way}", "dpo", *WAYS[way])
    assert_as_written(capsys, path)
    adapter = path / "checkpoints" / "adapter.ckpt"
    if adapter.is_file():
        alone, whole = evaluated(capsys, adapter, "test"), evaluated(capsys, path, "test")
        numbers = {name: value for name, value in whole.items() if isinstance(value, float)}
        assert {name: alone[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["lora=default"], []], ids=["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_every_precision(folder: Path, precision: str, more: list[str], capsys: pytest.CaptureFixture) -> None:
    for task in ("sft", "dpo"):
        words = [f"trainer.precision={precision}", *more]
        path = run(folder, f"{task}_{precision}_{len(more)}", task, *words)
        assert_as_written(capsys, path)


@pytest.mark.slow
def test_a_reference_of_before_still_evaluates(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Earlier versions could be given the path of a reference, whose weights are in the checkpoint."""
    path = run(folder, "dpo_path", "dpo", "task.reference=copy")
    file = resolve(path)
    assert file is not None
    state = load(file)
    state[HEADER]["config"]["task"]["reference"] = "gone/base.ckpt"
    save(file, state)
    assert_as_written(capsys, path)


def test_what_cannot_be_evaluated_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = run(folder, "sft_full", "sft")
    file = resolve(path)
    assert file is not None
    broken = {}
    for name, change in {
        "no task": lambda state: state[HEADER]["config"].pop("task"),
        "an odd option": lambda state: state[HEADER]["config"]["task"].update(loss="x"),
        "a tensor less": lambda state: state["state_dict"].pop("model.final_norm.bias"),
        "no data": lambda state: state[HEADER]["config"].pop("data"),
        "other data": lambda state: state[HEADER]["lineage"].update(data="0" * 64),
    }.items():
        state = load(file)
        change(state)
        broken[name] = tmp_path / f"{len(broken)}.ckpt"
        save(broken[name], state)
    failures = []
    for command, message in (
        ([str(path), "--split", "test", "--stride", "4"], "--stride 4 is for texts"),
        ([str(folder / "base.ckpt"), "--split", "test"], "pretraining data has no test split"),
        ([str(broken["no task"]), "--split", "test"], "does not hold what its task needs"),
        ([str(broken["an odd option"]), "--split", "test"], "does not hold what its task needs"),
        ([str(broken["a tensor less"]), "--split", "test"], "does not hold what a model needs"),
        ([str(broken["no data"]), "--split", "test"], "use --text FILE"),
        ([str(broken["other data"]), "--split", "val"], "not the data that the model was trained with"),
    ):
        code = cli(["evaluate", *command])
        printed = capsys.readouterr()
        if code != 2 or message not in printed.err or printed.err.count("\n") != 1 or printed.out:
            failures.append((command, code, printed))
    assert not failures


def test_the_process_is_left_as_it_was(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = run(folder, "sft_full", "sft")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    evaluated(capsys, path, "test")
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
