"""Published weights from a name or a path: folders and files, GGUF, the Hugging Face hub, installed packages.

The weights say what they are: sizes, tokenizer, chat template and settings of generation come with them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from llm_lightning.files.atomic import sha256_of
from llm_lightning.files.download import DownloadError
from llm_lightning.files.hub import HubFile, fetch
from llm_lightning.models.gpt import GPTConfig
from llm_lightning.nearest import did_you_mean
from llm_lightning.weights.contents import Pretrained
from llm_lightning.weights.folder import convert, info_of, load_folder, naming
from llm_lightning.weights.hub_weights import load_repository
from llm_lightning.weights.releases import HUB, RELEASES, Packaged, Pinned, Repository, is_release
from llm_lightning.weights.safetensors_files import WEIGHTS, StoredTensors

GPT2_END = 50256


def load_pretrained(name_or_path: str | Path) -> Pretrained:
    """Load published weights.

    Args:
        name_or_path: a folder as transformers writes it, one `.safetensors` file, one `.gguf` file, a repository of
            the hub (`hf:ORG/NAME` or `hf:ORG/NAME@REVISION`), or a short name of `releases.RELEASES`.

    Raises:
        FileNotFoundError: if the path has no weights, or the package with them is not installed.
        OSError: if a download fails or has the wrong digest.
        ValueError: if the files are damaged, in another format, or of a model that we do not implement.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.exists():
        return _load_path(path)
    if not is_release(name):
        hint, known = did_you_mean(name, RELEASES), ", ".join(RELEASES)
        raise FileNotFoundError(f"no weights at {name}; {hint}give a folder, a file, hf:ORG/NAME, or {known}")
    release = RELEASES.get(name)
    if isinstance(release, Pinned):
        return _load_pinned(name, release)
    if isinstance(release, Packaged):
        return _load_packaged(name, release)
    return _load_hub(name)


def _load_path(path: Path) -> Pretrained:
    if path.suffix != ".gguf":
        return load_folder(path)
    from llm_lightning.weights.gguf.reading import read_gguf  # late: it needs an optional package

    return read_gguf(path)


def _load_hub(name: str) -> Pretrained:
    """Load `hf:ORG/NAME@REVISION` or what a short name stands for."""
    place = HUB.fullmatch(name)
    release = Repository(place["repository"]) if place else RELEASES[name]
    assert isinstance(release, Repository)
    try:
        return load_repository(release.repository, (place["revision"] if place else None) or "main")
    except DownloadError as error:
        if release.without_network is None:
            raise
        raise DownloadError(f"{error}; {release.without_network} is a copy in 4 bits that needs no network") from error


def _load_pinned(name: str, release: Pinned) -> Pretrained:
    """Load one file of the hub: the rest of GPT-2 is known here."""
    file = HubFile(release.repository, release.revision, WEIGHTS, release.sha256)
    path, digest = fetch(file, f"{name}.safetensors")
    config = replace(GPTConfig(), **release.config)  # type: ignore[arg-type]
    with naming(path):
        state = convert(StoredTensors([path]), config)
    info = info_of(f"{release.repository}@{release.revision}", digest, state)
    generation = {"eos_token_id": [GPT2_END], "bos_token_id": GPT2_END}
    return Pretrained(config, state, {"name": "gpt2"}, info, None, generation)


def _load_packaged(name: str, release: Packaged) -> Pretrained:
    """Load a file of an installed package, which is located and not imported.

    Raises:
        FileNotFoundError: if the package is not installed.
        ValueError: if the file has another digest.
    """
    spec = importlib.util.find_spec(release.module)
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / release.file if places else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{name} is a file of the Python package {release.package}: {release.command}")
    if (actual := sha256_of(path)) != release.sha256:
        raise ValueError(f"{path} has sha256 {actual}, expected {release.sha256}; {release.command} --force-reinstall")
    contents = _load_path(path)
    return contents._replace(info=contents.info | {"source": f"{release.package}: {release.file}"})
