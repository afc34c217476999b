"""Input backends: views made on the host by tf.data, or on devices that keep all images."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from layermatch_jax.batches import TrainBatch
from layermatch_jax.data import pipeline
from layermatch_jax.data.augment import device
from layermatch_jax.data.images import Images
from layermatch_jax.data.sampler import Draws, Sampler
from layermatch_jax.data.splits import Partition
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import parallel

_CHUNK = 256  # images read and copied to the devices at a time


class Feed(NamedTuple):
    """The functions of an input backend. A chunk is the input of K training steps.

    A chunk has NumPy arrays [rows, K, ...]: this host's rows of K global batches.
    """

    # Parallelism -> arrays that every device keeps during the run, replicated as by
    # `parallel.replicate`; and their size on each device in bytes. () and 0 for none.
    resident: Callable[[str], Any]
    resident_bytes: int
    # A chunk of the first steps; only its shapes and dtypes count
    example: Any
    # steps -> (number of the chunk's last step, 1-based; the chunk), in order
    chunks: Callable[[range], Iterator[tuple[int, Any]]]
    # (resident, one step of a chunk: [rows, ...]) -> TrainBatch; runs inside the program
    batch: Callable[[Any, Any], TrainBatch]
    # Step, 0-based -> its TrainBatch, as `batch` makes it; reads only the images of its rows
    one_step: Callable[[int], TrainBatch]
    # (state, statistics, only_shapes) -> the resident arrays, where they depend on the state, so
    # that `resident` has none
    from_state: Callable[..., Any] | None = None


def create(
    config: ml_collections.ConfigDict, partition: Partition, sampler: Sampler, rows: slice
) -> Feed:
    """Creates the Feed of config.input.backend.

    Args:
      config: the whole config.
      partition: the run's images.
      sampler: the sampler of the run's draws.
      rows: this host's rows of every global batch.

    Raises:
      InputError: an image cannot be read; the message names its file. `resident` and `chunks`
        raise it, too.
    """
    return _BACKENDS[config.input.backend](config, partition, sampler, rows)


def _tf_data(config, partition, sampler, rows) -> Feed:
    """Feed of tf.data: the host makes all views, and a chunk is the batch of one step."""
    if not importlib.util.find_spec("tensorflow"):
        raise InputError(
            "--config.input.backend=tf_data needs TensorFlow: pip install tensorflow. Or use "
            "--config.input.backend=device, which does not need it"
        )
    padding = config.dataset.padding

    def chunk(batch: TrainBatch) -> TrainBatch:
        return jax.tree.map(lambda x: x[:, None], batch)

    def chunks(steps: range) -> Iterator[tuple[int, TrainBatch]]:
        batches = pipeline.train_batches(
            partition,
            sampler,
            padding=padding,
            steps=steps,
            rows=rows,
            prefetch=config.input.prefetch,
        )
        for step, batch in enumerate(batches, steps.start + 1):
            yield step, chunk(batch)

    def one_step(step: int) -> TrainBatch:
        _, made = next(chunks(range(step, step + 1)))
        return jax.tree.map(lambda x: x[:, 0], made)

    example, _ = pipeline.moved_views(partition, sampler, padding, 0, rows)
    return Feed(lambda _: (), 0, chunk(example), chunks, lambda resident, batch: batch, one_step)


def _device(config, partition, sampler, rows) -> Feed:
    """Feed of the devices: they keep all images and make all views; a chunk has K steps' draws."""
    padding, size, K = config.dataset.padding, sampler.image_size, config.input.steps_per_call

    def draws(step: int) -> Draws:
        return sampler.draw(step).rows(rows)

    def batch(resident: device.ResidentData, draws: Draws) -> TrainBatch:
        return device.make_batch(resident, draws, sampler.layout, padding, size)

    labeled, unlabeled = partition.labeled, partition.unlabeled
    counts = len(labeled.labels), len(unlabeled.labels) if sampler.layout.mu else 0

    def resident(parallelism: str) -> device.ResidentData:
        def pixels(images: Images, count: int) -> jax.Array:
            shape = (count, *[config.dataset.stored_size] * 2, 3)
            parts = (
                images.read(np.arange(start, min(start + _CHUNK, count)))
                for start in range(0, count, _CHUNK)
            )
            return parallel.fill(shape, parts, parallelism)

        return device.ResidentData(
            labeled_images=pixels(labeled, counts[0]),
            labels=parallel.replicate(labeled.labels, parallelism),
            unlabeled_images=pixels(unlabeled, counts[1]),
            true_labels=parallel.replicate(unlabeled.labels, parallelism),
        )

    def one_step(step: int) -> TrainBatch:
        draws = sampler.draw(step).rows(rows)
        few = device.ResidentData(
            labeled_images=labeled.read(draws.labeled),
            labels=labeled.labels[draws.labeled],
            unlabeled_images=unlabeled.read(draws.unlabeled.reshape(-1)),
            true_labels=unlabeled.labels[draws.unlabeled.reshape(-1)],
        )
        among_few = draws._replace(
            labeled=np.arange(draws.labeled.size, dtype=np.int32),
            unlabeled=np.arange(draws.unlabeled.size, dtype=np.int32).reshape(
                draws.unlabeled.shape
            ),
        )
        made = jax.jit(batch)(few, among_few)
        return made._replace(labeled_indices=draws.labeled, unlabeled_indices=draws.unlabeled)

    resident_bytes = sum(counts) * 3 * config.dataset.stored_size**2
    example, chunks = stack(draws, range(K)), functools.partial(in_chunks, draws, K)
    return Feed(resident, resident_bytes, example, chunks, batch, one_step)


def in_chunks(draws: Callable[[int], Any], K: int, steps: range) -> Iterator[tuple[int, Any]]:
    """Yields the chunks of some steps.

    Args:
      draws: step (0-based) -> its draws, a tree of arrays [rows, ...].
      K: steps in a chunk. A chunk ends at a multiple of K, wherever the run resumes.
      steps: which steps.

    Yields:
      (number of the chunk's last step, 1-based; the chunk).
    """
    start = steps.start
    while start < steps.stop:
        stop = min(start - start % K + K, steps.stop)
        yield stop, stack(draws, range(start, stop))
        start = stop


def stack(draws: Callable[[int], Any], steps: range) -> Any:
    """Makes a chunk, [rows, K, ...], of the draws of K steps."""
    return jax.tree.map(lambda *x: np.stack(x, axis=1), *map(draws, steps))


_BACKENDS = {"tf_data": _tf_data, "device": _device}
