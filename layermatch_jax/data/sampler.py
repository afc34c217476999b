"""Draws of a step: its images and all random numbers of their augmentation.

Later stages draw no random numbers. The draws of a step are a function of (seed, step) and cover
the whole global batch; hosts and devices take their rows. So the number of hosts and devices and
the input backend do not change a run, and a resumed run needs no iterator state.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from layermatch_jax.data.augment import operations
from layermatch_jax.views import Layout

CUTOUT_MAX_SIDE = 0.5  # of the image's side

# Independent streams of random numbers: the second word of the generator's key.
_LABELED, _UNLABELED, _AUGMENT, _POLICY, _VERSIONS = range(5)

_IDENTITY = operations.NAMES.index("identity")
_LOWEST, _HIGHEST = np.array([limits for _, *limits in operations.RANDAUGMENT], np.float32).T


class Draws(NamedTuple):
    """Draws of one step for the global batch: B labeled images with μ unlabeled images each.

    Each row has V views in the order of views.Layout. A of them are augmented: entry i on the axis
    of length A belongs to the view at position Layout.augmented[i].
    """

    labeled: Int32[np.ndarray, " B"]  # positions in the labeled set
    unlabeled: Int32[np.ndarray, "B μ"]  # positions in the unlabeled set
    flip: Bool[np.ndarray, "B V"]  # mirrored left-right
    offset: Int32[np.ndarray, "B V 2"]  # (y, x) of the crop in the padded image, pixels
    op: Int32[np.ndarray, "B A n"]  # positions in RANDAUGMENT, in the order of application
    value: Float32[np.ndarray, "B A n"]  # their magnitudes, in the operation's own unit
    affine: Int32[np.ndarray, "B A n 6"]  # `operations.coefficients` of these
    cutout: Int32[np.ndarray, "B A 4"]  # box (y0, x0, y1, x1), half-open, pixels
    policy: Any = ()  # the policy's own draws, a tree of arrays [B, ...]

    def rows(self, rows: slice) -> "Draws":
        """Selects rows of the batch, such as one host's."""
        return jax.tree.map(lambda x: x[rows], self)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Makes the draws of any step from these settings. All sizes are global."""

    seed: int
    num_labeled: int
    num_unlabeled: int
    batch_size: int  # B
    layout: Layout  # of the method's views; its μ is 0 for supervised training
    image_size: int  # side after the crop, pixels
    crop_range: int  # stored side + 2 · padding − image_size: offsets are in 0..crop_range, pixels
    flip: bool
    randaugment_ops: int  # n
    # (generator, B, μ) -> the policy's own draws, a tree of arrays [B, ...]; None = it has none
    policy_draws: Callable[[np.random.Generator, int, int], Any] | None = None

    def draw(self, step: int) -> Draws:
        """Makes the draws of one step (0-based); a pure function of the settings and the step."""
        B, mu, n = self.batch_size, self.layout.mu, self.randaugment_ops
        kinds, augmented = self.layout.kinds, self.layout.augmented
        V, A = len(kinds), len(augmented)
        rng = _generator(self.seed, _AUGMENT, step)
        moved = np.array([kind.moved for kind in kinds])
        flip = (rng.random((B, V)) < 0.5) & moved & self.flip
        op = rng.integers(len(_LOWEST), size=(B, A, n), dtype=np.int32)
        for a, v in enumerate(augmented):
            if kinds[v].operations is not None:
                op[:, a, kinds[v].operations :] = _IDENTITY
        level = rng.random((B, A, n), np.float32)
        value = _LOWEST[op] + (_HIGHEST - _LOWEST)[op] * level
        offset = rng.integers(self.crop_range + 1, size=(B, V, 2), dtype=np.int32)
        offset = np.where(moved[:, None], offset, np.int32(self.crop_range // 2))
        return Draws(
            labeled=_stream(self.seed, _LABELED, self.num_labeled, step * B, B),
            unlabeled=_stream(
                self.seed, _UNLABELED, self.num_unlabeled, step * B * mu, B * mu
            ).reshape(B, mu),
            flip=flip,
            offset=offset,
            op=op,
            value=value,
            affine=operations.coefficients(op, value, self.image_size),
            cutout=_cutout_boxes(rng, (B, A), self.image_size),
            policy=self.draw_for_policy(step),
        )

    def draw_versions(self, step: int, versions: int) -> np.ndarray:
        """Draws the version of each view of a step (0-based): int32 [B, V] in 0..versions−1."""
        rng = _generator(self.seed, _VERSIONS, step)
        size = self.batch_size, len(self.layout.kinds)
        return rng.integers(versions, size=size, dtype=np.int32)

    def draw_for_policy(self, step: int) -> Any:
        """Makes the policy's own draws of one step (0-based), a tree of arrays [B, ...]."""
        if self.policy_draws is None:
            return ()
        rng = _generator(self.seed, _POLICY, step)
        return self.policy_draws(rng, self.batch_size, self.layout.mu)


def _generator(seed: int, stream: int, count: int) -> np.random.Generator:
    """Creates a counter-based generator, independent for each (seed, stream, count)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, count))))


def _permutation(seed: int, stream: int, size: int, epoch: int) -> np.ndarray:
    return _generator(seed, stream, epoch).permutation(size).astype(np.int32)


_kept_permutation = functools.lru_cache(maxsize=8)(_permutation)


def _stream(seed: int, stream: int, size: int, start: int, count: int) -> np.ndarray:
    """Returns `count` items, from `start` on, of an endless sequence of permutations of 0..size−1.

    Returns int32 [count].
    """
    if count == 0:
        return np.zeros(0, np.int32)
    first, last = start // size, (start + count - 1) // size
    # Other steps use only the first and the last epoch. With few labels a step has many epochs
    # between them; caching those would push the long permutations out of the cache.
    epochs = [
        (_kept_permutation if e in (first, last) else _permutation)(seed, stream, size, e)
        for e in range(first, last + 1)
    ]
    return np.concatenate(epochs)[start - first * size :][:count]


def _cutout_boxes(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Draws boxes of side U(0, 0.5)·size around a uniform center, clipped at the border.

    The corners are rounded as in the field's reference code, which draws with PIL's
    `ImageDraw.rectangle` (both corners inclusive).

    Returns int32 [*shape, 4].
    """
    side = rng.uniform(0.0, CUTOUT_MAX_SIDE, shape)[..., None] * size
    center = rng.uniform(0.0, size, (*shape, 2))
    low = np.floor(np.maximum(center - side / 2, 0.0))
    high = np.minimum(np.floor(low + side) + 1, size)
    return np.concatenate([low, high], -1).astype(np.int32)
