"""Runs a grid of methods and label seeds, and puts the results into one table and one figure.

    python launch/sweep.py digits:labels=10 --methods=fixmatch,freematch+layerwise \
        --label-seeds=0,1,2 --workdir=runs/digits10 --jobs=2 --config.policy.threshold=0.6

`METHOD+layerwise` is the method with Grad-ReLU and Avg-Clustering. Rows and folders have the
canonical names of methods: `fixmatch+layerwise` is `layermatch`, so the two cannot both be rows.
Each run has seed = label seed, so that methods are compared on the same labels, order and draws.
Flags that the sweep does not know are passed to every run. Run the same command again to skip
finished runs and resume unfinished ones. At the end the sweep writes table.md and table.csv into
the workdir: each row's gradient mask and centers, accuracies of the EMA parameters (mean ±
standard deviation over seeds), and paired differences to the baseline (± standard error). If
there are rows with labels alone (supervised, probe) and others, it says whether the unlabeled
images paid. If
matplotlib is installed, it also writes comparison.png.

With --masks each method runs with each of these gradient masks (docs/reference.md lists them):

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
from layermatch_jax.sweep import grid, paid, running, slurm, table


def main(argv: list[str]) -> int:
    """Runs the sweep; returns 0, 1 if a run failed (after all others), 2 if the grid is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="as --config of layermatch_jax.main, but without method=")
    parser.add_argument("--methods", required=True, help="methods, comma-separated")
    parser.add_argument("--label-seeds", required=True, help="whole numbers, comma-separated")
    parser.add_argument("--masks", help="names of gradient masks, comma-separated")
    parser.add_argument("--workdir", required=True, help="local folder for all runs")
    parser.add_argument("--baseline", help="row to compare the others to (default: the first)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="number of runs at a time (default 1); several on one GPU need "
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
    )
    parser.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="submit the runs to Slurm as an array job, --jobs of them at a time, with OPTIONS of "
        "sbatch, as in --slurm='--time=4:00:00 --partition=gpu'. When the job is done, run the "
        "same command without --slurm to write the table",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    options, extra = parser.parse_known_args(argv)
    try:
        if "://" in options.workdir:
            raise InputError(f"--workdir={options.workdir}: give a local folder")
        options.workdir = pathlib.Path(options.workdir).expanduser()
        name, *arg = options.config.split(":", 1)
        file = config_file.find(name)
        if options.slurm is not None:  # the jobs run in the folder of the checkout
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
        # Paths may contain bytes that are not UTF-8; the shell of the job must read the same bytes.
        file = slurm.commands_file(options, unfinished)
        file.write_text(slurm.commands(unfinished), "utf-8", "surrogateescape")
        environment = os.environ | {"PYTHON": sys.executable}
        job = slurm.array_job(options, unfinished)
        return subprocess.run(job, check=False, env=environment).returncode
    failed = running.run_all(unfinished, options.jobs, len(finished))
    baseline = options.baseline or cells[0].row
    rows = table.make_table(cells, baseline)
    layers = {cell.row: (cell.mask, cell.centers) for cell in cells}
    answer = paid.did_unlabeled_images_pay(cells)
    text = "\n".join(filter(None, [table.markdown(rows, layers), answer, table.provenance(cells)]))
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
