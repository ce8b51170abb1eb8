"""Weights of a repository of a hub on this machine, through the real client of the hub."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_model import CONFIG, WHOLE, drawn_state, repository
from hub_server import COMMIT, FakeRepository, serving_repository
from huggingface_hub import constants
from safetensors.torch import save

from llm_lightning.files import hub_repository
from llm_lightning.files.download import DownloadError
from llm_lightning.weights.families.llama import to_hf
from llm_lightning.weights.load import load_model
from llm_lightning.weights.pretrained import load_pretrained
from llm_lightning.weights.releases import RELEASES, Repository

NAME = "hf:org/name"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
IN_THE_WAY = {
    "additional_chat_templates/rag.jinja": b"rag",
    "README.md": b"not asked for",
    "pytorch_model.bin": b"not asked for",
    "original/consolidated.00.pth": b"not asked for",
    "original/model.safetensors": b"not asked for",
    "onnx/model.safetensors": b"not asked for",
    "modeling_custom.py": b"raise SystemExit",
}


def in_shards(files: dict[str, bytes]) -> dict[str, bytes]:
    theirs = to_hf(drawn_state(), CONFIG)
    names = sorted(theirs)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    shards = {file: save({name: theirs[name] for name in part}) for file, part in parts.items()}
    rest = {name: content for name, content in files.items() if name != WHOLE}
    return rest | shards | {f"{WHOLE}.index.json": json.dumps(index).encode()}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeRepository]]:
    monkeypatch.setenv("LLM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "client"))
    monkeypatch.setattr(constants, "DEFAULT_ETAG_TIMEOUT", 2)
    with serving_repository(repository() | IN_THE_WAY) as (handler, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield handler


def assert_right(found: dict[str, torch.Tensor]) -> None:
    expected = drawn_state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def asked_files(hub: type[FakeRepository]) -> set[str]:
    return {line.partition(f"/resolve/{COMMIT}/")[2] for line in hub.requests if "/resolve/" in line}


def test_only_what_a_model_needs_is_downloaded_and_recorded(hub: type[FakeRepository]) -> None:
    loaded = load_pretrained(NAME)
    assert_right(loaded.state)
    assert loaded.tokenizer == {"name": "byte"}
    assert loaded.generation == {"eos_token_id": [256, 2], "pad_token_id": 2, "top_p": 0.9}
    assert loaded.template is not None
    assert loaded.template["text"] == "{{ messages[0]['content'] }}"
    wanted = {WHOLE, "config.json", "generation_config.json", "llm_lightning.json", "chat_template.jinja"}
    wanted.add("additional_chat_templates/rag.jinja")
    assert asked_files(hub) == wanted
    assert loaded.info == {
        "source": f"org/name@{COMMIT}",
        "name": f"hf:org/name@{COMMIT}",
        "digest": hashlib.sha256(hub.files[WHOLE]).hexdigest(),
        "dtype": "float32",
        "files": {name: hashlib.sha256(hub.files[name]).hexdigest() for name in wanted},
    }
    hub.requests.clear()
    assert_right(load_pretrained(NAME).state)
    assert hub.requests == ["GET /api/models/org/name/revision/main"]  # has it moved?
    header = load_model(f"{NAME}@{COMMIT}").header
    assert (len(hub.requests), header["lineage"]) == (1, loaded.info)
    assert header["generation"]["eos_token_id"] == [256, 2]


def test_shards_are_those_of_the_index(hub: type[FakeRepository]) -> None:
    hub.files = in_shards(hub.files) | {"model-00003-of-00003.safetensors": b"of another index"}
    assert_right(load_pretrained(NAME).state)
    assert {name for name in asked_files(hub) if "model" in name} == {*SHARDS, f"{WHOLE}.index.json"}


def test_offline_a_complete_copy_of_ours_is_enough(
    hub: type[FakeRepository], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_pretrained(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there
    assert_right(load_pretrained(NAME).state)
    assert f"commit {COMMIT[:12]} of before is used" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_right(load_pretrained(NAME).state)
    with pytest.raises(DownloadError, match=r"cannot download org/name@v2: .*unset HF_HUB_OFFLINE"):
        load_pretrained(f"{NAME}@v2")


def test_a_complete_cache_may_be_read_only(hub: type[FakeRepository], monkeypatch: pytest.MonkeyPatch) -> None:
    load_pretrained(NAME)

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("locked", "write_atomically"):  # permissions do not stop an administrator
        monkeypatch.setattr(hub_repository, name, refused)
    for name in (NAME, f"{NAME}@{COMMIT}"):
        assert_right(load_pretrained(name).state)
    next((hub_repository.cache_dir() / "hub").rglob("config.json")).unlink()
    with pytest.raises(OSError, match="Read-only"):
        load_pretrained(NAME)


def test_offline_the_cache_of_the_client_is_enough(
    hub: type[FakeRepository], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    options = {"endpoint": os.environ["HF_ENDPOINT"], "cache_dir": tmp_path / "client"}
    for name in (WHOLE, "config.json", "llm_lightning.json"):
        path = huggingface_hub.hf_hub_download("org/name", name, revision="main", **options)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_right(load_pretrained(NAME).state)
    loaded = load_pretrained(f"{NAME}@{COMMIT}")
    assert loaded.info["source"] == f"org/name@{COMMIT}"
    assert sorted(loaded.info["files"]) == ["config.json", "llm_lightning.json", WHOLE]
    Path(path).resolve().unlink()  # as after an interrupted download
    (tmp_path / "cache").rename(tmp_path / "gone")
    with pytest.raises(OSError, match=r"llm_lightning.json|does not say which tokenizer"):
        load_pretrained(NAME)


def test_a_copy_of_the_client_is_not_downloaded_again(
    hub: type[FakeRepository], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    options = {"endpoint": os.environ["HF_ENDPOINT"], "cache_dir": tmp_path / "client"}
    own = Path(huggingface_hub.hf_hub_download("org/name", WHOLE, revision=COMMIT, **options))
    hub.requests.clear()
    assert_right(load_pretrained(NAME).state)
    assert WHOLE not in asked_files(hub)
    own.resolve().write_bytes(b"damaged")  # the same file under two names
    assert_right(load_pretrained(NAME).state)
    assert WHOLE in asked_files(hub)


def test_wrong_bytes_never_get_a_name_and_changed_ones_are_replaced(
    hub: type[FakeRepository], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_pretrained(NAME)
    kept = next((tmp_path / "cache").rglob("config.json"))
    kept.write_text("{}")
    assert_right(load_pretrained(NAME).state)
    right = hub.files["config.json"]
    assert kept.read_bytes() == right
    kept.unlink()
    monkeypatch.setattr(FakeRepository, "file", lambda self, path: FakeRepository.answer(self, 200, b"?" * len(right), {
        "ETag": f'"{"0" * 40}"', "X-Repo-Commit": COMMIT,
    }))  # fmt: skip
    with pytest.raises(DownloadError, match=r"cannot use org/name@607a30d/config.json: its bytes have git id \w+, exp"):
        load_pretrained(NAME)
    assert not kept.exists()


def test_what_we_do_not_implement_is_refused_before_the_weights_are_downloaded(hub: type[FakeRepository]) -> None:
    hub.files["config.json"] = b'{"model_type": "mistral"}'
    with pytest.raises(ValueError, match=r"model_type='mistral' is not a family known here"):
        load_pretrained(NAME)
    assert WHOLE not in asked_files(hub)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({WHOLE: None}, r"hf:org/name@\w{40} has no model.safetensors; pytorch_model.bin is not read, because pickled"),
        ({WHOLE: None, "pytorch_model.bin": None}, r"has no model.safetensors; original/consolidated.00.pth is not"),
        ({"config.json": None}, r"hf:org/name@\w{40} has no config.json"),
        (
            {WHOLE: None, f"{WHOLE}.index.json": b'{"weight_map": {"a": "b.safetensors"}}'},
            r"model.safetensors.index.json lists b.safetensors, which the repository does not have",
        ),
        (
            {WHOLE: None, f"{WHOLE}.index.json": b'{"weight_map": {"a": "../b.safetensors"}}'},
            "weight_map must name files of this folder",
        ),
    ],
)
def test_a_repository_without_weights_that_are_read(
    hub: type[FakeRepository], files: dict[str, bytes | None], message: str
) -> None:
    hub.files = {name: content for name, content in (hub.files | files).items() if content is not None}
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_pretrained(NAME)


def test_a_missing_revision_or_repository_is_one_line(hub: type[FakeRepository]) -> None:
    load_pretrained(NAME)
    for name, message in (
        (f"{NAME}@v9", "cannot download org/name@v9: the hub has no such revision; correct it, or leave it out"),
        ("hf:org/other", "cannot download org/other@main: the hub has no such repository, or it needs a permission"),
    ):
        with pytest.raises(DownloadError, match=message) as caught:
            load_pretrained(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no weights at hf:name; "):
        load_pretrained("hf:name")
    hub.status, hub.error_code = 403, "GatedRepo"
    with pytest.raises(DownloadError, match="needs a permission; accept its terms, set HF_TOKEN"):
        load_pretrained(f"{NAME}@v9")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("status", 503, "the hub answers 503; check the network and HF_ENDPOINT, or give a folder of the weights"),
        ("page", b"<html>log in</html>", r"http://127.0.0.1:\d+ does not answer as a hub does; check the network"),
        ("page", b"[]", "does not answer as a hub does"),
        ("page", b'{"sha": null, "siblings": [], "id": "x"}', "does not answer as a hub does"),
        (
            "page",
            b'{"sha": "%s", "siblings": [{"rfilename": "config.json"}], "id": "x"}' % (b"1" * 40),
            "as a hub does",
        ),
        ("page", b'{"sha": "main", "siblings": [3], "id": "x"}', "does not answer as a hub does"),
    ],
)
def test_a_hub_that_is_down_or_none_is_one_line(
    hub: type[FakeRepository], attribute: str, value: object, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    setattr(hub, attribute, value)
    with pytest.raises(DownloadError, match=message) as caught:
        load_pretrained(NAME)
    assert "\n" not in str(caught.value)
    setattr(hub, attribute, getattr(FakeRepository, attribute))
    load_pretrained(NAME)
    setattr(hub, attribute, value)
    assert_right(load_pretrained(NAME).state)
    assert "of before is used" in caplog.text


def test_a_page_in_place_of_a_file_is_refused(hub: type[FakeRepository], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRepository, "file", lambda self, path: FakeRepository.answer(self, 200, b"<html>", {}))
    with pytest.raises(DownloadError, match=r"cannot download org/name@607a30d/\S+: ") as caught:
        load_pretrained(NAME)
    assert "\n" not in str(caught.value)


def test_short_names_stand_for_repositories_and_name_their_like(
    hub: type[FakeRepository], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RELEASES, "smollm2-135m-instruct", Repository("org/name", "smollm2-135m-instruct-q4"))
    assert_right(load_pretrained("smollm2-135m-instruct").state)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(RELEASES, "smollm2-135m-instruct", Repository("org/more", "smollm2-135m-instruct-q4"))
    with pytest.raises(DownloadError, match=r"; smollm2-135m-instruct-q4 is a copy in 4 bits that needs no network$"):
        load_pretrained("smollm2-135m-instruct")
