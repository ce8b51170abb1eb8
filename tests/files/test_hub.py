"""Files of a hub on this machine, through the real client of the hub."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import COMMIT, FakeHub, serving_hub
from huggingface_hub import constants

from llm_lightning.files.atomic import cache_dir
from llm_lightning.files.download import DownloadError
from llm_lightning.files.hub import HubFile, fetch

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ADDRESS = f"/owner/model/resolve/{COMMIT}/model.safetensors"
STATED = HubFile("owner/model", COMMIT, "model.safetensors")
PINNED = STATED._replace(sha256=SHA256)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client"))
    with serving_hub(CONTENT) as (handler, address):
        monkeypatch.setenv("HF_ENDPOINT", address + "/")
        yield handler


def test_only_the_file_is_requested_and_once(hub: type[FakeHub]) -> None:
    path, digest = fetch(PINNED, "m.safetensors")
    assert (path.read_bytes(), digest) == (CONTENT, SHA256)
    assert path == cache_dir() / "downloads" / "m.safetensors"
    assert hub.requests == [f"HEAD {ADDRESS}", f"GET {ADDRESS}", "GET /cdn/blob"]
    assert fetch(PINNED, "m.safetensors") == (path, SHA256)
    assert len(hub.requests) == 3
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == ["m.safetensors"]


def test_a_digest_that_the_hub_states_is_remembered(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    path, digest = fetch(STATED, "m.safetensors")
    assert digest == SHA256
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there
    assert fetch(STATED, "m.safetensors") == (path, SHA256)
    with pytest.raises(DownloadError, match=r"cannot download other/model@607a30d/model.safetensors: .*try again"):
        fetch(STATED._replace(repository="other/model"), "n.safetensors")


def test_a_damaged_record_of_a_digest_is_asked_for_again(hub: type[FakeHub]) -> None:
    fetch(STATED, "m.safetensors")
    (record,) = (cache_dir() / "digests").glob("*.json")
    for damage in ("", "[1]", "{}", '{"sha256": 1}', '{"sha256": "ab"}', "[" * 100_000, '"\x1b"'):
        record.write_text(damage)
        assert fetch(STATED, "m.safetensors")[1] == SHA256


def test_wrong_bytes_under_the_right_etag_never_get_a_name(hub: type[FakeHub], tmp_path: Path) -> None:
    hub.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    for file in (PINNED, STATED):
        with pytest.raises(DownloadError, match=f"its bytes have sha256 .*, expected {SHA256}; put a copy"):
            fetch(file, "m.safetensors")
    assert not list(tmp_path.rglob("*.safetensors"))
    hub.content = CONTENT
    assert fetch(PINNED, "m.safetensors")[0].read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_downloaded_again(hub: type[FakeHub]) -> None:
    path, _ = fetch(PINNED, "m.safetensors")
    path.write_bytes(CONTENT[:1000])
    assert fetch(PINNED, "m.safetensors")[0].read_bytes() == CONTENT


def test_a_copy_in_the_clients_own_cache_is_used_if_it_is_right(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    options = {"endpoint": os.environ["HF_ENDPOINT"].rstrip("/"), "cache_dir": tmp_path / "client"}
    own = Path(huggingface_hub.hf_hub_download("owner/model", "model.safetensors", revision=COMMIT, **options))
    hub.requests.clear()
    assert fetch(PINNED, "m.safetensors")[0] == own
    assert hub.requests == []
    own.resolve().write_bytes(b"damaged")
    assert fetch(PINNED, "m.safetensors")[0] == cache_dir() / "downloads" / "m.safetensors"


def test_an_interrupted_download_is_resumed(hub: type[FakeHub]) -> None:
    hub.cut_at = 100_000
    for _ in range(2):
        try:
            path, _ = fetch(PINNED, "m.safetensors")
            break
        except DownloadError:
            continue
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "the hub answers 401|permission"), (403, "403|permission"), (404, "404")],
)
def test_refusals_are_one_line(hub: type[FakeHub], status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(DownloadError, match=rf"cannot download owner/model@607a30d/model.safetensors: .*({message})"):
        fetch(PINNED, "m.safetensors")


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"unset HF_HUB_OFFLINE"):
        fetch(PINNED, "m.safetensors")


def test_a_token_reaches_the_hub_and_nobody_else(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(PINNED, "m.safetensors")
    assert hub.requests == [f"HEAD {ADDRESS} with a token", f"GET {ADDRESS} with a token", "GET /cdn/blob"]
