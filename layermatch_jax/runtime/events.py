"""Writes TensorBoard's event files without TensorFlow, whose import takes seconds."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence

from etils import epath


class EventFile:
    """One event file in a folder (local or gs://), for one start of a run.

    Args:
      folder: folder of the event files; created if it is missing.
      first_step: the first step that this start writes. TensorBoard drops this step and later ones
        from earlier files, so that it shows each step once.

    Raises:
      ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.histogram.summary import histogram_pb
        from tensorboard.plugins.scalar.summary import scalar_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._scalar, self._histogram = event_pb2.Event, scalar_pb, histogram_pb
        folder.mkdir(parents=True, exist_ok=True)
        # An object in a bucket cannot be appended to: each flush would upload all of it again.
        self._flushed = "://" not in str(folder)
        # TensorBoard looks for "tfevents"; the rest keeps the starts of a run apart.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._open = contextlib.ExitStack()
        # epath opens a file in a bucket only by `with`.
        file = self._open.enter_context((folder / name).open("wb"))
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")
        # The first start writes this event, too: TensorBoard takes only the second for a restart.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def write(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Sequence[float | None]],
    ) -> None:
        """Writes the values of a step. Readers see them at once; in a bucket, after `close`.

        Args:
          step: the train step.
          scalars: {tag: number}.
          histograms: {tag: numbers}; None among the numbers is left out.
        """
        for tag, value in scalars.items():
            self._write(step=step, summary=self._scalar(tag, value))
        for tag, values in histograms.items():
            if known := [value for value in values if value is not None]:
                self._write(step=step, summary=self._histogram(tag, known))
        if self._flushed:
            self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._open.close()

    def _write(self, **fields) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
