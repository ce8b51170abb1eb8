"""Files of the Hugging Face hub: `huggingface_hub` downloads them, we verify them.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and proxies work as usual; an interrupted download is resumed. The client
trusts the server's ETag, so we compare the sha256 of the bytes before a file gets its name in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llm_lightning.files.atomic import cache_dir, commit, locked, sha256_of, write_atomically
from llm_lightning.files.download import SHA256, DownloadError

log = logging.getLogger(__name__)


class HubFile(NamedTuple):
    """One file of a repository at a commit.

    `sha256=None`: the digest that the hub states at the first download is stored, and required from then on.
    """

    repository: str
    revision: str
    path: str
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision[:7]}/{self.path}"


def fetch(file: HubFile, name: str) -> tuple[Path, str]:
    """Return the verified file, `name` in the cache, and its sha256. No other file is requested.

    A copy in the client's own cache is used if its sha256 matches.

    Raises:
        DownloadError: if it cannot be downloaded, or its bytes have another sha256.
    """
    target = cache_dir() / "downloads" / name
    known = file.sha256 or _remembered(file)
    if known is not None and target.exists() and sha256_of(target) == known:
        return target, known
    with locked(target):
        digest = file.sha256 or _remembered(file) or _stated(file)
        if target.exists():  # from another process, or damaged
            if (actual := sha256_of(target)) == digest:
                return target, digest
            log.warning("%s has sha256 %s, expected %s: downloading it again", target, actual, digest)
        copy = in_client_cache(file)
        if copy is not None and sha256_of(copy) == digest:
            return copy, digest
        download_to(file, target, digest, force=copy is not None)  # else the client would copy its damaged file
    return target, digest


def download_to(file: HubFile, target: Path, digest: str, *, force: bool) -> None:
    """Download a file and give it its name once its digest is right; `digest`: see `digest_like`."""
    from huggingface_hub import hf_hub_download

    folder = target.with_name(f"{target.name}.hub")  # keeps a partial download for the next attempt
    remedy = f"put a copy with sha256 {digest} at {target}" if len(digest) == 64 else "try again later"
    with one_error(file, remedy), _without_xet():
        options: dict[str, Any] = {"local_dir": folder, "endpoint": endpoint(), "force_download": force}
        received = Path(hf_hub_download(file.repository, file.path, revision=file.revision, **options))
    actual = digest_like(digest, received)
    if actual != digest:
        shutil.rmtree(folder)
        kind = "sha256" if len(digest) == 64 else "git id"
        raise DownloadError(f"cannot use {file}: its bytes have {kind} {actual}, expected {digest}; {remedy}")
    commit(received, target)
    shutil.rmtree(folder)


def digest_like(stated: str, path: Path) -> str:
    """The digest of a file of the kind that the hub states: sha256 of large files, git's id of small ones."""
    if len(stated) == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def in_client_cache(file: HubFile) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(file.repository, file.path, revision=file.revision)
    return Path(path) if isinstance(path, str) else None


def _remembered(file: HubFile) -> str | None:
    """The digest stored at the first download; None if there is none, or the record is damaged."""
    try:
        kept = json.loads(_record(file).read_bytes())["sha256"]
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return kept if isinstance(kept, str) and re.fullmatch(SHA256, kept) else None


def _stated(file: HubFile) -> str:
    """Request the sha256 of a large file, which is its ETag on the hub, and store it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(file.repository, file.path, revision=file.revision, endpoint=endpoint())
    with one_error(file, "try again later"):
        digest = get_hf_file_metadata(url, endpoint=endpoint()).etag or ""
    if not re.fullmatch(SHA256, digest):
        raise DownloadError(f"cannot verify {file}: the hub states no sha256 for it (got {digest!r})")
    _record(file).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_record(file), json.dumps({"file": "/".join(file[:3]), "sha256": digest}))
    return digest


def _record(file: HubFile) -> Path:
    name = f"{file.repository}/{file.revision}/{file.path}"
    return cache_dir() / "digests" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"


def endpoint() -> str | None:
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None  # the client reads it once, at import


@contextmanager
def _without_xet() -> Iterator[None]:
    """Download over plain HTTP: the client's other protocol (Xet) needs services that mirrors lack."""
    from huggingface_hub import constants

    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def one_error(file: object, remedy: str) -> Iterator[None]:
    """Turn the client's exceptions into a DownloadError that names the file, the reason and the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(f"cannot download {file}: it needs a permission; accept its terms, set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        hint = "correct it, or leave it out for the newest"
        raise DownloadError(f"cannot download {file}: the hub has no such revision; {hint}") from error
    except errors.RepositoryNotFoundError as error:
        reason = "the hub has no such repository, or it needs a permission"
        raise DownloadError(f"cannot download {file}: {reason}; correct the name, or set HF_TOKEN") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        remedy = f"unset HF_HUB_OFFLINE if it is set, or {remedy}"
        raise DownloadError(f"cannot download {file}: {reason}; {remedy}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise DownloadError(f"cannot download {file}: the hub answers {status}; {remedy}") from error
    except OSError as error:
        if error.errno is None:
            raise DownloadError(f"cannot download {file}: {' '.join(str(error).split())[:200]}; {remedy}") from error
        where = "make room there, or set LLM_LIGHTNING_CACHE to another folder"
        place = error.filename or cache_dir()
        raise DownloadError(f"cannot download {file}: {error.strerror} ({place}); {where}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "requests")):  # the client's HTTP library
            raise
        raise DownloadError(f"cannot download {file}: {' '.join(str(error).split())[:200]}; {remedy}") from error
