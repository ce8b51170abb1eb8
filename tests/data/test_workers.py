"""Loader processes: what they are given, that they outlive signals, and that nothing outlives the run."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import ROOT, assert_same, living, write_corpus

from llm_lightning.data.base import BaseDataModule
from llm_lightning.data.classification import ClassificationDataModule
from llm_lightning.data.instruction import InstructionDataModule
from llm_lightning.data.preference import PreferenceDataModule
from llm_lightning.data.pretraining import PretrainingDataModule
from llm_lightning.tokenizers.build import build_tokenizer

SCRIPT = """
import signal, sys, time
import llm_lightning.data.samples
from llm_lightning.data.workers import Loader, begin_with

def work(rows):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, range(1, 16))  # without a mask they are ignored as well
    time.sleep(0.1)
    return rows

if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, lambda *_: None)
    loader = Loader(range(40), batch_size=1, collate_fn=work, num_workers=2, worker_init_fn=begin_with())
    rows = iter(loader)
    print(*next(rows), *(worker.pid for worker in rows._workers), flush=True)
    sys.stdin.readline()
    print(sum(row for row, in loader), "lightning" in sys.modules, flush=True)
    kept = [rows]  # at the end of the process the first workers still wait for work
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_survive_signals_to_the_group_and_end_with_the_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, script], env=environment, start_new_session=True, **pipes) for _ in range(2)
    ]
    for process, is_killed in zip(processes, (True, False), strict=True):
        assert process.stdout is not None
        first, *workers = map(int, process.stdout.readline().split())
        assert first == 0
        assert len(workers) == 2
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.killpg(process.pid, signum)
        if is_killed:
            process.kill()
        out, err = process.communicate("\n", timeout=60)
        assert (process.returncode, out, err) == ((-9, "", "") if is_killed else (0, "780 False\n", ""))
        deadline = time.monotonic() + 2
        while living(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not living(process.pid), is_killed


def modules(folder: Path) -> dict[str, BaseDataModule]:
    """A data module of every kind."""
    tokenizer, sizes = build_tokenizer("byte"), {"batch_size": 4, "num_workers": 2}
    options: dict[str, Any] = {"tokenizer": tokenizer, "context_length": 256, **sizes}
    chat = {"template": "{instruction}[ {input}]\n{response}", "name": None, **options}
    rows = [
        f'{{"instruction": "Say {n}", "output": "It is {n}.", "chosen": "Yes {n}.", "rejected": "No {n}!"}}'
        for n in range(40)
    ]
    records = folder / "records.jsonl"
    records.write_text("\n".join(rows))
    return {
        "pretraining": PretrainingDataModule(path=str(write_corpus(folder / "corpus.txt", 2000)), **options),
        "classification": ClassificationDataModule(**options),
        "sft, packed": InstructionDataModule(path=str(records), packing=True, **chat),
        "sft, padded": InstructionDataModule(path=str(records), packing=False, **chat),
        "dpo, packed": PreferenceDataModule(path=str(records), packing=True, **chat),
        "dpo, padded": PreferenceDataModule(path=str(records), packing=False, **chat),
    }


class Trainer:
    """It is in use, and no process can be sent one."""

    global_rank, world_size = 0, 1
    strategy = SimpleNamespace(root_device=torch.device("cpu"))

    def __reduce__(self) -> Any:
        raise TypeError("a trainer cannot be pickled")


def test_what_a_worker_is_sent_is_light_and_gives_the_same_batch(tmp_path: Path) -> None:
    for name, data in modules(tmp_path).items():
        data.build()
        data.trainer = Trainer()  # type: ignore[assignment]
        loader = data.train_dataloader()
        sent = pickle.dumps((loader.collate_fn, loader.worker_init_fn))
        assert len(sent) < 1000, name
        collate, _ = pickle.loads(sent)
        samples = pickle.loads(pickle.dumps(loader.dataset))
        rows = [samples[index] for index in range(4)]
        wanted = data.collate([data.train_samples[index] for index in range(4)])
        assert_same(collate(rows)._asdict(), wanted._asdict(), name)
        assert type(data).collator is not BaseDataModule.collator
    windows = modules(tmp_path)["pretraining"]
    windows.build()
    assert len(pickle.dumps(windows.train_samples)) < 1000, "a memory map is sent by its name"


def test_forked_workers_read_what_this_process_reads(tmp_path: Path) -> None:
    data = modules(tmp_path)["pretraining"]
    data.build()
    loader = data.val_dataloader()[0]
    assert not loader.persistent_workers
    here = [data.collate([loader.dataset[index] for index in batch]) for batch in loader.batch_sampler]
    for one, other in zip(loader, here, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
