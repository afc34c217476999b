"""The folder of a run: checks before a start, the lock, and the files with its settings."""

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
    "Or delete it: the same command then writes it again, but cannot check whether the {} are "
    "those that the run began with."
)


def default(config: ml_collections.ConfigDict) -> str:
    """Returns the default folder of a run, runs/DATASET-LABELS-METHOD-lLABELSEED-sSEED.

    If only the folder that an earlier version used for this run exists, it is returned.

    Args:
      config: resolved.
    """
    dataset = config.dataset
    labels = f"{100 * dataset.label_fraction:g}%" if dataset.label_fraction else dataset.num_labels
    today, before = (
        f"runs/{dataset.name}-{labels}-{method}-l{dataset.label_seed}-s{config.seed}"
        for method in (config.method, renamed.method_name(config.method, back=True))
    )
    return before if os.path.exists(before) and not os.path.exists(today) else today


def check(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that cannot be written to, or that holds a run with other settings.

    Settings that do not affect the result may differ. A run without progress is accepted, because
    `set_aside` moves it away.

    Raises:
      InputError: the message names the obstacle, or lists the settings that differ.
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
                "Use the same settings to resume it, or another --workdir to start a new run."
            )


def has_progress(workdir: epath.Path) -> bool:
    """Whether a run in this folder ever saved a result or a checkpoint, even if damaged now."""
    return checkpoint.recorded(workdir) or (workdir / RESULT).exists()


def set_aside(workdir: epath.Path) -> None:
    """Moves the files of a run without progress to workdir/before-1 (or -2, …), and says so.

    Call it under the lock, because that run may still be training.
    """
    if has_progress(workdir) or not (workdir / CONFIG).exists():
        return
    number = next(n for n in itertools.count(1) if not (workdir / f"before-{n}").exists())
    to = workdir / f"before-{number}"
    to.mkdir()
    for name in _WRITTEN:
        if (workdir / name).exists():
            (workdir / name).rename(to / name)
    said = f"{workdir} held a run without any checkpoint: its files are now in"
    print(f"{said} {to}, and this run starts at step 0.", file=sys.stderr)


def _check_place(workdir: epath.Path) -> None:
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        name = os.fsencode(str(workdir))
        raise InputError(f"--workdir={name}: this path is not in UTF-8. Choose another.") from None
    if "://" in str(workdir):
        _check_bucket(workdir)
        return
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"--workdir={workdir}: {there} is not a writable folder. Choose another.")


def _check_apart(workdir: epath.Path, dataset: ml_collections.ConfigDict) -> None:
    if dataset.name != "folder" or "://" in str(workdir):
        return
    root = os.path.realpath(os.path.expanduser(dataset.data_dir))
    inside = os.path.relpath(os.path.realpath(workdir), root).split(os.sep)
    if inside[0].lower() in ("train", "test", "val", "unlabeled", "unlabelled"):
        raise InputError(
            f"--workdir={workdir} lies among the images of --config.dataset.data_dir="
            f"{dataset.data_dir}: its folders would be taken for classes. Choose another."
        )


def _check_bucket(workdir: epath.Path) -> None:
    # Write access is not checked here: only a write can show it.
    if checkpoint.NO_NAME.search(str(workdir)):
        raise InputError(
            f"--workdir={workdir}: a path in a bucket must not contain *, ?, [ or backslashes, "
            "which Orbax cannot use. Choose another."
        )
    try:
        from google.cloud import storage  # as Orbax does
    except ImportError:
        storage = None
    # Without TensorFlow epath would use gcsfs, which overwrites a file instead of appending.
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
    if not bucket.exists():  # TensorFlow's mkdir would retry forever
        raise InputError(f"--workdir={workdir}: there is no {bucket}. Make it, or choose another.")


def read_split(workdir: epath.Path) -> dict[str, Any]:
    """Reads labeled_split.json; {} if it is missing.

    Raises:
      InputError: the file is damaged.
    """
    path, mend = workdir / SPLIT, f"{_FROM_BACKUP}. {_AT_YOUR_RISK.format('images')}"
    return files.read_json(path, mend) if path.exists() else {}


def check_split(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Refuses to resume a run if its images have changed while its settings are the same.

    Args:
      workdir: the run's folder.
      record: the content of labeled_split.json for the images of today.

    Raises:
      InputError: the message lists the differences.
    """
    before = read_split(workdir)
    if not before:
        if has_progress(workdir):
            said = "%s is missing: the images of the run may have been different."
            logging.warning(said, workdir / SPLIT)
        return
    differences = _differences(before, json.loads(json.dumps(record)))
    if differences:
        differences.pop("indices", None)  # too many to read; the sha256 differs with them
        raise InputError(
            f"{workdir} holds a run on other images:\n{_listed(differences)}\n"
            "Restore the data set of the run to resume it, or use another --workdir to start a new "
            "run."
        )


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Locks a local workdir against other processes; the lock is released even after a crash.

    Folders in buckets (gs://) are not locked.

    Raises:
      InputError: another process has locked it; the message names the process.
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
                f"{workdir} is in use by {by}. Wait until it is done, stop it, or use another "
                "--workdir."
            ) from None
        except (OSError, NotImplementedError) as error:  # on file systems without locks
            logging.warning(
                "%s cannot be locked (%s): do not start a second run in it.", workdir, error
            )
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


def write_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes config.json, with every field under its dotted name."""
    if has_progress(workdir) and not (workdir / CONFIG).exists():
        logging.warning(
            "%s was missing: the settings of the run may have been different.", workdir / CONFIG
        )
    files.write_json(workdir / CONFIG, _plain(config))


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """Reads the config of the run in a folder, and resolves it.

    Raises:
      InputError: there is no config, it is damaged, or another version wrote it.
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
    """Fills in automatic values and the canonical name of the method.

    Older versions wrote None for automatic values, and the method as the user had written it.
    Fields that this version cannot read are returned as they are; `check` then compares them and
    shows the differences to the user.
    """
    fields = renamed.fields(fields)
    try:
        config = _plain(automatic.resolve(config_lib.from_fields(fields)))
    except (InputError, TypeError, ValueError):
        return fields
    return {name: config[name] for name in fields}


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the fields as JSON reads them back: tuples become lists."""
    return json.loads(json.dumps(config_lib.fields(config)))


def _differences(before: dict, now: dict) -> dict[str, tuple]:
    """Returns {name: (before, now)} of entries that differ; None stands for a missing one."""
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _listed(differences: dict[str, tuple]) -> str:
    return "\n".join(
        f"  {name}: {before!r} before, {now!r} now" for name, (before, now) in differences.items()
    )
