"""Makes the table and the figure of a grid from the result files of its runs."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from layermatch_jax.after import drawing, statistics
from layermatch_jax.runtime import metrics
from layermatch_jax.runtime import result as result_lib
from layermatch_jax.sweep.grid import Cell


class Entry(NamedTuple):
    """An entry of the table: a mean over seeds and its spread."""

    title: str  # title of the column
    mean: statistics.Mean
    paired: bool  # True: a paired difference ± standard error; False: a mean ± standard deviation


# {name in `measured`: whether the table also has its paired difference to the baseline}.
COLUMNS = {
    "median20": True,
    "last": False,
    "best": False,
    "a tenth": True,
    "used": False,
    "used right": False,
    "all right": True,
    "seconds": False,
}


def measured(cell: Cell) -> dict[str, float | None] | None:
    """Returns the numbers of one run, {column: number}; None if the run is not finished.

    'median20', 'last', 'best' and 'a tenth' (after a tenth of the steps) are accuracies of the EMA
    parameters. 'used' is the mask rate over the run; 'used right' and 'all right' are the
    accuracies of the used and of all pseudo-labels. All these are in %. 'seconds' is the wall time.
    """
    result = result_lib.read_result(cell.folder)
    if result is None:
        return None
    split = result_lib.evaluated_on(result)
    curve = {
        line["step"]: line["accuracy_ema"]
        for line in metrics.read(cell.folder)
        if line["split"] == split and line["accuracy_ema"] is not None
    }
    tenth = result["train_steps"] / 10
    near = [step for step in curve if abs(step - tenth) <= tenth / 2]
    values = {
        **(
            dict.fromkeys(("median20", "last", "best"))
            if split == "none"
            else result[f"{split}_accuracy"]["ema"]
        ),
        "a tenth": curve[min(near, key=lambda step: abs(step - tenth))] if near else None,
        "used": result["mask_rate"],
        "used right": result["pseudo_label_accuracy"],
        "all right": result["pseudo_label_accuracy_all"],
    }
    percent = {name: None if value is None else 100 * value for name, value in values.items()}
    return percent | {"seconds": result["wall_seconds"]}


def make_table(cells: list[Cell], baseline: str) -> dict[str, list[Entry]]:
    """Computes means over seeds and paired differences to the baseline: {row: entries}."""
    scores = by_row(cells)
    rows = {}
    for row, by_seed in scores.items():
        rows[row] = []
        for name, compared in COLUMNS.items():
            ours, theirs = (
                {seed: values[name] for seed, values in of_row.items()}
                for of_row in (by_seed, scores[baseline] if row != baseline else {})
            )
            rows[row].append(Entry(name, statistics.mean(ours.values()), paired=False))
            if compared:
                difference = statistics.mean_difference(ours, theirs)
                rows[row].append(Entry(f"− {baseline}", difference, paired=True))
    return rows


def by_row(cells: list[Cell]) -> dict[str, dict[int, dict[str, float | None]]]:
    """Collects `measured` as {row: {seed: numbers}}; leaves out runs that are not finished."""
    rows = {cell.row: {} for cell in cells}
    for cell in cells:
        if values := measured(cell):
            rows[cell.row][cell.seed] = values
    return rows


def markdown(rows: dict[str, list[Entry]], layers: dict[str, tuple[str, str]]) -> str:
    """Formats the table as Markdown; "(n = …)" marks an entry over fewer seeds than its row.

    Args:
      rows: from `make_table`.
      layers: {row: (gradient mask, centers)}.
    """

    def shown(entry: Entry, seeds: int) -> str:
        text, count = entry.mean.text("+.1f" if entry.paired else ".1f"), entry.mean.count
        return text if count in (0, seeds) else f"{text} (n = {count})"

    first = next(iter(rows.values()))
    header = ["method", "mask", "centers", "n", *(entry.title for entry in first)]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        seeds = row[0].mean.count
        cells = (shown(entry, seeds) for entry in row)
        lines.append([f"`{name}`", *layers[name], str(seeds), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(
    rows: dict[str, list[Entry]], layers: dict[str, tuple[str, str]]
) -> list[list[Any]]:
    """Formats the table for CSV: unrounded mean, spread and number of seeds of each entry."""
    header, before = ["method", "mask", "centers"], ""
    for entry in next(iter(rows.values())):
        name = f"{before} {entry.title}" if entry.paired else entry.title
        spread = "standard error" if entry.paired else "standard deviation"
        header += [name, f"{name}, {spread}", f"{name}, n"]
        before = before if entry.paired else entry.title
    lines = [
        [
            name,
            *layers[name],
            *(x for entry in row for x in entry.mean),
        ]
        for name, row in rows.items()
    ]
    return [header, *lines]


def provenance(cells: list[Cell]) -> str:
    """Explains the numbers of the table, and on what data and devices they were measured."""
    results = [result for cell in cells if (result := result_lib.read_result(cell.folder))]
    split = all_of(results, result_lib.evaluated_on)
    if missing := metrics.missing_accuracy(results):
        missing += "\n"
    return (
        f"Accuracy of the EMA parameters on {split} images, %, mean ± standard deviation; paired "
        "differences, points, mean ± standard error.\n"
        f"{missing}"
        f"{len(results)} of {len(cells)} runs. Data: {describe_data(results)}; "
        f"device: {all_of(results, lambda r: '{count} x {kind}'.format(**r['device']))}; "
        f"jax {all_of(results, lambda r: r['versions']['jax'])}; "
        f"commit {all_of(results, lambda r: r['git_commit'])}.\n"
    )


def describe_data(results: list[dict[str, Any]]) -> str:
    """Names the data, the labels and the steps of the runs."""
    return (
        f"{all_of(results, lambda r: r['dataset'])}, "
        f"{all_of(results, lambda r: r['num_labels'])} labels; "
        f"steps: {all_of(results, lambda r: r['train_steps'])}"
    )


def all_of(results: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> str:
    """Joins all different values of the results."""
    return ", ".join(sorted({str(value(result)) for result in results}))


def draw(cells: list[Cell], baseline: str, path: pathlib.Path) -> None:
    """Draws median20 of the rows and its differences to the baseline; says if it cannot."""
    scores = {
        row: {seed: values["median20"] for seed, values in by_seed.items()}
        for row, by_seed in by_row(cells).items()
    }
    results = [result for cell in cells if (result := result_lib.read_result(cell.folder))]
    quantity = "accuracy (EMA, median20), %"
    drawing.save(
        lambda: drawing.comparison(scores, baseline, quantity, title=describe_data(results)), path
    )
