"""A run that was made before, opened to be looked at."""

from typing import NamedTuple

import jax
import ml_collections
from etils import epath

from layermatch_jax import setup
from layermatch_jax.data import description
from layermatch_jax.method import state
from layermatch_jax.runtime import checkpoint
from layermatch_jax.runtime import workdir as workdir_lib


class Run(NamedTuple):
    """A run's settings, data and parameters."""

    config: ml_collections.ConfigDict
    data: setup.Data
    state: state.TrainState  # of NumPy arrays, for functions of one device (no axis_name)

    @property
    def step(self) -> int:
        """How many updates the state has seen."""
        return int(self.state.step)


def read(workdir: str, step: int | None = None, data_dir: str = "") -> Run:
    """Opens the run in a folder; changes nothing there.

    Args:
      workdir: the run's folder (local or gs://); the run may be under way.
      step: of which checkpoint; None = of the newest that is whole.
      data_dir: where the data set is now; '' = where the run had it.

    Raises:
      InputError: no run, no such checkpoint, no data, or other data than the run had.
    """
    folder = epath.Path(workdir).expanduser()
    config = read_config(folder, data_dir)
    data = read_data(folder, config)
    return Run(config, data, read_state(folder, config, data, step))


def read_config(folder: epath.Path, data_dir: str = "") -> ml_collections.ConfigDict:
    """The config of a run, with its data where they are now."""
    config = workdir_lib.read_config(folder)
    if data_dir:
        config.dataset.data_dir = data_dir
    return config


def read_data(folder: epath.Path, config: ml_collections.ConfigDict) -> setup.Data:
    """The images of a run, found to be those that it had; with the statistics that it kept."""
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
    folder: epath.Path, config: ml_collections.ConfigDict, data: setup.Data, step: int | None = None
) -> state.TrainState:
    """A saved state of a run; raises as `read` does."""
    partition = data.partition
    initial = state.initializer(
        config,
        num_classes=len(partition.class_names),
        num_unlabeled=len(partition.unlabeled.labels),
        labels=partition.labeled.labels,
    )
    return checkpoint.read_state(folder, jax.eval_shape(initial), step)
