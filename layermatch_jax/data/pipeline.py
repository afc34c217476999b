"""From positions to batches: the tf.data training pipeline and the evaluation batches."""

from collections.abc import Iterator

import ml_collections
import numpy as np

from layermatch_jax.batch import EvalBatch, TrainBatch
from layermatch_jax.data import crop
from layermatch_jax.data.images import Images
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.data.splits import Partition


def create_sampler(config: ml_collections.ConfigDict, partition: Partition) -> Sampler:
    """The sampler of a run: a function of its config and the sizes of its sets."""
    dataset = config.dataset
    return Sampler(
        seed=config.seed,
        num_labeled=len(partition.labeled.labels),
        num_unlabeled=len(partition.unlabeled.labels),
        batch_size=config.batch_size,
        # Without a loss on them, unlabelled images would only change BatchNorm's statistics.
        unlabeled_ratio=config.unlabeled_ratio if config.unsupervised_weight > 0 else 0,
        image_size=dataset.image_size,
        crop_range=dataset.stored_size + 2 * dataset.padding - dataset.image_size,
        flip=dataset.flip,
        randaugment_ops=config.augment.randaugment_ops,
    )


def weak_views(partition: Partition, sampler: Sampler, padding: int, step: int, rows: slice):
    """Reads, crops and flips the images of some rows of a step's batch.

    Args:
      partition: the run's images.
      sampler: its draws.
      padding: reflected border, pixels.
      step: 0-based.
      rows: which rows of the global batch.

    Returns:
      The TrainBatch, its strong views not yet augmented, and the draws of these rows.
    """
    draws = sampler.draw(step).rows(rows)
    count, mu = draws.unlabeled.shape
    labeled = partition.labeled.read(draws.labeled)[:, None]
    unlabeled = partition.unlabeled.read(draws.unlabeled.reshape(-1))
    unlabeled = unlabeled.reshape(count, mu, *labeled.shape[2:])
    views = np.concatenate([labeled, unlabeled, unlabeled], axis=1)
    views = crop.crop_and_flip(
        views.reshape(-1, *views.shape[2:]),
        draws.offset.reshape(-1, 2),
        draws.flip.reshape(-1),
        padding,
        sampler.image_size,
    )
    batch = TrainBatch(
        images=views.reshape(count, 1 + 2 * mu, *views.shape[1:]),
        labels=partition.labeled.labels[draws.labeled],
        indices=draws.unlabeled,
        true_labels=partition.unlabeled.labels[draws.unlabeled],
    )
    return batch, draws


def train_batches(
    partition: Partition,
    sampler: Sampler,
    *,
    padding: int,
    steps: range,
    rows: slice = slice(None),
    prefetch: int = 4,
) -> Iterator[TrainBatch]:
    """The batches of some steps through tf.data; stateless, so a run resumes from any step.

    Args:
      partition: the run's images.
      sampler: its draws.
      padding: reflected border before the crop, pixels.
      steps: which steps, in order.
      rows: this host's rows of every global batch.
      prefetch: batches made ahead.

    Yields:
      TrainBatch of NumPy arrays, one a step.

    Raises:
      InputError: an image cannot be read; names its file.
    """
    import tensorflow as tf

    from layermatch_jax.data import augment_tf

    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
    mu, size, n = sampler.unlabeled_ratio, sampler.image_size, sampler.randaugment_ops
    failures = {}  # by step

    def read(step):
        try:
            batch, draws = weak_views(partition, sampler, padding, int(step), rows)
        # Raised here, TensorFlow would print pages of traceback. That holds for every error: when
        # the process ends, batches made ahead find the threads that decode images gone.
        except Exception as error:
            failures[int(step)] = error
            batch, draws = weak_views(partition, sampler, padding, int(step), slice(0))
        return *batch, draws.op, draws.value, draws.affine, draws.cutout

    @tf.autograph.experimental.do_not_convert
    def load(step):
        kinds = [tf.uint8] + [tf.int32] * 4 + [tf.float32, tf.int32, tf.int32]
        arrays = tf.numpy_function(read, [step], kinds, stateful=False)
        shapes = [[None, 1 + 2 * mu, size, size, 3], [None], [None, mu], [None, mu]]
        shapes += [[None, mu, n], [None, mu, n], [None, mu, n, 6], [None, mu, 4]]
        return tuple(map(tf.ensure_shape, arrays, shapes))

    @tf.autograph.experimental.do_not_convert
    def augment(images, labels, indices, true_labels, op, value, affine, cutout):
        strong = augment_tf.strong_views(
            tf.reshape(images[:, 1 + mu :], [-1, size, size, 3]),
            tf.reshape(op, [-1, n]),
            tf.reshape(value, [-1, n]),
            tf.reshape(affine, [-1, n, 6]),
            tf.reshape(cutout, [-1, 4]),
        )
        strong = tf.reshape(strong, [-1, mu, size, size, 3])
        images = tf.concat([images[:, : 1 + mu], strong], axis=1)
        return images, labels, indices, true_labels

    dataset = tf.data.Dataset.range(steps.start, steps.stop)
    dataset = dataset.map(load, num_parallel_calls=2, deterministic=True)
    if mu:
        dataset = dataset.map(augment, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    else:
        dataset = dataset.map(lambda *arrays: arrays[: len(TrainBatch._fields)])
    batches = dataset.prefetch(prefetch).as_numpy_iterator()
    for step, arrays in zip(steps, batches, strict=True):
        if step in failures:
            raise failures[step]
        yield TrainBatch(*arrays)


def eval_batches(
    images: Images, batch_size: int, image_size: int, rows: slice = slice(None)
) -> Iterator[EvalBatch]:
    """A whole split in order, centre-cropped; the last batch is padded and its padding masked.

    Args:
      images: the split.
      batch_size: rows of every batch.
      image_size: side of the crop, pixels.
      rows: this host's rows of every batch.

    Yields:
      EvalBatch of NumPy arrays, all of one shape.
    """
    total = len(images.labels)
    for start in range(0, total, batch_size):
        positions = np.arange(start, start + batch_size)[rows]
        inside = np.minimum(positions, total - 1)
        once, row = np.unique(inside, return_inverse=True)  # the padding repeats the last image
        yield EvalBatch(
            images=crop.center_crop(images.read(once), image_size)[row],
            labels=images.labels[inside],
            mask=(positions < total).astype(np.float32),
        )
