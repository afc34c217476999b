import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from layermatch_jax.data import folder, sources, tfds_sets
from layermatch_jax.errors import InputError

RNG = np.random.default_rng(0)


def settings(name, data_dir="", stored_size=8, **changed):
    return ConfigDict(
        {
            "name": name,
            "data_dir": str(data_dir),
            "stored_size": stored_size,
            "class_list": "",
            "drop_test_duplicates": False,
            "num_classes": 10,
            **changed,
        }
    )


def all_of(images):
    return images.read(np.arange(len(images.labels)))


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# ---- Images ----


def test_take_and_concatenate_compose():
    pixels = noise(10, 4, 4, 3)
    a = sources.from_array(pixels[:6], np.arange(6))
    b = sources.take(sources.from_array(pixels, np.arange(10)), np.array([9, 7, 8, 6]))
    both = sources.concatenate(a, b)
    assert both.labels.tolist() == [0, 1, 2, 3, 4, 5, 9, 7, 8, 6]
    assert both.labels.dtype == np.int32
    for wanted in ([0, 9, 5, 6, 6, 1], [1, 2], [7, 6], []):
        got = both.read(np.array(wanted, np.int32))
        np.testing.assert_array_equal(got, pixels[both.labels[np.array(wanted, int)]])
    view = sources.take(both, np.array([6, 0]))
    np.testing.assert_array_equal(all_of(view), pixels[[9, 0]])
    assert view.labels.tolist() == [9, 0]


def test_channel_statistics():
    pixels = noise(300, 5, 5, 3) // np.array([1, 2, 5], np.uint8)
    mean, std = sources.channel_statistics(sources.from_array(pixels, None))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 1, 2)), rtol=1e-12)
    assert all(type(x) is float for x in (*mean, *std))

    some, _ = sources.channel_statistics(sources.from_array(pixels, None), limit=100)
    np.testing.assert_allclose(some, (pixels[::3] / 255).mean((0, 1, 2)), rtol=1e-12)


def test_channel_statistics_of_constant_images_can_be_divided_by():
    pixels = np.full((3, 4, 4, 3), 51, np.uint8)
    mean, std = sources.channel_statistics(sources.from_array(pixels, None))
    assert mean == (0.2, 0.2, 0.2)
    assert std == (1 / 255,) * 3
    with pytest.raises(ValueError, match="needs an image"):
        sources.channel_statistics(sources.from_array(pixels[:0], None))


# ---- load ----


def test_unknown_name_says_the_nearest():
    with pytest.raises(InputError, match=r"'cifar_10'. Did you mean 'cifar10'\?.*cifar100, digits"):
        sources.load(settings("cifar_10"))
    with pytest.raises(InputError, match=r"'mnist'. There are: cifar10"):
        sources.load(settings("mnist"))
    with pytest.raises(InputError, match=r"stored_size=0.*at least 1"):
        sources.load(settings("digits", stored_size=0))


def test_digits_are_scikit_learns():
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    made = sources.load(settings("digits", stored_size=8))
    assert made.class_names == tuple("0123456789")
    assert made.unlabeled is None
    assert len(made.train.labels) == 1297
    assert np.bincount(made.test.labels).tolist() == [50] * 10

    # Class 0 has 178 images; a fifth of them, say, is every 3.56th.
    zeros = np.flatnonzero(digits.target == 0)[[0, 3, 7, 10, 14, 17]]
    got = all_of(made.test)[made.test.labels == 0][:6]
    expected = np.repeat(np.round(digits.images[zeros] * 15.9375)[..., None], 3, -1)
    np.testing.assert_array_equal(got, expected)

    # Every image is in one of the two, once, with its label.
    def keys(images, labels):
        return sorted((int(c), x.tobytes()) for x, c in zip(images, labels, strict=True))

    grey = np.concatenate([all_of(made.train), all_of(made.test)])[..., 0]
    labels = np.concatenate([made.train.labels, made.test.labels])
    want = np.round(digits.images * 15.9375).astype(np.uint8)
    assert keys(grey, labels) == keys(want, digits.target)


def test_digits_upsampled():
    small, large = (sources.load(settings("digits", stored_size=s)) for s in (8, 32))
    assert small.train.labels.tolist() == large.train.labels.tolist()
    got = large.train.read(np.array([5]))[0]
    assert got.shape == (32, 32, 3)
    image = Image.fromarray(small.train.read(np.array([5]))[0, :, :, 0])
    want = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    for channel in range(3):
        np.testing.assert_array_equal(got[..., channel], want)


