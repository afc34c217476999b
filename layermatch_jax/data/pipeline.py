"""Batches: the tf.data training pipeline and the evaluation batches."""

from collections.abc import Callable, Iterator

import jax
import ml_collections
import numpy as np

from layermatch_jax.batches import EvalBatch, TrainBatch
from layermatch_jax.data.augment import crop
from layermatch_jax.data.images import Images
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.data.splits import Partition
from layermatch_jax.views import Layout

_ARRAYS = TrainBatch._fields.index("draws")  # fields that pass through tf.data; draws are a tree


def create_sampler(
    config: ml_collections.ConfigDict,
    partition: Partition,
    layout: Layout,
    policy_draws: Callable | None = None,
) -> Sampler:
    """Creates the sampler of a run from its config, the sizes of its sets and its policy.

    Args:
      config: the whole config.
      partition: the run's images; only their numbers are used.
      layout: layout of the policy's views.
      policy_draws: the policy's function; see `Sampler`.
    """
    dataset = config.dataset
    return Sampler(
        seed=config.seed,
        num_labeled=len(partition.labeled.labels),
        num_unlabeled=len(partition.unlabeled.labels),
        batch_size=config.batch_size,
        layout=layout,
        image_size=dataset.image_size,
        crop_range=dataset.stored_size + 2 * dataset.padding - dataset.image_size,
        flip=dataset.flip,
        randaugment_ops=config.augment.randaugment_ops,
        policy_draws=policy_draws,
    )


def moved_views(partition: Partition, sampler: Sampler, padding: int, step: int, rows: slice):
    """Reads the images of some rows of a step's batch, and crops and flips their views.

    Args:
      partition: the run's images.
      sampler: the sampler of the run's draws.
      padding: reflected border, pixels.
      step: 0-based.
      rows: which rows of the global batch.

    Returns:
      (the TrainBatch, its views without RandAugment and Cutout; the draws of these rows).
    """
    draws, wanted = sampler.draw(step).rows(rows), sampler.layout.views
    count, mu = draws.unlabeled.shape
    labeled = partition.labeled.read(draws.labeled)[:, None]
    unlabeled = partition.unlabeled.read(draws.unlabeled.reshape(-1))
    unlabeled = unlabeled.reshape(count, mu, *labeled.shape[2:])
    views = np.concatenate(
        [labeled] * len(wanted.labeled) + [unlabeled] * len(wanted.unlabeled), axis=1
    )
    views = crop.crop_and_flip(
        views.reshape(-1, *views.shape[2:]),
        draws.offset.reshape(-1, 2),
        draws.flip.reshape(-1),
        padding,
        sampler.image_size,
    )
    batch = TrainBatch(
        images=views.reshape(count, len(sampler.layout.kinds), *views.shape[1:]),
        labels=partition.labeled.labels[draws.labeled],
        labeled_indices=draws.labeled,
        unlabeled_indices=draws.unlabeled,
        true_labels=partition.unlabeled.labels[draws.unlabeled],
        draws=draws.policy,
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
    """Yields the batches of some steps by tf.data; stateless, so a run resumes from any step.

    Args:
      partition: the run's images.
      sampler: the sampler of the run's draws.
      padding: reflected border before the crop, pixels.
      steps: which steps, in order.
      rows: this host's rows of every global batch.
      prefetch: batches made ahead.

    Yields:
      A TrainBatch of NumPy arrays for each step.

    Raises:
      InputError: an image cannot be read; the message names its file.
    """
    import tensorflow as tf

    from layermatch_jax.data.augment import host

    tf.config.set_visible_devices([], "GPU")  # JAX uses the accelerator
    layout, size, n = sampler.layout, sampler.image_size, sampler.randaugment_ops
    mu, V, A = layout.mu, len(layout.kinds), len(layout.augmented)
    failures = {}  # by step

    def read(step):
        try:
            batch, draws = moved_views(partition, sampler, padding, int(step), rows)
        # TensorFlow would print pages of traceback for an error raised here. So every error is
        # stored, also those of prefetched batches after the decoding threads have ended.
        except Exception as error:
            failures[int(step)] = error
            batch, draws = moved_views(partition, sampler, padding, int(step), slice(0))
        return *batch[:_ARRAYS], draws.op, draws.value, draws.affine, draws.cutout

    @tf.autograph.experimental.do_not_convert
    def load(step):
        kinds = [tf.uint8] + [tf.int32] * 5 + [tf.float32, tf.int32, tf.int32]
        arrays = tf.numpy_function(read, [step], kinds, stateful=False)
        shapes = [[None, V, size, size, 3], [None], [None], [None, mu], [None, mu]]
        shapes += [[None, A, n], [None, A, n], [None, A, n, 6], [None, A, 4]]
        return tuple(map(tf.ensure_shape, arrays, shapes))

    @tf.autograph.experimental.do_not_convert
    def augment(images, *others):
        *others, op, value, affine, cutout = others
        ground = tf.concat(layout.only_augmented(images), axis=1)
        strong = host.strong_views(
            tf.reshape(ground, [-1, size, size, 3]),
            tf.reshape(op, [-1, n]),
            tf.reshape(value, [-1, n]),
            tf.reshape(affine, [-1, n, 6]),
            tf.reshape(cutout, [-1, 4]),
        )
        strong = tf.reshape(strong, [-1, A, size, size, 3])
        return tf.concat(layout.with_augmented(images, strong), axis=1), *others

    dataset = tf.data.Dataset.range(steps.start, steps.stop)
    dataset = dataset.map(load, num_parallel_calls=2, deterministic=True)
    if A:
        dataset = dataset.map(augment, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    else:
        dataset = dataset.map(lambda *arrays: arrays[:_ARRAYS])
    batches = dataset.prefetch(prefetch).as_numpy_iterator()
    for step, arrays in zip(steps, batches, strict=True):
        if step in failures:
            raise failures[step]
        policy_draws = jax.tree.map(lambda x: x[rows], sampler.draw_for_policy(step))
        yield TrainBatch(*arrays, draws=policy_draws)


def eval_batches(
    images: Images, batch_size: int, image_size: int, rows: slice = slice(None)
) -> Iterator[EvalBatch]:
    """Yields the center crops of all images in order; pads the last batch and masks the padding.

    Args:
      images: the evaluation images.
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
