"""Reads the small files of run folders, which suffice for curves and tables."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from layermatch_jax import config as config_lib
from layermatch_jax import presets
from layermatch_jax.after import runs
from layermatch_jax.data import description
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files, metrics
from layermatch_jax.runtime import result as result_lib
from layermatch_jax.runtime import workdir as workdir_lib

# Runs that differ only in these settings are repetitions.
SEEDS = ("seed", "dataset.label_seed", "dataset.split_file")


class Log(NamedTuple):
    """The content of a run's folder, without its checkpoints."""

    folder: epath.Path
    config: ml_collections.ConfigDict
    split: dict[str, Any]  # from labeled_split.json; {} if it is not written yet
    lines: list[dict[str, Any]]  # from metrics.jsonl
    result: dict[str, Any] | None  # from result.json; None if the run is not finished

    @property
    def step(self) -> int:
        """The last step in the log."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def evaluated_on(self) -> str:
        """'test' or 'validation'."""
        return self.config.dataset.evaluate_on


def read(folder: epath.Path, data_dir: str = "") -> Log:
    """Reads the log of one run; `data_dir`, if not '', replaces dataset.data_dir in its config.

    Raises:
      InputError: the folder has no run, or a run of another version.
    """
    config = runs.read_config(folder, data_dir)
    split = workdir_lib.read_split(folder)
    return Log(folder, config, split, metrics.read(folder), result_lib.read_result(folder))


def folders(names: str) -> list[epath.Path]:
    """Finds the run folders in a comma-separated list, without duplicates.

    A folder that is not a run but contains runs, such as one from launch/sweep.py, stands for all
    of them. A comma may be part of a name: see `files.separate`.
    """
    found = []
    folder_of = lambda name: epath.Path(os.path.expanduser(name))  # noqa: E731
    for folder in map(folder_of, files.separate(names, lambda name: folder_of(name).is_dir())):
        inside = []
        if folder.is_dir() and not (folder / workdir_lib.CONFIG).exists():
            inside = [f for f in folder.iterdir() if (f / workdir_lib.CONFIG).exists()]
        found += sorted(inside) or [folder]
    return list(dict.fromkeys(found))


def distinct(logs: Sequence[Log]) -> tuple[list[Log], list[str]]:
    """Removes duplicates of runs.

    Two folders hold the same run if their seeds, images and settings agree (settings that change no
    result do not count). Counted as two seeds, they would make differences look too certain.

    Returns:
      (the logs, one for each run; a sentence on each folder that is left out). Among duplicates, a
      finished run is kept, else the one with the most steps.
    """
    same = {}
    for log in logs:
        seeds = log.config.seed, log.config.dataset.label_seed
        images = json.dumps([log.split, description.read(log.folder)], sort_keys=True)
        same.setdefault((*settings_of(log).items(), *seeds, images), []).append(log)
    kept, notes = [], []
    for copies in same.values():
        best = max(copies, key=lambda log: (log.result is not None, log.step))
        kept.append(best)
        notes += [
            f"{log.folder} is left out: it is the same run as {best.folder}, with the same "
            "settings, seeds and images."
            for log in copies
            if log is not best
        ]
    return kept, notes


def check_same_images(logs: Sequence[Log]) -> None:
    """Checks that all runs have the same data set and evaluation split.

    Raises:
      InputError: the runs differ; the message lists them by data set and split.
    """
    kinds = {}
    for log in logs:
        if not log.split:
            continue  # the run has no results yet
        kind = f"{log.config.dataset.name}, {len(log.split['class_counts'])} classes, "
        kind += f"{log.split['num_train']} training images, evaluated on {log.evaluated_on} images"
        kinds.setdefault(kind, []).append(str(log.folder))
    if len(kinds) > 1:
        listed = "".join(f"\n  {kind}: {', '.join(names)}" for kind, names in kinds.items())
        raise InputError(
            "--workdir: these runs have different images, so their results cannot be compared:"
            f"{listed}\nMake one report for each of these groups."
        )


def by_method(logs: Sequence[Log]) -> dict[str, list[Log]]:
    """Groups repetitions of a run by a name.

    The name has the method, and the settings in which the runs of this method differ.
    """
    of_method = {}
    for log in logs:
        of_method.setdefault(log.config.method, []).append(settings_of(log))
    groups = {}
    for log in logs:
        own, same = settings_of(log), of_method[log.config.method]
        named = [field for field in own if len({other[field] for other in same}) > 1]
        settings = (f"{field.split('.')[-1]}={own[field]}" for field in named)
        groups.setdefault(", ".join([log.config.method, *settings]), []).append(log)
    return groups


def settings_of(log: Log) -> dict[str, str]:
    """Returns a run's settings as text, without seeds and settings that do not change results."""
    left_out = {"method", *SEEDS, *config_lib.RESULT_NEUTRAL}
    fields = {k: v for k, v in config_lib.fields(log.config).items() if k not in left_out}
    masks = {mask: name for name, mask in presets.MASKS.items()}
    mask = fields["layerwise.gradient_mask"]
    fields["layerwise.gradient_mask"] = masks.get(mask, mask)
    return {name: str(value) for name, value in fields.items()}