@pytest.mark.parametrize("classes", [2, 7, 10])
def test_fake_is_deterministic_and_learnable(classes):
    a, b = (sources.load(settings("fake", num_classes=classes)) for _ in range(2))
    train, test = all_of(a.train), all_of(a.test)
    np.testing.assert_array_equal(train, all_of(b.train))
    assert (train.shape, train.dtype, test.shape) == ((400, 8, 8, 3), np.uint8, (100, 8, 8, 3))
    assert len(a.class_names) == classes
    assert np.ptp(np.bincount(a.train.labels, minlength=classes)) <= 1
    means = np.stack([train[a.train.labels == c].mean(0) for c in range(classes)])
    nearest = ((test[:, None] - means) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == a.test.labels).mean() > 0.9
    assert len(np.unique(train.reshape(400, -1), axis=0)) == 400


def test_fake_needs_some_classes():
    with pytest.raises(InputError, match=r"num_classes=1, allowed 2\.\.100"):
        sources.load(settings("fake", num_classes=1))


# ---- npz ----


def npz_arrays(**changed):
    made = {
        "train_images": noise(12, 8, 8, 3),
        "train_labels": np.arange(12) % 3,
        "test_images": noise(5, 8, 8, 3),
        "test_labels": np.array([2, 1, 0, 0, 1], np.uint8),
        **changed,
    }
    return {key: value for key, value in made.items() if value is not None}


def test_npz_round_trip(tmp_path):
    data = npz_arrays(unlabeled_images=noise(7, 8, 8, 3), class_names=["cat", "dog", "owl"])
    np.savez(tmp_path / "data.npz", **data)
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    assert made.class_names == ("cat", "dog", "owl")
    for part in ("train", "test"):
        images = getattr(made, part)
        np.testing.assert_array_equal(all_of(images), data[f"{part}_images"])
        np.testing.assert_array_equal(images.labels, data[f"{part}_labels"])
        assert images.labels.dtype == np.int32
    np.testing.assert_array_equal(all_of(made.unlabeled), data["unlabeled_images"])
    assert made.unlabeled.labels.tolist() == [-1] * 7


def test_npz_grey_and_resized(tmp_path):
    data = npz_arrays(train_images=noise(12, 28, 28), test_images=noise(5, 16, 16, 3))
    np.savez_compressed(tmp_path / "data.npz", **data)
    made = sources.load(settings("npz", tmp_path / "data.npz", stored_size=16))
    assert made.class_names == ("0", "1", "2")
    assert made.unlabeled is None
    want = Image.fromarray(data["train_images"][3]).resize((16, 16), Image.Resampling.BILINEAR)
    got = made.train.read(np.array([3]))[0]
    np.testing.assert_array_equal(got, np.asarray(want.convert("RGB")))
    np.testing.assert_array_equal(all_of(made.test), data["test_images"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_images": None, "test_labels": None}, "lacks test_images, test_labels; it has"),
        ({"train_images": np.zeros((12, 8, 8, 3))}, r"train_images is float64 \[12, 8, 8, 3\]"),
        ({"test_images": noise(5, 8, 9, 3)}, r"test_images is uint8 \[5, 8, 9, 3\].*square"),
        ({"test_images": noise(5, 8, 8, 4)}, r"test_images is uint8 \[5, 8, 8, 4\]"),
        ({"test_images": noise(0, 8, 8, 3), "test_labels": np.zeros(0, int)}, "at least one"),
        ({"unlabeled_images": noise(5, 64)}, r"unlabeled_images is uint8 \[5, 64\]"),
        ({"train_labels": np.zeros(11, int)}, r"train_labels is int64 \[11\].*integers \[12\]"),
        ({"train_labels": np.zeros(12)}, r"train_labels is float64"),
        ({"test_labels": np.array([0, 1, -1, 0, 0])}, "test_labels goes down to -1.*unlabeled_im"),
        ({"test_labels": np.array([0, 1, 3, 0, 0])}, r"up to 3, and there are 3.*0\.\.2"),
        ({"class_names": ["a", "b"]}, r"train_labels goes up to 2.*by class_names.*0\.\.1"),
        ({"train_labels": np.array([None] * 12)}, r"cannot be read as \.npz"),
    ],
)
def test_npz_malformed(tmp_path, changed, message):
    np.savez(tmp_path / "data.npz", **npz_arrays(**changed))
    with pytest.raises(InputError, match=message) as error:
        sources.load(settings("npz", tmp_path / "data.npz"))
    assert str(tmp_path / "data.npz") in str(error.value)


