"""Where a run that continues finds its data, first weights and reference: by their digest, wherever they are now.

With `resume=FOLDER` the settings are the folder's. What they name is looked for beside the folder, as the run saw it;
then where it was; then from where the user stands. What is there is used if it has the digest that the run wrote down,
and nothing else is. A path that is typed again for the same run means what it says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from llm_lightning.data.corpus.sources import absolute_paths
from llm_lightning.experiments.foreign import NO_FILE, SHOWN, read_command, recorded_value
from llm_lightning.experiments.run_folder import RunFolder
from llm_lightning.files.places import as_setting, candidates, existing, place_of
from llm_lightning.terminal import one_line
from llm_lightning.weights.checkpoint import verify
from llm_lightning.weights.load import load_model, resolve

Built = TypeVar("Built")

log = logging.getLogger(__name__)


class OtherDataError(ValueError):
    """What lies at a place is not what the run was made from."""


def read_data(cfg: DictConfig, run: RunFolder, build: Callable[[str | None], Built]) -> Built:
    """The data of a run, from the place that has the recorded digest. Leaves that place in `cfg.data.path`.

    Args:
        build: reads what `cfg.data` names; given a digest, it may raise OtherDataError before it is done.

    Raises:
        ValueError, OSError: as `build` does; or if no place has what the run was made from, naming all.
    """
    typed = _plain(cfg.data.get("path"))
    place, folder = _recorded(cfg, "data.path", typed)
    digest = run.header["lineage"]["data"] if run.checkpoint else (place or {}).get("digest")
    if place is None or digest is None:
        return build(None)
    before = run.header["config"]["data"].get("path") if run.checkpoint else None  # earlier versions: absolute
    options = candidates(place, run.path)
    options += [_words(typed, folder), _words(before, folder) if before else [], _words(typed, Path.cwd())]
    tried: list[str] = []
    first_error: Exception | None = None
    for words in _there("data.path", typed, options):
        cfg.data.path = as_setting(typed, words)
        try:
            built: Any = build(digest)
            if built.data_digest == digest:
                _say("data.path", typed, words, options)
                return built
        except OtherDataError:
            pass
        except (ValueError, OSError) as error:
            first_error = first_error or error
        tried.append(", ".join(words))
    if first_error is not None and len(tried) == 1:
        raise first_error
    raise _nothing_fits("data.path", tried, digest)


def find_weights(cfg: DictConfig, run: RunFolder) -> None:
    """Put into `cfg` where the first weights (of a run without a checkpoint) and a given reference are now.

    Raises:
        ValueError, OSError: if no place has what the run was made from, naming all.
    """
    if not run.checkpoint and cfg.init_from:
        cfg.init_from = _weights_at(cfg, run, "init_from", str(cfg.init_from))
    if cfg.task.get("reference"):
        cfg.task.reference = _weights_at(cfg, run, "task.reference", str(cfg.task.reference))


def refuse_other_parent(run: RunFolder, init_from: str | None) -> None:
    """Refuse to continue a run from a checkpoint with `init_from` naming other weights than it began with.

    A run that continues does not read them, so that they may be gone; but it must not say that it came from others.
    """
    before = run.header["config"].get("init_from")
    if init_from == before:
        return
    expected = run.header["lineage"].get("parent")
    if init_from is None or expected is None or digest_at(init_from) != expected:
        raise ValueError(
            f"cannot resume with other settings: init_from was {before!r} and is {init_from!r}, which are other "
            "weights; give the old value again, or start a new run under another run_name"
        )


def places_of(cfg: DictConfig, settings: dict[str, Any], run: RunFolder, lineage: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps of its places, for `command.json` and the header of its checkpoints.

    Args:
        cfg: with the places that were used.
        settings: as they were typed.
        lineage: of the run, with the digests of its data and first weights.
    """
    places = {}
    if typed := settings["data"].get("path"):
        found = _words(_plain(cfg.data.path), Path.cwd())
        places["data.path"] = place_of(typed, found, run.path, lineage["data"])
    if (typed := settings["init_from"]) and lineage["parent"]:
        kept = run.header["lineage"].get("places", {}).get("init_from") if run.checkpoint else None
        if kept and kept.get("typed") == typed:
            places["init_from"] = kept
        elif Path(cfg.init_from).exists():
            found = [str(Path(cfg.init_from).absolute())]
            places["init_from"] = place_of(typed, found, run.path, lineage["parent"])
    typed = settings["task"].get("reference")
    if typed and not NO_FILE["task.reference"].fullmatch(typed):
        found = [str(Path(cfg.task.reference).absolute())]
        places["task.reference"] = place_of(typed, found, run.path, digest_at(cfg.task.reference))
    return places


def digest_at(name: str) -> str:
    """The digest of the weights that a path or name means."""
    path = resolve(name)
    return verify(path) if path is not None else load_model(name).header["digest"]


def _weights_at(cfg: DictConfig, run: RunFolder, key: str, typed: str) -> str:
    place, folder = _recorded(cfg, key, typed)
    digest = (place or {}).get("digest")
    if place is None or digest is None or (NO_FILE[key].fullmatch(typed) and not Path(typed).exists()):
        return typed
    options = [*candidates(place, run.path), [str(folder / typed)], [typed]]
    tried = []
    for words in _there(key, typed, options):
        if digest_at(words[0]) == digest:
            _say(key, typed, words, options)
            return words[0]
        tried.append(words[0])
    raise _nothing_fits(key, tried, digest)


def _recorded(cfg: DictConfig, key: str, value: Any) -> tuple[dict[str, Any] | None, Path]:
    """What the folder of `resume=` keeps of a place, and where it was typed; None if `value` is not the folder's."""
    if not cfg.resume:
        return None, Path.cwd()
    command = read_command(Path(cfg.resume), cfg.resume)
    places = command.get("places")
    place = places.get(key) if isinstance(places, dict) else None
    if isinstance(place, dict) and place.get("typed") == value and isinstance(place.get("digest"), str):
        return place, Path(command["folder"])
    is_recorded = value is not None and recorded_value(command, key) == value
    return {} if is_recorded else None, Path(command["folder"])


def _there(key: str, typed: Any, options: list[list[str]]) -> list[list[str]]:
    found = existing(options)
    if not found:
        looked = ", ".join(dict.fromkeys(one_line(", ".join(words), SHOWN) for words in options if words))
        raise FileNotFoundError(
            f"{key}={typed} of the run is not there (looked for {looked}); put it back, or type {key}=PLACE beside "
            "resume="
        )
    return found


def _say(key: str, typed: Any, words: list[str], options: list[list[str]]) -> None:
    if existing(options[:1]) != existing([words]):
        log.info("%s=%s is read from %s", key, one_line(typed, SHOWN), one_line(", ".join(words), SHOWN))


def _nothing_fits(key: str, tried: list[str], digest: str) -> ValueError:
    return ValueError(
        f"cannot resume: {key} changed since the run began: digest {digest[:12]} is not that of "
        f"{one_line('; '.join(tried), SHOWN)}; put the old one back, or start a new run under another run_name"
    )


def _words(value: Any, folder: Path) -> list[str]:
    """Absolute paths, read from `folder`."""
    found = absolute_paths(value, folder)
    return [found] if isinstance(found, str) else found


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
