"""Runs a grid of methods and label seeds, and puts the results into one table and one figure.

    python launch/sweep.py digits:labels=10 --methods=fixmatch,freematch+layerwise \
        --label-seeds=0,1,2 --workdir=runs/digits10 --jobs=2 --config.policy.threshold=0.6

`METHOD+layerwise` is the method with Grad-ReLU and Avg-Clustering. Rows and folders are named by
what the runs do: `fixmatch+layerwise` is `layermatch`, and cannot be a row beside it. Each run has
seed = label seed, so that methods are compared on the same labels, order and draws. Flags not the
runner's own go to every run. The same command again skips finished runs and goes on with unfinished
ones. At the end it writes table.md and table.csv into the workdir: each row's gradient mask and
centers, accuracies of the EMA parameters, mean ± standard deviation over seeds, and paired
differences to the baseline ± their standard error; and, where matplotlib is installed,
comparison.png.

With --masks each method runs with each of the gradient masks (named in docs/reference.md):

    python launch/sweep.py digits:labels=10 --methods=fixmatch --label-seeds=0,1,2 \
        --masks=none,classifier,from_stage3,from_stage2,everything --workdir=runs/masks10
"""

import argparse
import csv
import os
import pathlib
import shlex
import subprocess
import sys

from layermatch_jax import config_file
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import workdir
from layermatch_jax.sweep import grid, running, slurm, table


def main(argv: list[str]) -> int:
    """Returns 0; 1 if a run failed (the others are finished first); 2 if the grid was refused."""
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
        cells = grid.make_cells(options, extra)
    except InputError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finished = [cell for cell in cells if (cell.folder / workdir.RESULT).exists()]
    unfinished = [cell for cell in cells if cell not in finished]
    if options.dry_run and options.slurm is not None and unfinished:
        print(shlex.join(slurm.array_job(options, unfinished)))
        print(f"{slurm.commands_file(options, unfinished)}:\n{slurm.commands(unfinished)}", end="")
    elif options.dry_run:
        for cell in unfinished:
            print(shlex.join(grid.PROGRAM + cell.arguments))
    if options.dry_run:
        print(f"{len(unfinished)} runs to do, {len(finished)} finished", file=sys.stderr)
        return 0

    options.workdir.mkdir(parents=True, exist_ok=True)
    if options.slurm is not None and unfinished:
        # Paths may hold bytes that are no UTF-8: the shell that reads them needs the same bytes.
        file = slurm.commands_file(options, unfinished)
        file.write_text(slurm.commands(unfinished), "utf-8", "surrogateescape")
        environment = os.environ | {"PYTHON": sys.executable}
        job = slurm.array_job(options, unfinished)
        return subprocess.run(job, check=False, env=environment).returncode
    failed = running.run_all(unfinished, options.jobs, len(finished))
    baseline = options.baseline or cells[0].row
    rows = table.make_table(cells, baseline)
    layers = {cell.row: (cell.mask, cell.centers) for cell in cells}
    text = table.markdown(rows, layers) + "\n" + table.provenance(cells)
    (options.workdir / "table.md").write_text(text, encoding="utf-8")
    with (options.workdir / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table.comma_separated(rows, layers))
    print(text)
    table.draw(cells, baseline, options.workdir / "comparison.png")
    for cell, status in failed:
        print(
            f"FAILED: {cell}: exit status {status}, {running.last_line(running.log(cell))}",
            file=sys.stderr,
        )
        print(f"  see {running.log(cell)}", file=sys.stderr)
    return 1 if failed else 0