def test_npz_no_such_file(tmp_path):
    for path in ("", tmp_path, tmp_path / "none.npz"):
        with pytest.raises(InputError, match=r"not a file\. Write it with np\.savez"):
            sources.load(settings("npz", path))
    np.save(tmp_path / "one.npy", noise(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("one.npy", "text.npz", "cut.npz"):
        with pytest.raises(InputError, match=r"cannot be read as \.npz"):
            sources.load(settings("npz", tmp_path / name))


# ---- folder ----


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def root(tmp_path):
    """Two classes with two training and one test image each, 8 px, lossless."""
    for name in ("owl", "cat"):
        for file in ("train/{}/1.png", "train/{}/0.png", "test/{}/0.png"):
            write(tmp_path / file.format(name), noise(8, 8, 3))
    return tmp_path


def test_folder_pixels_and_order(tmp_path):
    # In the order in which they must come. The names are sorted, the folders nested.
    train = {
        "cat/B.PNG": noise(8, 8, 3),
        "cat/a.png": noise(8, 8, 3),
        "cat/b/deep/er/0.bmp": noise(8, 8, 3),
        "cat/c.gif": np.full((8, 8, 3), 77, np.uint8),
        "owl/1.webp": noise(8, 8, 3),
    }
    for name, pixels in reversed(train.items()):
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        write(tmp_path / "train" / name, pixels, **options)
    owl = write(tmp_path / "val/owl/z.png", noise(8, 8, 3))
    cat = write(tmp_path / "val/cat/z.png", noise(8, 8, 3))
    more = write(tmp_path / "unlabeled/x/y.png", noise(8, 8, 3))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._a.png").write_text("left behind by another system")
    (tmp_path / "train/.cache").mkdir()

    made = sources.load(settings("folder", tmp_path))
    assert made.class_names == ("cat", "owl")
    assert made.train.labels.tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_array_equal(all_of(made.train), np.stack(list(train.values())))
    np.testing.assert_array_equal(made.train.read(np.array([4, 1])), [*train.values()][::-3])
    assert made.test.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(all_of(made.test), [cat, owl])
    np.testing.assert_array_equal(all_of(made.unlabeled), [more])
    assert made.unlabeled.labels.tolist() == [-1]
    empty = made.train.read(np.zeros(0, int))
    assert (empty.shape, empty.dtype) == ((0, 8, 8, 3), np.uint8)


def test_folder_test_goes_before_val(root):
    write(root / "val/cat/0.png", noise(8, 8, 3))
    assert len(sources.load(settings("folder", root)).test.labels) == 2


def test_decode_crops_the_centre(tmp_path):
    wide, tall = noise(8, 14, 3), noise(13, 8, 3)
    write(tmp_path / "wide.png", wide)
    write(tmp_path / "tall.png", tall)
    np.testing.assert_array_equal(folder.decode(str(tmp_path / "wide.png"), 8), wide[:, 3:11])
    np.testing.assert_array_equal(folder.decode(str(tmp_path / "tall.png"), 8), tall[2:10])


def test_decode_resizes_the_shorter_side(tmp_path):
    # Halves that differ, with a middle band: after the crop the band fills the middle.
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = (250, 100, 50)
    write(tmp_path / "x.png", pixels)
    got = folder.decode(str(tmp_path / "x.png"), 8)
    want = np.zeros((8, 8, 3))
    want[:, 2:6] = (250, 100, 50)
    np.testing.assert_allclose(got[:, [0, 3, 4, 7]], want[:, [0, 3, 4, 7]])
    # Larger, too; every value lies between the neighbours it came from.
    got = folder.decode(str(tmp_path / "x.png"), 80)
    assert got.shape == (80, 80, 3)
    assert got[:, 20:60].min(axis=(0, 1)).tolist() >= [125, 50, 25]


def test_decode_every_mode(tmp_path):
    rgb = np.zeros((8, 8, 3), np.uint8) + np.array([200, 100, 40], np.uint8)
    grey = noise(8, 8)
    image = Image.fromarray(rgb)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(grey))
    palette = image.quantize(4)
    palette.info["transparency"] = b"\x00\x80"
    cases = {
        "rgba.png": (alpha, rgb),
        "palette.png": (palette, rgb),
        "cmyk.jpg": (image.convert("CMYK"), rgb),
        "jpeg.JPEG": (image, rgb),
        "grey.png": (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        "sixteen.png": (
            Image.fromarray(grey.astype(np.uint16) * 256 + 7),
            np.stack([grey] * 3, -1),
        ),
        "la.png": (Image.merge("LA", [Image.fromarray(grey)] * 2), np.stack([grey] * 3, -1)),
        "bit.png": (Image.fromarray(grey > 99), np.stack([(grey > 99) * 255] * 3, -1)),
    }
    for name, (picture, want) in cases.items():
        picture.save(tmp_path / name)
        got = folder.decode(str(tmp_path / name), 8).astype(int)
        assert got.shape == (8, 8, 3), name
        tolerance = 3 if name.lower().endswith(("jpg", "jpeg")) else 0
        assert np.abs(got - want).max() <= tolerance, name


def test_decode_turns_as_exif_says(tmp_path):
    pixels = np.repeat(np.repeat(noise(2, 2, 3), 8, 0), 8, 1)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° clockwise to show"
    image.save(tmp_path / "x.png", exif=exif)
    got = folder.decode(str(tmp_path / "x.png"), 16)
    np.testing.assert_array_equal(got, np.rot90(pixels, -1))


@pytest.mark.parametrize("height", [180, 300, 600])  # decoded at 1/1, 1/2 and 1/4 of the size
def test_decode_large_jpeg_is_close_to_a_full_decode(tmp_path, height):
    size = (height * 4 // 3, height)
    smooth = Image.fromarray(noise(6, 8, 3)).resize(size, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    got = folder.decode(str(tmp_path / "x.jpg"), 64).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        box = (height // 6, 0, height // 6 + height, height)
        full = image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(got - np.asarray(full)).max() <= 8
    assert got.std() > 20


def test_folder_corrupt_image_is_named(root):
    for content in (b"", b"\x89PNG\r\n\x1a\n", (root / "train/cat/1.png").read_bytes()[:-60]):
        (root / "train/cat/0.png").write_bytes(content)
        made = sources.load(settings("folder", root))
        with pytest.raises(InputError, match=r"train/cat/0\.png.*Remove or replace"):
            made.train.read(np.array([1, 0]))
        assert made.train.read(np.array([1, 2])).shape == (2, 8, 8, 3)


def test_folder_class_list(root, tmp_path):
    write(root / "train/ant/0.png", noise(8, 8, 3))
    write(root / "test/bee/0.png", noise(8, 8, 3))  # would be an error if it counted
    path = tmp_path / "classes.txt"
    path.write_text("# from the paper\nowl\n\n cat \n")
    made = sources.load(settings("folder", root, class_list=str(path)))
    assert made.class_names == ("owl", "cat")
    assert made.train.labels.tolist() == [0, 0, 1, 1]
    with Image.open(root / "train/owl/0.png") as image:
        np.testing.assert_array_equal(made.train.read(np.array([0]))[0], np.asarray(image))

    for text, message in [
        ("owl\neel\ncat\n", r"1 of the classes named in .*classes\.txt.*: eel"),
        ("owl\nowl\n", "twice: owl"),
        ("# nothing\n", "names no class"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            sources.load(settings("folder", root, class_list=str(path)))
    with pytest.raises(InputError, match=r"class_list='none\.txt' cannot be read"):
        sources.load(settings("folder", root, class_list="none.txt"))


def test_folder_of_another_form(root, tmp_path, caplog):
    def refused(message, folder=root):
        with pytest.raises(InputError, match=message):
            sources.load(settings("folder", folder))

    refused(r"data_dir='' is not a folder\. Expected: ROOT/train/CLASS", "")
    refused("is not a folder", tmp_path / "none")
    (tmp_path / "bare").mkdir()
    refused(r"train is missing\. Expected", tmp_path / "bare")
    (tmp_path / "bare/train").mkdir()
    refused(r"train has no class folders\. Expected", tmp_path / "bare")
    write(tmp_path / "bare/train/cat/0.png", noise(8, 8, 3))
    refused(r"val is missing\. Expected", tmp_path / "bare")

    (root / "unlabeled").mkdir()
    refused("unlabeled has no images")
    (root / "unlabeled").rmdir()
    (root / "test/cat/0.png").unlink()
    assert sources.load(settings("folder", root)).test.labels.tolist() == [1]
    assert "No test images in" in caplog.text
    (root / "test/owl/0.png").unlink()
    refused("No images of these classes in .*test: cat, owl")
    write(root / "test/eel/0.png", noise(8, 8, 3))
    refused(r"1 of the classes found in .*test have no folder in .*train: eel")
    (root / "train/eel").mkdir()
    refused("No images in these folders of .*train: eel")


# ---- test images among the unlabelled ones ----


def test_drop_test_duplicates(tmp_path, caplog):
    data = npz_arrays(unlabeled_images=noise(700, 8, 8, 3))
    data["unlabeled_images"][[3, 300, 699]] = data["test_images"][[4, 0, 0]]
    data["unlabeled_images"][5] = data["train_images"][0]
    data["unlabeled_images"][6] = data["test_images"][1]
    data["unlabeled_images"][6, 7, 7, 2] ^= 1  # one bit is enough to be another image
    np.savez(tmp_path / "data.npz", **data)
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    assert len(made.unlabeled.labels) == 700

    with caplog.at_level("INFO", "absl"):
        made = sources.load(settings("npz", tmp_path / "data.npz", drop_test_duplicates=True))
    assert "dropped 3 unlabelled images" in caplog.text
    kept = np.delete(np.arange(700), [3, 300, 699])
    np.testing.assert_array_equal(all_of(made.unlabeled), data["unlabeled_images"][kept])
    assert len(made.unlabeled.labels) == 697
    assert len(made.train.labels) == 12

    fake = sources.load(settings("fake"))
    assert sources.drop_test_duplicates(fake) == (fake, 0)


# ---- tfds ----


def prepare(root, name, version, splits, shards=1):
    """Writes a data set as tfds stores it. splits: {name: (pixels, labels)}."""
    import tensorflow as tf

    place = root / name / version
    place.mkdir(parents=True)
    described = []
    for split, (pixels, labels) in splits.items():
        parts = np.array_split(np.arange(len(labels)), shards)
        for shard, part in enumerate(parts):
            path = place / f"{name}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for i in part:
                    png = io.BytesIO()
                    Image.fromarray(pixels[i]).save(png, "png")
                    bytes_of = {"image": png.getvalue(), "id": f"{split}_{i}".encode()}
                    feature = {
                        key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                        for key, value in bytes_of.items()
                    }
                    feature["label"] = tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[labels[i]])
                    )
                    example = tf.train.Example(features=tf.train.Features(feature=feature))
                    writer.write(example.SerializeToString())
        described.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(part)) for part in parts],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": "tfrecord", "splits": described}
    (place / "dataset_info.json").write_text(json.dumps(info))
    (place / "label.labels.txt").write_text("\n".join(f"name {c}" for c in range(10)))


def cifar(train=90, test=20):
    return {
        "train": (noise(train, 32, 32, 3), np.arange(train) % 10),
        "test": (noise(test, 32, 32, 3), np.arange(test)[::-1] % 10),
    }


@pytest.mark.parametrize("shards", [1, 4])
def test_tfds_in_stored_order(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(tfds_sets, "_BATCH", 16)
    made = cifar()
    prepare(tmp_path, "cifar10", "3.0.2", made, shards)
    source = sources.load(settings("cifar10", tmp_path, stored_size=32))
    assert source.class_names == tuple(f"name {c}" for c in range(10))
    assert source.unlabeled is None
    for part, (pixels, labels) in made.items():
        np.testing.assert_array_equal(all_of(getattr(source, part)), pixels)
        np.testing.assert_array_equal(getattr(source, part).labels, labels)
        assert getattr(source, part).labels.dtype == np.int32


def test_tfds_stl10_and_the_environment_variable(tmp_path, monkeypatch):
    made = {
        "train": (noise(10, 96, 96, 3), np.arange(10)),
        "test": (noise(5, 96, 96, 3), np.arange(5)),
        "unlabelled": (noise(7, 96, 96, 3), np.full(7, -1)),
    }
    made["unlabelled"][0][2] = made["test"][0][1]
    prepare(tmp_path, "stl10", "1.0.0", made)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    source = sources.load(settings("stl10", stored_size=96))
    np.testing.assert_array_equal(all_of(source.unlabeled), made["unlabelled"][0])
    assert source.unlabeled.labels.tolist() == [-1] * 7

    source = sources.load(settings("stl10", stored_size=48, drop_test_duplicates=True))
    image = Image.fromarray(made["unlabelled"][0][6])
    want = np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR))
    assert len(source.unlabeled.labels) == 6
    np.testing.assert_array_equal(source.unlabeled.read(np.array([5]))[0], want)


def test_tfds_damaged(tmp_path):
    prepare(tmp_path, "cifar10", "3.0.2", cifar())
    path = tmp_path / "cifar10/3.0.2/cifar10-train.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=r"'train' of .*cifar10/3\.0\.2 is damaged.*Delete"):
        sources.load(settings("cifar10", tmp_path, stored_size=32))
    path.write_bytes(whole)
    for count in (89, 91):
        info = path.parent / "dataset_info.json"
        data = json.loads(info.read_text())
        data["splits"][0]["shardLengths"] = [str(count)]
        info.write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"'train' of .* is damaged"):
            sources.load(settings("cifar10", tmp_path, stored_size=32))


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-binary.tar.gz"),
        ("cifar100", "cifar-100-binary.tar.gz"),
        ("stl10", "stl10_binary.tar.gz"),
    ],
)
def test_tfds_offline_says_what_to_do_at_once(tmp_path, monkeypatch, name, archive):
    asked = []
    monkeypatch.setattr(tfds_sets, "_answers", lambda url: asked.append(url))
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        sources.load(settings(name, tmp_path))
    assert time.perf_counter() - start < 5
    assert [url.endswith(archive) for url in asked] == [True]
    for part in ("TFDS_DATA_DIR", "--config.dataset.data_dir", archive, "'folder' or 'npz'"):
        assert part in str(error.value)
    assert str(tmp_path / "downloads/manual") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_tfds_takes_the_archive_that_is_there(tmp_path, monkeypatch):
    # Nobody asks the network, tfds opens the file, and finds that it is not the right one.
    monkeypatch.setattr(tfds_sets, "_answers", None)
    (tmp_path / "downloads/manual").mkdir(parents=True)
    (tmp_path / "downloads/manual/cifar-10-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"(?s)NonMatchingChecksumError.*-binary.*Do one of"):
        sources.load(settings("cifar10", tmp_path))


def test_probe_asks_the_server(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path[1:]))
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert tfds_sets._answers(f"{url}/200")
        assert not tfds_sets._answers(f"{url}/503")
        server.shutdown()
    assert not tfds_sets._answers(f"{url}/200")


