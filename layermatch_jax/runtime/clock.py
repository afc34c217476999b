"""Measures how long training takes, in seconds and in timed steps."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

# For each log window: `seconds` is the whole time of training. `timed_seconds` and `timed_steps`
# leave out the first call of each start, because it compiles the train step.
EMPTY = dict.fromkeys(("seconds", "timed_seconds", "timed_steps"), np.float32(0))


class Clock:
    """Counts seconds and steps of training since the last log line.

    It counts steps that the devices have finished, because the host runs ahead of them. A
    checkpoint contains the clock's window, so that a resumed run continues to count.

    Attributes:
      first_call: (step, time.monotonic()) when the first call of this start was done; None before.
      step_seconds: mean seconds of a step in this start, without its first call; None before the
        second call is done.
    """

    def __init__(self, step: int, window: dict[str, np.ndarray]):
        self.first_call = self.step_seconds = None
        self._window = {name: float(value) for name, value in window.items()}
        self._timed_seconds, self._timed_steps = 0.0, 0  # of this start
        self._done, self._since = step, time.monotonic()

    def done(self, step: int) -> None:
        """Records that the devices have finished all steps up to `step`, and none after it."""
        now = time.monotonic()
        seconds, steps = now - self._since, step - self._done
        self._done, self._since = step, now
        self._window["seconds"] += seconds
        if self.first_call:
            self._window["timed_seconds"] += seconds
            self._window["timed_steps"] += steps
            self._timed_seconds += seconds
            self._timed_steps += steps
            self.step_seconds = self._timed_steps and self._timed_seconds / self._timed_steps
        elif steps:
            self.first_call = (step, now)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the block from all timings."""
        yield
        self._since = time.monotonic()

    def window(self) -> dict[str, np.ndarray]:
        """Returns seconds and steps since the last log line, with the keys of EMPTY."""
        return {name: np.float32(value) for name, value in self._window.items()}

    def next_window(self) -> dict[str, float]:
        """Returns the window as floats, and begins a new one."""
        window, self._window = self._window, {name: 0.0 for name in EMPTY}
        return window


def duration(seconds: float) -> str:
    """Formats seconds: 3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
