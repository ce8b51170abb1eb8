"""What the processes of a run compare, and how a difference reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_lightning.experiments.ranks.agreement import (
    facts_of,
    refuse_differences,
    refuse_other_disks,
    sees_folder,
    source_digest,
)
from llm_lightning.experiments.run_folder import RunFolder

SETTINGS: dict[str, Any] = {
    "seed": 1,
    "run_name": None,
    "init_from": None,
    "optimizer": {"lr": 1e-3},
    "data": {"path": "/a/text.txt", "batch_size": 2, "num_workers": 0},
    "trainer": {"max_steps": 4, "enable_progress_bar": True},
}


def facts(changes: dict[str, Any], data: str = "abc", folder: str = "run") -> dict[str, Any]:
    settings = {name: dict(node) if isinstance(node, dict) else node for name, node in SETTINGS.items()}
    for key, value in changes.items():
        *nodes, name = key.split(".")
        (settings[nodes[0]] if nodes else settings)[name] = value
    return facts_of(settings, RunFolder(Path(folder), None, {}), {"data": data, "parent": None})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.path": "/scratch/of/this/node/text.txt"},
        {"init_from": "/b/best.ckpt"},
        {"trainer.enable_progress_bar": False},
        {"data.num_workers": 4},
        {"run_name": "mine"},
    ],
)
def test_what_may_differ_from_node_to_node(changes: dict[str, Any]) -> None:
    refuse_differences([facts({}), facts(changes)])


@pytest.mark.parametrize(
    ("of_ranks", "message"),
    [
        ([{}, {"optimizer.lr": 2e-3}, {}, {"optimizer.lr": 2e-3}], "optimizer.lr is 0.001 on ranks 0, 2 and 0.002 on"),
        ([{}, {"trainer.max_steps": 5}], "trainer.max_steps is 4 on rank 0 and 5 on rank 1; start all with"),
        ([{}, {"seed": 2}, {"seed": 3}], "seed is 1 on rank 0 and 2 on rank 1 and 3 on rank 2"),
        (
            [{}, {"data.batch_size": 3, "seed": 7}],
            "seed is 1 on rank 0 and 7 on rank 1; data.batch_size is 2 on",
        ),
    ],
)
def test_a_difference_names_the_key_the_values_and_the_ranks(of_ranks: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match="the processes of this run disagree") as raised:
        refuse_differences([facts(changes) for changes in of_ranks])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_many_differences_stay_one_line() -> None:
    with pytest.raises(ValueError, match="; and 2 more; start all with the same command"):
        refuse_differences([dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1)])


def test_other_data_and_libraries_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the digest of the data is 'abc' on rank 0 and 'def' on rank 1"):
        refuse_differences([facts({}), facts({}, data="def")])
    one = facts({})
    with pytest.raises(ValueError, match=r"torch is '.*' on rank 0 and '1.0' on rank 1"):
        refuse_differences([one, {**one, "torch": "1.0"}])
    assert one["the source code of llm_lightning"] == source_digest()


def test_a_process_without_the_disk_of_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_bytes(b"this run")
    assert sees_folder(tmp_path, b"this run", seconds=0)
    assert not sees_folder(tmp_path, b"another run", seconds=0)
    assert not sees_folder(tmp_path / "missing", b"this run", seconds=0)
    refuse_other_disks(tmp_path, [True, True], ["a", "b"])
    with pytest.raises(ValueError, match=r"rank 2 on node-b does not see the run folder .* of rank 0 on node-a; set"):
        refuse_other_disks(tmp_path, [True, True, False], ["node-a", "node-a", "node-b"])
