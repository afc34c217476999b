"""Runs a grid of methods and label seeds, and puts the results into one table and one figure.

    python launch/sweep.py configs/digits.py:labels=10 --methods=fixmatch,freematch+layerwise \
        --label-seeds=0,1,2 --workdir=runs/digits10 --jobs=2 --config.policy.threshold=0.6

`METHOD+layerwise` is the method with Grad-ReLU and Avg-Clustering. Rows and folders are named by
what the runs do: `fixmatch+layerwise` is `layermatch`, and cannot be a row beside it. Each run has
seed = label seed, so that methods are compared on the same labels, order and draws. Flags not the
runner's own go to every run. The same command again skips finished runs and goes on with unfinished
ones. At the end it writes table.md and table.csv into the workdir: each row's gradient mask and
centres, accuracies of the EMA parameters, mean ± standard deviation over seeds, and paired
differences to the baseline ± their standard error; and, where matplotlib is installed,
comparison.png.

With --masks each method runs with each of the gradient masks, named as in layermatch_jax/config.py:

    python launch/sweep.py configs/digits.py:labels=10 --methods=fixmatch --label-seeds=0,1,2 \
        --masks=none,classifier,from_stage3,from_stage2,everything --workdir=runs/masks10
"""

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package is used from its checkout

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_collections  # noqa: E402
from absl import flags  # noqa: E402

from layermatch_jax import automatic, config_file, models, rules
from layermatch_jax import main as run_main  # noqa: E402
from layermatch_jax.after import drawing
from layermatch_jax.errors import InputError  # noqa: E402
from layermatch_jax.method import layerwise
from layermatch_jax.runtime import clock, metrics, terminal, workdir
from layermatch_jax.runtime import result as result_lib

PROGRAM = [sys.executable, "-m", "layermatch_jax.main"]


class Cell(NamedTuple):
    """One run of the grid."""

    row: str  # of the table: the method's one name (config.method_name)
    mask: str
    centres: str
    seed: int
    folder: pathlib.Path
    arguments: list[str]  # of layermatch_jax.main

    def __str__(self):
        return f"{self.row}, label seed {self.seed}"


