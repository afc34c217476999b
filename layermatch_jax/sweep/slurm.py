"""Submits the runs of a grid to Slurm as an array job."""

import argparse
import hashlib
import pathlib
import shlex

from layermatch_jax.errors import InputError
from layermatch_jax.sweep.grid import ROOT, Cell


def array_job(options: argparse.Namespace, cells: list[Cell]) -> list[str]:
    """Returns the command that submits the runs in `commands_file`.

    Raises:
      InputError: launch/slurm.sbatch is missing, because this is not a checkout.
    """
    script = ROOT / "launch" / "slurm.sbatch"
    if not script.exists():
        raise InputError(f"--slurm needs a checkout of the project: there is no {script}")
    array = ["sbatch", f"--array=1-{len(cells)}%{options.jobs}", f"--chdir={ROOT}"]
    commands = f"--commands={commands_file(options, cells)}"
    return [*array, *shlex.split(options.slurm), str(script), commands]


def commands_file(options: argparse.Namespace, cells: list[Cell]) -> pathlib.Path:
    """Returns the path of the file of commands.

    Its name contains a hash of its content, so that a new file does not replace the one of an array
    job that is still waiting.
    """
    name = hashlib.sha256(commands(cells).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return options.workdir / f"commands-{name}.txt"


def commands(cells: list[Cell]) -> str:
    """Returns the content of that file: a line of arguments for each run, quoted for the shell."""
    return "".join(shlex.join(cell.arguments) + "\n" for cell in cells)
