"""Digits, synthetic images, and arrays in an .npz file."""

import numpy as np
import pytest
from image_builders import all_of, noise, npz_arrays, settings
from PIL import Image

from layermatch_jax.data import sources
from layermatch_jax.errors import InputError


def test_digits_are_scikit_learns():
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    made = sources.load(settings("digits", stored_size=8))
    assert made.class_names == tuple("0123456789")
    assert made.unlabeled is None
    assert len(made.train.labels) == 1297
    assert np.bincount(made.test.labels).tolist() == [50] * 10

    # Class 0 has 178 images; 50 of them, evenly spaced, are every 3.56th.
    zeros = np.flatnonzero(digits.target == 0)[[0, 3, 7, 10, 14, 17]]
    got = all_of(made.test)[made.test.labels == 0][:6]
    expected = np.repeat(np.round(digits.images[zeros] * 15.9375)[..., None], 3, -1)
    np.testing.assert_array_equal(got, expected)

    # Every image is once in training or test, with its label.
    def keys(images, labels):
        return sorted((int(c), x.tobytes()) for x, c in zip(images, labels, strict=True))

    gray = np.concatenate([all_of(made.train), all_of(made.test)])[..., 0]
    labels = np.concatenate([made.train.labels, made.test.labels])
    want = np.round(digits.images * 15.9375).astype(np.uint8)
    assert keys(gray, labels) == keys(want, digits.target)


def test_digits_upsampled():
    small, large = (sources.load(settings("digits", stored_size=s)) for s in (8, 32))
    assert small.train.labels.tolist() == large.train.labels.tolist()
    got = large.train.read(np.array([5]))[0]
    assert got.shape == (32, 32, 3)
    image = Image.fromarray(small.train.read(np.array([5]))[0, :, :, 0])
    want = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
    for channel in range(3):
        np.testing.assert_array_equal(got[..., channel], want)


def test_names_of_classes_in_bytes(tmp_path):
    names = np.array([b"cat", b"owl", b"fox"])
    np.savez(tmp_path / "data.npz", **npz_arrays(class_names=names))
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    assert made.class_names == ("cat", "owl", "fox")


def test_classes_with_one_name_and_a_single_class_are_refused(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **npz_arrays(class_names=["cat", "owl", "cat"]))
    with pytest.raises(InputError, match="class_names repeats cat"):
        sources.load(settings("npz", path))
    one = npz_arrays()
    one = {key: array * 0 if key.endswith("labels") else array for key, array in one.items()}
    np.savez(path, **one)
    with pytest.raises(InputError, match=r"has fewer than two classes \(1\)"):
        sources.load(settings("npz", path))


def test_classes_without_test_images_are_named(tmp_path, caplog):
    data = npz_arrays(class_names=["cat", "owl", "fox"])
    data["test_labels"] = np.where(data["test_labels"] == 1, 0, data["test_labels"])
    np.savez(tmp_path / "data.npz", **data)
    with caplog.at_level("WARNING", "absl"):
        sources.load(settings("npz", tmp_path / "data.npz"))
    assert "No test images for: owl." in caplog.text


def test_settings_of_folders_are_not_those_of_arrays(tmp_path):
    np.savez(tmp_path / "data.npz", **npz_arrays())
    made = sources.load(settings("npz", tmp_path / "data.npz", on_broken="skip"))
    assert made.notes == ("not used: on_broken (a setting of image folders only)",)


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
    with pytest.raises(InputError, match=r"num_classes=1: allowed are 2\.\.100"):
        sources.load(settings("fake", num_classes=1))


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


