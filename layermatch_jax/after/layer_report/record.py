"""Reads and writes the files of a run's layer reports, and formats them as a table."""

import csv
import io
import json
from typing import Any

from etils import epath

from layermatch_jax.after.layer_report.estimates import QUANTITIES
from layermatch_jax.runtime import files, workdir

FILE, TABLE, FIGURE = FILES = workdir.LAYER_REPORT


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """Reads the layer reports of a run, sorted by step; [] if there is no file."""
    path = workdir / FILE
    mend = "Restore it from a backup, or delete it, which loses the layer reports so far."
    return files.read_json(path, mend, list) if path.exists() else []


def add(workdir: epath.Path, report: dict[str, Any]) -> None:
    """Adds a report to the run's file; replaces a report of the same step."""
    others = [one for one in read(workdir) if one["step"] != report["step"]]
    _write(workdir, sorted([*others, report], key=lambda one: one["step"]))


def cut_back(workdir: epath.Path, step: int) -> None:
    """Removes the reports after `step`, from which the run resumes."""
    before = read(workdir)
    kept = [one for one in before if one["step"] <= step]
    if len(kept) < len(before):
        _write(workdir, kept)


def _write(workdir: epath.Path, reports: list[dict[str, Any]]) -> None:
    """Writes the JSON and the CSV file atomically; the figure is drawn when a mode ends."""
    files.write_text(workdir / FILE, json.dumps(reports, indent=1) + "\n")
    files.write_text(workdir / TABLE, comma_separated(reports))


def comma_separated(reports: list[dict[str, Any]]) -> str:
    """Formats reports as CSV: a line for each step and layer, with values and intervals."""
    file = io.StringIO()
    ends = [f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["step", "layer", "parameters", *ends])
    for report in reports:
        for name, told in report["layers"].items():
            values = [x for quantity in QUANTITIES for x in told[quantity]]
            writer.writerow([report["step"], name, told["parameters"], *values])
    return file.getvalue()


def as_table(report: dict[str, Any]) -> str:
    """Formats a report as a table for people."""
    used, right = report["mask_rate"], report["pseudo_label_accuracy"]
    shown = "" if used is None else f", {used:.1%} of them used"
    shown += "" if right is None else f", {right:.1%} of these right"
    lines = [
        f"step {report['step']}: {report['batches']} batches, {report['known']} unlabeled images "
        f"of known class{shown}",
        "",
        f"{'':16}" + "".join(f"{name:>25}" for name in QUANTITIES),
    ]
    for name, told in report["layers"].items():
        cells = [
            "–" if told[q][0] is None else "{:.3f} ({:.3f}, {:.3f})".format(*told[q])
            for q in QUANTITIES
        ]
        lines.append(f"{name:16}" + "".join(f"{cell:>25}" for cell in cells))
    named = ", ".join(f"{name} = {meaning}" for name, meaning in QUANTITIES.items())
    lines += ["", f"{named}; in parentheses: 95 % interval"]
    if any(None in told[q] for told in report["layers"].values() for q in QUANTITIES):
        lines.append(
            "–: not known. The method has no pseudo-labels, no pseudo-label was used, or the noise "
            "of too few batches hides the gradient (use more: --config.layer_report.batches=N)"
        )
    return "\n".join(lines)
