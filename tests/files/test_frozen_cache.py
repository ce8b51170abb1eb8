"""The store of frozen computation: complete or absent, whoever is killed, and never wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_lightning.files import frozen_cache
from llm_lightning.files.frozen_cache import FrozenCache, FrozenCacheError
from llm_lightning.weights import digests as module_of_digests
from llm_lightning.weights.digests import code_digest, weights_digest

LENGTHS = [3, 1, 5, 2, 4]
KEYS = [bytes([n]) * 32 for n in LENGTHS]


def rows_of(index: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows that stand for example `index`."""
    return (torch.arange(LENGTHS[index] * 4).view(-1, 4) / 7 + 100 * index).to(dtype)


class Counting:
    """Computes rows and remembers for whom."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.asked = dtype, []

    def __call__(self, indices: list[int]) -> Tensor:
        self.asked.append(indices)
        return torch.cat([rows_of(index, self.dtype) for index in indices])


def store(folder: Path, dtype: torch.dtype = torch.float32, code: str = "now", **identity: Any) -> FrozenCache:
    return FrozenCache({"weights": "w", **identity}, width=4, dtype=dtype, code=code, folder=folder)


def fill(cache: FrozenCache, compute: Any, chosen: list[int] | None = None, rows_per_batch: int = 6) -> int:
    """Ensure some examples, whose indices `compute` then gets."""
    chosen = list(range(5)) if chosen is None else chosen

    def translated(indices: list[int]) -> Tensor:
        return compute([chosen[index] for index in indices])

    return cache.ensure(
        [KEYS[i] for i in chosen],
        [LENGTHS[i] for i in chosen],
        translated,
        rows_per_batch=rows_per_batch,
        description="rows",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    cache, compute = store(tmp_path, dtype), Counting(dtype)
    assert fill(cache, compute) == 5
    assert len(cache) == 5
    assert cache.n_bytes == sum(LENGTHS) * 4 * dtype.itemsize
    for again in (cache, store(tmp_path, dtype), pickle.loads(pickle.dumps(cache))):
        for index, key in enumerate(KEYS):
            assert torch.equal(again.rows(key), rows_of(index, dtype))
    batch = cache.batch([KEYS[1], KEYS[2]], 6)
    assert batch.shape == (2, 6, 4)
    assert torch.equal(batch[1, :5], rows_of(2, dtype))
    assert torch.equal(batch[0, :1], rows_of(1, dtype))
    assert not batch[0, 1:].any()


def test_only_what_is_missing_is_computed_and_padding_is_bounded(tmp_path: Path) -> None:
    compute = Counting()
    assert fill(store(tmp_path), compute, [0, 1]) == 2
    assert fill(store(tmp_path), compute) == 3
    assert fill(store(tmp_path), compute) == 0
    asked = [index for batch in compute.asked for index in batch]
    assert sorted(asked) == [0, 1, 2, 3, 4]
    assert all(len(batch) * max(LENGTHS[i] for i in batch) <= 6 for batch in compute.asked)


def test_equal_keys_are_computed_once(tmp_path: Path) -> None:
    compute = Counting()
    cache = store(tmp_path)
    keys = [KEYS[0], KEYS[1], KEYS[0]]
    cache.ensure(keys, [3, 1, 3], compute, rows_per_batch=100, description="rows")
    assert sorted(index for batch in compute.asked for index in batch) == [0, 1]


@pytest.mark.parametrize("change", [{"weights": "other"}, {"blocks": 3}, {"precision": "bf16-mixed"}])
def test_another_identity_is_another_store(tmp_path: Path, change: dict[str, Any]) -> None:
    fill(store(tmp_path), Counting())
    assert len(store(tmp_path, **change)) == 0


def test_rows_of_other_code_are_computed_again_and_those_of_before_are_read(tmp_path: Path) -> None:
    assert fill(store(tmp_path, code="old"), Counting()) == 5
    assert fill(store(tmp_path, code="old"), Counting()) == 0
    assert fill(store(tmp_path, code="new"), Counting()) == 5
    assert fill(store(tmp_path, code="new"), Counting()) == fill(store(tmp_path, code="old"), Counting()) == 0
    for index in store(tmp_path).folder.glob("*.json"):  # as an earlier version wrote it
        facts = json.loads(index.read_text())
        facts.pop("code", None)
        index.write_text(json.dumps(facts))
    assert fill(store(tmp_path, code="newer"), Counting()) == 0


def test_code_version_and_type_are_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store(tmp_path), Counting())
    assert len(store(tmp_path, torch.bfloat16)) == 0
    monkeypatch.setattr(frozen_cache, "CODE_VERSION", -1)
    assert len(store(tmp_path)) == 0


def test_a_flipped_bit_is_found_and_the_rows_are_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = store(tmp_path)
    fill(cache, Counting())
    (file,) = cache.folder.glob("*.rows")
    content = bytearray(file.read_bytes())
    content[17] ^= 4
    file.write_bytes(content)
    again, compute = store(tmp_path), Counting()
    assert fill(again, compute) == 5
    assert "is damaged" in caplog.text
    assert torch.equal(again.rows(KEYS[2]), rows_of(2))
    assert len(store(tmp_path)) == 5


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"sha256": "x"}'])
def test_a_damaged_index_is_set_aside(tmp_path: Path, content: str) -> None:
    cache = store(tmp_path)
    fill(cache, Counting())
    (index,) = (file for file in cache.folder.glob("*.json") if file.stem != "identity")
    index.write_text(content)
    assert fill(store(tmp_path), Counting()) == 5


def _killed_at(folder: Path, batch: int) -> None:
    """Fill the store in this process and die in the computation of one batch."""

    def compute(indices: list[int]) -> Tensor:
        counting(indices)
        if len(counting.asked) > batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.cat([rows_of(index) for index in indices])

    counting = Counting()
    fill(store(folder), compute)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_killed_builder_leaves_nothing_that_counts(tmp_path: Path, batch: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(tmp_path, batch))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cache = store(tmp_path)
    assert len(cache) == 0
    assert fill(cache, Counting()) == 5
    assert not list(cache.folder.glob("*.tmp")), "what the killed one left is swept"
    assert len(list(cache.folder.glob("*.rows"))) == 1


def _fill_at_once(folder: Path, barrier: Any, computed: Any) -> None:
    barrier.wait(30)
    computed.put(fill(store(folder), Counting()))


def test_of_several_processes_one_computes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, computed = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_fill_at_once, args=(tmp_path, barrier, computed)) for _ in range(4)]
    for process in processes:
        process.start()
    counts = sorted(computed.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert counts == [0, 0, 0, 5]
    assert len(store(tmp_path)) == 5


def test_a_full_disk_is_its_own_error_and_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    fill(store(tmp_path), Counting(), [0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(FrozenCacheError, match=r"cannot keep rows in .*File too large"):
            fill(store(tmp_path), Counting())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(store(tmp_path)) == 1
    assert fill(store(tmp_path), Counting()) == 4


def test_too_little_space_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    compute = Counting()
    with pytest.raises(FrozenCacheError, match="240 bytes needed, 10 free"):
        fill(store(tmp_path), compute)
    assert compute.asked == []


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        fill(store(tmp_path), lambda indices: torch.cat([rows_of(i) for i in indices]) * float("nan"))
    assert len(store(tmp_path)) == 0


def test_the_identity_can_be_read_by_a_person(tmp_path: Path) -> None:
    cache = store(tmp_path, blocks=11)
    fill(cache, Counting())
    facts = json.loads((cache.folder / "identity.json").read_text())
    assert facts["blocks"] == 11
    assert facts["dtype"] == "torch.float32"


def test_a_digest_depends_on_every_name_type_shape_and_value() -> None:
    base = {"a": torch.zeros(2, 2), "b": torch.ones(1)}
    others = [
        {"c": torch.zeros(2, 2), "b": torch.ones(1)},
        {"a": torch.zeros(4), "b": torch.ones(1)},
        {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.ones(1)},
        {"a": torch.zeros(2, 2), "b": torch.full((1,), 1.0000001)},
    ]
    digests = [weights_digest(state.items()) for state in (base, *others)]
    assert len(set(digests)) == 5
    assert digests[0] == weights_digest({"a": torch.zeros(2, 2).t(), "b": torch.ones(1)}.items())


def test_code_is_known_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(module_of_digests.__file__).parents[1]
    shutil.copytree(package / "models", tmp_path / "models")
    monkeypatch.setattr(module_of_digests, "__file__", str(tmp_path / "weights" / "digests.py"))
    core, found = tmp_path / "models" / "gpt.py", [code_digest("models")]
    for old, new in (
        ("class MLP", "# a comment\n\n\nclass MLP"),
        ("Two linear layers", "Two dense layers"),
        ('F.gelu(self.up_proj(x), approximate="tanh")', "F.silu(self.up_proj(x))"),
    ):
        assert old in core.read_text()
        core.write_text(core.read_text().replace(old, new))
        found.append(code_digest.__wrapped__("models"))
    assert found[0] == found[1] == found[2] != found[3]
