"""Figures by matplotlib, which is optional: without it `figure` raises an InputError."""

from typing import Any

from layermatch_jax.errors import InputError

# Okabe and Ito's colours, which are told apart by colour-blind readers, too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, which no window shows and no pyplot state knows.

    Args:
      width: inches.
      height: inches.

    Raises:
      InputError: matplotlib is not installed; says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "figures need matplotlib: pip install -r notebooks/requirements.txt"
        ) from None
    return Figure((width, height), dpi=150, layout="constrained")


def comparison(
    scores: dict[str, dict[int, float]], baseline: str, quantity: str, title: str = ""
) -> Any:
    """Rows against a number, a point for each seed, and against the difference to a baseline.

    Args:
      scores: by row and seed; a seed that a row lacks is left out.
      baseline: a row.
      quantity: what the numbers are, with their unit.
      title: of the figure.

    Returns:
      A Figure: numbers with mean ± standard deviation beside paired differences, those of one seed,
      with mean ± standard error.
    """
    chart = figure(9, 1.4 + 0.36 * len(scores))
    left, right = chart.subplots(1, 2, sharey=True)
    positions = range(len(scores))
    for position, (row, by_seed) in zip(positions, scores.items(), strict=True):
        _points(left, position, list(by_seed.values()), BLUE, standard_error=False)
        shared = by_seed.keys() & scores[baseline].keys() if row != baseline else ()
        differences = [by_seed[seed] - scores[baseline][seed] for seed in sorted(shared)]
        _points(right, position, differences, RED, standard_error=True)
    left.set_yticks(positions, list(scores))
    left.invert_yaxis()
    left.set_xlabel(f"{quantity}\npoints: seeds; bar: mean ± standard deviation")
    right.set_xlabel(f"difference to {baseline}, points\nof each seed; bar: mean ± standard error")
    right.axvline(0, color=GREY, linewidth=1)
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        chart.suptitle(title, fontsize="medium")
    return chart


def _points(axes, position: int, values: list[float], colour: str, *, standard_error: bool):
    """Seeds as light points above the mean and its spread."""
    import numpy as np

    if not values:
        return
    axes.plot(values, [position - 0.14] * len(values), "o", color=colour, alpha=0.4, markersize=4)
    spread = np.std(values, ddof=1) if len(values) > 1 else None
    if spread is not None and standard_error:
        spread /= len(values) ** 0.5
    axes.errorbar(
        np.mean(values),
        position + 0.14,
        xerr=spread,
        fmt="D",
        color=colour,
        markersize=5,
        capsize=3,
    )
