"""The figure of a run's layer reports: maps of layers by training steps."""

from typing import Any

import numpy as np
from etils import epath

from layermatch_jax.after import drawing
from layermatch_jax.after.layer_report import record
from layermatch_jax.after.layer_report.estimates import QUANTITIES


def write(workdir: epath.Path) -> None:
    """Draws the layer reports of a run into its folder; without reports, removes the figure."""
    if reports := record.read(workdir):
        drawing.save(lambda: draw(reports), workdir / record.FIGURE)
    else:
        (workdir / record.FIGURE).unlink(missing_ok=True)


def draw(reports: list[dict[str, Any]]) -> Any:
    """Draws reports of one or several steps: for each quantity, a map of layers by steps."""
    layers, at_steps = list(reports[0]["layers"]), [one["step"] for one in reports]

    def values(name):  # [3, layers, steps]
        told = [[one["layers"][x][name] for one in reports] for x in layers]
        return np.moveaxis(np.array(told, float), -1, 0)

    colors = {
        "cosine_true": ("RdBu", -1, 1),
        "cosine_supervised": ("RdBu", -1, 1),
        "norm_ratio": ("viridis", None, None),
        "noise_share": ("cividis", 0, 1),
    }
    panels = [drawing.Panel(QUANTITIES[name], *values(name), *colors[name]) for name in QUANTITIES]
    counts = " or ".join(map(str, sorted({one["batches"] for one in reports})))
    title = f"mean gradients over {counts} batches; below: 95 % interval; empty: not known"
    return drawing.maps(panels, layers, [f"{step:,}" for step in at_steps], "step", title)
