"""Figures with matplotlib, which is optional: without it `figure` raises an InputError."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from layermatch_jax.after import statistics
from layermatch_jax.errors import InputError

# Okabe and Ito's colors, which are told apart by color-blind readers, too.
BLUE, ORANGE, GREEN, RED, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"


def figure(width: float, height: float) -> Any:
    """Creates an empty matplotlib Figure without a window and without pyplot's state.

    Args:
      width: inches.
      height: inches.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib: pip install matplotlib") from None
    return Figure((width, height), dpi=150, layout="constrained")


def save(draw: Callable[[], Any], path: epath.Path) -> None:
    """Writes a Figure as a PNG file; if matplotlib is missing, prints a message instead.

    Args:
      draw: () -> the Figure.
      path: path of the file.
    """
    try:
        chart = draw()
    except InputError as error:
        print(f"{path.name} is not drawn: {error}", file=sys.stderr)
        return
    with path.open("wb") as file:
        chart.savefig(file, format="png")


def comparison(
    scores: dict[str, dict[int, float]], baseline: str, quantity: str, title: str = ""
) -> Any:
    """Draws scores by row, and their differences to a baseline, with a point for each seed.

    Args:
      scores: {row: {seed: score}}; rows may lack seeds.
      baseline: the row to compare with.
      quantity: name and unit of the scores.
      title: title of the figure.

    Returns:
      A Figure. On the left, scores with mean ± standard deviation; on the right, differences
      between scores of the same seed, with mean ± standard error.
    """
    chart = figure(9, 1.4 + 0.36 * len(scores))
    left, right = chart.subplots(1, 2, sharey=True)
    positions = range(len(scores))
    for position, (row, by_seed) in zip(positions, scores.items(), strict=True):
        _points(left, position, list(by_seed.values()), statistics.mean(by_seed.values()), BLUE)
        if row != baseline:
            compared = by_seed, scores[baseline]
            differences = statistics.differences(*compared)
            _points(right, position, differences, statistics.mean_difference(*compared), RED)
    left.set_yticks(positions, list(scores))
    left.invert_yaxis()
    left.set_xlabel(f"{quantity}\npoints: seeds; bar: mean ± standard deviation")
    right.set_xlabel(
        f"difference to {baseline}, percentage points\npoints: seeds; bar: mean ± standard error"
    )
    right.axvline(0, color=GRAY, linewidth=1)
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        chart.suptitle(title, fontsize="medium")
    return chart


def _points(axes, position: int, values: list[float], mean: statistics.Mean, color: str):
    """Draws the seeds as light points, and below them the mean with its spread."""
    if not values:
        return
    axes.plot(values, [position - 0.14] * len(values), "o", color=color, alpha=0.4, markersize=4)
    axes.errorbar(
        mean.value,
        position + 0.14,
        xerr=mean.spread,
        fmt="D",
        color=color,
        markersize=5,
        capsize=3,
    )


class Panel(NamedTuple):
    """A quantity for each row and column of a map; NaN: not known, the cell stays empty."""

    title: str
    values: np.ndarray  # [rows, columns]
    low: np.ndarray  # [rows, columns], ends of the interval
    high: np.ndarray
    colors: str  # name of a matplotlib colormap
    least: float | None  # of the color scale; both None = a logarithmic scale
    most: float | None


def maps(panels: list[Panel], rows: list[str], columns: list[str], along: str, title: str) -> Any:
    """Draws maps of the same rows and columns, two side by side, with values and intervals.

    Args:
      panels: the maps.
      rows: names of the rows, from the top.
      columns: names of the columns, from the left.
      along: label of the horizontal axis.
      title: title of the figure.
    """
    lines = -(-len(panels) // 2)
    width, height = max(0.95 * len(columns), 1.9), 0.36 * len(rows)
    chart = figure(2 * (width + 2.2), lines * (height + 0.9) + 0.3)
    chart.suptitle(title, fontsize="medium")
    for axes, panel in zip(chart.subplots(lines, 2).flat, panels, strict=True):
        image = axes.imshow(panel.values, aspect="auto", cmap=panel.colors, norm=_norm(panel))
        chart.colorbar(image, ax=axes, pad=0.02)
        for (row, column), value in np.ndenumerate(panel.values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                ends = panel.low[row, column], panel.high[row, column]
                interval = " – ".join(_number(end, panel) for end in ends)
                style = {"ha": "center", "color": "white" if dark else "black"}
                axes.text(
                    column, row - 0.02, _number(value, panel), va="bottom", fontsize=8, **style
                )
                axes.text(column, row + 0.05, interval, va="top", fontsize=6, **style)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(along)
        axes.tick_params(length=0)
    return chart


def _norm(panel: Panel):
    from matplotlib import colors

    if panel.least is not None:
        return colors.Normalize(panel.least, panel.most)
    positive = panel.values[np.isfinite(panel.values) & (panel.values > 0)]
    return colors.LogNorm(min([0.1, *positive]), max([10.0, *positive]))


def _number(value: float, panel: Panel) -> str:
    text = f"{value:.3g}" if panel.least is None else f"{value:.2f}"
    return text.replace("-", "−")
