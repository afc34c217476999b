"""Figures of a model's predictions, images and features, with matplotlib."""

from collections.abc import Sequence

import numpy as np

from layermatch_jax.after import style


def confusion(matrix: np.ndarray, names: Sequence[str]):
    """Draws a confusion matrix, each row in % of its class.

    Args:
      matrix: integers [K, K], rows by true class, columns by predicted class.
      names: names of the K classes.

    Returns:
      A Figure. With at most 20 classes, the cells show numbers.
    """
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(names)
    side = 1.6 + (0.38 * count if count <= style.WRITTEN else 6.0)
    with style.styled_figure(side + 0.9, side) as figure:
        from matplotlib import colors, ticker

        # With many classes, most entries are a few percent; the power makes them visible.
        norm = colors.Normalize(0, 1) if count <= style.WRITTEN else colors.PowerNorm(0.5, 0, 1)
        axes = figure.subplots()
        image = axes.imshow(share, norm=norm, cmap="Blues")
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="true class")
        style.name_axis(axes.xaxis, names, "predicted class")
        style.name_axis(axes.yaxis, names, "true class")
        if count <= style.NAMED and max(map(len, names)) > 2:
            axes.tick_params("x", labelrotation=90)
        if count <= style.WRITTEN:
            for i, j in zip(*np.nonzero(matrix), strict=True):
                shown = f"{100 * share[i, j]:.0f}" if share[i, j] >= 0.005 else "<1"
                color = "white" if share[i, j] > 0.55 else "black"
                axes.text(j, i, shown, ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(
            image,
            label="% of the class's images",
            format=ticker.PercentFormatter(1.0, symbol=""),
            shrink=0.8,
        )
    return figure


def draw_images(pixels, titles: Sequence[Sequence[str]], rows: Sequence[str] = ()):
    """Draws a grid of images.

    Args:
      pixels: [R][C] images, uint8 [H, W, 3]; a row may be shorter than the first.
      titles: [R][C], the text above each image; long lines are shortened.
      rows: [R], the text on the left of each row; () for none.

    Returns:
      A Figure.
    """
    columns, width = len(pixels[0]), 1.15
    lines = max(title.count("\n") + 1 for row in titles for title in row)
    any_title = any(title for row in titles for title in row)
    coarse = pixels[0][0].shape[0] > 64  # at full resolution, photographs would take megabytes
    height = width + (0.17 * lines if any_title else 0)
    with style.styled_figure(
        width * columns + (0.5 if rows else 0), height * len(pixels)
    ) as figure:
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
                    text = "\n".join(style.shortened(line, 18) for line in titles[r][c].split("\n"))
                    grid[r, c].set_title(text, fontsize=7.5, pad=2)
            if rows:
                grid[r, 0].set_ylabel(rows[r])
    return figure


def feature_map(
    points: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    shares: Sequence[float],
    centers: np.ndarray | None = None,
    wrong: np.ndarray | None = None,
):
    """Draws features in the plane of their first two principal components.

    Args:
      points: [N, 2], projected features.
      labels: integers [N], true classes.
      names: names of the K classes.
      shares: [2], share of the variance along each axis.
      centers: [K, 2], NaN for a class without center; None for no centers.
      wrong: bool [N], whether the prediction is wrong. With more than 20 classes, colors show this
        instead of the classes.

    Returns:
      A Figure.
    """
    few = len(names) <= style.WRITTEN
    with style.styled_figure(6.4, 5.2) as figure:
        axes = figure.subplots()
        size = float(np.clip(4000 / max(len(points), 1), 5, 20))
        if few:
            for k, name in enumerate(names):
                axes.scatter(
                    *points[labels == k].T,
                    s=size,
                    color=style.COLORS[k % len(style.COLORS)],
                    marker=style.MARKERS[k // len(style.COLORS) % len(style.MARKERS)],
                    alpha=0.6,
                    linewidths=0,
                    label=style.shortened(name, 24),
                )
        else:
            wrong = np.zeros(len(points), bool) if wrong is None else wrong
            for mask, color, label in (
                (~wrong, style.COLORS[0], "predicted right"),
                (wrong, style.COLORS[1], "predicted wrong"),
            ):
                axes.scatter(
                    *points[mask].T, s=size, color=color, alpha=0.5, linewidths=0, label=label
                )
        if centers is not None:
            colors = [
                style.COLORS[k % len(style.COLORS)] if few else "white" for k in range(len(names))
            ]
            axes.scatter(
                *centers.T, marker="*", s=130 if few else 30, c=colors, edgecolor="black",
                linewidths=1, zorder=3, label="center",
            )  # fmt: skip
        if centers is not None and len(names) <= style.SEPARATE:
            for name, (x, y) in zip(names, centers, strict=True):
                if np.isfinite(x):
                    axes.annotate(
                        style.shortened(name, 12), (x, y), (6, 5), textcoords="offset points",
                        fontweight="bold", zorder=4, in_layout=False,
                        bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1},
                    )  # fmt: skip
        axes.set(
            xlabel=f"first principal component ({shares[0]:.0%} of the variance)",
            ylabel=f"second principal component ({shares[1]:.0%})",
        )
        legend = figure.legend(loc="outside right center")
        for handle in legend.legend_handles:
            handle.set_sizes([30])
    return figure
