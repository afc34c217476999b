"""CIFAR-10, CIFAR-100 and STL-10 by way of TensorFlow Datasets, all in memory.

TensorFlow is imported inside the functions: it takes seconds, and most of the program runs
without it.
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
    """The tfds set of this name; the images are in the order in which tfds stored them.

    Sets already prepared in dataset.data_dir ('': the environment's TFDS_DATA_DIR, or else tfds's
    default, ~/tensorflow_datasets) are read. A missing one is downloaded and prepared there, if
    the server answers or the archive lies in downloads/manual; tfds itself would retry for
    minutes. STL-10's split `unlabelled` becomes Source.unlabeled.

    Raises:
      InputError: no TensorFlow Datasets, no data and no way to get them, or damaged data.
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
        raise _damaged(builder, f"it names {len(names)} classes and has the label {largest}")
    return source


def _damaged(builder, what: str) -> InputError:
    return InputError(
        f"{builder.data_dir} is damaged: {what}. Delete that folder and prepare the set again (with"
        " network, the next run does)."
    )


def _read(builder, split: str, side: int) -> Images:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # or TensorFlow takes the memory JAX needs
    count = builder.info.splits[split].num_examples
    pixels = np.empty((count, side, side, 3), np.uint8)
    labels = np.empty(count, np.int32)
    # One shard after another: tfds's default interleaves them, so that the order would depend on
    # into how many files a set was written. No cache: it would hold all images a second time.
    # A number of images other than the announced one is an error, raised while reading.
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
    """The tfds builder of a set that lies prepared on disk; prepares it where that can work."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"Data set {name!r} is read with TensorFlow Datasets, which cannot be imported"
            f" ({error}). Install it and TensorFlow (pip install tensorflow-datasets"
            " importlib_resources tensorflow), or take data set 'npz', 'folder' or 'digits', which"
            " need neither."
        ) from error

    # tfds reads the variable once, when it is imported; here it counts when it is asked for.
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", ""))
    if re.search(r"[*?\[]", data_dir):
        raise InputError(
            f"--config.dataset.data_dir={data_dir}: TensorFlow Datasets reads *, ? and [ in a path"
            " as a pattern. Rename the folder, or make a link to it (ln -s) without these"
            " characters and give the link."
        )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    # tfds reads the files that describe the set, and raises whatever damaged ones lead it to.
    except Exception as error:
        folder = os.path.join(data_dir or os.path.join("~", "tensorflow_datasets"), name)
        raise InputError(
            f"Data set {name!r} cannot be opened by tfds ({type(error).__name__}: {error}). Its"
            f" description in {folder} is damaged or cannot be read: delete that folder and prepare"
            " the set again (with network, the next run does)."
        ) from error
    if builder.is_prepared():
        return builder

    manual = builder.data_dir_root / "downloads" / "manual"
    archives = {url: info.filename for url, info in builder.url_infos.items()}
    mend = (
        "Do one of these: set TFDS_DATA_DIR or --config.dataset.data_dir to a folder in which tfds"
        f" has prepared it (one that holds {name}/{builder.version}); run once on a machine with"
        f" network; put the archive {' and '.join(archives.values())} (from"
        f" {' and '.join(archives)}) into {manual}; or take data set 'folder' or 'npz' with your"
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
    # Whatever goes wrong on the way (network, checksum, disk), the user has the same ways out.
    except Exception as error:
        raise InputError(
            f"Data set {name!r} is not in {builder.data_dir_root}, and tfds could not prepare it"
            f" there ({type(error).__name__}: {error}). {mend}"
        ) from error
    return builder


def _answers(url: str) -> bool:
    """Whether the server of a URL can be reached, within seconds.

    Asked with `requests`, as tfds downloads, so the same proxy and certificate settings apply.
    """
    import requests

    answers = []

    def ask():
        with contextlib.suppress(requests.RequestException):
            answers.append(requests.head(url, timeout=_PROBE_SECONDS).status_code < 500)

    # A thread, because the timeout of `requests` does not cover the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1)
    return answers == [True]
