"""What the figures of reports share: colors, axes, names that fit."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from layermatch_jax.after import drawing
from layermatch_jax.after.drawing import BLUE, GREEN, ORANGE, RED

# Okabe and Ito's seven, the pale yellow left out.
COLORS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
# Not by color alone, and what lies below a broken line is seen. With the colors: 21 series.
LINES = ("-", (0, (6, 1.5)), (0, (2, 1)))
MARKERS = "o^sDvP"
WRITTEN = 20  # classes whose confusion matrix has numbers in it
NAMED = 30  # classes whose names fit on an axis
SEPARATE = 12  # classes that are drawn in a panel each
FEW = 40  # points of a curve that are marked one by one
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
    "text.parse_math": False,  # a class may be called $1_bill
}


@contextlib.contextmanager
def styled_figure(width: float, height: float) -> Iterator:
    """A Figure of so many inches; what is drawn meanwhile has the style of them all.

    What else is needed of matplotlib is imported within, after it was found to be there.
    """
    drawing.figure(width, height)  # raises where there is no matplotlib
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield drawing.figure(width, height)


def step_axis(axis) -> None:
    """Whole numbers, the large ones as 200k."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def marker(steps) -> str | None:
    """Few points are marked one by one; a single one would not be seen otherwise."""
    return "." if len(steps) <= FEW else None


def name_axis(axis, names: Sequence[str], label: str) -> None:
    """Class names where they fit; else numbers."""
    if len(names) <= NAMED:
        axis.set_ticks(np.arange(len(names)), labels=[shortened(name, 16) for name in names])
        axis.set_label_text(label)
    else:
        axis.set_label_text(f"{label}, by number from 0")


def shortened(text: str, length: int) -> str:
    """Cut in its middle: class names differ at either end."""
    tail = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - tail]}…{text[-tail:]}"
