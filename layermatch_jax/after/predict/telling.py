"""Progress and summary of a prediction, for the user."""

import collections
import sys
import time

from layermatch_jax.after.predict.lines import Row
from layermatch_jax.data.sources import checking, names
from layermatch_jax.runtime import progress

_CLASSES = 20  # classes in the table at the end
_BROKEN = 100  # broken images in the list


class Tally:
    """Counts the images of each class, and collects the broken images."""

    def __init__(self):
        self.predicted = self.broken = 0
        self.remarks = collections.Counter()
        self._classes, self._broken = collections.Counter(), {}

    def add(self, row: Row) -> None:
        """Counts a row."""
        if not row.error:
            self.predicted += 1
            self._classes[row.classes[0]] += 1
            return
        self.broken += 1
        if self.broken <= _BROKEN:
            self._broken[row.path] = row.error

    def listing(self) -> str:
        """Lists the broken images, one on each line, with the reasons."""
        more = self.broken - len(self._broken)
        return checking.as_lines(self._broken) + (f"\n  and {more:,} more" if more > 0 else "")

    def table(self, class_names: tuple[str, ...]) -> str:
        """Formats the number of images of the most frequent classes as a table."""
        shown = self._classes.most_common(_CLASSES)
        width = max([len("class"), *(len(name) for name, _ in shown)])
        rows = [f"{'class':<{width}}    images   share"]
        rows += [
            f"{name:<{width}}{count:>10,}{count / self.predicted:>8.1%}" for name, count in shown
        ]
        rest = len(self._classes) - len(shown)
        if rest > 0:
            others = self.predicted - sum(count for _, count in shown)
            rows.append(f"{rest:,} other classes: {others:,} images")
        if none := len(set(map(names.visible, class_names)) - self._classes.keys()):
            rows.append(f"no image of {none:,} other classes" if shown else "no image")
        return "\n".join(rows)


class Progress:
    """Prints the progress to stderr."""

    def __init__(self, done: int, total: int):
        self._total, self._said = total, None
        self._from = None  # (images done, time) after the first batch, which compiles
        if done < total:
            print("compiling the model ...", file=sys.stderr, flush=True)

    def update(self, done: int) -> None:
        """Prints at most one line per period. Call it after every batch; `done` counts images."""
        now = time.monotonic()
        if self._from is None:
            self._from, self._said = (done, now), now
        elif now - self._said >= progress.PERIOD:
            self._said = now
            speed = (done - self._from[0]) / (now - self._from[1])
            left = progress.short((self._total - done) / speed)
            print(
                f"{done:,}/{self._total:,} images  {speed:,.0f} images/s  {left} left",
                file=sys.stderr,
                flush=True,
            )
