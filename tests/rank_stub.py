"""A rank that imports no torch: it meets the others, does what its words say, and waits as in a collective call.

    python rank_stub.py FOLDER RANK WHAT...       what the rank RANK does; the others wait. Alone, it is rank 0.

As `python rank_stub.py supervise RANKS FOLDER RANK WHAT...` it is the supervisor of such ranks.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm_lightning.experiments.errors import guarded
from llm_lightning.experiments.processes import end_with_parent
from llm_lightning.experiments.ranks import causes
from llm_lightning.experiments.ranks.supervisor import supervise
from llm_lightning.experiments.ranks.watch import Watch

WAITS_SECONDS = 60.0
CLOSED = "[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:2345"


class Shared:
    """The first rank's object for all, through a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, value: Any) -> Any:
        if causes.rank() == 0:
            self.path.with_suffix(".tmp").write_bytes(pickle.dumps(value))
            self.path.with_suffix(".tmp").rename(self.path)
            return value
        while not self.path.exists():
            time.sleep(0.02)
        return pickle.loads(self.path.read_bytes())


def act(folder: Path, what: str, watch: Watch | None) -> None:
    """Do what the words of one rank say."""
    print(f"a word of rank {causes.rank()}", file=sys.stderr, flush=True)
    if what == "raise":
        raise ValueError("the disk is made of cheese")
    if what == "fault":
        raise KeyError("a fault")
    if what == "exit":
        os._exit(3)
    if what == "stall":
        assert watch is not None  # its thread calls this, while the ranks wait
        threading.Timer(0.5, watch.stalled, ["no progress for 3 minutes"]).start()
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))


def main(folder: Path, who: str, *what: str) -> None:
    watch = None
    if "saves" in what:  # it answers SIGTERM as a run does
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    if "unmet" not in what:
        causes.join(causes.rank(), causes.size(), folder)
        watch = Watch(causes.rank(), causes.size(), folder)
        if causes.size() > 1:
            watch.connect(Shared(folder / "shared"))
    (folder / f"ready_{causes.rank()}").write_text(str(os.getpid()))
    while len(list(folder.glob("ready_*"))) < causes.size():
        time.sleep(0.02)
    if who in ("all", str(causes.rank())):
        act(folder, what[0], watch)
    elif "watched" in what:  # the watchdog comes before the heartbeat
        time.sleep(1)
        assert watch is not None
        watch.stalled("no progress for 3 minutes")
    elif "gloo" in what:  # the others see the connection break
        time.sleep(1)
        raise RuntimeError(CLOSED)
    time.sleep(0.5 if what[0] == "end" else WAITS_SECONDS)


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        ranks, folder = int(sys.argv[2]), Path(sys.argv[3])
        sys.exit(supervise([sys.executable, __file__, *sys.argv[3:]], ranks, run_dir=folder))
    end_with_parent()
    folder = Path(sys.argv[1])
    code, _ = guarded(lambda: main(folder, *sys.argv[2:]), log_dir=folder)
    sys.exit(code)
