"""What TensorBoard shows beside curves, as its summaries: a run in HParams, the columns there, a layout, a picture.

TensorBoard takes a *session* for a run's line in HParams, an *experiment* for the columns of that table. Of several
experiments below one folder it takes any, so a run writes none. Imports neither torch nor lightning.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llm_lightning.callbacks import event_files  # noqa: F401 (keeps TensorFlow out)

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.api_pb2 import HParamInfo

CHARTED = ("loss", "accuracy", "reward_accuracy")
"""Metrics whose training and validation curves share a chart."""
LAYOUT_TAG = "custom_scalars__config__"
MOST_LISTED = 12
"""Different values of a setting up to which HParams offers each of them as a filter; else a range or a pattern."""
Plain = bool | int | float | str


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def session(settings: Mapping[str, Any], status: Literal["success", "failure"]) -> Summary:
    """A run's line in HParams: its settings, by dotted keys, and how it ended."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo()
    for key, value in settings.items():
        _put(start.hparams[key], plain(value))
    end = plugin_data_pb2.SessionEndInfo(status=getattr(api_pb2, f"STATUS_{status.upper()}"))
    return _of_hparams(
        {
            metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_start_info=start),
            metadata.SESSION_END_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_end_info=end),
        }
    )


def experiment(settings: Mapping[str, Collection[Any]], metrics: Sequence[str]) -> Summary:
    """The columns of HParams.

    Args:
        settings: dotted key -> its value in each run.
        metrics: names of scalars; the last value of each is shown.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    columns = [_column(key, {plain(value) for value in values}) for key, values in settings.items()]
    results = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=name)) for name in metrics]
    content = api_pb2.Experiment(hparam_infos=columns, metric_infos=results)
    return _of_hparams({metadata.EXPERIMENT_TAG: plugin_data_pb2.HParamsPluginData(experiment=content)})


def layout(metrics: Collection[str]) -> Summary:
    """The Custom Scalars tab: the training and the validation curves of each of `CHARTED` in one chart.

    Args:
        metrics: names of validation metrics, such as `val/loss`; others than `CHARTED` have no chart.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from tensorboard.util import tensor_util

    charts = [
        layout_pb2.Chart(
            title=name.replace("_", " "),
            multiline=layout_pb2.MultilineChartContent(tag=[f"^(train/{name}|train/eval_{name}|val/([^/]+/)?{name})$"]),
        )
        for name in CHARTED
        if f"val/{name}" in metrics
    ]
    category = layout_pb2.Category(title="training and validation", chart=charts)
    content = layout_pb2.Layout(category=[category]).SerializeToString()
    value = Summary.Value(
        tag=LAYOUT_TAG, metadata=metadata.create_summary_metadata(), tensor=tensor_util.make_tensor_proto(content)
    )
    return Summary(value=[value])


def picture(name: str, png: bytes) -> Summary:
    """A PNG file, unchanged, in the Images tab."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def plain(value: Any) -> Plain:
    """A value that HParams can show: JSON, in which TensorBoard answers, has no infinity."""
    if isinstance(value, (bool, str)) or (isinstance(value, (int, float)) and math.isfinite(value)):
        return value
    return str(value) if isinstance(value, float) else json.dumps(value, default=str)


def _column(key: str, values: Collection[Plain]) -> HParamInfo:
    from tensorboard.plugins.hparams import api_pb2

    kinds = {"bool" if isinstance(one, bool) else "string" if isinstance(one, str) else "float64" for one in values}
    kind = kinds.pop() if len(kinds) == 1 else "string"
    column = api_pb2.HParamInfo(name=key, type=getattr(api_pb2, f"DATA_TYPE_{kind.upper()}"), differs=len(values) > 1)
    if len(values) <= MOST_LISTED and not kinds:
        for value in sorted(values):  # type: ignore[type-var]
            _put(column.domain_discrete.values.add(), value)
    return column


def _put(target: Any, value: Plain) -> None:
    """Set a protobuf `Value`."""
    kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
    setattr(target, f"{kind}_value", value)


def _of_hparams(contents: Mapping[str, Any]) -> Summary:
    """A summary that has only metadata."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    values = [
        Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)
        for tag, content in contents.items()
    ]
    return Summary(value=values)
