"""What the small files of run folders say, finished or under way; enough for curves and tables."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from layermatch_jax import config as config_lib
from layermatch_jax import metrics, runs
from layermatch_jax import workdir as workdir_lib
from layermatch_jax.errors import InputError

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
    return Log(folder, config, split, metrics.read(folder), workdir_lib.read_result(folder))


def folders(names: str) -> list[epath.Path]:
    """The folders of runs in a comma-separated list, each once.

    A folder that is no run's but has such folders in it, as one of launch/sweep.py does, stands
    for all of them.
    """
    found = []
    for name in filter(None, names.split(",")):
        folder = epath.Path(os.path.expanduser(name))
        inside = []
        if folder.is_dir() and not (folder / workdir_lib.CONFIG).exists():
            inside = [f for f in folder.iterdir() if (f / workdir_lib.CONFIG).exists()]
        found += sorted(inside) or [folder]
    return list(dict.fromkeys(found))


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
    masks = {mask: name for name, mask in config_lib.MASKS.items()}
    mask = fields["layerwise.gradient_mask"]
    fields["layerwise.gradient_mask"] = masks.get(mask, mask)
    return {name: str(value) for name, value in fields.items()}
