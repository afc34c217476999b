"""Starts a run from the weights that `config.model.pretrained` names."""

import hashlib
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util

from layermatch_jax.data import description, splits
from layermatch_jax.errors import InputError
from layermatch_jax.frozen import head
from layermatch_jax.method import state
from layermatch_jax.models import pretrained
from layermatch_jax.models.pretrained import packages
from layermatch_jax.runtime import checkpoint, files, hosts
from layermatch_jax.runtime import workdir as workdir_lib

FILE = workdir_lib.WEIGHTS


def read(config: ml_collections.ConfigDict) -> pretrained.Weights | None:
    """Reads the weights that a config names: from a package, a file or another run.

    Args:
      config: the whole config, resolved; only config.model is read.

    Returns:
      The weights; None if the run starts from random ones.

    Raises:
      InputError: there are no such weights, or they belong to another network.
    """
    source = config.model.pretrained
    if not source:
        return None
    folder = epath.Path(source).expanduser()
    if source in packages.PACKAGES or not folder.is_dir():
        weights = pretrained.read(source, config.model.name)
    elif (folder / workdir_lib.CONFIG).exists():
        weights = _of_run(folder)
    else:
        raise InputError(
            f"--config.model.pretrained={source} is a folder, but holds no run: there is no "
            f"{workdir_lib.CONFIG}. If the weights are in a file of this folder, give that file"
        )
    if weights.bn_epsilon not in (None, config.model.bn_epsilon):
        raise InputError(
            f"--config.model.bn_epsilon={config.model.bn_epsilon}: the weights of {weights.source} "
            f"were trained with {weights.bn_epsilon} and need it. Set it to that value"
        )
    return weights


def _of_run(folder: epath.Path) -> pretrained.Weights:
    """Reads the averaged parameters and the classifier of a run, which may still be training."""
    model = workdir_lib.read_config(folder).model
    saved = checkpoint.read_state(folder, None)
    backbone, batch_stats = (
        traverse_util.flatten_dict(tree, sep="/")
        for tree in (saved["ema_params"]["backbone"], saved["batch_stats"])
    )
    classifier = saved["ema_params"]["classifier"]
    data, before = description.read(folder), read_record(folder)
    if data is None:
        raise InputError(
            f"{folder} has no {description.FILE}, because an earlier version wrote it. Train "
            "that run again, or start from other weights"
        )
    mean, std = description.statistics(data)
    digest = hashlib.sha256()
    for _, x in sorted((backbone | batch_stats | classifier).items()):
        digest.update(np.ascontiguousarray(x).tobytes())
    return pretrained.Weights(
        params=backbone,
        batch_stats=batch_stats,
        classifier=classifier,
        class_names=tuple(data["class_names"]),
        bn_epsilon=model.bn_epsilon if batch_stats else None,
        normalization=pretrained.Normalization(mean, std, before.get("resize", "as its images")),
        looks_like=f"{model.name} of another size" if model.name == "wide_resnet" else model.name,
        source=f"the run in {folder}, step {int(saved['step'])}",
        sha256=digest.hexdigest(),
        license=before.get("license", "as the run's data allow"),
        notes=("averaged parameters (EMA), and the normalization of that run",),
    )


def begin(
    initial: state.TrainState,
    config: ml_collections.ConfigDict,
    weights: pretrained.Weights,
    num_unlabeled: int,
) -> state.TrainState:
    """Replaces the random backbone of the initial state; its averages start there, too.

    Args:
      initial: from `state.create`.
      config: the whole config, resolved.
      weights: from `read`.
      num_unlabeled: size of the unlabeled set.

    Raises:
      InputError: a weight is missing, is not used or has another shape.
    """
    backbone, batch_stats = pretrained.fit(weights, initial.params["backbone"], initial.batch_stats)
    classifier = initial.params["classifier"]
    return state.with_weights(initial, config, backbone, batch_stats, classifier, num_unlabeled)


def first_classifier(
    begun: state.TrainState,
    config: ml_collections.ConfigDict,
    weights: pretrained.Weights,
    partition: splits.Partition,
) -> tuple[state.TrainState, tuple[str, ...]]:
    """Replaces the classifier of the initial state as config.model.head_init says.

    Args:
      begun: from `begin`.
      config: the whole config, resolved.
      weights: from `read`.
      partition: the images of the run.

    Returns:
      (the state, sentences for the user about the classifier).

    Raises:
      InputError: an image cannot be read; the message names its file.
    """
    name = config.model.head_init
    if name in ("random", "zeros"):  # as in `begun`
        return begun, ()
    if name == "weights" and (order := _order(weights, partition.class_names)):
        classifier = jax.tree.map(lambda x: x[..., order], weights.classifier)
        notes = ("The classifier starts as that of the weights, which has all classes of this run",)
    else:
        name = "probe" if name == "weights" else name
        statistics = weights.normalization.mean, weights.normalization.std
        found = head.fit(name, begun, statistics, partition, config)
        classifier, notes = {"kernel": found.kernel, "bias": found.bias}, found.notes
    backbone, count = begun.params["backbone"], len(partition.unlabeled.labels)
    return (
        state.with_weights(begun, config, backbone, begun.batch_stats, classifier, count),
        notes,
    )


def _order(weights: pretrained.Weights, class_names: tuple[str, ...]) -> list[int]:
    """Returns for each class of the run its position in the weights; [] if one is not there."""
    theirs = {name: j for j, name in enumerate(weights.class_names or ())}
    if weights.classifier is None or not theirs.keys() >= set(class_names):
        return []
    return [theirs[name] for name in class_names]


def kept_normalization(workdir: epath.Path, config: ml_collections.ConfigDict) -> tuple | None:
    """Returns the (mean, deviation) that a run with pretrained weights has saved; else None.

    With them, a resumed run does not need the file of the weights again. All processes must call
    this function; the first one reads.
    """
    if not config.model.pretrained:
        return None
    data = None
    with hosts.all_or_none():
        if hosts.is_first() and checkpoint.recorded(workdir):
            data = description.read(workdir)
    numbers = np.array(description.statistics(data) if data else np.zeros((2, 3)))
    mean, std = np.asarray(hosts.from_first(numbers)).tolist()
    return (tuple(mean), tuple(std)) if any(std) else None


def write(workdir: epath.Path, weights: pretrained.Weights | None) -> None:
    """Writes weights.json: source, SHA-256, license and normalization of a run's weights."""
    if weights is not None and not (workdir / FILE).exists():
        files.write_json(workdir / FILE, weights.record())


def told(workdir: epath.Path) -> list[str]:
    """Tells the user which pretrained weights a run starts from; a list of sentences."""
    record = read_record(workdir)
    if not record:
        return []
    sha256, notes = record["sha256"][:8], record["notes"]
    first = f"starts from {record['source']} (license: {record['license']}; SHA-256 {sha256}…)"
    return [first, *(f"  {note}" for note in notes)]


def read_record(workdir: epath.Path) -> dict[str, Any]:
    """Reads weights.json; {} for a run that started from random weights.

    Raises:
      InputError: the file is damaged.
    """
    path = workdir / FILE
    mend = "Delete it: training does not need it"
    return files.read_json(path, f"{mend}.") if path.exists() else {}
