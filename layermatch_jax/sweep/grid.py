"""Makes the runs of a grid, and checks all of them before the first one starts."""

import argparse
import pathlib
import re
import sys
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags

import layermatch_jax
from layermatch_jax import automatic, rules
from layermatch_jax import main as run_main
from layermatch_jax.errors import InputError
from layermatch_jax.method import layerwise, state
from layermatch_jax.runtime import result as result_lib
from layermatch_jax.runtime import workdir

ROOT = pathlib.Path(layermatch_jax.__file__).parent.parent  # of the checkout
PROGRAM = [sys.executable, "-m", "layermatch_jax.main"]


class Cell(NamedTuple):
    """One run of the grid."""

    row: str  # row of the table: the method's canonical name (presets.method_name)
    mask: str
    centers: str
    seed: int
    folder: pathlib.Path
    arguments: list[str]  # for layermatch_jax.main

    def __str__(self):
        return f"{self.row}, label seed {self.seed}"


def make_cells(options: argparse.Namespace, extra: list[str]) -> list[Cell]:
    """Makes the runs of the grid, and checks their settings as layermatch_jax.main does.

    Raises:
      InputError: a method, a seed or a setting cannot be run, or the folder of a run holds a run
        with other settings.
      SystemExit: status 2, after a message, if layermatch_jax.main does not know a flag.
    """
    methods = options.methods.split(",")
    masks = [None] if options.masks is None else options.masks.split(",")
    try:
        seeds = [int(seed) for seed in options.label_seeds.split(",")]
    except ValueError:
        raise InputError(
            f"--label-seeds={options.label_seeds}: write whole numbers, as in 0,1,2"
        ) from None
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--label-seeds={options.label_seeds}: a seed is given twice")
    for argument in extra:
        if re.match(r"--?config(\.seed|\.dataset\.label_seed)?(=|$)", argument):
            raise InputError(
                f"{argument}: give the config as CONFIG and the seeds by --label-seeds"
            )
    if options.jobs < 1:
        raise InputError(f"--jobs={options.jobs} must be at least 1")
    cells, rows = [], {}  # rows: {name: how the user wrote it}
    for seed in seeds:
        for method in methods:
            for mask in masks:
                cell, config = make_cell(options, extra, method, mask, seed)
                if seed == seeds[0]:  # the network is the same for every seed
                    check_mask(config)
                written = method if mask is None else f"{method} with mask {mask}"
                if seed == seeds[0] and cell.row in rows:
                    raise InputError(
                        f"the same runs are given twice: {rows[cell.row]} and {written} are both "
                        f"{cell.row}. Leave one of them out"
                    )
                rows[cell.row] = written
                cells.append(cell)
    if options.baseline not in (None, *rows):
        raise InputError(f"--baseline={options.baseline} is not among the rows: {', '.join(rows)}")
    return cells


def make_cell(
    options: argparse.Namespace, extra: list[str], method: str, mask: str | None, seed: int
) -> tuple[Cell, ml_collections.ConfigDict]:
    """Makes one run and its config, and checks all but the gradient mask."""
    file = f"{options.config}{',' if ':' in options.config else ':'}method={method}"
    file += "" if mask is None else f",mask={mask}"
    seeds = [f"--config.seed={seed}", f"--config.dataset.label_seed={seed}"]

    values = flags.FlagValues()
    left = run_main.parse_flags([PROGRAM[-1], f"--config={file}", *seeds, *extra], values)
    if left[1:]:
        raise InputError(f"unexpected argument {left[1]!r}: flags are written --name=value")
    for line in automatic.ignored(values.config):
        print(f"{method}, label seed {seed}: {line}", file=sys.stderr)
    config = automatic.resolve(values.config)
    rules.validate(config)
    folder = options.workdir / f"{config.method}-l{seed}"
    workdir.check(folder.absolute(), config)
    arguments = [f"--config={file}", f"--workdir={folder}", *seeds, *extra]
    layers = result_lib.trained_layers(config).values()
    return Cell(config.method, *layers, seed, folder, arguments), config


def check_mask(config: ml_collections.ConfigDict) -> None:
    """Raises InputError if the gradient mask does not fit the network."""
    if config.layerwise.gradient_mask:
        # Shapes alone, because the runs need the memory of the devices.
        shapes = jax.eval_shape(state.initializer(config, 10, 1, np.zeros(1, np.int32)))
        layerwise.mask_multipliers(config.layerwise.gradient_mask, shapes.params)