def test_npz_gray_and_resized(tmp_path):
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
        (
            {"test_images": None, "test_labels": None},
            "lacks the keys test_images, test_labels; its keys are",
        ),
        ({"train_images": np.zeros((12, 8, 8, 3))}, r"train_images is float64 \[12, 8, 8, 3\]"),
        ({"test_images": noise(5, 8, 9, 3)}, r"test_images is uint8 \[5, 8, 9, 3\].*square"),
        ({"test_images": noise(5, 8, 8, 4)}, r"test_images is uint8 \[5, 8, 8, 4\]"),
        ({"test_images": noise(0, 8, 8, 3), "test_labels": np.zeros(0, int)}, "at least one"),
        ({"unlabeled_images": noise(5, 64)}, r"unlabeled_images is uint8 \[5, 64\]"),
        ({"train_labels": np.zeros(11, int)}, r"train_labels is int64 \[11\].*integers \[12\]"),
        ({"train_labels": np.zeros(12)}, r"train_labels is float64"),
        ({"test_labels": np.array([0, 1, -1, 0, 0])}, "test_labels has the label -1.*unlabeled_im"),
        ({"test_labels": np.array([0, 1, 3, 0, 0])}, r"up to 3, but there are 3.*0\.\.2"),
        ({"class_names": ["a", "b"]}, r"train_labels goes up to 2.*by class_names.*0\.\.1"),
        ({"train_labels": np.array([None] * 12)}, r"cannot be read as an \.npz file"),
        (
            {"train_labels": np.arange(12) % 3 + 1},
            r"from 1 to 3.*no image of 0\. .*0\.\.K-1",
        ),
        ({"train_labels": np.arange(12) % 2 * 4}, r"from 0 to 4, but has no image of 1, 2, 3\."),
        ({"train_labels": np.arange(12) * 9}, r"no image of 1, 2, 3, 4, 5 and more\."),
        ({"train_labels": np.arange(12) + 2**60}, r"no image of 0, 1, 2, 3, 4 and more\."),
        ({"unlabeled_imges": noise(5, 8, 8, 3)}, "'unlabeled_imges'.*mean 'unlabeled_images'"),
        ({"unlabelled-images": noise(5, 8, 8, 3)}, "'unlabelled-images'.*mean 'unlabeled_images'"),
        ({"classnames": ["a", "b", "c"]}, "'classnames'.*Did you mean 'class_names'"),
        (
            {"unlabeled_images": noise(5, 8, 8, 3), "Unlabelled_images": noise(5, 8, 8, 3)},
            "unlabeled_images in two spellings",
        ),
    ],
)
def test_npz_malformed(tmp_path, changed, message):
    np.savez(tmp_path / "data.npz", **npz_arrays(**changed))
    with pytest.raises(InputError, match=message) as error:
        sources.load(settings("npz", tmp_path / "data.npz"))
    assert str(tmp_path / "data.npz") in str(error.value)


@pytest.mark.parametrize("key", ["unlabelled_images", "Unlabeled_Images"])
def test_npz_unlabeled_images_in_other_spellings_are_used(tmp_path, key):
    extra = noise(4, 8, 8, 3)
    np.savez(tmp_path / "data.npz", **npz_arrays(**{key: extra}))
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    np.testing.assert_array_equal(all_of(made.unlabeled), extra)
    assert made.notes == ()


def test_npz_keys_that_are_passed_over_are_named(tmp_path):
    others = {"val_images": noise(2, 8, 8, 3), "val_labels": np.zeros(2, int)}
    np.savez(tmp_path / "data.npz", **npz_arrays(**others))
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    assert made.notes == (
        f"{tmp_path / 'data.npz'}: keys that are not used: val_images, val_labels.",
    )


def test_npz_class_names_may_name_a_class_without_training_images(tmp_path):
    names = ["none", "a", "b", "c"]
    data = npz_arrays(train_labels=np.arange(12) % 3 + 1, class_names=names)
    np.savez(tmp_path / "data.npz", **data)
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    assert made.class_names == tuple(names)
    assert made.train.labels.tolist() == [1, 2, 3] * 4


def test_npz_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "data.npz", **npz_arrays())
    assert len(sources.load(settings("npz", "~/data.npz")).train.labels) == 12


def test_npz_no_such_file(tmp_path):
    for path in ("", tmp_path, tmp_path / "none.npz"):
        with pytest.raises(InputError, match=r"not a file\. Write it with np\.savez"):
            sources.load(settings("npz", path))
    np.save(tmp_path / "one.npy", noise(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("one.npy", "text.npz", "cut.npz"):
        with pytest.raises(InputError, match=r"cannot be read as an \.npz file"):
            sources.load(settings("npz", tmp_path / name))
