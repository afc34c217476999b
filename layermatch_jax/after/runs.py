"""Opens existing runs for reading. Only `read_data` needs the run's data set."""

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
    """The settings, classes, state and result of a run, from its folder."""

    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    statistics: tuple  # (mean, standard deviation) from sources.channel_statistics
    state: state.TrainState  # NumPy arrays, for functions without a device axis (axis_name)
    result: dict[str, Any] | None  # from result.json; None if the run is not finished
    weights: dict[str, Any]  # from weights.json; {} if the run started from random weights

    @property
    def step(self) -> int:
        """The number of training steps behind the state."""
        return int(self.state.step)


def read(workdir: str, step: int | None = None, data_dir: str = "") -> Run:
    """Reads a run from its folder, without changes there.

    Only a run of an earlier version, without data.json, also needs its data set.

    Args:
      workdir: the run's folder (local or gs://); the run may still be going on.
      step: step of the checkpoint; None = the newest complete checkpoint.
      data_dir: present location of the data set; '' = the location in the run's config.

    Raises:
      InputError: the folder has no run or no such checkpoint.
    """
    folder = epath.Path(workdir).expanduser()
    config = read_config(folder, data_dir)
    kept = description.read(folder)
    if kept is None:
        said = "%s has no %s (earlier versions did not write it), so the run's data set is read."
        logging.warning(said, folder, description.FILE)
        kept = read_data(folder, config).description
    names = tuple(kept["class_names"])
    of_run = read_state(folder, config, len(names), step)
    result = result_lib.read_result(folder)
    weights = initial_weights.read_record(folder)
    return Run(config, names, description.statistics(kept), of_run, result, weights)


def read_config(folder: epath.Path, data_dir: str = "") -> ml_collections.ConfigDict:
    """Reads the config of a run; `data_dir`, if not '', replaces dataset.data_dir."""
    config = workdir_lib.read_config(folder)
    if data_dir:
        config.dataset.data_dir = data_dir
    return config


def read_data(folder: epath.Path, config: ml_collections.ConfigDict) -> setup.Data:
    """Loads the data set of a run, and checks that it is unchanged; uses the run's statistics.

    Raises:
      InputError: the data set is missing, or differs from the run's.
    """
    kept = description.read(folder)
    data = setup.load(config, kept and description.statistics(kept))
    description.check(folder, data.description)
    workdir_lib.check_split(folder, data.partition.record)
    return data


def read_class_names(folder: epath.Path) -> tuple[str, ...] | None:
    """Reads the class names of a run from data.json; None if that file is missing."""
    kept = description.read(folder)
    return kept and tuple(kept["class_names"])


def read_state(
    folder: epath.Path,
    config: ml_collections.ConfigDict,
    num_classes: int,
    step: int | None = None,
) -> state.TrainState:
    """Reads a saved state of a run; raises the errors of `read`."""
    split = workdir_lib.read_split(folder)
    if not {"class_counts", "num_unlabeled"} <= split.keys():
        path = folder / workdir_lib.SPLIT
        raise InputError(
            f"{path} is missing or lacks the numbers of images, which are needed to read the saved "
            "state. Restore it from a backup, or start the run's command, which writes it"
        )
    initial = state.initializer(
        config,
        num_classes=num_classes,
        num_unlabeled=split["num_unlabeled"],
        # Only the number of labels matters here; the state has the labels themselves.
        labels=np.repeat(np.arange(num_classes, dtype=np.int32), split["class_counts"]),
    )
    return checkpoint.read_state(folder, jax.eval_shape(initial), step)
