"""Views of every kind in any order: positions in a batch, draws and pixels."""

import jax
import numpy as np
import pytest
from image_builders import all_of
from pipeline_test import batches, prepared, view
from sampler_test import SAMPLER, many

from layermatch_jax.batches import TrainBatch
from layermatch_jax.data import pipeline
from layermatch_jax.data.augment import device as augment_jax
from layermatch_jax.data.augment.operations import CUTOUT_COLOR, NAMES
from layermatch_jax.views import MADE, Layout, Views

VIEWS = Views(
    labeled={"weak": "weak", "hard": "strong"},
    unlabeled={"first": "strong", "weak": "weak", "middle": "medium", "plain": "none"},
)
MU = 2
LAYOUT = Layout(VIEWS, MU)
# By hand: 2 views of the labeled image; then two of each, of the row's two unlabeled images.
NAMES_BY_POSITION = [
    *("weak", "hard"),
    *("first", "first", "weak", "weak", "middle", "middle", "plain", "plain"),
]
KIND = {"weak": "weak", "hard": "strong", "first": "strong", "middle": "medium", "plain": "none"}
AUGMENTED = [1, 2, 3, 6, 7]


def test_positions_of_the_views():
    assert len(LAYOUT.kinds) == len(NAMES_BY_POSITION) == 10
    assert list(LAYOUT.augmented) == AUGMENTED
    for name in VIEWS.labeled:
        assert NAMES_BY_POSITION[:2].index(name) == LAYOUT.labeled(name)
    for name in VIEWS.unlabeled:
        assert NAMES_BY_POSITION[2:][LAYOUT.unlabeled(name).start - 2] == name
        assert NAMES_BY_POSITION[LAYOUT.unlabeled(name)] == [name] * MU


def test_an_array_is_split_by_view_in_row_order():
    x = np.arange(3 * 10).reshape(3, 10, 1)  # 3 rows; row r has 10r to 10r + 9
    by_view = LAYOUT.split(x)
    assert {name: a.ravel().tolist() for name, a in by_view.labeled.items()} == {
        "weak": [0, 10, 20],
        "hard": [1, 11, 21],
    }
    assert {name: a.ravel().tolist() for name, a in by_view.unlabeled.items()} == {
        "first": [2, 3, 12, 13, 22, 23],
        "weak": [4, 5, 14, 15, 24, 25],
        "middle": [6, 7, 16, 17, 26, 27],
        "plain": [8, 9, 18, 19, 28, 29],
    }


def test_views_that_a_policy_makes_are_not_drawn_and_join_the_others():
    unlabeled = {"first": "strong", "mixed": MADE, "weak": "weak"}
    layout = Layout(VIEWS._replace(unlabeled=unlabeled), MU)
    assert layout.drawn == Layout(Views(VIEWS.labeled, {"first": "strong", "weak": "weak"}), MU)
    assert LAYOUT.drawn == LAYOUT
    assert (layout.size, layout.drawn.size, LAYOUT.size) == (8, 6, 10)
    drawn = layout.drawn.split(np.arange(3 * 6).reshape(3, 6, 1))
    mixed = -np.arange(3 * 2).reshape(6, 1)
    joined = layout.join(drawn._replace(unlabeled={"mixed": mixed, **drawn.unlabeled}))
    assert joined[..., 0].tolist() == [
        [0, 1, 2, 3, 0, -1, 4, 5],
        [6, 7, 8, 9, -2, -3, 10, 11],
        [12, 13, 14, 15, -4, -5, 16, 17],
    ]
    np.testing.assert_array_equal(layout.split(joined).unlabeled["mixed"], mixed)


def test_augmented_views_are_taken_out_and_put_back():
    x = np.arange(2 * 10).reshape(2, 10)
    taken = np.concatenate(LAYOUT.only_augmented(x), axis=1)
    assert taken.tolist() == [[1, 2, 3, 6, 7], [11, 12, 13, 16, 17]]
    back = np.concatenate(LAYOUT.with_augmented(x, -taken), axis=1)
    assert back[1].tolist() == [10, -11, -12, -13, 14, 15, -16, -17, 18, 19]


@pytest.mark.parametrize("flip", [True, False])
def test_each_kind_of_view_has_its_own_draws(flip):
    draws = many(layout=LAYOUT, randaugment_ops=3, flip=flip)  # 2,560 rows
    kinds = np.array([KIND[name] for name in NAMES_BY_POSITION])
    assert draws.flip.shape == (2560, 10)
    assert draws.offset.shape == (2560, 10, 2)
    assert draws.op.shape == (2560, 5, 3)
    # none: the center, never mirrored. crop_range is 8, so offsets are 0 to 8.
    assert (draws.offset[:, kinds == "none"] == 4).all()
    assert not draws.flip[:, kinds == "none"].any()
    moved = kinds != "none"
    # A share of 2,560: 5 standard errors of a half are 5 · 0.5 / sqrt(2560) = 0.05.
    np.testing.assert_allclose(draws.flip[:, moved].mean(0), 0.5 if flip else 0.0, atol=0.05)
    for v in np.flatnonzero(moved):
        assert set(np.unique(draws.offset[:, v])) == set(range(9))
    # medium: any operation, then the identity; strong: any three.
    for a, v in enumerate(AUGMENTED):
        drawn = draws.op[:, a]
        own = 1 if kinds[v] == "medium" else 3
        for i in range(own):
            assert set(drawn[:, i]) == set(range(len(NAMES)))
        assert (drawn[:, own:] == NAMES.index("identity")).all()
        # The identity's map: the pixel itself, looked up at its center.
        unmoved = [2**16, 0, 2**15, 0, 2**16, 2**15]
        assert (draws.affine[:, a, own:] == unmoved).all()
    # No two views share their draws.
    for a, b in ((0, 1), (2, 3), (4, 5), (6, 7)):
        assert (draws.offset[:, a] != draws.offset[:, b]).any(axis=-1).mean() > 0.9


