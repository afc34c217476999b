"""The folder of a run: what it was started with, and how it ended."""

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import filelock
import ml_collections
from absl import logging
from etils import epath

from layermatch_jax import automatic, renamed
from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import checkpoint, files, metrics

CONFIG, SPLIT, RESULT = "config.json", "labeled_split.json", "result.json"
DATA = "data.json"  # of data/description.py
WEIGHTS = "weights.json"  # of initial_weights.py
LAYER_REPORT = ("layer_report.json", "layer_report.csv", "layer_report.png")
LOCK, HOLDER = ".lock", ".lock.holder"  # what is locked, and who holds it
# What a run writes beside its checkpoints and its result. The config is the last to be moved.
_WRITTEN = (SPLIT, DATA, WEIGHTS, metrics.FILE, "tensorboard", *LAYER_REPORT, CONFIG)
_FROM_BACKUP = "Bring it back from a backup"
_AT_YOUR_RISK = (
    "Or delete it: the same command writes it anew, but cannot check then whether the {} are "
    "those that the run began with."
)


def default(config: ml_collections.ConfigDict) -> str:
    """runs/DATASET-LABELS-METHOD-lLABELSEED-sSEED, of a resolved config.

    A run that an earlier version began is found under its earlier name.
    """
    dataset = config.dataset
    labels = f"{100 * dataset.label_fraction:g}%" if dataset.label_fraction else dataset.num_labels
    today, before = (
        f"runs/{dataset.name}-{labels}-{method}-l{dataset.label_seed}-s{config.seed}"
        for method in (config.method, renamed.method_name(config.method, back=True))
    )
    return before if os.path.exists(before) and not os.path.exists(today) else today


