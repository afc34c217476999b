"""Figures of runs for reports and notebooks: functions of arrays that return a matplotlib Figure.

They read and write no files and do not change pyplot's state. Without matplotlib, which training
does not need, every function raises an InputError.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from layermatch_jax.after import style
from layermatch_jax.after.drawing import GRAY

_WIDTH = 84  # characters in a line of a legend


class Series(NamedTuple):
    """A line of a figure, and optionally a band around it."""

    label: str
    steps: np.ndarray  # [T]
    values: np.ndarray  # [T]
    low: np.ndarray | None = None  # [T], of the band around the line
    high: np.ndarray | None = None


def png(figure) -> bytes:
    """Converts a Figure to the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi, metadata={"Software": None})
    return file.getvalue()


def draw_curves(series: Sequence[Series], title: str, unit: str, *, percent: bool = False):
    """Draws lines over training steps.

    Args:
      series: the lines. Color and line style depend on the position in this list; series without a
        step are left out.
      title: title of the figure.
      unit: label of the vertical axis.
      percent: whether the values are fractions that the axis shows in %.

    Returns:
      A Figure.
    """
    longest = max((len(style.shortened(one.label, _WIDTH)) for one in series), default=0)
    columns = int(np.clip(_WIDTH // (longest + 7), 1, 3))
    rows = -(-len(series) // columns) if len(series) > 1 else 0
    with style.styled_figure(5.6, 3.1 + 0.2 * rows) as figure:
        from matplotlib import ticker

        axes = figure.subplots()
        for i, one in enumerate(series):
            if not len(one.steps):
                continue
            color, line = style.COLORS[i % len(style.COLORS)], style.LINES[i % len(style.LINES)]
            axes.plot(
                one.steps,
                one.values,
                color=color,
                linestyle=line,
                marker=style.marker(one.steps),
                label=style.shortened(one.label, _WIDTH),
            )
            if one.low is not None:
                axes.fill_between(
                    one.steps, one.low, one.high, color=color, alpha=0.18, linewidth=0
                )
        axes.set(title=title, xlabel="training step", ylabel=unit)
        axes.set_xlim(left=0)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=GRAY, linewidth=0.8)
        style.step_axis(axes.xaxis)
        if percent:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None, symbol=""))
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=columns)
    return figure


def class_counts(steps, pseudo_labels, truths, names: Sequence[str]):
    """Draws, for each class, used pseudo-labels and images of the class over training.

    Few classes get a panel each; for many classes, a map shows the ratio.

    Args:
      steps: [T], the last step of each window.
      pseudo_labels: [T, K], used pseudo-labels per step.
      truths: [T, K], images of the class per step.
      names: names of the K classes.

    Returns:
      A Figure.
    """
    if len(names) > style.SEPARATE:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.log2(np.where(truths > 0, pseudo_labels / truths, np.nan))
        return class_map(
            steps,
            ratio,
            names,
            "Used pseudo-labels of a class per image of the class",
            "ratio",
            limits=(-2, 2),
            ticks={-2: "≤ 1/4", -1: "1/2", 0: "1", 1: "2", 2: "≥ 4"},
            colors="PuOr",
        )
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    with style.styled_figure(9.2, 0.6 + 1.5 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for k, axes in enumerate(grid.flat):
            if k >= len(names):
                axes.set_axis_off()
                continue
            for values, color, label in (
                (truths, GRAY, "images of the class"),
                (pseudo_labels, style.COLORS[0], "pseudo-labels used"),
            ):
                axes.plot(steps, values[:, k], color=color, marker=style.marker(steps), label=label)
            axes.set_title(style.shortened(names[k], 16))
            style.step_axis(axes.xaxis)
        grid[0, 0].set(xlim=(0, None), ylim=(0, None))  # the panels share the axes
        figure.supxlabel("training step", fontsize=9)
        figure.supylabel("images per step", fontsize=9)
        lines, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper right", ncols=2)
    return figure


def class_map(
    steps, values, names: Sequence[str], title: str, unit: str, *, limits, ticks=None, colors=None
):
    """Draws a quantity by class over training as a color map.

    Args:
      steps: [T], the last step of each window; T > 0.
      values: [T, K]; NaN (not known) is gray.
      names: names of the K classes.
      title: title of the figure.
      unit: label of the color bar.
      limits: (lowest, highest) value of the color scale; values beyond are clipped.
      ticks: {value: label on the color bar}; None: the values are fractions, shown in %.
      colors: name of a matplotlib colormap; None for viridis.

    Returns:
      A Figure.
    """
    with style.styled_figure(5.6, 1.2 + max(2.0, 0.17 * min(len(names), style.NAMED))) as figure:
        import matplotlib
        from matplotlib import ticker

        axes = figure.subplots()
        palette = matplotlib.colormaps[colors or "viridis"].with_extremes(bad="#c8c8c8")
        mesh = axes.pcolormesh(
            np.concatenate([[0], steps]),
            np.arange(len(names) + 1) - 0.5,
            np.ma.masked_invalid(np.clip(values, *limits)).T,
            cmap=palette,
            vmin=limits[0],
            vmax=limits[1],
        )
        axes.grid(visible=False)
        axes.set(title=title, xlabel="training step")
        axes.invert_yaxis()
        style.name_axis(axes.yaxis, names, "class")
        style.step_axis(axes.xaxis)
        bar = figure.colorbar(mesh, label=unit)
        if ticks:
            bar.set_ticks(list(ticks), labels=list(ticks.values()))
        else:
            bar.formatter = ticker.PercentFormatter(1.0, decimals=None, symbol="")
    return figure


# ---------------------------------------------------------------------------------------------
