"""Style of the reports' figures: colors, axes, shortened names."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from layermatch_jax.after import drawing
from layermatch_jax.after.drawing import BLUE, GREEN, ORANGE, RED

# The palette of Okabe and Ito without the pale yellow.
COLORS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
# Lines also differ in style; gaps show lines below. With the colors, 21 series differ.
LINES = ("-", (0, (6, 1.5)), (0, (2, 1)))
MARKERS = "o^sDvP"
WRITTEN = 20  # up to this number of classes, a confusion matrix shows numbers
NAMED = 30  # up to this number of classes, an axis shows their names
SEPARATE = 12  # up to this number of classes, each has its own panel
FEW = 40  # up to this number of points, a curve has markers
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "image.interpolation": "nearest",
    "text.parse_math": False,  # class names may contain $
}


@contextlib.contextmanager
def styled_figure(width: float, height: float) -> Iterator:
    """Yields a Figure of this size in inches; drawing within the context uses STYLE.

    Import other parts of matplotlib inside the context, where matplotlib is known to be installed.
    """
    drawing.figure(width, height)  # raises if matplotlib is not installed
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield drawing.figure(width, height)


def step_axis(axis) -> None:
    """Labels an axis with whole numbers; large ones as 200k."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def marker(steps) -> str | None:
    """Returns a marker for curves of few points, because a single point has no line; else None."""
    return "." if len(steps) <= FEW else None


def name_axis(axis, names: Sequence[str], label: str) -> None:
    """Labels an axis with class names if they fit, else with numbers."""
    if len(names) <= NAMED:
        axis.set_ticks(np.arange(len(names)), labels=[shortened(name, 16) for name in names])
        axis.set_label_text(label)
    else:
        axis.set_label_text(f"{label}, by number from 0")


def shortened(text: str, length: int) -> str:
    """Shortens a text in its middle, because class names may differ at either end."""
    tail = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - tail]}…{text[-tail:]}"
