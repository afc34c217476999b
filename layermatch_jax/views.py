"""Views: the augmented copies of a batch's images that a method uses, by name.

A method names the views that it wants of each labeled and of each unlabeled image. The sampler, the
augmentation and the train step all read that list, so a method may have any number of views.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from layermatch_jax.arrays import Array


class Kind(NamedTuple):
    """How a view is made from an image."""

    moved: bool  # True: random crop, and random flip if dataset.flip; False: center crop
    # Number of RandAugment operations after the crop; Cutout follows. None: the number in the
    # config; 0: neither RandAugment nor Cutout
    operations: int | None


KINDS = {
    "none": Kind(moved=False, operations=0),
    "weak": Kind(moved=True, operations=0),
    "medium": Kind(moved=True, operations=1),
    "strong": Kind(moved=True, operations=None),
}
# The kind of an unlabeled view that the policy makes from other views in the step (Policy.prepare).
MADE = "made"


class Views(NamedTuple):
    """The views that a method wants of labeled and of unlabeled images: {name: key of KINDS}.

    An unlabeled view may also have the kind MADE. Labeled and unlabeled images both need a view
    called "weak", because class centers average its features.
    """

    labeled: Mapping[str, str] = {"weak": "weak"}
    unlabeled: Mapping[str, str] = {"weak": "weak", "strong": "strong"}


class ByView(NamedTuple):
    """Arrays by name of the view, of labeled and of unlabeled images."""

    labeled: dict[str, Shaped[Array, "B ..."]]
    unlabeled: dict[str, Shaped[Array, "μB ..."]]


class Layout(NamedTuple):
    """The order of a row's views in a batch: V = labeled views + μ · unlabeled views.

    A row holds the views of one labeled image, in the order of their names; then, for each
    unlabeled view, that view of the row's μ unlabeled images. So a slice of rows is a complete
    share of the batch.
    """

    views: Views
    mu: int  # μ, unlabeled images per labeled one

    @property
    def drawn(self) -> "Layout":
        """The layout of the views that augmentation makes from images: all except kind MADE."""
        drawn = {name: kind for name, kind in self.views.unlabeled.items() if kind != MADE}
        return Layout(Views(self.views.labeled, drawn), self.mu)

    @property
    def size(self) -> int:
        """V, the number of views in a row."""
        return len(self.views.labeled) + self.mu * len(self.views.unlabeled)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """How each of the V views is made; only for a layout without MADE views (`drawn`)."""
        labeled = [KINDS[kind] for kind in self.views.labeled.values()]
        unlabeled = [KINDS[kind] for kind in self.views.unlabeled.values() for _ in range(self.mu)]
        return (*labeled, *unlabeled)

    @property
    def augmented(self) -> tuple[int, ...]:
        """Positions of the views that RandAugment and Cutout change, ascending; A of them."""
        return tuple(v for v, kind in enumerate(self.kinds) if kind.operations != 0)

    def labeled(self, name: str) -> int:
        """The position of a view of the labeled images."""
        return list(self.views.labeled).index(name)

    def unlabeled(self, name: str) -> slice:
        """The μ positions of a view of the unlabeled images."""
        start = len(self.views.labeled) + self.mu * list(self.views.unlabeled).index(name)
        return slice(start, start + self.mu)

    def only_augmented(self, images) -> list:
        """Selects the augmented views of [B, V, ...], in pieces to be concatenated on axis 1."""
        return [images[:, start:stop] for start, stop, augmented in self._runs() if augmented]

    def with_augmented(self, images, augmented) -> list:
        """Replaces the augmented views of [B, V, ...]; returns pieces as `only_augmented` does.

        Args:
          images: [B, V, ...], of any array library.
          augmented: [B, A, ...], the replacements.
        """
        pieces, done = [], 0
        for start, stop, replaced in self._runs():
            count = stop - start
            pieces.append(augmented[:, done : done + count] if replaced else images[:, start:stop])
            done += count if replaced else 0
        return pieces

    def _runs(self) -> list[tuple[int, int, bool]]:
        """Groups neighboring views that are alike: (start, stop, whether they are augmented)."""
        alike = [kind.operations != 0 for kind in self.kinds]
        starts = [v for v in range(len(alike)) if v == 0 or alike[v] != alike[v - 1]]
        return [(a, b, alike[a]) for a, b in itertools.pairwise([*starts, len(alike)])]

    def split(self, x: Shaped[Array, "B V ..."]) -> ByView:
        """Splits a batch into its views, each in row order."""
        rest = x.shape[2:]
        return ByView(
            {name: x[:, self.labeled(name)] for name in self.views.labeled},
            {
                name: x[:, self.unlabeled(name)].reshape(len(x) * self.mu, *rest)
                for name in self.views.unlabeled
            },
        )

    def join(self, by_view: ByView) -> jax.Array:
        """The inverse of `split`: [B, V, ...] by row."""
        labeled = [by_view.labeled[name][:, None] for name in self.views.labeled]
        rows = len(labeled[0])
        unlabeled = [
            by_view.unlabeled[name].reshape(rows, self.mu, *labeled[0].shape[2:])
            for name in self.views.unlabeled
        ]
        return jnp.concatenate([*labeled, *unlabeled], axis=1)
