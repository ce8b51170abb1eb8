"""Locate the data and the first weights of a resumed run by their digest.

`resume=FOLDER` uses the folder's settings. Each place that they name is searched relative to the run folder, as the run
saw it; then at its old location; then from the current folder. Only content with the recorded digest is used. A path
that is typed again for the same run is used as typed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llm_lightning.data.files.find import absolute_paths
from llm_lightning.experiments.foreign import recorded_value
from llm_lightning.experiments.run_folder import RunFolder
from llm_lightning.experiments.run_records import SHOWN, Settings, Start, read_command
from llm_lightning.files.data_paths import data_paths, with_data_paths
from llm_lightning.files.places import candidates, existing, joint, place_of, settings_at
from llm_lightning.terminal import one_line
from llm_lightning.weights import checkpoint as checkpoints
from llm_lightning.weights.load import LoadedModel, load_model, resolve
from llm_lightning.weights.releases import HUB, is_release

Built = TypeVar("Built")

log = logging.getLogger(__name__)


class OtherDataError(ValueError):
    """The content of a place is not the data of the run."""


def read_data(
    settings: Settings, run: RunFolder, start: Start, build: Callable[[dict[str, Any], str | None], Built]
) -> tuple[Built, dict[str, Any]]:
    """The data of a run, and the settings of `data` with the paths at which they have the recorded digest.

    All paths that were recorded are looked up together, because one digest covers the data of all. Where others are
    typed anew, the whole must still have that digest; if all are, they are read as typed.

    Args:
        build: reads the data that settings of `data` name; given a digest, it may raise OtherDataError early.

    Raises:
        ValueError, OSError: from `build`; or if no place has the run's data, naming every place.
    """
    typed = data_paths(settings["data"])
    recorded = {key: _recorded(start, key, value) for key, value in typed.items()}
    known = {key: (place, folder) for key, (place, folder) in recorded.items() if place is not None}
    digests = [place["digest"] for place, _ in known.values() if place]
    digest = run.header["lineage"]["data"] if run.checkpoint else next(iter(digests), None)
    if not known or digest is None:
        return build(settings["data"], None), settings["data"]
    options = {key: _options(key, typed[key], place, folder, run) for key, (place, folder) in known.items()}
    for key, places in options.items():
        _refuse_missing(key, typed[key], places)
    tried: list[str] = []
    errors: list[Exception] = []
    for paths in joint(options):
        data = with_data_paths(settings["data"], settings_at(typed, paths))
        try:
            built: Any = build(data, digest)
            if built.data_digest == digest:
                for key, found in paths.items():
                    _say(key, typed[key], found, options[key])
                return built, data
        except OtherDataError:
            pass
        except (ValueError, OSError) as error:
            errors.append(error)
        tried.append(", ".join(path for found in paths.values() for path in found))
    if len(errors) == len(tried):
        raise errors[0]
    raise _nothing_fits(", ".join(typed), tried, digest)


def _options(key: str, typed: Any, place: Mapping[str, Any], folder: Path, run: RunFolder) -> list[list[str]]:
    """Possible paths of a recorded setting, in one order of kinds for all settings."""
    before = data_paths(run.header["config"]["data"]).get(key) if run.checkpoint else None  # earlier versions: absolute
    options = candidates(place, run.path)
    return [
        *options,
        _absolute(typed, folder),
        _absolute(before, folder) if before else [],
        _absolute(typed, Path.cwd()),
    ]


def find_weights(settings: Settings, run: RunFolder, start: Start) -> str | None:
    """The current place of the first weights; as typed if the run has a checkpoint, which makes them unnecessary.

    Raises:
        ValueError, OSError: if no place has the run's first weights, naming every place.
    """
    typed: str | None = settings["init_from"]
    if run.checkpoint or not typed:
        return typed
    place, folder = _recorded(start, "init_from", typed)
    digest = (place or {}).get("digest")
    if place is None or digest is None:
        return typed
    if is_release(typed) and not Path(typed).exists():
        return _commit_of(typed, place)
    options = [*candidates(place, run.path), [str(folder / typed)], [typed]]
    tried = []
    _refuse_missing("init_from", typed, options)
    for paths in existing(options):
        if digest_at(paths[0]) == digest:
            _say("init_from", typed, paths, options)
            return paths[0]
        tried.append(paths[0])
    raise _nothing_fits("init_from", tried, digest)


def refuse_other_parent(run: RunFolder, init_from: str | None) -> None:
    """Refuse to continue from a checkpoint if `init_from` names other weights than the run started from.

    A continued run does not read them, so they may be missing; but it must not record others as its parent.
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


