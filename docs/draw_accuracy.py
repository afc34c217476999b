"""Draws images/accuracy_digits.png from the first two tables of results.md.

python docs/draw_accuracy.py
"""

import pathlib
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).resolve().parent
NAMES = {
    "supervised": "supervised (labels only)",
    "fixmatch": "FixMatch",
    "grad_relu": "FixMatch + Grad-ReLU",
    "avg_clustering": "FixMatch + Avg-Clustering",
    "layermatch": "LayerMatch (both)",
}
COLORS = ("#777777", "#0072b2", "#56b4e9", "#009e73", "#d55e00")


def accuracies(text: str) -> dict[str, dict[str, tuple[float, float]]]:
    """{title of a panel: {method: (mean, standard deviation)}}, in %, of the first two tables."""
    section = text.partition("## Digits: the parts of LayerMatch")[2].partition("\n##")[0]
    tables = {}
    for line in section.split("\n"):
        if heading := re.match(r"\*\*(\d+) labels\*\*.*label seeds 0-(\d+)", line):
            panel = f"{heading[1]} labels ({int(heading[2]) + 1} seeds)"
        elif row := re.match(r"\| `(\w+)` \| ([\d.]+) ± ([\d.]+) ", line):
            tables.setdefault(panel, {})[row[1]] = (float(row[2]), float(row[3]))
    return tables


def main() -> None:
    """Writes the picture."""
    tables = accuracies((FOLDER / "results.md").read_text(encoding="utf-8"))
    figure, axes = plt.subplots(
        1, len(tables), figsize=(8.4, 2.5), sharey=True, layout="constrained"
    )
    for ax, panel in zip(axes, sorted(tables), strict=True):
        for place, name in enumerate(NAMES):
            mean, deviation = tables[panel][name]
            ax.errorbar(
                mean, place, xerr=deviation, fmt="o", capsize=3, markersize=6, color=COLORS[place]
            )
            ax.annotate(
                f"{mean:.1f}", (mean, place), (0, 6), textcoords="offset points", ha="center"
            )
        ax.set_yticks(range(len(NAMES)), list(NAMES.values()))
        ax.set_ylim(len(NAMES) - 0.5, -0.7)
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(panel, fontsize=10)
    figure.supxlabel(
        "test accuracy on handwritten digits, %, mean ± standard deviation", fontsize=10
    )
    figure.savefig(FOLDER / "images" / "accuracy_digits.png", dpi=150)


if __name__ == "__main__":
    main()
