"""A part of torchrun's store that no earlier attempt of the run has written to.

The agent's store outlives a restart, and PyTorch writes the same keys to it each time: the processes of the second
attempt may read addresses of the first, and wait for dead processes. The number of restarts tells the attempts of
several nodes not apart, because each agent counts its own.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_TOKEN, _ARRIVED, _ALL = "llm_lightning/token", "llm_lightning/arrived", "llm_lightning/all"
_LOOK_SECONDS = 0.1


def fresh_store(address: str, rank: int, processes: int, timeout: timedelta) -> Store:
    """The store at HOST:PORT under a prefix that the living processes have agreed on.

    Raises:
        DistError: if they do not within `timeout`.
    """
    from torch.distributed import PrefixStore, TCPStore

    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
    agree = _gather if rank == 0 else _join
    return PrefixStore(agree(store, rank, processes, timeout), store)


def _gather(store: Store, rank: int, processes: int, timeout: timedelta) -> str:
    """Offer a new token, and confirm to each process, by its own number, that it has taken this one."""
    token = secrets.token_hex(8)
    store.set(_TOKEN, token)
    numbers = [store.get(f"{_ARRIVED}/{token}/{other}").decode() for other in range(1, processes)]
    store.set(f"{_ALL}/{token}", json.dumps(numbers))
    return token


def _join(store: Store, rank: int, processes: int, timeout: timedelta) -> str:
    """Take the token that is confirmed with this process's own number: an old token never is."""
    from torch.distributed import DistStoreError

    own, deadline, told = secrets.token_hex(8), time.monotonic() + timeout.total_seconds(), ""
    while time.monotonic() < deadline:
        token = store.get(_TOKEN).decode()
        if token != told:
            store.set(f"{_ARRIVED}/{token}/{rank}", own)
            told = token
        if store.check([f"{_ALL}/{token}"]) and own in json.loads(store.get(f"{_ALL}/{token}")):
            return token
        time.sleep(_LOOK_SECONDS)
    raise DistStoreError(f"the first of {processes} processes did not answer in {timeout}")