def places_of(
    settings: Settings, run: RunFolder, lineage: dict[str, Any], data: Mapping[str, Any], init_from: str | None
) -> dict[str, Any]:
    """The places that a run records in `command.json` and in its checkpoints' headers.

    Args:
        settings: with the places as typed.
        lineage: the run's, with the digests of its data and first weights.
        data: the settings of `data` with the paths actually used.
        init_from: the place actually used.
    """
    used = data_paths(data)
    places = {
        key: place_of(typed, _absolute(used[key], Path.cwd()), run.path, lineage["data"])
        for key, typed in data_paths(settings["data"]).items()
        if typed
    }
    if (typed := settings["init_from"]) and lineage["parent"]:
        kept = run.header["lineage"].get("places", {}).get("init_from") if run.checkpoint else None
        if kept and kept.get("typed") == typed:
            places["init_from"] = kept
        elif init_from and Path(init_from).exists():
            places["init_from"] = place_of(typed, [str(Path(init_from).absolute())], run.path, lineage["parent"])
        elif HUB.fullmatch(lineage["parent_name"] or ""):  # with its commit; other releases never change
            name, digest = lineage["parent_name"], lineage["parent"]
            places["init_from"] = {"typed": typed, "found": [name], "from_run": [], "digest": digest}
    return places


def lasting_name(init_from: str, parent: LoadedModel) -> str:
    """A name for weights that is valid in any folder and at any time: an absolute path, or a release's name.

    A repository of the hub is named with the commit that was loaded.
    """
    if Path(init_from).exists():
        return str(Path(init_from).absolute())
    name: str = parent.header["lineage"].get("name", init_from)
    return name


def digest_at(name: str) -> str:
    """The digest of the weights at a path, or of a release."""
    path = resolve(name)
    return checkpoints.verify(path) if path is not None else load_model(name).header["digest"]


def _recorded(start: Start, key: str, value: Any) -> tuple[dict[str, Any] | None, Path]:
    """The recorded place of a setting, and the folder it was typed in; None if `value` was not recorded."""
    if not start.resume:
        return None, Path.cwd()
    command = read_command(Path(start.resume), start.resume)
    places = command.get("places")
    place = places.get(key) if isinstance(places, dict) else None
    if isinstance(place, dict) and place.get("typed") == value and isinstance(place.get("digest"), str):
        return place, Path(command["folder"])
    is_recorded = value is not None and recorded_value(command, key) == value
    return {} if is_recorded else None, Path(command["folder"])


def _commit_of(typed: str, place: Mapping[str, Any]) -> str:
    """The name of a release that a run began with; of a repository of the hub, with its commit.

    Raises:
        ValueError: if its weights are not those that the run began with.
    """
    found = place.get("found")
    name = found[0] if isinstance(found, list) and found and is_release(str(found[0])) else typed
    if digest_at(name) != place["digest"]:
        raise _nothing_fits("init_from", [name], place["digest"])
    return str(name)


def _refuse_missing(key: str, typed: Any, options: list[list[str]]) -> None:
    """Raise FileNotFoundError if none of the places exists."""
    if not existing(options):
        looked = ", ".join(dict.fromkeys(one_line(", ".join(paths), SHOWN) for paths in options if paths))
        raise FileNotFoundError(
            f"{key}={typed} of the run is not there (looked for {looked}); put it back, or type {key}=PLACE with "
            "resume="
        )


def _say(key: str, typed: Any, paths: list[str], options: list[list[str]]) -> None:
    if existing(options[:1]) != existing([paths]):
        log.info("%s=%s is read from %s", key, one_line(typed, SHOWN), one_line(", ".join(paths), SHOWN))


def _nothing_fits(key: str, tried: list[str], digest: str) -> ValueError:
    return ValueError(
        f"cannot resume: {key} changed since the run began: digest {digest[:12]} is not that of "
        f"{one_line('; '.join(tried), SHOWN)}; put the old one back, or start a new run under another run_name"
    )


def _absolute(value: Any, folder: Path) -> list[str]:
    """Absolute paths, read from `folder`."""
    absolute = absolute_paths(value, folder)
    return [absolute] if isinstance(absolute, str) else absolute
