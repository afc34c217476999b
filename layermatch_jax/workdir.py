"""The folder of a run: what it was started with, and how it ended."""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import flax
import jax
import ml_collections
from absl import logging
from etils import epath

import layermatch_jax
from layermatch_jax import config as config_lib
from layermatch_jax import files, metrics
from layermatch_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, SPLIT, RESULT = "config.json", "labeled_split.json", "result.json"
LOCK = ".lock"


def default(config: ml_collections.ConfigDict) -> str:
    """runs/DATASET-LABELS-METHOD-lLABELSEED-sSEED."""
    dataset = config.dataset
    labels = f"{100 * dataset.label_fraction:g}%" if dataset.label_fraction else dataset.num_labels
    return f"runs/{dataset.name}-{labels}-{config.method}-l{dataset.label_seed}-s{config.seed}"


def check(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a folder that cannot be written to, or holds a run that would end in another result.

    Raises:
      InputError: names what is in the way, or lists the fields that differ.
    """
    if "://" in str(workdir):
        _check_bucket(workdir)
    else:
        there = next(path for path in (workdir, *workdir.parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise InputError(
                f"--workdir={workdir}: {there} is no folder that can be written to. Take another."
            )
    path = workdir / CONFIG
    if path.exists():
        before, now = json.loads(path.read_text()), _plain(config)
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


def _check_bucket(workdir: epath.Path) -> None:
    # Whether it can be written to, only writing tells.
    try:
        from google.cloud import storage  # as Orbax does
    except ImportError:
        storage = None
    # Without TensorFlow epath would take gcsfs, which overwrites where it should append.
    if not (storage and importlib.util.find_spec("tensorflow")):
        raise InputError(
            f"--workdir={workdir}: a bucket needs google-cloud-storage and TensorFlow: "
            "pip install -r requirements.txt"
        )
    try:
        storage.Client()
    except OSError as error:
        raise InputError(f"--workdir={workdir}: {error} Set GOOGLE_CLOUD_PROJECT.") from None
    bucket = epath.Path(*workdir.parts[:3])
    if not bucket.exists():  # TensorFlow's mkdir would look for it for ever
        raise InputError(f"--workdir={workdir}: there is no {bucket}. Make it, or take another.")


def check_split(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Refuses to go on with a run whose images are others now, under the same settings.

    Args:
      workdir: the run's folder.
      record: what labeled_split.json is going to hold.

    Raises:
      InputError: lists what differs.
    """
    path = workdir / SPLIT
    if not path.exists():
        return
    differences = _differences(json.loads(path.read_text()), json.loads(json.dumps(record)))
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

    Buckets (gs://) and Windows have no such lock.

    Raises:
      InputError: another process is at work there; says which.
    """
    if "://" in str(workdir) or fcntl is None:
        yield
        return
    with open(workdir / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{workdir} is in use by {file.read() or 'another process'}. Wait until it is "
                "done, stop it, or take another --workdir."
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): start no second run in it.", workdir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes every field under its dotted name."""
    files.write_json(workdir / CONFIG, _plain(config))


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The config of the run in a folder.

    Raises:
      InputError: there is none, or it is of another version.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise InputError(f"--workdir={workdir} holds no run: there is no {path}")
    try:
        return config_lib.from_fields(json.loads(path.read_text()))
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path} is of another version, or damaged: {error}") from None


def read_result(workdir: epath.Path) -> dict[str, Any] | None:
    """What a finished run wrote; None if it is not finished."""
    path = workdir / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def write_result(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    split: dict[str, Any],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Writes result.json: what was run, what came out, and on what.

    Args:
      workdir: the run's folder.
      config: the whole config.
      split: the record that labeled_split.json holds.
      measured: of metrics.result.

    Returns:
      What was written.
    """
    result = {
        "method": config.method,
        "dataset": config.dataset.name,
        "num_labels": split["num_labels"],
        "label_seed": config.dataset.label_seed,
        "seed": config.seed,
        "train_steps": config.train_steps,
        **measured,
        "split_sha256": split["sha256"],
        "parallelism": config.parallelism,
        **provenance(),
    }
    files.write_json(workdir / RESULT, result)
    return result


def provenance() -> dict[str, Any]:
    """What a measurement was made on and with."""
    return {
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "versions": {
            "layermatch_jax": layermatch_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        "git_commit": _git_commit(),
    }


def summary(result: dict[str, Any], workdir: epath.Path) -> str:
    """A result as a person reads it."""
    split = "test" if "test_accuracy" in result else "validation"
    speed = result["images_per_second"]
    speed = "" if speed is None else f", {speed:.0f} images/s"
    lines = [
        f"{result['method']} on {result['dataset']}, {result['num_labels']} labels "
        f"(label seed {result['label_seed']}, seed {result['seed']}): {result['train_steps']} "
        f"steps in {result['wall_seconds']:.0f} s{speed}",
        "",
        f"{split} accuracy      last   median{result['evaluations_in_median']:<4} best",
    ]
    for kind, values in result[f"{split}_accuracy"].items():
        numbers = "".join(f"{100 * values[k]:8.2f} %" for k in ("last", "median20", "best"))
        lines.append(f"  {kind:<14}{numbers}")
    if result["mask_rate"] is not None:
        shown = f"{result['mask_rate']:.1%} used"
        if result["pseudo_label_accuracy"] is not None:
            shown += f", {result['pseudo_label_accuracy']:.1%} of these right"
        if result["pseudo_label_accuracy_all"] is not None:
            shown += f", {result['pseudo_label_accuracy_all']:.1%} of all right"
        else:
            shown += f"; how many are right is not known: {metrics.TRUTH_UNKNOWN}"
        lines += ["", f"pseudo-labels over the run: {shown}"]
    written = f"files: {workdir}/ ({RESULT}, {metrics.FILE}, {SPLIT}, {CONFIG})"
    return "\n".join([*lines, "", written])


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


def _git_commit() -> str | None:
    """The commit of the code that runs, with '-dirty' where it was changed; None if not known."""
    here = epath.Path(layermatch_jax.__file__).parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
