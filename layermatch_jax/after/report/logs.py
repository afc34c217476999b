"""What the small files of run folders say, finished or under way; enough for curves and tables."""

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

# Runs that differ in these alone are repetitions of one another.
SEEDS = ("seed", "dataset.label_seed", "dataset.split_file")


class Log(NamedTuple):
    """A run's folder, without its checkpoints."""

    folder: epath.Path
    config: ml_collections.ConfigDict
    split: dict[str, Any]  # of labeled_split.json; {} if the run has not come to write it
    lines: list[dict[str, Any]]  # of metrics.jsonl
    result: dict[str, Any] | None  # of result.json

    @property
    def step(self) -> int:
        """The last one that is logged."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def evaluated_on(self) -> str:
        """'test' or 'validation'."""
        return self.config.dataset.evaluate_on


def read(folder: epath.Path, data_dir: str = "") -> Log:
    """The log of one run; its config says that its data are in `data_dir`, unless that is ''.

    Raises:
      InputError: there is none, or it is of another version.
    """
    config = runs.read_config(folder, data_dir)
    split = workdir_lib.read_split(folder)
    return Log(folder, config, split, metrics.read(folder), result_lib.read_result(folder))


def folders(names: str) -> list[epath.Path]:
    """The folders of runs in a comma-separated list, each once.

    A folder that is no run's but has such folders in it, as one of launch/sweep.py does, stands
    for all of them. A comma may be part of a name: see `files.separate`.
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
    """Runs, each once however many folders hold it.

    Two folders hold the same run if their settings (but for those that change no result), seeds and
    images are the same: the one is a copy of the other, or repeats it. As two seeds they would make
    differences look surer than they are.

    Returns:
      The logs: of folders with the same run, a finished one's, or else that of the folder whose run
      has come farthest; and a sentence on each that is left out.
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
    """Refuses runs whose accuracies are of different images, which one axis would mix.

    Raises:
      InputError: says which run is of which.
    """
    kinds = {}
    for log in logs:
        if not log.split:
            continue  # it has no numbers yet
        kind = f"{log.config.dataset.name}, {len(log.split['class_counts'])} classes, "
        kind += f"{log.split['num_train']} training images, evaluated on {log.evaluated_on} images"
        kinds.setdefault(kind, []).append(str(log.folder))
    if len(kinds) > 1:
        listed = "".join(f"\n  {kind}: {', '.join(names)}" for kind, names in kinds.items())
        raise InputError(
            "--workdir: these runs are of different images, so their numbers cannot be compared:"
            f"{listed}\nGive those of one kind together."
        )


def by_method(logs: Sequence[Log]) -> dict[str, list[Log]]:
    """Repetitions of one another together, by a name for what they have in common.

    The name is the method, with those settings behind it in which the method's runs differ.
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
    """A run's settings as text, without its seeds and what does not change its result."""
    left_out = {"method", *SEEDS, *config_lib.RESULT_NEUTRAL}
    fields = {k: v for k, v in config_lib.fields(log.config).items() if k not in left_out}
    masks = {mask: name for name, mask in presets.MASKS.items()}
    mask = fields["layerwise.gradient_mask"]
    fields["layerwise.gradient_mask"] = masks.get(mask, mask)
    return {name: str(value) for name, value in fields.items()}
