"""A run that was made before, opened to be looked at. Only `read_data` needs its data."""

from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from layermatch_jax import initial_weights, setup
from layermatch_jax.data import description
from layermatch_jax.errors import InputError
from layermatch_jax.method import state
from layermatch_jax.runtime import checkpoint
from layermatch_jax.runtime import result as result_lib
from layermatch_jax.runtime import workdir as workdir_lib


class Run(NamedTuple):
    """What a run's folder says of its settings, its classes, its parameters and its result."""

    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    statistics: tuple  # of sources.channel_statistics
    state: state.TrainState  # of NumPy arrays, for functions of one device (no axis_name)
    result: dict[str, Any] | None  # of result.json; None if the run is not finished
    weights: dict[str, Any]  # of weights.json; {} if the run started from random ones

    @property
    def step(self) -> int:
        """How many updates the state has seen."""
        return int(self.state.step)


def read(workdir: str, step: int | None = None, data_dir: str = "") -> Run:
    """Opens the run in a folder; changes nothing there, and needs nothing else.

    A run of a version that kept no data.json is opened by its data, which must be there.

    Args:
      workdir: the run's folder (local or gs://); the run may be under way.
      step: of which checkpoint; None = of the newest that is whole.
      data_dir: where the data set is now; '' = where the run had it.

    Raises:
      InputError: no run, or no such checkpoint.
    """
    folder = epath.Path(workdir).expanduser()
    config = read_config(folder, data_dir)
    kept = description.read(folder)
    if kept is None:
        said = "%s holds no %s, which earlier versions did not write: the run's data are read."
        logging.warning(said, folder, description.FILE)
        kept = read_data(folder, config).description
    names = tuple(kept["class_names"])
    of_run = read_state(folder, config, len(names), step)
    result = result_lib.read_result(folder)
    weights = initial_weights.read_record(folder)
    return Run(config, names, description.statistics(kept), of_run, result, weights)


def read_config(folder: epath.Path, data_dir: str = "") -> ml_collections.ConfigDict:
    """The config of a run, with its data where they are now."""
    config = workdir_lib.read_config(folder)
    if data_dir:
        config.dataset.data_dir = data_dir
    return config


def read_data(folder: epath.Path, config: ml_collections.ConfigDict) -> setup.Data:
    """The images of a run, found to be those that it had; with the statistics that it kept.

    Raises:
      InputError: no data, or other data than the run had.
    """
    kept = description.read(folder)
    data = setup.load(config, kept and description.statistics(kept))
    description.check(folder, data.description)
    workdir_lib.check_split(folder, data.partition.record)
    return data


def read_class_names(folder: epath.Path) -> tuple[str, ...] | None:
    """The names of a run's classes, for which its data are not needed; None if it kept none."""
    kept = description.read(folder)
    return kept and tuple(kept["class_names"])


def read_state(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    num_classes: int,
    step: int | None = None,
) -> state.TrainState:
    """A saved state of a run; raises as `read` does."""
    split = workdir_lib.read_split(folder)
    if not {"class_counts", "num_unlabeled"} <= split.keys():
        path = folder / workdir_lib.SPLIT
        raise InputError(
            f"{path} is missing or lacks how many images there are, which the saved state depends "
            "on. Bring it back from a backup, or let the command of the run write it anew"
        )
    initial = state.initializer(
        config,
        num_classes=num_classes,
        num_unlabeled=split["num_unlabeled"],
        # The labels themselves are in the state; these have the same shape.
        labels=np.repeat(np.arange(num_classes, dtype=np.int32), split["class_counts"]),
    )
    return checkpoint.read_state(folder, jax.eval_shape(initial), step)
