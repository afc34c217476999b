"""Pictures of runs: arrays in, a matplotlib Figure out, for reports and notebooks.

Nothing is read or written here, and no state of pyplot is touched. Without matplotlib, which
training does not need, every function raises an InputError.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from layermatch_jax.after import drawing
from layermatch_jax.after.drawing import BLUE, GREEN, GREY, ORANGE, RED

# Okabe and Ito's seven, the pale yellow left out.
COLOURS = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#000000")
# Not by colour alone, and what lies below a broken line is seen. With the colours: 21 series.
_LINES = ("-", (0, (6, 1.5)), (0, (2, 1)))
_MARKERS = "o^sDvP"
WRITTEN = 20  # classes whose confusion matrix has numbers in it
NAMED = 30  # classes whose names fit on an axis
SEPARATE = 12  # classes that are drawn in a panel each
_WIDTH = 84  # characters of a legend's line
_FEW = 40  # points of a curve that are marked one by one
_STYLE = {
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


class Series(NamedTuple):
    """A line of a picture, and what lies around it."""

    label: str
    steps: np.ndarray  # [T]
    values: np.ndarray  # [T]
    low: np.ndarray | None = None  # [T], of the band around the line
    high: np.ndarray | None = None


def png(figure) -> bytes:
    """A Figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi, metadata={"Software": None})
    return file.getvalue()


def curves(series: Sequence[Series], title: str, unit: str, *, percent: bool = False):
    """Lines over training steps.

    Args:
      series: what to draw, each in the look of its place; those without a step are left out.
      title: what is drawn.
      unit: of the values, for the axis.
      percent: the values are fractions, to be shown in %.

    Returns:
      A Figure.
    """
    longest = max((len(_short(one.label, _WIDTH)) for one in series), default=0)
    columns = int(np.clip(_WIDTH // (longest + 7), 1, 3))
    rows = -(-len(series) // columns) if len(series) > 1 else 0
    with _figure(5.6, 3.1 + 0.2 * rows) as figure:
        from matplotlib import ticker

        axes = figure.subplots()
        for i, one in enumerate(series):
            if not len(one.steps):
                continue
            colour, line = COLOURS[i % len(COLOURS)], _LINES[i % len(_LINES)]
            axes.plot(
                one.steps,
                one.values,
                color=colour,
                linestyle=line,
                marker=_marker(one.steps),
                label=_short(one.label, _WIDTH),
            )
            if one.low is not None:
                axes.fill_between(
                    one.steps, one.low, one.high, color=colour, alpha=0.18, linewidth=0
                )
        axes.set(title=title, xlabel="training step", ylabel=unit)
        axes.set_xlim(left=0)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=GREY, linewidth=0.8)
        _steps(axes.xaxis)
        if percent:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None, symbol=""))
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=columns)
    return figure


