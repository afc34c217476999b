"""The runs of a grid, handed to Slurm as an array job."""

import argparse
import hashlib
import pathlib
import shlex

from layermatch_jax.errors import InputError
from layermatch_jax.sweep.grid import ROOT, Cell


def array_job(options: argparse.Namespace, cells: list[Cell]) -> list[str]:
    """The command that submits the runs of the file of commands.

    Raises:
      InputError: the script of the jobs is not there, as it is in a checkout.
    """
    script = ROOT / "launch" / "slurm.sbatch"
    if not script.exists():
        raise InputError(f"--slurm needs a checkout of the project: there is no {script}")
    array = ["sbatch", f"--array=1-{len(cells)}%{options.jobs}", f"--chdir={ROOT}"]
    commands = f"--commands={commands_file(options, cells)}"
    return [*array, *shlex.split(options.slurm), str(script), commands]


def commands_file(options: argparse.Namespace, cells: list[Cell]) -> pathlib.Path:
    """Named by what it holds: an array that still waits must find its own lines."""
    name = hashlib.sha256(commands(cells).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return options.workdir / f"commands-{name}.txt"


def commands(cells: list[Cell]) -> str:
    """The arguments of each run, a line each, quoted for the shell."""
    return "".join(shlex.join(cell.arguments) + "\n" for cell in cells)
