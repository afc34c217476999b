import dataclasses

import jax
import numpy as np
import pytest

from layermatch_jax.data import sampler as sampler_lib
from layermatch_jax.data.augment import operations
from layermatch_jax.data.sampler import Draws, Sampler
from layermatch_jax.views import Layout, Views

SAMPLER = Sampler(
    seed=3,
    num_labeled=10,
    num_unlabeled=50,
    batch_size=8,
    layout=Layout(Views(), 3),
    image_size=32,
    crop_range=8,
    flip=True,
    randaugment_ops=2,
)


def sampler(**changed):
    return dataclasses.replace(SAMPLER, **changed)


def many(steps=40, **changed):
    """The draws of several steps, joined along the rows. B = 64: 2,560 rows."""
    s = sampler(**{"batch_size": 64, **changed})
    return Draws(*map(np.concatenate, zip(*(s.draw(step) for step in range(steps)), strict=True)))


def test_shapes_and_types():
    expected = {
        "labeled": ((8,), np.int32),
        "unlabeled": ((8, 3), np.int32),
        "flip": ((8, 7), np.bool_),
        "offset": ((8, 7, 2), np.int32),
        "op": ((8, 3, 2), np.int32),
        "value": ((8, 3, 2), np.float32),
        "affine": ((8, 3, 2, 6), np.int32),
        "cutout": ((8, 3, 4), np.int32),
    }
    found = SAMPLER.draw(5)._asdict()
    assert found.pop("policy") == ()  # this sampler's policy has no draws
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == expected


def own_draws(rng, batch_size, mu):
    return {"labeled": rng.normal(size=batch_size), "other": [rng.random((batch_size, mu))]}


def leaves(draws):
    """The arrays of draws by their names, the policy's own among them."""
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(draws)}


def test_a_function_of_seed_and_step():
    other = sampler()  # another object, asked for other steps before
    other.draw(2)
    other.draw(1_000_000)
    for a, b in zip(SAMPLER.draw(7), other.draw(7), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"step": 8}, {"step": 7 + 2**32}])
def test_another_seed_or_step_draws_anew(changed):
    step = changed.pop("step", 7)
    before = leaves(sampler(policy_draws=own_draws).draw(7))
    after = leaves(sampler(policy_draws=own_draws, **changed).draw(step))
    assert before.keys() == after.keys()
    assert len(before) == 8 + 2  # all fields, and the policy's two
    for name in before:
        assert (before[name] != after[name]).any(), name


