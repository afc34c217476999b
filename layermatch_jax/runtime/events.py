"""TensorBoard's event files, written without TensorFlow, whose import takes seconds."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence

from etils import epath


class EventFile:
    """One event file in a folder (local or gs://), for one start of a run.

    Args:
      folder: of the event files; made if it is not there.
      first_step: the first one that this start will write. TensorBoard drops what earlier files
        hold of this step and later ones, so that it shows each step once.

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
        # A bucket's object cannot be added to: it would be uploaded anew each time.
        self._flushed = "://" not in str(folder)
        # TensorBoard looks for "tfevents"; the rest keeps the starts of a run apart.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._open = contextlib.ExitStack()
        # A bucket's file is one within a `with` only.
        file = self._open.enter_context((folder / name).open("wb"))
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")
        # The first start says it as well: TensorBoard takes only a second one for a restart.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def write(
        self,
        step: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, Sequence[float | None]],
    ) -> None:
        """Adds a step's values by their tags; readers see them at once, in a bucket at the end.

        Args:
          step: of the run.
          scalars: a number each.
          histograms: numbers each; None are left out.
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
