"""A checkpoint is whole and ours, or it is refused; what stood there before survives whatever happens to a save."""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_lightning.models.gpt import GPT, GPTConfig
from llm_lightning.tokenizers.build import build_tokenizer
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.checkpoint import HEADER, CheckpointError
from llm_lightning.weights.families.gpt2 import to_hf
from llm_lightning.weights.load import load_model

CONFIG = GPTConfig(vocab_size=257, context_length=8, n_layer=1, n_head=2, n_embd=8)


def model_state(**header: Any) -> dict[str, Any]:
    """What a run saves, without optimizer."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    description = checkpoints.describe(
        task="pretraining",
        model_config=CONFIG,
        tokenizer=build_tokenizer("byte"),
        step=3,
        config={"seed": 1, "optimizer": {"betas": [0.9, 0.95]}, "run_name": None},
        lineage={"data": "d" * 64, "parent": None},
    )
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"state_dict": weights, HEADER: description | header}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "one.ckpt"
    checkpoints.save(path, model_state())
    return path


def with_digest(archive: bytes) -> bytes:
    """Any zip archive as a forger would sign it."""
    import hashlib

    digest = hashlib.sha256(archive[:-2]).hexdigest().encode()
    comment = checkpoints._MARK + digest
    return archive[:-2] + len(comment).to_bytes(2, "little") + comment


class Gadget:
    """Unpickling one runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


# --- what is loaded is what was saved ----------------------------------------------------------------------------


def test_a_checkpoint_loads_as_it_was_saved(tmp_path: Path) -> None:
    state = model_state()
    digest = checkpoints.save(tmp_path / "one.ckpt", state)
    loaded = checkpoints.load(tmp_path / "one.ckpt")
    assert checkpoints.verify(tmp_path / "one.ckpt") == digest
    assert loaded[HEADER] == state[HEADER] | {"digest": digest}
    assert loaded["state_dict"].keys() == state["state_dict"].keys()
    for name, tensor in state["state_dict"].items():
        assert torch.equal(loaded["state_dict"][name], tensor), name


def test_the_header_says_all_that_rebuilds_the_model(saved: Path) -> None:
    header = checkpoints.read_header(saved)
    assert header["model"] == asdict(CONFIG)
    assert header["tokenizer"] == build_tokenizer("byte").describe()
    assert {"format", "task", "step", "config", "lineage", "digest"} <= header.keys()


def test_nothing_in_a_checkpoint_needs_a_pickle_that_runs_code(saved: Path) -> None:
    assert torch.load(saved, weights_only=True)[HEADER]["task"] == "pretraining"


