"""The files of one commit of a repository of the Hugging Face hub, in one folder of our cache, each verified.

The hub states a digest of every file. The list is stored, so that a complete copy needs no network; a file that the
client of the hub has in its own cache is taken from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.files.atomic import cache_dir, locked, sha256_of, write_atomically
from llm_lightning.files.download import DownloadError
from llm_lightning.files.hub import HubFile, digest_like, download_to, endpoint, in_client_cache, one_error

log = logging.getLogger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")
TIMEOUT = 10.0  # seconds without an answer
_DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


class Listing(NamedTuple):
    """One commit of a repository."""

    repository: str
    commit: str
    files: dict[str, str]
    """path -> digest, of the kind that the hub states; see `hub.digest_like`."""

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}"

    @property
    def folder(self) -> Path:
        """Where its files are, once they are fetched."""
        return cache_dir() / "hub" / self.repository.replace("/", "--") / self.commit


def list_repository(repository: str, revision: str = "main") -> Listing:
    """Ask the hub for the commit of a revision and the digests of its files.

    A commit that was listed before is not asked for again. If the hub cannot be reached, the list of before is used,
    or that of the client's own cache.

    Raises:
        DownloadError: if there is no such repository or revision, or the hub cannot be reached and nothing is stored.
    """
    known = _stored(repository, revision)
    if known is not None and COMMIT.fullmatch(revision):
        return known
    try:
        listing = _asked(repository, revision)
    except _UnreachableError as error:
        known = known or _in_client_cache(repository, revision)
        if known is None:
            raise DownloadError(str(error)) from error
        log.warning("%s; commit %s of before is used", error, known.commit[:12])
        return known
    for name in {revision, listing.commit}:
        if _stored(repository, name) == listing:  # so that a complete cache may be read-only
            continue
        _record(repository, name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_record(repository, name), json.dumps(listing._asdict()))
    return listing


def fetch_files(listing: Listing, names: Iterable[str]) -> dict[str, str]:
    """Bring files into `listing.folder`; return the sha256 of each. What is there and right is not requested.

    Raises:
        DownloadError: if a file cannot be downloaded, or its bytes have another digest.
    """
    names = list(names)
    held = {name: _held(listing, name) for name in names}
    if all(held.values()):
        return {name: digest for name, digest in held.items() if digest}
    with locked(listing.folder):
        return {name: _fetched(listing, name) for name in names}


class _UnreachableError(OSError):
    """The hub did not answer, or not as a hub does."""


def _asked(repository: str, revision: str) -> Listing:
    from huggingface_hub import HfApi, errors

    what = f"{repository}@{revision}"
    remedy = "check the network and HF_ENDPOINT, or give a folder of the weights"
    try:
        with one_error(what, remedy):
            info = HfApi(endpoint=endpoint()).model_info(
                repository, revision=revision, files_metadata=True, timeout=TIMEOUT
            )
        files = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings or ()}
        return _checked({"repository": repository, "commit": info.sha, "files": files})
    except DownloadError as error:
        final = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.DisabledRepoError)
        if isinstance(error.__cause__, final):
            raise
        raise _UnreachableError(str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a page of a proxy, or of another server
        raise _UnreachableError(
            f"cannot download {what}: {endpoint() or 'the hub'} does not answer as a hub does; {remedy}"
        ) from error


def _checked(facts: Any) -> Listing:
    """A listing of plain data.

    Raises:
        ValueError: if it is none.
    """
    repository, commit, files = (facts[key] for key in ("repository", "commit", "files"))
    if not isinstance(repository, str) or not COMMIT.fullmatch(commit):
        raise ValueError("it does not name a commit")
    known = {name: one for name, one in files.items() if _DIGEST.fullmatch(one or "")}
    if files and not known:
        raise ValueError("it states no digests")
    return Listing(repository, commit, known)


def _stored(repository: str, revision: str) -> Listing | None:
    """The list of an earlier call; None if there is none, or it is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        listing = _checked(json.loads(_record(repository, revision).read_bytes()))
        return listing if listing.repository == repository else None
    return None


def _record(repository: str, revision: str) -> Path:
    name = hashlib.sha256(f"{repository}@{revision}".encode()).hexdigest()
    return cache_dir() / "hub" / "listings" / f"{name}.json"


def _in_client_cache(repository: str, revision: str) -> Listing | None:
    """What the client's own cache has of a revision: its files are links to others that are named by their digests."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = revision if COMMIT.fullmatch(revision) else ref.read_text().strip() if ref.is_file() else ""
    snapshot = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = {path.relative_to(snapshot).as_posix(): path.resolve().name for path in snapshot.rglob("*")}
    return Listing(repository, commit, {name: one for name, one in files.items() if _DIGEST.fullmatch(one)})


def _held(listing: Listing, name: str) -> str | None:
    """The sha256 of a file that is in the folder with the right bytes."""
    target, stated = listing.folder / name, listing.files[name]
    if not target.exists() or digest_like(stated, target) != stated:
        return None
    return stated if len(stated) == 64 else sha256_of(target)


def _fetched(listing: Listing, name: str) -> str:
    """Bring one file into the folder; return its sha256."""
    if held := _held(listing, name):
        return held
    file, target, stated = HubFile(listing.repository, listing.commit, name), listing.folder / name, listing.files[name]
    if target.exists():
        log.warning("%s was changed since it was downloaded: downloading it again", target)
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    _bring(file, target, stated)
    return stated if len(stated) == 64 else sha256_of(target)


def _bring(file: HubFile, target: Path, stated: str) -> None:
    copy = in_client_cache(file)
    if copy is None or digest_like(stated, copy) != stated:
        download_to(file, target, stated, force=copy is not None)
        return
    try:
        os.link(copy.resolve(), target)
    except OSError:  # another disk
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(copy, temporary)
        temporary.replace(target)