def main(argv: list[str]) -> int:
    """Returns 0; 1 if a run failed (the others are finished first); 2 for a grid that cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="as --config of layermatch_jax.main, without method=")
    parser.add_argument("--methods", required=True, help="comma-separated")
    parser.add_argument("--label-seeds", required=True, help="comma-separated")
    parser.add_argument("--masks", help="comma-separated names of gradient masks, for every method")
    parser.add_argument("--workdir", required=True, help="a local folder for all runs")
    parser.add_argument("--baseline", help="row that others are compared to; default: the first")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time (default 1); on one GPU, set XLA_PYTHON_CLIENT_MEM_FRACTION",
    )
    parser.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="hand the runs to Slurm as an array job, --jobs of them at a time; OPTIONS of sbatch, "
        "as in --slurm='--time=4:00:00 --partition=gpu'. When it is done, the same command without "
        "--slurm writes the table",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options, extra = parser.parse_known_args(argv)
    try:
        if "://" in options.workdir:
            raise InputError(f"--workdir={options.workdir}: a sweep's folder must be a local one")
        options.workdir = pathlib.Path(options.workdir).expanduser()
        name, *arg = options.config.split(":", 1)
        file = config_file.find(name)
        if options.slurm is not None:  # its jobs run in the checkout
            options.workdir, file = options.workdir.absolute(), file.absolute()
        options.config = ":".join([str(file), *arg])
        cells = grid(options, extra)
    except InputError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finished = [cell for cell in cells if (cell.folder / workdir.RESULT).exists()]
    unfinished = [cell for cell in cells if cell not in finished]
    if options.dry_run and options.slurm is not None and unfinished:
        print(shlex.join(array_job(options, unfinished)))
        print(f"{commands_file(options, unfinished)}:\n{commands(unfinished)}", end="")
    elif options.dry_run:
        for cell in unfinished:
            print(shlex.join(PROGRAM + cell.arguments))
    if options.dry_run:
        print(f"{len(unfinished)} runs to do, {len(finished)} finished", file=sys.stderr)
        return 0

    options.workdir.mkdir(parents=True, exist_ok=True)
    if options.slurm is not None and unfinished:
        # Paths may hold bytes that are no UTF-8: the shell that reads them needs the same bytes.
        file = commands_file(options, unfinished)
        file.write_text(commands(unfinished), "utf-8", "surrogateescape")
        environment = os.environ | {"PYTHON": sys.executable}
        job = array_job(options, unfinished)
        return subprocess.run(job, check=False, env=environment).returncode
    failed = run_all(unfinished, options.jobs, len(finished))
    baseline = options.baseline or cells[0].row
    rows = table(cells, baseline)
    layers = {cell.row: (cell.mask, cell.centres) for cell in cells}
    text = markdown(rows, layers) + "\n" + provenance(cells)
    (options.workdir / "table.md").write_text(text, encoding="utf-8")
    with (options.workdir / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(comma_separated(rows, layers))
    print(text)
    draw(cells, baseline, options.workdir / "comparison.png")
    for cell, status in failed:
        print(f"FAILED: {cell}: exit status {status}, {last_line(log(cell))}", file=sys.stderr)
        print(f"  see {log(cell)}", file=sys.stderr)
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------
# The grid.


def grid(options: argparse.Namespace, extra: list[str]) -> list[Cell]:
    """The runs, their settings checked as main checks them: a mistake is found before the first.

    Raises:
      InputError: a method, a seed or a setting that cannot be run, or a cell's folder that holds a
        run with other settings.
      SystemExit: 2, after a message, for a flag that layermatch_jax.main does not know.
    """
    methods = options.methods.split(",")
    masks = [None] if options.masks is None else options.masks.split(",")
    try:
        seeds = [int(seed) for seed in options.label_seeds.split(",")]
    except ValueError:
        raise InputError(
            f"--label-seeds={options.label_seeds}: write numbers, as in 0,1,2"
        ) from None
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--label-seeds={options.label_seeds}: a seed is there twice")
    for argument in extra:
        if re.match(r"--?config(\.seed|\.dataset\.label_seed)?(=|$)", argument):
            raise InputError(f"{argument}: config and seeds are given as CONFIG and --label-seeds")
    if options.jobs < 1:
        raise InputError(f"--jobs={options.jobs} must be at least 1")
    cells, rows = [], {}  # rows: by name, how each was written
    for seed in seeds:
        for method in methods:
            for mask in masks:
                cell = make_cell(options, extra, method, mask, seed)
                written = method if mask is None else f"{method} with mask {mask}"
                if seed == seeds[0] and cell.row in rows:
                    raise InputError(
                        f"the same runs are there twice: {rows[cell.row]} and {written} are both "
                        f"{cell.row}. Leave one of them out"
                    )
                rows[cell.row] = written
                cells.append(cell)
    if options.baseline not in (None, *rows):
        raise InputError(f"--baseline={options.baseline} is not among the rows: {', '.join(rows)}")
    return cells


def make_cell(
    options: argparse.Namespace, extra: list[str], method: str, mask: str | None, seed: int
) -> Cell:
    """One checked run."""
    file = f"{options.config}{',' if ':' in options.config else ':'}method={method}"
    file += "" if mask is None else f",mask={mask}"
    seeds = [f"--config.seed={seed}", f"--config.dataset.label_seed={seed}"]

    values = flags.FlagValues()
    left = run_main.parse_flags([PROGRAM[-1], f"--config={file}", *seeds, *extra], values)
    if left[1:]:
        raise InputError(f"unexpected argument {left[1]!r}: flags are written --name=value")
    config = automatic.resolve(values.config)
    rules.validate(config)
    model = ml_collections.FrozenConfigDict(config.model)
    layerwise.mask_multipliers(config.layerwise.gradient_mask, parameters(model))  # fits
    folder = options.workdir / f"{config.method}-l{seed}"
    workdir.check(folder.absolute(), config)
    arguments = [f"--config={file}", f"--workdir={folder}", *seeds, *extra]
    return Cell(config.method, *result_lib.trained_layers(config).values(), seed, folder, arguments)


@functools.cache
def parameters(model: ml_collections.FrozenConfigDict) -> dict:
    """The shapes of a model's parameters; no device is asked, for the runs need its memory."""
    backbone = models.create_model(model)

    def init():
        return backbone.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)["params"]

    return {"backbone": jax.eval_shape(init), "classifier": {"kernel": 0, "bias": 0}}


# ---------------------------------------------------------------------------------------------
# The runs, by Slurm.


def array_job(options: argparse.Namespace, cells: list[Cell]) -> list[str]:
    """The command that submits the runs of the file of commands."""
    array = ["sbatch", f"--array=1-{len(cells)}%{options.jobs}", f"--chdir={ROOT}"]
    script = [str(ROOT / "launch/slurm.sbatch"), f"--commands={commands_file(options, cells)}"]
    return array + shlex.split(options.slurm) + script