def test_the_classic_views_keep_their_draws():
    """Compares with numbers of commit 49b359c, which only supported 1 + 2μ views."""
    draws = SAMPLER.draw(5)
    assert draws.labeled.tolist() == [8, 7, 2, 4, 5, 0, 9, 3]
    assert draws.unlabeled[7].tolist() == [46, 37, 5]
    assert draws.flip[0].tolist() == [False, False, True, False, False, False, False]
    assert draws.flip[7].tolist() == [False, True, True, False, False, True, False]
    assert draws.offset[7].tolist() == [
        [6, 5], [3, 3], [1, 2], [3, 2], [3, 3], [2, 7], [7, 1],
    ]  # fmt: skip
    assert draws.op[7].tolist() == [[1, 7], [13, 4], [9, 3]]
    assert draws.value[7].tolist() == [
        [0.43608585000038147, 10.198402404785156],
        [0.1363772749900818, 0.9925464391708374],
        [0.23313802480697632, 0.43168434500694275],
    ]
    assert draws.affine[7, 0, 1].tolist() == [64501, -11604, 228673, 11604, 64501, -131039]
    assert draws.cutout[7].tolist() == [[19, 2, 20, 3], [14, 13, 16, 15], [11, 14, 22, 25]]
    # And of all rows: the numbers of each field, added up.
    sums = {"flip": 20, "offset": 415, "op": 332, "affine": 10379695, "cutout": 1488}
    assert {name: getattr(draws, name).sum() for name in sums} == sums


# ---------------------------------------------------------------- pixels


def in_layout(mu=MU, **fields):
    config, source, partition, _ = prepared(unlabeled_ratio=max(mu, 1), **fields)
    return source, partition, pipeline.create_sampler(config, partition, Layout(VIEWS, mu))


def test_a_batch_holds_the_views_that_were_drawn():
    source, partition, sampler = in_layout(batch_size=32)
    (batch,) = batches(partition, sampler, range(2, 3))
    draws, labeled = sampler.draw(2), np.array(partition.record["indices"])
    pixels = all_of(source.train)
    assert batch.images.shape == (32, 10, 8, 8, 3)
    compared = dict.fromkeys(KIND, 0)
    for b in range(32):
        for v, name in enumerate(NAMES_BY_POSITION):
            index = labeled[draws.labeled[b]] if v < 2 else draws.unlabeled[b, v % 2]
            image = pixels[index]
            if KIND[name] == "none":  # as in evaluation: the middle 8 of 12 pixels
                expected = image[2:10, 2:10]
            else:
                expected = view(image, draws.offset[b, v], draws.flip[b, v]).copy()
            if v in AUGMENTED:
                a = AUGMENTED.index(v)
                if (draws.op[b, a] != NAMES.index("identity")).any():
                    continue  # the operations have tests of their own
                y0, x0, y1, x1 = draws.cutout[b, a]
                expected[y0:y1, x0:x1] = CUTOUT_COLOR
            np.testing.assert_array_equal(batch.images[b, v], expected, err_msg=f"{name} {b}")
            compared[name] += 1
    # prepared() has one operation a view, which is the identity in one of 14 cases.
    assert min(compared.values()) >= 1, f"choose another step: {compared}"


@pytest.mark.parametrize("mu", [MU, pytest.param(0, marks=pytest.mark.slow)])
def test_the_devices_batches_are_the_same(mu):
    fields = {"augment.randaugment_ops": 3, "batch_size": 16}
    _, partition, sampler = in_layout(mu, **fields)
    data = augment_jax.ResidentData(
        *(all_of(partition.labeled), partition.labeled.labels),
        *(all_of(partition.unlabeled), partition.unlabeled.labels),
    )

    @jax.jit
    def make_batch(data, draws):
        return augment_jax.make_batch(data, draws, sampler.layout, 1, 8)

    for step, expected in zip(range(3, 5), batches(partition, sampler, range(3, 5)), strict=True):
        batch = make_batch(data, sampler.draw(step))
        assert expected.images.shape == (16, 2 + 4 * mu, 8, 8, 3)
        for name in TrainBatch._fields[:-1]:  # without the policy's own draws, which are empty
            a, b = getattr(batch, name), getattr(expected, name)
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            np.testing.assert_array_equal(a, b, err_msg=name)