def check(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that cannot be written to, or holds a run that would end in another result.

    A run without progress is in nobody's way: see `set_aside`.

    Raises:
      InputError: names what is in the way, or lists the fields that differ.
    """
    _check_place(workdir)
    _check_apart(workdir, config.dataset)
    path = workdir / CONFIG
    if has_progress(workdir) and path.exists():
        mend = f"{_FROM_BACKUP}. {_AT_YOUR_RISK.format('settings')}"
        before, now = _resolved(files.read_json(path, mend)), _plain(config)
        for name in config_lib.RESULT_NEUTRAL:
            before.pop(name, None)
            now.pop(name)
        if new := {name: value for name, value in now.items() if name not in before}:
            settings = ", ".join(f"{name}={value!r}" for name, value in new.items())
            logging.warning("%s is from a version without these settings: %s", workdir, settings)
        differences = _differences(new | before, now)
        if differences:
            raise InputError(
                f"{workdir} holds a run with other settings:\n{_listed(differences)}\n"
                "Take the same settings to go on with it, or another --workdir to start anew."
            )


def has_progress(workdir: epath.Path) -> bool:
    """Whether a run in this folder ever saved a checkpoint, be it damaged now, or a result."""
    return checkpoint.recorded(workdir) or (workdir / RESULT).exists()


def set_aside(workdir: epath.Path) -> None:
    """Moves the files of a run without progress to workdir/before-1, or -2 and so on; says so.

    To be called under the lock: the run may be at work.
    """
    if has_progress(workdir) or not (workdir / CONFIG).exists():
        return
    number = next(n for n in itertools.count(1) if not (workdir / f"before-{n}").exists())
    to = workdir / f"before-{number}"
    to.mkdir()
    for name in _WRITTEN:
        if (workdir / name).exists():
            (workdir / name).rename(to / name)
    said = f"{workdir} holds a run without any checkpoint: its files are now in"
    print(f"{said} {to}, and this run begins anew.", file=sys.stderr)


def _check_place(workdir: epath.Path) -> None:
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        name = os.fsencode(str(workdir))
        raise InputError(f"--workdir={name}: this path is not in UTF-8. Take another.") from None
    if "://" in str(workdir):
        _check_bucket(workdir)
        return
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(
            f"--workdir={workdir}: {there} is no folder that can be written to. Take another."
        )


def _check_apart(workdir: epath.Path, dataset: ml_collections.ConfigDict) -> None:
    if dataset.name != "folder" or "://" in str(workdir):
        return
    root = os.path.realpath(os.path.expanduser(dataset.data_dir))
    inside = os.path.relpath(os.path.realpath(workdir), root).split(os.sep)
    if inside[0].lower() in ("train", "test", "val", "unlabeled", "unlabelled"):
        raise InputError(
            f"--workdir={workdir} lies among the images of --config.dataset.data_dir="
            f"{dataset.data_dir}: its folders would be taken for classes. Take another."
        )


def _check_bucket(workdir: epath.Path) -> None:
    # Whether it can be written to, only writing tells.
    if checkpoint.NO_NAME.search(str(workdir)):
        raise InputError(
            f"--workdir={workdir}: a path in a bucket must be without *, ?, [ and backslashes, "
            "which Orbax reads as patterns. Take another."
        )
    try:
        from google.cloud import storage  # as Orbax does
    except ImportError:
        storage = None
    # Without TensorFlow epath would take gcsfs, which overwrites where it should append.
    if not (storage and importlib.util.find_spec("tensorflow")):
        raise InputError(
            f"--workdir={workdir}: a bucket needs google-cloud-storage and TensorFlow: "
            "pip install google-cloud-storage tensorflow"
        )
    try:
        storage.Client()
    except OSError as error:
        raise InputError(f"--workdir={workdir}: {error} Set GOOGLE_CLOUD_PROJECT.") from None
    bucket = epath.Path(*workdir.parts[:3])
    if not bucket.exists():  # TensorFlow's mkdir would look for it for ever
        raise InputError(f"--workdir={workdir}: there is no {bucket}. Make it, or take another.")


def read_split(workdir: epath.Path) -> dict[str, Any]:
    """What labeled_split.json holds; {} if it is not there.

    Raises:
      InputError: the file is damaged.
    """
    path, mend = workdir / SPLIT, f"{_FROM_BACKUP}. {_AT_YOUR_RISK.format('images')}"
    return files.read_json(path, mend) if path.exists() else {}


def check_split(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Refuses to go on with a run whose images are others now, under the same settings.

    Args:
      workdir: the run's folder.
      record: what labeled_split.json is going to hold.

    Raises:
      InputError: lists what differs.
    """
    before = read_split(workdir)
    if not before:
        if has_progress(workdir):
            said = "%s is missing: the images may be others than the run had."
            logging.warning(said, workdir / SPLIT)
        return
    differences = _differences(before, json.loads(json.dumps(record)))
    if differences:
        differences.pop("indices", None)  # too many to read; the sha256 differs with them
        raise InputError(
            f"{workdir} holds a run on other images:\n{_listed(differences)}\n"
            "Bring the data set back to what it was to go on with the run, or take another "
            "--workdir to start anew."
        )


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Keeps other processes out of a local workdir while this one lives, however it ends.

    Buckets (gs://) have no such lock.

    Raises:
      InputError: another process is at work there; says which.
    """
    if "://" in str(workdir):
        yield
        return
    holder = workdir / HOLDER
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(filelock.FileLock(workdir / LOCK, blocking=False))
        except filelock.Timeout:
            by = holder.read_text() if holder.exists() else "another process"
            raise InputError(
                f"{workdir} is in use by {by}. Wait until it is done, stop it, or take another "
                "--workdir."
            ) from None
        except (OSError, NotImplementedError) as error:  # of file systems that know no locks
            logging.warning("%s cannot be locked (%s): start no second run in it.", workdir, error)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


def write_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes every field under its dotted name."""
    if has_progress(workdir) and not (workdir / CONFIG).exists():
        logging.warning(
            "%s was missing: the settings may be others than the run had.", workdir / CONFIG
        )
    files.write_json(workdir / CONFIG, _plain(config))


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The config of the run in a folder, resolved.

    Raises:
      InputError: there is none, or it is of another version.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise InputError(f"--workdir={workdir} holds no run: there is no {path}")
    values = files.read_json(path, f"{_FROM_BACKUP}.")
    try:
        return automatic.resolve(config_lib.from_fields(values))
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path} is of another version, or damaged: {error}") from None


def _resolved(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields with automatic values filled in and the method's one name.

    Older versions wrote None, and a run's method as the user had. Fields that this version cannot
    read stay as they are: they are compared and shown to the user.
    """
    fields = renamed.fields(fields)
    try:
        config = _plain(automatic.resolve(config_lib.from_fields(fields)))
    except (InputError, TypeError, ValueError):
        return fields
    return {name: config[name] for name in fields}


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields as JSON gives them back: tuples become lists."""
    return json.loads(json.dumps(config_lib.fields(config)))


def _differences(before: dict, now: dict) -> dict[str, tuple]:
    """{name: (before, now)} of the entries that differ; None where there was or is none."""
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _listed(differences: dict[str, tuple]) -> str:
    return "\n".join(
        f"  {name}: {before!r} before, {now!r} now" for name, (before, now) in differences.items()
    )