def commands_file(options: argparse.Namespace, cells: list[Cell]) -> pathlib.Path:
    """Named by what it holds: an array that still waits must find its own lines."""
    name = hashlib.sha256(commands(cells).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return options.workdir / f"commands-{name}.txt"


def commands(cells: list[Cell]) -> str:
    """The arguments of each run, a line each, quoted for the shell."""
    return "".join(shlex.join(cell.arguments) + "\n" for cell in cells)


# ---------------------------------------------------------------------------------------------
# The runs, on this machine.


def run_all(cells: list[Cell], jobs: int, finished: int) -> list[tuple[Cell, int]]:
    """Runs cells, some at a time; tells of each; returns those that failed, with their status."""
    failed, start, total = [], time.monotonic(), len(cells) + finished
    print(f"{total} runs: {finished} finished, {len(cells)} to do, {jobs} at a time", flush=True)
    with processes(jobs) as (pool, running):
        runs = {pool.submit(run, cell, running): cell for cell in cells}
        for done, future in enumerate(concurrent.futures.as_completed(runs), 1):
            cell, status = runs[future], future.result()
            scores = measured(cell)
            if status or not scores:
                failed.append((cell, status))
                outcome = f"FAILED, exit status {status}"
            else:
                outcome = f"{scores['median20']:.1f} %"
            elapsed = time.monotonic() - start
            print(
                f"{finished + done}/{total}  {cell}: {outcome}  "
                f"{clock.duration(elapsed)} passed, about "
                f"{clock.duration(elapsed / done * (len(cells) - done))} left",
                flush=True,
            )
    return failed


@contextlib.contextmanager
def processes(jobs: int):
    """A pool of threads, and the set of processes they wait for; none outlives the runner."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {end: signal.signal(end, interrupt) for end in (signal.SIGTERM, signal.SIGHUP)}
    pool, running = concurrent.futures.ThreadPoolExecutor(jobs), set()
    try:
        yield pool, running
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        for process in list(running):  # they save what they have
            process.wait()
        if not isinstance(error, KeyboardInterrupt):
            raise
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
    pool.shutdown()


def run(cell: Cell, running: set[subprocess.Popen]) -> int:
    """Runs one cell in a process of its own, its output in log.txt; returns the exit status.

    The process is in `running` as long as it lives.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    print(f"{cell}: started, follow it by  tail -f {log(cell)}", flush=True)
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    with log(cell).open("a") as file:
        process = subprocess.Popen(
            PROGRAM + cell.arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    running.add(process)
    status = process.wait()
    running.discard(process)
    return status


def log(cell: Cell) -> pathlib.Path:
    """What the cell's run prints."""
    return cell.folder / "log.txt"


def last_line(path: pathlib.Path) -> str:
    """The last line of a text file that is not empty."""
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


# ---------------------------------------------------------------------------------------------
# The table.


class Entry(NamedTuple):
    """What stands in the table: a mean over seeds and its spread."""

    title: str  # of its column
    mean: float | None
    spread: float | None  # None with less than two values
    count: int
    paired: bool  # a difference and its standard error; else a standard deviation


# Name in `measured`, and whether its paired difference is of interest, too.
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
    """The numbers of one run's row: accuracies in %, of the EMA parameters; None if unfinished.

    'a tenth' is after a tenth of the steps; 'used' the utilisation (mean weight of pseudo-labels),
    'used right' and 'all right' their accuracies, over the run; 'seconds' its wall time.
    """
    result = result_lib.read_result(cell.folder)
    if result is None:
        return None
    split = "test" if "test_accuracy" in result else "validation"
    curve = {
        line["step"]: line["accuracy_ema"]
        for line in metrics.read(cell.folder)
        if line["split"] == split
    }
    tenth = result["train_steps"] / 10
    near = [step for step in curve if abs(step - tenth) <= tenth / 2]
    values = {
        **result[f"{split}_accuracy"]["ema"],
        "a tenth": curve[min(near, key=lambda step: abs(step - tenth))] if near else None,
        "used": result["mask_rate"],
        "used right": result["pseudo_label_accuracy"],
        "all right": result["pseudo_label_accuracy_all"],
    }
    percent = {name: None if value is None else 100 * value for name, value in values.items()}
    return percent | {"seconds": result["wall_seconds"]}


def table(cells: list[Cell], baseline: str) -> dict[str, list[Entry]]:
    """Means over seeds and paired differences to the baseline, by row."""
    scores = by_row(cells)
    rows = {}
    for row, by_seed in scores.items():
        rows[row] = []
        for name, compared in COLUMNS.items():
            own = [values[name] for values in by_seed.values()]
            rows[row].append(summarise(name, own, paired=False))
            if compared:
                pairs = [
                    (values[name], scores[baseline][seed][name])
                    for seed, values in by_seed.items()
                    if seed in scores[baseline] and row != baseline
                ]
                differences = [None if None in pair else pair[0] - pair[1] for pair in pairs]
                rows[row].append(summarise(f"− {baseline}", differences, paired=True))
    return rows


def by_row(cells: list[Cell]) -> dict[str, dict[int, dict[str, float | None]]]:
    """What is `measured`, by row and seed; a run that is not finished is not there."""
    rows = {cell.row: {} for cell in cells}
    for cell in cells:
        if values := measured(cell):
            rows[cell.row][cell.seed] = values
    return rows


def summarise(title: str, values: list[float | None], *, paired: bool) -> Entry:
    """The mean of what is known, its standard deviation, or its standard error if paired."""
    known = [value for value in values if value is not None]
    if not known:
        return Entry(title, None, None, 0, paired)
    spread = statistics.stdev(known) if len(known) > 1 else None
    if paired and spread is not None:
        spread /= len(known) ** 0.5
    return Entry(title, statistics.fmean(known), spread, len(known), paired)


def markdown(rows: dict[str, list[Entry]], layers: dict[str, tuple[str, str]]) -> str:
    """The table as people read it; (n = …) stands where fewer seeds count than in the row.

    Args:
      rows: of `table`.
      layers: the gradient mask and the centres of each row.
    """

    def shown(entry: Entry, seeds: int) -> str:
        if entry.mean is None:
            return ""
        text = f"{entry.mean:{'+' if entry.paired else ''}.1f}"
        text += "" if entry.spread is None else f" ± {entry.spread:.1f}"
        return text if entry.count == seeds else f"{text} (n = {entry.count})"

    first = next(iter(rows.values()))
    header = ["method", "mask", "centres", "n", *(entry.title for entry in first)]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        seeds = row[0].count
        cells = (shown(entry, seeds) for entry in row)
        lines.append([f"`{name}`", *layers[name], str(seeds), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(
    rows: dict[str, list[Entry]], layers: dict[str, tuple[str, str]]
) -> list[list[Any]]:
    """The table as programs read it: unrounded, each entry's mean, spread and number of seeds."""
    header, before = ["method", "mask", "centres"], ""
    for entry in next(iter(rows.values())):
        name = f"{before} {entry.title}" if entry.paired else entry.title
        spread = "standard error" if entry.paired else "standard deviation"
        header += [name, f"{name}, {spread}", f"{name}, n"]
        before = before if entry.paired else entry.title
    lines = [
        [
            name,
            *layers[name],
            *(x for entry in row for x in (entry.mean, entry.spread, entry.count)),
        ]
        for name, row in rows.items()
    ]
    return [header, *lines]


def provenance(cells: list[Cell]) -> str:
    """What the table's numbers are and what they were measured on, from the result files."""
    results = [result for cell in cells if (result := result_lib.read_result(cell.folder))]
    split = "test" if any("test_accuracy" in result for result in results) else "validation"
    if missing := metrics.missing_accuracy(results):
        missing += "\n"
    return (
        f"Accuracy of the EMA parameters on {split} images, %, mean ± standard deviation; paired "
        "differences, points, mean ± standard error.\n"
        f"{missing}"
        f"{len(results)} of {len(cells)} runs. Data: {data(results)}; "
        f"device: {all_of(results, lambda r: '{count} x {kind}'.format(**r['device']))}; "
        f"jax {all_of(results, lambda r: r['versions']['jax'])}; "
        f"commit {all_of(results, lambda r: r['git_commit'])}.\n"
    )


def data(results: list[dict[str, Any]]) -> str:
    """The data of the runs and the steps they took."""
    return (
        f"{all_of(results, lambda r: r['dataset'])}, "
        f"{all_of(results, lambda r: r['num_labels'])} labels; "
        f"steps: {all_of(results, lambda r: r['train_steps'])}"
    )


def all_of(results: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> str:
    """Every value that occurs."""
    return ", ".join(sorted({str(value(result)) for result in results}))


# ---------------------------------------------------------------------------------------------
# The figure.


def draw(cells: list[Cell], baseline: str, path: pathlib.Path) -> None:
    """The rows' median20, and its differences to the baseline, as a PNG; tells where it is not."""
    scores = {
        row: {seed: values["median20"] for seed, values in by_seed.items()}
        for row, by_seed in by_row(cells).items()
    }
    results = [result for cell in cells if (result := result_lib.read_result(cell.folder))]
    quantity = "accuracy (EMA, median20), %"
    drawing.save(lambda: drawing.comparison(scores, baseline, quantity, title=data(results)), path)


if __name__ == "__main__":
    terminal.allow_any_text()
    sys.exit(main(sys.argv[1:]))
