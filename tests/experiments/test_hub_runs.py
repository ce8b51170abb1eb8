"""Runs that begin with a repository of the hub: the commit and the digests are recorded, and later compared."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_model import WHOLE, repository
from hub_server import COMMIT, FakeRepository, serving_repository
from huggingface_hub import constants
from tiny_run import SETTINGS, train_here, write_corpus

from llm_lightning.cli.lineage import trace
from llm_lightning.weights import checkpoint as checkpoints

QUIET = [*SETTINGS, "trainer.max_steps=1", "callbacks.samples=null", "logger=csv", "data.path=corpus.txt"]
LAST = Path("checkpoints", "last.ckpt")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeRepository]]:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client"))
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus.txt")
    with serving_repository(repository()) as (handler, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield handler


@pytest.mark.slow
def test_a_run_names_the_commit_that_it_began_with(hub: type[FakeRepository], tmp_path: Path) -> None:
    outcome = train_here([*QUIET, "run_name=one", "init_from=hf:org/name"])
    assert outcome.code == 0, outcome.err
    run = tmp_path / "outputs" / "pretraining" / "one"
    header = checkpoints.read_header(run / LAST)
    lineage = header["lineage"]
    assert lineage["parent"] == hashlib.sha256(hub.files[WHOLE]).hexdigest()
    assert lineage["parent_name"] == f"hf:org/name@{COMMIT}"
    assert lineage["parent_files"] == {name: hashlib.sha256(text).hexdigest() for name, text in hub.files.items()}
    assert lineage["places"]["init_from"]["typed"] == "hf:org/name"
    assert header["generation"] == {"eos_token_id": [256, 2], "pad_token_id": 2, "top_p": 0.9}
    assert header["template"]["text"] == "{{ messages[0]['content'] }}"
    assert header["model"]["position"] == "rope"
    assert [link["state"] for link in trace(str(run))] == ["same", "not read"]

    hub.files, hub.commit = repository(seed=4), "1" * 40  # main moves on
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")  # as a run that was killed early: it needs its first weights again
    outcome = train_here([f"resume={run}"])
    assert outcome.code == 0, outcome.err
    assert checkpoints.read_header(run / LAST)["lineage"] == lineage  # of the commit of before, from the cache

    command = json.loads((run / "command.json").read_text())
    command["places"]["init_from"]["digest"] = "0" * 64
    (run / "command.json").write_text(json.dumps(command))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    outcome = train_here([f"resume={run}"])
    assert outcome.code == 2
    assert (
        f"init_from changed since the run began: digest 000000000000 is not that of hf:org/name@{COMMIT}" in outcome.err
    )
    del command["places"]["init_from"]
    (run / "command.json").write_text(json.dumps(command))
    outcome = train_here([f"resume={run}"])
    assert outcome.code == 2
    assert "init_from=hf:org/name (a path whose content was not recorded)" in outcome.err