def test_copies_and_links_verify_and_stand_alone(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(saved, other / "renamed.bin")
    (other / "symlink.ckpt").symlink_to(saved)
    checkpoints.link(saved, other / "link.ckpt")
    digests = {checkpoints.verify(path) for path in [saved, *other.iterdir()]}
    assert len(digests) == 1
    saved.unlink()
    assert checkpoints.verify(other / "link.ckpt") in digests


def test_link_replaces_and_leaves_no_temporary_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = saved.with_name("last.ckpt")
    target.write_bytes(b"old")
    for _ in range(2):
        checkpoints.link(saved, target)
        assert target.samefile(saved)
    target.unlink()

    def no_links(*_: Any) -> None:
        raise OSError("this file system has none")

    monkeypatch.setattr(os, "link", no_links)
    checkpoints.link(saved, target)
    assert not target.samefile(saved)
    assert checkpoints.verify(target) == checkpoints.verify(saved)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["last.ckpt", "one.ckpt"]


# --- what is not whole is refused --------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    content, draw = saved.read_bytes(), random.Random(0)
    ends = [bit for byte in (0, len(content) - 1) for bit in (8 * byte, 8 * byte + 7)]
    for bit in ends + [draw.randrange(8 * len(content)) for _ in range(100)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoints.load(saved)


def test_every_truncation_and_addition_is_noticed(saved: Path) -> None:
    content, draw = saved.read_bytes(), random.Random(0)
    lengths = [0, 1, 21, 22, 97, len(content) - 1] + [draw.randrange(len(content)) for _ in range(50)]
    for damaged in [content[:length] for length in lengths] + [content + b"\0", content + content]:
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"one.ckpt"):
            checkpoints.load(saved)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none.ckpt"):
        checkpoints.load(tmp_path / "none.ckpt")


@pytest.mark.parametrize("foreign", [{"state_dict": {}}, torch.zeros(3), {HEADER: 1}, {HEADER: {}}])
def test_checkpoints_of_other_programs_are_refused(tmp_path: Path, foreign: Any) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save(foreign, path)
    with pytest.raises(CheckpointError, match="written by another program"):
        checkpoints.load(path)
    path.write_bytes(with_digest(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"another program has written it|llm_lightning\.format=None must be"):
        checkpoints.load(path)


@pytest.mark.parametrize("missing", ["model", "tokenizer", "state_dict"])
def test_a_checkpoint_without_a_model_is_refused(tmp_path: Path, missing: str) -> None:
    state = model_state()
    del (state if missing in state else state[HEADER])[missing]
    checkpoints.save(tmp_path / "part.ckpt", state)
    with pytest.raises(CheckpointError, match=f"does not hold what a model needs.*{missing}"):
        load_model(tmp_path / "part.ckpt")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "one.ckpt", model_state(model=asdict(CONFIG) | {"n_embd": 16}))
    with pytest.raises(CheckpointError, match=r"weights do not fit the model: .* has shape \(257, 8\)"):
        load_model(tmp_path / "one.ckpt")


def test_a_newer_format_says_to_update(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "new.ckpt", model_state(format=checkpoints.FORMAT_VERSION + 1))
    with pytest.raises(CheckpointError, match="has format 2, this version reads up to 1; update llm-lightning"):
        checkpoints.load(tmp_path / "new.ckpt")


@pytest.mark.parametrize("kind", ["pickle", "legacy torch", "torch", "signed torch", "signed pickle in a zip"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, kind: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    state = {**model_state(), "gadget": Gadget(canary)}
    content = io.BytesIO()
    if kind == "pickle":
        pickle.dump(state, content)
    elif kind == "signed pickle in a zip":
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Gadget(canary)))
            archive.writestr("archive/version", "3")
    else:
        torch.save(state, content, _use_new_zipfile_serialization=kind != "legacy torch")
    path.write_bytes(with_digest(content.getvalue()) if "signed" in kind else content.getvalue())
    for read in (checkpoints.load, checkpoints.read_header, load_model):
        with pytest.raises(CheckpointError):
            read(path)
    assert not canary.exists()


# --- a save happens wholly or not at all -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_during_a_save_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = saved.read_bytes()

    def breaks(_: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(error):
        checkpoints.save(saved, model_state(step=4))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_cannot_be_pickled_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(Exception, match="lambda"):
        checkpoints.save(saved, {"function": lambda: None})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """A larger file cannot be written, as on a full disk. No longer than needed: the test runner writes files too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("n_bytes", [0, 100, 4096, -100, -2])
def test_a_full_disk_leaves_the_old_file_and_says_how_much_is_needed(saved: Path, n_bytes: int) -> None:
    before = saved.read_bytes()
    needed = sum(tensor.nbytes for tensor in model_state()["state_dict"].values())
    message = rf"cannot write checkpoint .*one.ckpt: .*\({needed:,} bytes needed, [\d,]+ free\)"
    limit = n_bytes if n_bytes >= 0 else len(before) + n_bytes
    with pytest.raises(OSError, match=message), largest_file(limit):
        checkpoints.save(saved, model_state(step=4))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def save_forever(folder: Path, first: int, reports: Connection) -> None:
    config = GPTConfig(vocab_size=4000, context_length=8, n_layer=1, n_head=1, n_embd=64)
    header = checkpoints.describe(task="pretraining", model_config=config, tokenizer=build_tokenizer("byte"))
    weights = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    for step in itertools.count(first):
        state = {"state_dict": weights, HEADER: {**header, "step": step}}
        checkpoints.save(folder / f"step_{step:08d}.ckpt", state)
        checkpoints.save(folder / "last.ckpt", state)
        reports.send(step)


def killed_saves(folder: Path, first: int, kills: int, draw: random.Random) -> int:
    """Save in child processes that are killed; after each kill compare what is there with what was reported."""
    fork = multiprocessing.get_context("fork")
    for _ in range(kills):
        received, sent = fork.Pipe(duplex=False)
        child = fork.Process(target=save_forever, args=(folder, first, sent))
        child.start()
        sent.close()
        reported = received.recv()
        time.sleep(draw.uniform(0, 0.1))
        child.kill()
        child.join()
        with suppress(EOFError):
            while True:
                reported = received.recv()
        newest = checkpoints.newest_valid(folder)
        assert newest is not None
        step = checkpoints.read_header(newest)["step"]
        assert newest.name == f"step_{step:08d}.ckpt"
        assert step in (reported, reported + 1)
        assert checkpoints.read_header(folder / "last.ckpt")["step"] in (reported, reported + 1)
        first = step + 1
    return first


def test_the_newest_checkpoint_loads_after_a_kill(tmp_path: Path) -> None:
    killed_saves(tmp_path, 0, 1, random.Random(0))


@pytest.mark.slow
def test_the_newest_checkpoint_loads_after_each_of_20_kills(tmp_path: Path) -> None:
    killed_saves(tmp_path, 0, 20, random.Random(1))


# --- which one is chosen -----------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_passed_over_and_both_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [tmp_path / f"step_{step:08d}.ckpt" for step in (5, 90, 100)]
    for path in paths:
        checkpoints.save(path, model_state())
    assert checkpoints.newest_valid(tmp_path) == paths[2]
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_valid(tmp_path) == paths[1]
    assert str(paths[2]) in caplog.text
    assert f"Falling back to {paths[1]}" in caplog.text


def test_a_folder_of_damaged_checkpoints_is_refused_an_empty_one_is_new(tmp_path: Path) -> None:
    assert checkpoints.newest_valid(tmp_path) is None
    (tmp_path / ".step_00000001.ckpt.77.tmp").write_bytes(b"half")
    assert checkpoints.newest_valid(tmp_path) is None
    (tmp_path / "step_00000001.ckpt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"step_00000001.ckpt"):
        checkpoints.newest_valid(tmp_path)


def test_a_run_folder_means_its_best_checkpoint_and_its_last_if_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    checkpoints.save(folder / "last.ckpt", model_state(step=9))
    assert load_model(tmp_path / "run").header["step"] == 9
    checkpoints.save(folder / "best.ckpt", model_state(step=5))
    assert load_model(str(tmp_path / "run")).header["step"] == 5
    assert load_model(folder / "last.ckpt").header["step"] == 9


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_path_alone_gives_the_same_model(tmp_path: Path, tied_head: bool) -> None:
    torch.manual_seed(1)
    config = GPTConfig(**{**asdict(CONFIG), "tied_head": tied_head})
    model, tokenizer = GPT(config).eval(), build_tokenizer("word", texts=["to be or not"])
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    header = checkpoints.describe(task="pretraining", model_config=config, tokenizer=tokenizer)
    checkpoints.save(tmp_path / "one.ckpt", {"state_dict": state, HEADER: header})
    loaded = load_model(tmp_path / "one.ckpt")
    ids = torch.randint(0, 257, (2, 8))
    assert torch.equal(loaded.model(ids), model(ids))
    assert not loaded.model.training
    assert loaded.model.config == config
    assert loaded.tokenizer.encode("not to be") == tokenizer.encode("not to be")
    assert (loaded.model.lm_head.weight is loaded.model.token_embedding.weight) == tied_head
    half = load_model(tmp_path / "one.ckpt", dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_foreign_weights_that_do_not_tell_their_tokenizer_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = GPTConfig(vocab_size=300, context_length=8, n_layer=1, n_head=1, n_embd=64)
    weights = {name: tensor.contiguous() for name, tensor in to_hf(GPT(config).state_dict(), config).items()}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not say which tokenizer its 300 tokens belong to"):
        load_model(tmp_path)


def test_a_task_of_someone_elses_may_save_more_than_a_model_of_ours(tmp_path: Path) -> None:
    state = model_state(task="mine", own={"beta": 0.5})
    state["state_dict"]["model.value_head.weight"] = torch.full((1, 8), -torch.inf)
    checkpoints.save(tmp_path / "one.ckpt", state)
    assert checkpoints.load(tmp_path / "one.ckpt")[HEADER]["own"] == {"beta": 0.5}
    with pytest.raises(CheckpointError, match=r"state_dict.model.value_head.weight is unknown to this version"):
        load_model(tmp_path / "one.ckpt")
