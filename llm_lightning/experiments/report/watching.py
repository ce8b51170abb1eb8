"""The report of a sweep and its columns in TensorBoard, written again as jobs end, and at its end.

A report grows with the sweep, and so does the time to write it: all of them together take at most a tenth of the
sweep's, but the last one is always written. An error costs one warning, never the sweep.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from llm_lightning.terminal import one_line, say

SHARE = 0.1
"""Of the sweep's time."""
FIRST_SECONDS = 2.0
"""What the first report is expected to take: it imports matplotlib."""


class SweepReport:
    """The report in the folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._began = time.monotonic()
        self._spent, self._next = 0.0, FIRST_SECONDS
        self._has_warned = False

    def job_ended(self) -> None:
        """Write the report, unless that would take too much of the time."""
        if self._spent + self._next <= SHARE * (time.monotonic() - self._began):
            self.write()

    def write(self) -> Path | None:
        """Write the report; its page, or None if that failed."""
        started = time.monotonic()
        try:
            from llm_lightning.experiments.hparams import write_hparams  # tensorboard comes with it
            from llm_lightning.experiments.report.writing import write_report  # and matplotlib with this

            written = write_report([self.folder])
            keys = dict.fromkeys(key for study in written.studies for key in study.keys)
            write_hparams(self.folder, [entry.run for entry in written.entries], list(keys))
            return written.page
        except Exception as error:  # of matplotlib, a font, a damaged file or a full disk
            if not self._has_warned:
                say(f"no report: {type(error).__name__}: {one_line(error)}", file=sys.stderr, flush=True)
            self._has_warned = True
            return None
        finally:
            self._next = time.monotonic() - started
            self._spent += self._next
