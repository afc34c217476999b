"""Batches of the tf.data pipeline, compared with NumPy and Pillow."""

import jax
import numpy as np
import pytest
from image_builders import all_of, fake_run
from PIL import Image as PillowImage
from PIL import ImageOps

from layermatch_jax import config as config_lib
from layermatch_jax.batches import TrainBatch
from layermatch_jax.data import pipeline
from layermatch_jax.data.augment import device
from layermatch_jax.data.augment.operations import NAMES


def prepared(**fields):
    return fake_run(config_lib.base(), **{"augment.randaugment_ops": 1} | fields)


def batches(partition, sampler, steps, rows=slice(None)):
    return list(pipeline.train_batches(partition, sampler, padding=1, steps=steps, rows=rows))


def view(image, offset, flip):
    """Makes one weak view step by step: pads, crops, mirrors."""
    y, x = offset
    cut = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")[y : y + 8, x : x + 8]
    return cut[:, ::-1] if flip else cut


def test_a_batch_holds_what_was_drawn():
    _, source, partition, sampler = prepared()
    (batch,) = batches(partition, sampler, range(5, 6))
    draws = sampler.draw(5)
    pixels = source.train.read(np.arange(len(source.train.labels)))
    labeled = np.array(partition.record["indices"])
    assert batch.images.shape == (4, 5, 8, 8, 3)
    assert batch.images.dtype == np.uint8
    compared = 0
    for b in range(4):
        first = labeled[draws.labeled[b]]
        assert batch.labels[b] == source.train.labels[first]
        np.testing.assert_array_equal(
            batch.images[b, 0], view(pixels[first], draws.offset[b, 0], draws.flip[b, 0])
        )
        for j in range(2):
            index = draws.unlabeled[b, j]
            assert batch.unlabeled_indices[b, j] == index
            known = index not in partition.record["indices"]  # labeled images test no pseudo-label
            assert batch.true_labels[b, j] == (source.train.labels[index] if known else -1)
            weak, strong = 1 + j, 3 + j
            np.testing.assert_array_equal(
                batch.images[b, weak],
                view(pixels[index], draws.offset[b, weak], draws.flip[b, weak]),
            )
            # Operations that Pillow does in one call, then the gray box.
            name = NAMES[draws.op[b, j, 0]]
            if name not in ("identity", "autocontrast", "equalize"):
                continue
            expected = view(pixels[index], draws.offset[b, strong], draws.flip[b, strong])
            if name != "identity":
                image = PillowImage.fromarray(np.ascontiguousarray(expected))
                expected = np.array(getattr(ImageOps, name)(image))
            y0, x0, y1, x1 = draws.cutout[b, j]
            expected = expected.copy()
            expected[y0:y1, x0:x1] = (125, 123, 114)
            np.testing.assert_array_equal(batch.images[b, strong], expected)
            compared += 1
    assert compared >= 1, "choose a step in which one of these operations is drawn"


def test_hosts_share_one_batch_and_any_step_can_be_the_first():
    _, _, partition, sampler = prepared()
    whole = batches(partition, sampler, range(3))
    halves = [batches(partition, sampler, range(3), rows=slice(r, r + 2)) for r in (0, 2)]
    later = batches(partition, sampler, range(2, 3))
    for step, batch in enumerate(whole):
        for field, (first, second) in zip(
            batch, zip(*(h[step] for h in halves), strict=True), strict=True
        ):
            np.testing.assert_array_equal(field, np.concatenate([first, second]))
    for a, b in zip(whole[2], later[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_devices_batches_are_the_same(weight):
    fields = {"unsupervised_weight": weight, "augment.randaugment_ops": 3, "batch_size": 16}
    _, _, partition, sampler = prepared(**fields)
    data = device.ResidentData(
        *(all_of(partition.labeled), partition.labeled.labels),
        *(all_of(partition.unlabeled), partition.unlabeled.labels),
    )

    @jax.jit
    def make_batch(data, draws):
        return device.make_batch(data, draws, sampler.layout, 1, 8)

    for step, expected in zip(range(3, 6), batches(partition, sampler, range(3, 6)), strict=True):
        batch = make_batch(data, sampler.draw(step))
        for name in TrainBatch._fields[:-1]:  # without the policy's own draws, which are empty
            a, b = getattr(batch, name), getattr(expected, name)
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_supervised_training_loads_no_unlabeled_image():
    _, _, partition, sampler = prepared(unsupervised_weight=0.0)

    def refuse(indices):
        assert len(indices) == 0
        return np.empty((0, 12, 12, 3), np.uint8)

    partition = partition._replace(unlabeled=partition.unlabeled._replace(read=refuse))
    (batch,) = batches(partition, sampler, range(1))
    assert batch.images.shape == (4, 1, 8, 8, 3)
    assert batch.unlabeled_indices.shape == (4, 0)


@pytest.mark.parametrize("size", [7, 50, 64])
def test_evaluation_batches_cover_the_split_once(size):
    _, source, _, _ = prepared()
    images = source.test
    pixels = images.read(np.arange(len(images.labels)))
    seen = list(pipeline.eval_batches(images, size, 8))
    assert {batch.images.shape for batch in seen} == {(size, 8, 8, 3)}
    kept = np.concatenate([batch.mask for batch in seen]) > 0
    np.testing.assert_array_equal(
        np.concatenate([batch.images for batch in seen])[kept], pixels[:, 2:10, 2:10]
    )
    np.testing.assert_array_equal(
        np.concatenate([batch.labels for batch in seen])[kept], images.labels
    )


def test_any_error_of_reading_is_raised_as_it_is():
    # At the end of a process the decoding threads have ended. TensorFlow would print pages of
    # traceback and raise its own error.
    _, _, partition, sampler = prepared()
    wanted = np.unique(sampler.draw(2).unlabeled)[-1]

    def read(indices):
        if wanted in indices:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        return partition.unlabeled.read(indices)

    broken = partition._replace(unlabeled=partition.unlabeled._replace(read=read))
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        batches(broken, sampler, range(5))
