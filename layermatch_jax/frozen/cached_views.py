"""Views of all images, passed once through the frozen first layers of the backbone.

While the first layers are frozen, a view always has the same activations behind them. So a run can
make V versions of each view of each image once, keep their activations on the devices and train
only the layers behind. This is much faster, at the price of V versions instead of new ones in each
step. The versions are a function of the seed, so a resumed run makes the same ones again.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from layermatch_jax.batches import TrainBatch
from layermatch_jax.data import feed, reading_ahead
from layermatch_jax.data.augment import device
from layermatch_jax.data.images import Images
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.data.splits import Partition
from layermatch_jax.method import backprop, freezing
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import parallel
from layermatch_jax.views import Layout, Views

_FIRST_DRAW = 2**40  # draws of versions begin at this step, so that they differ from a run's own
_PERIOD = 10.0  # seconds between two lines of progress


class Resident(NamedTuple):
    """Activations of all versions, by view, and labels, on a device."""

    labeled: Mapping[str, Any]  # {view: [N_l, V, ...]}
    unlabeled: Mapping[str, Any]  # {view: [N_u, V, ...]}
    labels: Any  # [N_l] int32
    true_labels: Any  # [N_u] int32; -1 = unknown, or a labeled image


class Draws(NamedTuple):
    """The images and versions of one step; a row as in views.Layout."""

    labeled: Any  # [B] int32
    unlabeled: Any  # [B, μ] int32
    version: Any  # [B, views] int32 in 0..V−1
    policy: Any


def create(
    config: ml_collections.ConfigDict,
    partition: Partition,
    sampler: Sampler,
    rows: slice,
    of_pixels: feed.Feed,
) -> feed.Feed:
    """Creates the Feed of cached views.

    Its `resident` arrays need the backbone: they come from `from_state`, after the state of the run
    is known.

    Args:
      config: the whole config; reads input, dataset, eval_batch_size and model.freeze.
      partition: the run's images.
      sampler: the sampler of the run's draws.
      rows: this host's rows of every global batch.
      of_pixels: the feed of the same views without a cache; its `one_step` is kept.
    """
    layout, versions, K = sampler.layout, config.input.cache_views, config.input.steps_per_call

    def draws_of(step: int) -> Draws:
        drawn = sampler.draw(step)
        version = sampler.draw_versions(step, versions)
        drawn = Draws(drawn.labeled, drawn.unlabeled, version, drawn.policy)
        return jax.tree.map(lambda x: x[rows], drawn)

    def batch(resident: Resident, draws: Draws) -> TrainBatch:
        parts = [
            resident.labeled[name][draws.labeled, draws.version[:, layout.labeled(name)]][:, None]
            for name in layout.views.labeled
        ]
        if layout.mu:
            parts += [
                resident.unlabeled[name][draws.unlabeled, draws.version[:, layout.unlabeled(name)]]
                for name in layout.views.unlabeled
            ]
        return TrainBatch(
            images=jnp.concatenate(parts, axis=1),
            labels=resident.labels[draws.labeled],
            labeled_indices=draws.labeled,
            unlabeled_indices=draws.unlabeled,
            true_labels=resident.true_labels[draws.unlabeled],
            draws=draws.policy,
        )

    return of_pixels._replace(
        resident=lambda parallelism: (),
        resident_bytes=0,
        from_state=functools.partial(fill, config, partition, sampler),
        example=feed.stack(draws_of, range(K)),
        chunks=functools.partial(feed.in_chunks, draws_of, K),
        batch=batch,
    )


def fill(
    config: ml_collections.ConfigDict,
    partition: Partition,
    sampler: Sampler,
    state: TrainState,
    statistics: tuple,
    only_shapes: bool = False,
) -> Resident:
    """Computes the activations of all versions; each process computes alone.

    Args:
      config: as in `create`.
      partition: the run's images.
      sampler: the sampler of the run's draws.
      state: the state that the run begins or goes on with; only frozen layers are used.
      statistics: (means, deviations) of the channels, for normalization.
      only_shapes: return shapes and dtypes, and compute nothing.

    Returns:
      The arrays on the devices of this process, replicated as by `parallel.replicate`.

    Raises:
      InputError: the first layers are not frozen, the activations do not fit into the memory, or
        an image cannot be read.
    """
    until = freezing.last_frozen_layer(config.model.freeze, state.params)
    layout, dataset, versions = sampler.layout, config.dataset, config.input.cache_views
    apply = functools.partial(state.apply_fn, train=False, until=until)
    variables = {"params": state.params["backbone"], "batch_stats": state.batch_stats}
    side = dataset.image_size
    row = jax.eval_shape(apply, variables, jax.ShapeDtypeStruct((1, side, side, 3), np.float32))
    views = (
        (partition.labeled, layout.views.labeled),
        (partition.unlabeled, layout.views.unlabeled if layout.mu else {}),
    )
    shapes = [
        {
            name: jax.ShapeDtypeStruct((len(images.labels), versions, *row.shape[1:]), row.dtype)
            for name in kinds
        }
        for images, kinds in views
    ]
    labels = partition.labeled.labels, partition.unlabeled.labels
    if only_shapes:
        return Resident(*shapes, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in labels))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    parallel.check_room(size, f"input.cache_views={versions}", "a smaller input.cache_views")
    number = sum(x.shape[0] * versions for x in jax.tree.leaves(shapes))
    _say(
        f"{number:,} views pass once through the frozen layers, up to {until}: "
        f"{size / 1e6:,.0f} MB in the memory of each device"
    )
    variables = parallel.replicate(jax.device_get(variables), "pmap")
    told = _Progress(number)
    filled = [
        {name: np.empty(shape.shape, shape.dtype) for name, shape in of_set.items()}
        for of_set in shapes
    ]
    for n, ((images, kinds), arrays) in enumerate(zip(views, filled, strict=True)):
        of_set = _of_set(config, sampler, images, kinds, n, statistics, apply, variables)
        for version, positions, activations in of_set:
            for name, array in arrays.items():
                array[positions, version] = activations[name]
            told.done(len(positions) * len(kinds))
    of_labeled, of_unlabeled = filled
    return parallel.replicate(Resident(of_labeled, of_unlabeled, *labels), config.parallelism)


def _of_set(config, sampler, images: Images, kinds, n: int, statistics, apply, variables):
    """Yields (version, positions, {view: activations}) for the images of the n-th set."""
    if not kinds:
        return
    total, dataset, versions = len(images.labels), config.dataset, config.input.cache_views
    size = reading_ahead.batch_size(config.eval_batch_size, total)
    # Each image takes the place of a labeled one, and all its views that of labeled views.
    layout = Layout(Views(labeled=kinds, unlabeled={}), 0)
    of_block = dataclasses.replace(
        sampler,
        num_labeled=size,
        num_unlabeled=1,
        batch_size=size,
        layout=layout,
        policy_draws=None,
    )
    mean, std = map(tuple, statistics)

    @jax.jit
    def activations(variables, pixels, draws):
        no_labels = jnp.zeros(len(pixels), jnp.int32)
        data = device.ResidentData(pixels, no_labels, pixels[:1], no_labels)
        made = device.make_batch(data, draws, layout, dataset.padding, dataset.image_size).images
        flat = backprop.normalize(made.reshape(-1, *made.shape[2:]), mean, std)
        out = apply(variables, flat)
        out = out.reshape(*made.shape[:2], *out.shape[1:])
        return {name: out[:, layout.labeled(name)] for name in kinds}

    def fetched(version: int, part: range, answer: dict) -> tuple[int, np.ndarray, dict]:
        rows = {name: x[: len(part)] for name, x in jax.device_get(answer).items()}
        return version, np.array(part), rows

    under_way: tuple[int, range, dict] | None = None
    blocks = [(v, start) for v in range(versions) for start in range(0, total, size)]
    for block, (version, start) in enumerate(blocks):
        part = range(start, min(start + size, total))
        draws = of_block.draw((n + 1) * _FIRST_DRAW + block)
        draws = draws._replace(labeled=np.arange(size, dtype=np.int32))
        pixels = np.zeros((size, *[dataset.stored_size] * 2, 3), np.uint8)
        pixels[: len(part)] = images.read(np.array(part))
        answer = activations(variables, *jax.tree.map(_by_rows, (pixels, draws)))
        if under_way:  # the devices compute while the block before is fetched
            yield fetched(*under_way)
        under_way = version, part, answer
    if under_way:
        yield fetched(*under_way)


def _by_rows(x: np.ndarray) -> jax.Array:
    return jax.device_put(x, parallel.by_rows("pmap"))


class _Progress:
    """Prints how far the computation is, and how long it will take."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._began = self._said = time.monotonic()

    def done(self, count: int) -> None:
        self._done, now = self._done + count, time.monotonic()
        if now - self._said > _PERIOD or self._done == self._total:
            self._said = now
            left = (now - self._began) * (self._total - self._done) / self._done
            _say(f"{self._done:,} of {self._total:,} views, {left:.0f} s left")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
