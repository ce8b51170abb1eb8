"""Weights of a repository of the hub: the small files first, so that what we do not implement is refused before the
large ones are downloaded. Nothing else is requested, and nothing that could run code.
"""

from __future__ import annotations

import re

from llm_lightning.files.hub_repository import Listing, fetch_files, list_repository
from llm_lightning.weights.contents import Pretrained
from llm_lightning.weights.export_folder import NOTE, read_json
from llm_lightning.weights.folder import CONFIG, config_of, load_folder, naming
from llm_lightning.weights.safetensors_files import INDEX, WEIGHTS, shards_in, without_weights

_SMALL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    rf"|merges\.txt|chat_template\.jinja|additional_chat_templates/[\w-][\w.-]*\.jinja|{re.escape(NOTE)}",
    re.ASCII,
)


def load_repository(repository: str, revision: str) -> Pretrained:
    """Download the files that a model needs, as far as they are not there, and load them.

    `info` names the commit: `source`, `name` (which loads the same again) and the sha256 of each file.

    Raises:
        DownloadError: if the hub cannot be reached, or has no such repository, revision or file.
        FileNotFoundError: if the repository has no weights in safetensors.
        ValueError: if the model is of a family or a kind that we do not implement, or a file is damaged.
    """
    listing = list_repository(repository, revision)
    _refuse_without_weights(listing)
    digests = fetch_files(listing, [name for name in listing.files if _SMALL.fullmatch(name)])
    with naming(listing.folder / CONFIG):
        config_of(read_json(listing.folder / CONFIG))
    digests |= fetch_files(listing, _weights(listing))
    contents = load_folder(listing.folder, digests)
    source = {"source": str(listing), "name": f"hf:{listing}", "files": digests}
    return contents._replace(info=contents.info | source)


def _refuse_without_weights(listing: Listing) -> None:
    if CONFIG not in listing.files:
        raise FileNotFoundError(f"hf:{listing} has no {CONFIG}, which says what its weights are")
    if WEIGHTS not in listing.files and INDEX not in listing.files:
        raise FileNotFoundError(f"hf:{listing} has {without_weights(listing.files)}")


def _weights(listing: Listing) -> list[str]:
    """The names of the files with weights; of several, their index is fetched first."""
    if WEIGHTS in listing.files:
        return [WEIGHTS]
    fetch_files(listing, [INDEX])
    shards = shards_in(listing.folder / INDEX)
    if missing := [name for name in shards if name not in listing.files]:
        raise FileNotFoundError(f"hf:{listing}: {INDEX} lists {missing[0]}, which the repository does not have")
    return [INDEX, *shards]
