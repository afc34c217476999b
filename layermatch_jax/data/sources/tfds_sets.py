"""CIFAR-10, CIFAR-100 and STL-10 from TensorFlow Datasets, all in memory.

TensorFlow is imported inside the functions, because the import takes seconds and most of the
program does not need it.
"""

import contextlib
import os
import re
import threading

import numpy as np
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, Source, from_array, resize
from layermatch_jax.errors import InputError

_BATCH = 1_000  # images decoded at a time
_PROBE_SECONDS = 4.0


def load(dataset: ConfigDict) -> Source:
    """Loads the tfds set dataset.name; the images are in the order in which tfds stored them.

    A set that is prepared in dataset.data_dir is read from there ('': the environment's
    TFDS_DATA_DIR, or else tfds's default, ~/tensorflow_datasets). A missing set is downloaded and
    prepared there if the server answers or the archive is in downloads/manual. (Without the check
    of the server, tfds would retry for minutes.) STL-10's split `unlabelled` becomes
    Source.unlabeled.

    Raises:
      InputError: TensorFlow Datasets is not installed, the data are missing and cannot be
        downloaded, or they are damaged.
    """
    builder = _builder(dataset.name, dataset.data_dir)
    splits, names = builder.info.splits, tuple(builder.info.features["label"].names)
    if missing := {"train", "test"} - set(splits):
        raise _damaged(builder, f"it has no split {' and no split '.join(sorted(missing))}")
    source = Source(
        class_names=names,
        train=_read(builder, "train", dataset.stored_size),
        unlabeled=(
            _read(builder, "unlabelled", dataset.stored_size) if "unlabelled" in splits else None
        ),
        test=_read(builder, "test", dataset.stored_size),
    )
    largest = max(source.train.labels.max(), source.test.labels.max())
    if largest >= len(names):
        raise _damaged(builder, f"it names {len(names)} classes, but has the label {largest}")
    return source


def _damaged(builder, what: str) -> InputError:
    return InputError(
        f"{builder.data_dir} is damaged: {what}. Delete that folder; the next run with network"
        " access prepares the set again."
    )


def _read(builder, split: str, side: int) -> Images:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # else TensorFlow takes memory that JAX needs
    count = builder.info.splits[split].num_examples
    pixels = np.empty((count, side, side, 3), np.uint8)
    labels = np.empty(count, np.int32)
    # Read one shard after another: tfds interleaves shards by default, so the order would depend on
    # the number of files. No cache, because it would hold all images a second time. If the number
    # of images differs from num_examples, reading raises an error.
    config = tfds.ReadConfig(
        interleave_cycle_length=1, try_autocache=False, assert_cardinality=True
    )
    config.options.autotune.enabled = False  # 1.4 s instead of 2.2 s for 10,000 CIFAR images
    stored = builder.as_dataset(
        split=split, shuffle_files=False, as_supervised=True, read_config=config
    )
    done = 0
    try:
        for image, label in tfds.as_numpy(stored.batch(_BATCH).prefetch(1)):
            stop = done + len(label)
            pixels[done:stop], labels[done:stop] = resize(image, side), label
            done = stop
    except tf.errors.OpError as error:
        raise _damaged(builder, f"split {split!r}: {str(error).splitlines()[0]}") from error
    return from_array(pixels, labels)


def _builder(name: str, data_dir: str):
    """Returns the tfds builder of a set on disk; downloads and prepares the set if needed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"Data set {name!r} needs TensorFlow Datasets, which cannot be imported ({error})."
            " Install it and TensorFlow (pip install tensorflow-datasets importlib_resources"
            " tensorflow), or use data set 'npz', 'folder' or 'digits', which need neither."
        ) from error

    # tfds reads the variable only at its import; here its present value counts.
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", ""))
    if re.search(r"[*?\[]", data_dir):
        raise InputError(
            f"--config.dataset.data_dir={data_dir}: TensorFlow Datasets reads *, ? and [ in a path"
            " as a pattern. Rename the folder, or make a link to it (ln -s) without these"
            " characters and use the link."
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    # tfds reads the files that describe the set; damaged files raise errors of many types.
    except Exception as error:
        folder = os.path.join(data_dir or os.path.join("~", "tensorflow_datasets"), name)
        raise InputError(
            f"Data set {name!r} cannot be opened by tfds ({type(error).__name__}: {error}). Its"
            f" description in {folder} is damaged or cannot be read. Delete that folder; the next"
            " run with network access prepares the set again."
        ) from error
    if builder.is_prepared():
        return builder

    manual = builder.data_dir_root / "downloads" / "manual"
    archives = {url: info.filename for url, info in builder.url_infos.items()}
    mend = (
        "Do one of these: set TFDS_DATA_DIR or --config.dataset.data_dir to a folder in which tfds"
        f" has prepared the set (it contains {name}/{builder.version}); run once on a machine with"
        f" network access; put the archive {' and '.join(archives.values())} (from"
        f" {' and '.join(archives)}) into {manual}; or use data set 'folder' or 'npz' with your"
        " own copy, or 'digits', which needs no download."
    )
    for url, archive in archives.items():
        if not (manual / archive).exists() and not _answers(url):
            raise InputError(
                f"Data set {name!r} is not in {builder.data_dir_root}, and {url} does not answer,"
                f" so it cannot be downloaded. {mend}"
            )
    try:
        builder.download_and_prepare()
    # The remedies are the same for every failure (network, checksum, disk).
    except Exception as error:
        raise InputError(
            f"Data set {name!r} is not in {builder.data_dir_root}, and tfds could not prepare it"
            f" there ({type(error).__name__}: {error}). {mend}"
        ) from error
    return builder


def _answers(url: str) -> bool:
    """Returns whether the server of a URL answers within seconds.

    Uses `requests`, as tfds does, so the same proxy and certificate settings apply.
    """
    import requests

    answers = []

    def ask():
        with contextlib.suppress(requests.RequestException):
            answers.append(requests.head(url, timeout=_PROBE_SECONDS).status_code < 500)

    # In a thread, because the timeout of `requests` does not cover the DNS look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1)
    return answers == [True]