def test_labeled_and_unlabeled_orders_are_independent():
    same = sampler(num_labeled=24, num_unlabeled=24).draw(0)
    labeled = np.concatenate([sampler(num_labeled=24).draw(s).labeled for s in range(3)])
    assert (labeled != same.unlabeled.ravel()).any()


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (10, 25), (1, 3), (7, 64)])
def test_streams_are_one_permutation_after_another(size, batch):
    s = sampler(num_labeled=size, num_unlabeled=size, batch_size=batch)
    draws = [s.draw(step) for step in range(12)]
    for stream in (
        np.concatenate([d.labeled for d in draws]),
        np.concatenate([d.unlabeled.ravel() for d in draws]),
    ):
        epochs = stream[: len(stream) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len(set(stream[len(epochs) * size :])) == len(stream) - len(epochs) * size
        if size > 1:
            assert len(np.unique(epochs, axis=0)) > 1, "every epoch in the same order"


def test_a_stream_does_not_depend_on_how_it_is_cut():
    whole = sampler(batch_size=24).draw(0)
    parts = [sampler(batch_size=6).draw(step) for step in range(4)]
    np.testing.assert_array_equal(whole.labeled, np.concatenate([d.labeled for d in parts]))
    np.testing.assert_array_equal(whole.unlabeled, np.concatenate([d.unlabeled for d in parts]))


def permutations(seed, stream, size, first, last):
    """Joins permutations, each from its own generator, without a cache."""
    words = [(seed, stream, epoch) for epoch in range(first, last)]
    generators = [np.random.Generator(np.random.Philox(np.random.SeedSequence(w))) for w in words]
    return np.concatenate([g.permutation(size) for g in generators])


@pytest.mark.parametrize(("size", "batch"), [(10, 64), (10, 20), (7, 3), (500, 64)])
def test_streams_are_those_of_their_generators(size, batch):
    s = sampler(num_labeled=size, num_unlabeled=size, batch_size=batch)
    for step in (4, 5, 3):
        draws = s.draw(step)
        for stream, drawn in ((0, draws.labeled), (1, draws.unlabeled.reshape(-1))):
            start, stop = step * len(drawn), (step + 1) * len(drawn)
            first = start // size
            expected = permutations(3, stream, size, first, (stop - 1) // size + 1)
            expected = expected[start - first * size : stop - first * size]
            np.testing.assert_array_equal(drawn, expected)


def test_the_long_permutation_is_made_once_however_few_labels_there_are(monkeypatch):
    made, original = [], sampler_lib._generator
    monkeypatch.setattr(
        sampler_lib, "_generator", lambda *key: made.append(key[1:]) or original(*key)
    )
    sampler_lib._kept_permutation.cache_clear()
    s = sampler(
        seed=11,
        num_labeled=10,
        num_unlabeled=126_689,
        batch_size=64,
        layout=Layout(Views(), 7),
    )
    for step in range(20):  # 20 · 64 · 7 = 8,960 of the 126,689 unlabeled images
        s.draw(step)
    labeled, unlabeled = ([epoch for stream, epoch in made if stream == n] for n in (0, 1))
    assert unlabeled == [0]
    assert sorted(labeled) == list(range(128))  # 20 · 64 of 10 images: 128 epochs, each made once


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_have_the_global_draws(hosts):
    draws, each = sampler(policy_draws=own_draws).draw(11), SAMPLER.batch_size // hosts
    parts = [leaves(draws.rows(slice(h * each, (h + 1) * each))) for h in range(hosts)]
    assert all(part.keys() == leaves(draws).keys() for part in parts)
    assert all(len(x) == each for part in parts for x in part.values())
    assert len(leaves(draws)) == 8 + 2
    for name, whole in leaves(draws).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)


def test_magnitudes_fill_their_ranges():
    draws = many()
    for index, (name, low, high) in enumerate(operations.RANDAUGMENT):
        values = draws.value[draws.op == index]
        assert values.min() >= np.float32(low), name
        assert values.max() <= np.float32(high), name
        # About 1,100 uniform draws: the mean is off by 5 standard errors, 0.2887/sqrt(1100) of
        # the range each, once in 2 million; the ends are reached to 2 %.
        share = (values - low) / (high - low)
        assert abs(share.mean() - 0.5) < 5 * 0.2887 / np.sqrt(len(share)), name
        assert share.min() < 0.02, name
        assert share.max() > 0.98, name


def chi_square(values, categories):
    """Pearson's statistic against the uniform distribution, and its degrees of freedom."""
    count = np.bincount(np.ravel(values), minlength=categories)
    assert len(count) == categories
    expected = count.sum() / categories
    return ((count - expected) ** 2 / expected).sum(), categories - 1


def test_operations_offsets_and_flips_are_uniform():
    draws = many()
    assert draws.op.size == 2_560 * 3 * 2
    for values, categories in (
        (draws.op, 14),
        (draws.op[..., 0] * 14 + draws.op[..., 1], 14 * 14),  # independent of each other
        (draws.offset[..., 0], 9),
        (draws.offset[..., 0] * 9 + draws.offset[..., 1], 81),
        (draws.flip.astype(int), 2),
        (2 * draws.flip[:, 1] + draws.flip[:, 4], 4),  # the two views of an image
    ):
        statistic, freedom = chi_square(values, categories)
        # Mean = freedom, variance = 2 · freedom: five standard deviations up, and not absurdly low.
        assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5
        assert statistic > freedom - 5 * np.sqrt(2 * freedom)


def test_chi_square_can_fail():
    # One of the fourteen comes 30 % too often.
    skewed = np.concatenate([np.arange(14).repeat(1_000), np.full(300, 3)])
    statistic, freedom = chi_square(skewed, 14)
    assert statistic > freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("size", [8, 32, 96])
def test_cutout_boxes(size):
    low, high = np.split(many(image_size=size, steps=10).cutout.reshape(-1, 4), 2, axis=1)
    assert low.min() >= 0
    assert high.max() <= size
    sides = high - low
    assert sides.min() >= 1  # Pillow's corners are inclusive: never empty
    assert sides.max() <= size // 2 + 1
    # A side is uniform up to half the image, and inclusive corners add about half a pixel; of the
    # boxes a quarter or so are cut off at the border.
    inner = sides[((low > 0) & (high < size)).all(1)]
    assert inner.mean() < size / 4 + 1
    assert inner.mean() > size / 4 * 0.75
    assert (low == 0).any()
    assert (high == size).any()


def test_images_that_may_not_be_mirrored():
    never, always_the_same = sampler(flip=False), SAMPLER
    for step in range(20):
        draws = never.draw(step)
        assert not draws.flip.any()
        np.testing.assert_array_equal(draws.offset, always_the_same.draw(step).offset)


def test_no_crop_range():
    assert not sampler(crop_range=0).draw(0).offset.any()


def test_supervised():
    draws = sampler(layout=Layout(Views(), 0)).draw(4)
    assert draws.labeled.shape == (8,)
    assert draws.flip.shape == (8, 1)
    assert draws.offset.shape == (8, 1, 2)
    assert draws.unlabeled.shape == (8, 0)
    assert draws.op.shape == (8, 0, 2)
    assert draws.affine.shape == (8, 0, 2, 6)
    assert draws.cutout.shape == (8, 0, 4)
    np.testing.assert_array_equal(draws.labeled, SAMPLER.draw(4).labeled)