def test_probe_gives_up(monkeypatch):
    import requests

    asked, over = threading.Event(), threading.Event()

    def hang(*args, **kwargs):
        asked.set()
        over.wait()
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "head", hang)
    monkeypatch.setattr(tfds_sets, "_PROBE_SECONDS", -0.9)  # one second more is waited
    start = time.perf_counter()
    assert not tfds_sets._answers("http://example.invalid")
    assert time.perf_counter() - start < 3
    assert asked.is_set()
    over.set()


@pytest.mark.parametrize(("name", "side"), [("cifar10", 32), ("cifar100", 32), ("stl10", 96)])
def test_tfds_prepared_sets(name, side):
    """Against the stored records, read without tfds: some 50 images of each split."""
    root = os.environ.get("TFDS_DATA_DIR", "")
    found = sorted(Path(root).glob(f"{name}/*/dataset_info.json")) if root else []
    if not found:
        pytest.skip(f"set TFDS_DATA_DIR to a folder with prepared {name}/<version>/")
    import tensorflow as tf

    source = sources.load(settings(name, stored_size=side))
    stored = json.loads(found[-1].read_text())["splits"]
    assert {split["name"] for split in stored} - {"unlabelled"} == {"train", "test"}
    for split in stored:
        images = getattr(source, {"unlabelled": "unlabeled"}.get(split["name"], split["name"]))
        count = sum(int(n) for n in split["shardLengths"])
        assert len(images.labels) == count
        files = sorted(str(p) for p in found[-1].parent.glob(f"{name}-{split['name']}.*"))
        step = max(1, count // 50)
        records = tf.data.TFRecordDataset(files).shard(step, 0)
        for i, record in zip(range(0, count, step), records, strict=True):
            feature = tf.train.Example.FromString(record.numpy()).features.feature
            png = Image.open(io.BytesIO(feature["image"].bytes_list.value[0]))
            np.testing.assert_array_equal(images.read(np.array([i]))[0], np.asarray(png))
            assert images.labels[i] == feature["label"].int64_list.value[0]
    assert source.class_names == tuple((found[-1].parent / "label.labels.txt").read_text().split())
    assert (source.unlabeled is not None) == (name == "stl10")


def test_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"cannot be imported.*pip install.*'npz'"):
        sources.load(settings("cifar10"))


def test_the_rest_does_not_import_tensorflow():
    code = (
        "import sys; from layermatch_jax.data import sources, splits;"
        " assert not {'tensorflow', 'tensorflow_datasets', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
