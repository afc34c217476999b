"""What happens in a step, as data: which images, and every random draw of their augmentation.

Nothing downstream draws random numbers. The draws of a step are a function of (seed, step) and
cover the whole global batch; hosts and devices take their rows of them. So the number of hosts and
devices and the input backend cannot change a run, and a resumed run needs no iterator state.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from layermatch_jax.data import operations

CUTOUT_MAX_SIDE = 0.5  # of the image's side

# Independent streams of random numbers: the second word of the generator's key.
_LABELED, _UNLABELED, _AUGMENT = range(3)

_LOWEST, _HIGHEST = np.array([limits for _, *limits in operations.RANDAUGMENT], np.float32).T


class Draws(NamedTuple):
    """One step's choices for the global batch: B labelled rows with μ unlabelled images each.

    View v = 0 is the labelled image's weak view, 1..μ are the weak and μ+1..2μ the strong views of
    the row's unlabelled images.
    """

    labeled: np.ndarray  # [B] int32, positions in the labelled set
    unlabeled: np.ndarray  # [B, μ] int32, positions in the unlabelled set
    flip: np.ndarray  # [B, 1 + 2μ] bool, mirrored left-right
    offset: np.ndarray  # [B, 1 + 2μ, 2] int32, (y, x) of the crop in the padded image, pixels
    op: np.ndarray  # [B, μ, n] int32, operations of the strong view in order, into RANDAUGMENT
    value: np.ndarray  # [B, μ, n] float32, their magnitudes, in the operation's own unit
    affine: np.ndarray  # [B, μ, n, 6] int32, `operations.coefficients` of these
    cutout: np.ndarray  # [B, μ, 4] int32, box (y0, x0, y1, x1), half-open, pixels

    def rows(self, rows: slice) -> "Draws":
        """One host's share of the batch."""
        return Draws(*(x[rows] for x in self))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The settings that draws depend on, apart from the step. All sizes are global."""

    seed: int
    num_labeled: int
    num_unlabeled: int
    batch_size: int  # B
    unlabeled_ratio: int  # μ; 0 for supervised training
    image_size: int  # side after the crop, pixels
    crop_range: int  # stored side + 2 · padding − image_size: offsets are in 0..crop_range, pixels
    flip: bool
    randaugment_ops: int  # n

    def draw(self, step: int) -> Draws:
        """The draws of one step (0-based); a pure function of the settings and the step."""
        B, mu, n = self.batch_size, self.unlabeled_ratio, self.randaugment_ops
        rng = _generator(self.seed, _AUGMENT, step)
        flip = rng.random((B, 1 + 2 * mu)) < 0.5
        op = rng.integers(len(_LOWEST), size=(B, mu, n), dtype=np.int32)
        level = rng.random((B, mu, n), np.float32)
        value = _LOWEST[op] + (_HIGHEST - _LOWEST)[op] * level
        return Draws(
            labeled=_stream(self.seed, _LABELED, self.num_labeled, step * B, B),
            unlabeled=_stream(
                self.seed, _UNLABELED, self.num_unlabeled, step * B * mu, B * mu
            ).reshape(B, mu),
            flip=flip & self.flip,
            offset=rng.integers(self.crop_range + 1, size=(B, 1 + 2 * mu, 2), dtype=np.int32),
            op=op,
            value=value,
            affine=operations.coefficients(op, value, self.image_size),
            cutout=_cutout_boxes(rng, (B, mu), self.image_size),
        )


def _generator(seed: int, stream: int, count: int) -> np.random.Generator:
    """A counter-based generator: cheap to start anywhere, independent for each (stream, count)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, count))))


def _permutation(seed: int, stream: int, size: int, epoch: int) -> np.ndarray:
    return _generator(seed, stream, epoch).permutation(size).astype(np.int32)


_kept_permutation = functools.lru_cache(maxsize=8)(_permutation)


def _stream(seed: int, stream: int, size: int, start: int, count: int) -> np.ndarray:
    """Items start..start+count of the endless stream of one permutation of 0..size−1 after another.

    Returns int32 [count].
    """
    if count == 0:
        return np.zeros(0, np.int32)
    first, last = start // size, (start + count - 1) // size
    # Only the first and the last epoch reach into other steps. With few labels a step has many
    # epochs between them; kept, they would push the long permutations out of the cache.
    epochs = [
        (_kept_permutation if e in (first, last) else _permutation)(seed, stream, size, e)
        for e in range(first, last + 1)
    ]
    return np.concatenate(epochs)[start - first * size :][:count]


def _cutout_boxes(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Boxes of side U(0, 0.5)·size around a uniform centre, cut off at the border.

    The corners are rounded as in the field's reference code, which draws with PIL's
    `ImageDraw.rectangle` (both corners inclusive).

    Returns int32 [*shape, 4].
    """
    side = rng.uniform(0.0, CUTOUT_MAX_SIDE, shape)[..., None] * size
    centre = rng.uniform(0.0, size, (*shape, 2))
    low = np.floor(np.maximum(centre - side / 2, 0.0))
    high = np.minimum(np.floor(low + side) + 1, size)
    return np.concatenate([low, high], -1).astype(np.int32)
