"""The logs of a run, `metrics.csv` and TensorBoard: each step once, however often the run was killed.

The contract with exact resume: steps are numbered from 0, and before a checkpoint of N updates is written every value
of steps 0..N-1, and none of a later step, was logged and `save()` was called. A run that continues from that checkpoint
passes `resumed_step=N`, and later rows of a killed process are dropped.
"""

from __future__ import annotations

import logging
import os
import re
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from llm_lightning.callbacks.event_files import EVENTS, HPARAMS, drop_events_from, keep_damaged
from llm_lightning.callbacks.summaries import LAYOUT_TAG, flat, layout, picture, session
from llm_lightning.files.atomic import naming, write_atomically
from llm_lightning.files.metrics_csv import (
    Covered,
    Row,
    cell,
    is_number,
    lines_of,
    merged,
    parse,
    unreadable,
    whole_file,
)

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

FIRST_COLUMNS = ("step", "train/loss", "val/loss", "train/eval_loss")

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """Write `metrics.csv`: one row per step, one column per metric, an empty cell where nothing was logged.

    Values of one step may come at different times. Columns are added as metrics appear and never removed.

    Args:
        run_dir: the folder of the run.
        resumed_step: updates in the checkpoint that the run continues from; rows from this step on are dropped.
    """

    name = "metrics"
    version = ""

    def __init__(self, run_dir: str | Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._resumed_step = resumed_step
        self._columns: list[str] | None = None  # of the file; None: not read yet
        self._rows: dict[int, Row] = {}  # rows not on disk yet, and the file's last row, which may get more cells
        self._last = -1  # step of the file's last row
        self._tail = 0  # the byte at which that row begins
        self._unsaved = False
        self._before = Covered()  # the rows before that one

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` beside this file has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add numbers to the row of `step`; they reach the disk with the next `save()`."""
        assert step is not None, "a row needs its step"
        self._load()
        self._rows.setdefault(step, {"step": str(step)}).update({k: cell(v) for k, v in metrics.items()})
        self._unsaved = True

    @rank_zero_only
    def save(self) -> None:
        """Write every row and wait until it is on the disk."""
        self._load()
        if not self._unsaved:
            return
        assert self._columns is not None
        rows = [self._rows[step] for step in sorted(self._rows)]
        columns = list(dict.fromkeys([*(self._columns or FIRST_COLUMNS), *(name for row in rows for name in row)]))
        if columns != self._columns or min(self._rows) < self._last:
            self._rewrite(columns, merged([*parse(self._content())[1], *rows]))
        else:
            self._write_at_tail(rows)
        self._unsaved = False

    @rank_zero_only
    def covered(self, step: int) -> dict[str, Any]:
        """Number and digest of the rows before `step`, for a checkpoint after that many updates."""
        self.save()
        before, rows = self._before, list(self._rows.values())
        if before.last >= step:
            before, rows = Covered(), parse(self._content())[1]
        return before.followed_by(row for row in rows if int(row["step"]) < step).facts()

    @rank_zero_only
    def expect(self, covered: Mapping[str, Any] | None) -> None:
        """Compare the file with the `covered` rows of the checkpoint that the run continues from.

        If rows are missing or altered, warn and keep a copy of the file.
        """
        self._load(covered)

    def _load(self, covered: Mapping[str, Any] | None = None) -> None:
        """Read the file, once; drop later rows of a killed process and an unfinished one."""
        if self._columns is not None:
            return
        content = self._content()
        columns, rows = parse(content)
        if columns and columns[0] != "step":
            raise ValueError(f"{self.path}, line 1: the first column is {columns[0]!r}, not 'step'; move the file away")
        rows = [row for row in rows if int(row["step"]) < self._resumed_step]
        if self._is_damaged(content, rows, covered):
            rows = [row for row in rows if all(map(is_number, row.values()))]
        if content == whole_file(columns, rows):
            self._before = Covered()
            self._settle(columns, rows, len(content))
        else:
            self._rewrite(columns, rows)

    def _is_damaged(self, content: bytes, rows: list[Row], covered: Mapping[str, Any] | None) -> bool:
        """Whether the rows differ from those that a checkpoint covers; then warn and keep a copy of the file."""
        found, step = Covered().followed_by(rows).facts(), self._resumed_step
        if covered is None or found == covered:  # checkpoints of earlier versions lack it
            lines = unreadable(content)
            if not lines:
                return False
            what = f"line {lines[0]} cannot be read and is left out"
        elif found["count"] != covered["count"]:
            what = f"it has {found['count']} rows before step {step}, the checkpoint covers {covered['count']}"
        else:
            what = f"rows before step {step} are not those that the checkpoint covers"
        kept = keep_damaged(self.path, content, self.path.name) if content else "gone"
        remedy = "stop the run and put a copy back, or let its curves have a gap"
        log.warning("%s is not what this run wrote: %s; the file as it was is %s; %s", self.path, what, kept, remedy)
        return True

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""

    def _rewrite(self, columns: list[str], rows: list[Row]) -> None:
        content = whole_file(columns, rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, content)
        self._before = Covered()
        self._settle(columns, rows, len(content))

    def _write_at_tail(self, rows: list[Row]) -> None:
        assert self._columns is not None
        content = lines_of(self._columns, rows)
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._tail)
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._settle(self._columns, rows, self._tail + len(content))

    def _settle(self, columns: list[str], rows: list[Row], size: int) -> None:
        """Remember what is on disk; of the rows only the last one, whose step may get more values."""
        self._before = self._before.followed_by(rows[:-1])
        self._columns = columns
        self._rows = {int(row["step"]): row for row in rows[-1:]}
        self._last = max(self._rows, default=-1)
        self._tail = size - len(lines_of(columns, rows[-1:]))


class TensorBoard(Logger):
    """Write TensorBoard events into the run folder, which then has the run's name there.

    A run that an earlier version began has its events in `tensorboard/` of the run folder, and continues there.

    Args:
        run_dir: the folder of the run.
        resumed_step: updates in the checkpoint that the run continues from; events from this step on are dropped.
    """

    name = "tensorboard"
    version = ""

    def __init__(self, run_dir: str | Path, resumed_step: int = 0) -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        earlier = self._run_dir / "tensorboard"
        self.path = earlier if any(earlier.glob(EVENTS)) else self._run_dir
        self._resumed_step = resumed_step
        self._writer: SummaryWriter | None = None
        self._has_layout = False

    @property
    def save_dir(self) -> str:
        return str(self.path)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer, for what has no method here: histograms, audio."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            for folder in (self.path, self._run_dir):  # it trains again
                (folder / HPARAMS).unlink(missing_ok=True)
            drop_events_from(self.path, self._resumed_step)
            self._has_layout = any(LAYOUT_TAG.encode() in path.read_bytes() for path in self.path.glob(EVENTS))
            _wait_for_a_later_name(self.path)
            # purge_step is for a TensorBoard that has read the dropped events already. And half a run of a minute would
            # pass before the default of 120 seconds between two flushes shows anything.
            self._writer = SummaryWriter(str(self.path), purge_step=self._resumed_step, flush_secs=10)
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a point to the curve of each metric, under its `tag_of`; the first validation adds the layout."""
        with naming(self.path):  # an error of the writer's thread is raised by the next call
            for name, value in metrics.items():
                if (tag := tag_of(name)) is not None:
                    self.experiment.add_scalar(tag, value, step)
            if not self._has_layout and "val/loss" in metrics:
                self._log(layout(metrics.keys()), step)
                self._has_layout = True

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        """Add Markdown under the Text tab."""
        with naming(self.path):
            self.experiment.add_text(name, text, step)

    @rank_zero_only
    def log_picture(self, name: str, png: bytes, step: int) -> None:
        """Add a PNG file under the Images tab."""
        with naming(self.path):
            self._log(picture(name, png), step)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: Mapping[str, float] | None = None, step: int | None = None
    ) -> None:
        """Write the line of a finished run in the HParams tab: settings, nested keys joined by dots, and `metrics`.

        `step` is the number of updates, so a process that continues from there drops the results and writes its own.
        Lightning also calls this when training starts, without metrics. Nothing is written then: a run that has not
        ended has no result, and TensorBoard would keep showing a placeholder.

        Args:
            metrics: values under tags of their own (`best/val_loss`): of a curve, TensorBoard would show the last
                value, not that of the best checkpoint.
        """
        if metrics is None:
            return
        settings = flat(vars(params) if isinstance(params, Namespace) else params)
        with naming(self.path):
            self._log(session(settings, "success"), step)
        self.log_metrics(metrics, step)
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write every event and wait until it is on the disk."""
        if self._writer is None:
            return
        with naming(self.path):
            self._writer.flush()
            with max(self.path.glob(EVENTS)).open("rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _log(self, summary: Summary, step: int | None) -> None:
        self.experiment._get_file_writer().add_summary(summary, step)


def tag_of(name: str) -> str | None:
    """Where TensorBoard shows a metric: in the groups train, val, lr, time, best, test. None: nowhere.

    `metrics.csv` has the metric's own name.
    """
    group, _, short = name.rpartition("/")
    if name == "epoch":  # a staircase
        return None
    if short in ("mfu", "peak_memory_gib") or short.endswith(("_per_second", "_seen")):
        return f"time/{short}"
    return f"val/{group}_{short}" if group == "samples" else name


def _wait_for_a_later_name(folder: Path) -> None:
    """Return when a new event file will sort after those there: TensorBoard reads them by name, a name has seconds."""
    names = [path.name.split(".") for path in folder.glob(EVENTS)]
    started = [int(parts[3]) for parts in names if re.fullmatch(r"[0-9]{1,18}", parts[3])]
    if int(time.time()) in started:
        time.sleep(1 - time.time() % 1)