def class_counts(steps, pseudo_labels, truths, names: Sequence[str]):
    """Pseudo-labels of each class over training, beside what is there of it.

    Few classes have a panel each; of many, a map shows the ratio.

    Args:
      steps: [T], the last one of each window.
      pseudo_labels: [T, K], rows a step.
      truths: [T, K], rows a step.
      names: of the K classes.

    Returns:
      A Figure.
    """
    if len(names) > SEPARATE:
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
            colours="PuOr",
        )
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    with _figure(9.2, 0.6 + 1.5 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for k, axes in enumerate(grid.flat):
            if k >= len(names):
                axes.set_axis_off()
                continue
            for values, colour, label in (
                (truths, GREY, "images of the class"),
                (pseudo_labels, COLOURS[0], "pseudo-labels used"),
            ):
                axes.plot(steps, values[:, k], color=colour, marker=_marker(steps), label=label)
            axes.set_title(_short(names[k], 16))
            _steps(axes.xaxis)
        grid[0, 0].set(xlim=(0, None), ylim=(0, None))  # all share them
        figure.supxlabel("training step", fontsize=9)
        figure.supylabel("rows a step", fontsize=9)
        lines, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper right", ncols=2)
    return figure


def class_map(
    steps, values, names: Sequence[str], title: str, unit: str, *, limits, ticks=None, colours=None
):
    """A quantity by class over training, as colours.

    Args:
      steps: [T], the last one of each window; T > 0.
      values: [T, K]; NaN, where it is not known, is grey.
      names: of the K classes.
      title: what is drawn.
      unit: of the values.
      limits: (lowest, highest) value that has a colour of its own.
      ticks: {value: what is written beside its colour}; None where fractions are shown in %.
      colours: name of a colour map; None for viridis.

    Returns:
      A Figure.
    """
    with _figure(5.6, 1.2 + max(2.0, 0.17 * min(len(names), NAMED))) as figure:
        import matplotlib
        from matplotlib import ticker

        axes = figure.subplots()
        palette = matplotlib.colormaps[colours or "viridis"].with_extremes(bad="#c8c8c8")
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
        _name_axis(axes.yaxis, names, "class")
        _steps(axes.xaxis)
        bar = figure.colorbar(mesh, label=unit)
        if ticks:
            bar.set_ticks(list(ticks), labels=list(ticks.values()))
        else:
            bar.formatter = ticker.PercentFormatter(1.0, decimals=None, symbol="")
    return figure


def confusion(matrix: np.ndarray, names: Sequence[str]):
    """A confusion matrix, each row in % of its class.

    Args:
      matrix: integers [K, K], rows by truth, columns by prediction.
      names: of the K classes.

    Returns:
      A Figure; with numbers where the classes are few.
    """
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(names)
    side = 1.6 + (0.38 * count if count <= WRITTEN else 6.0)
    with _figure(side + 0.9, side) as figure:
        from matplotlib import colors, ticker

        # Of many classes, most entries are a few percent: they must be seen.
        norm = colors.Normalize(0, 1) if count <= WRITTEN else colors.PowerNorm(0.5, 0, 1)
        axes = figure.subplots()
        image = axes.imshow(share, norm=norm, cmap="Blues")
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="true class")
        _name_axis(axes.xaxis, names, "predicted class")
        _name_axis(axes.yaxis, names, "true class")
        if count <= NAMED and max(map(len, names)) > 2:
            axes.tick_params("x", labelrotation=90)
        if count <= WRITTEN:
            for i, j in zip(*np.nonzero(matrix), strict=True):
                shown = f"{100 * share[i, j]:.0f}" if share[i, j] >= 0.005 else "<1"
                colour = "white" if share[i, j] > 0.55 else "black"
                axes.text(j, i, shown, ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(
            image,
            label="% of the class's images",
            format=ticker.PercentFormatter(1.0, symbol=""),
            shrink=0.8,
        )
    return figure


def images(pixels, titles: Sequence[Sequence[str]], rows: Sequence[str] = ()):
    """A grid of images.

    Args:
      pixels: uint8 [R][C] of [H, W, 3]; a row may be shorter than the first one.
      titles: [R][C], written above each; lines that are too long are cut.
      rows: [R], written on the left; () for nothing.

    Returns:
      A Figure.
    """
    columns, width = len(pixels[0]), 1.15
    lines = max(title.count("\n") + 1 for row in titles for title in row)
    any_title = any(title for row in titles for title in row)
    coarse = pixels[0][0].shape[0] > 64  # photographs: at full resolution, megabytes
    height = width + (0.17 * lines if any_title else 0)
    with _figure(width * columns + (0.5 if rows else 0), height * len(pixels)) as figure:
        figure.set_dpi(100 if coarse else figure.dpi)
        grid = figure.subplots(len(pixels), columns, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        for r, row in enumerate(pixels):
            for c, image in enumerate(row):
                grid[r, c].imshow(image)
                if titles[r][c]:
                    text = "\n".join(_short(line, 18) for line in titles[r][c].split("\n"))
                    grid[r, c].set_title(text, fontsize=7.5, pad=2)
            if rows:
                grid[r, 0].set_ylabel(rows[r])
    return figure


def feature_map(
    points: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    shares: Sequence[float],
    centres: np.ndarray | None = None,
    wrong: np.ndarray | None = None,
):
    """Features in the plane in which they vary most.

    Args:
      points: [N, 2].
      labels: integers [N], true classes.
      names: of the K classes.
      shares: [2], of the variance along the axes.
      centres: [K, 2], NaN for a class without; None for none.
      wrong: bool [N], predictions that are wrong. Of many classes, this is what is coloured.

    Returns:
      A Figure.
    """
    few = len(names) <= WRITTEN
    with _figure(6.4, 5.2) as figure:
        axes = figure.subplots()
        size = float(np.clip(4000 / max(len(points), 1), 5, 20))
        if few:
            for k, name in enumerate(names):
                axes.scatter(
                    *points[labels == k].T,
                    s=size,
                    color=COLOURS[k % len(COLOURS)],
                    marker=_MARKERS[k // len(COLOURS) % len(_MARKERS)],
                    alpha=0.6,
                    linewidths=0,
                    label=_short(name, 24),
                )
        else:
            wrong = np.zeros(len(points), bool) if wrong is None else wrong
            for mask, colour, label in (
                (~wrong, COLOURS[0], "predicted right"),
                (wrong, COLOURS[1], "predicted wrong"),
            ):
                axes.scatter(
                    *points[mask].T, s=size, color=colour, alpha=0.5, linewidths=0, label=label
                )
        if centres is not None:
            colours = [COLOURS[k % len(COLOURS)] if few else "white" for k in range(len(names))]
            axes.scatter(
                *centres.T, marker="*", s=130 if few else 30, c=colours, edgecolor="black",
                linewidths=1, zorder=3, label="centre",
            )  # fmt: skip
        if centres is not None and len(names) <= SEPARATE:
            for name, (x, y) in zip(names, centres, strict=True):
                if np.isfinite(x):
                    axes.annotate(
                        _short(name, 12), (x, y), (6, 5), textcoords="offset points",
                        fontweight="bold", zorder=4, in_layout=False,
                        bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1},
                    )  # fmt: skip
        axes.set(
            xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
            ylabel=f"second ({shares[1]:.0%})",
        )
        legend = figure.legend(loc="outside right center")
        for handle in legend.legend_handles:
            handle.set_sizes([30])
    return figure


# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator:
    """A Figure of so many inches; what is drawn meanwhile has the style of them all.

    What else is needed of matplotlib is imported within, after it was found to be there.
    """
    drawing.figure(width, height)  # raises where there is no matplotlib
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield drawing.figure(width, height)


def _steps(axis) -> None:
    """Whole numbers, the large ones as 200k."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(ticker.EngFormatter(sep=""))


def _marker(steps) -> str | None:
    """Few points are marked one by one; a single one would not be seen otherwise."""
    return "." if len(steps) <= _FEW else None


def _name_axis(axis, names: Sequence[str], label: str) -> None:
    """Class names where they fit; else numbers."""
    if len(names) <= NAMED:
        axis.set_ticks(np.arange(len(names)), labels=[_short(name, 16) for name in names])
        axis.set_label_text(label)
    else:
        axis.set_label_text(f"{label}, by number from 0")


def _short(text: str, length: int) -> str:
    """Cut in its middle: class names differ at either end."""
    tail = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - tail]}…{text[-tail:]}"
