"""data.json: its content, and the changes of a data set that its check finds."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from etils import epath
from image_builders import noise, npz_arrays, settings, write

from layermatch_jax.data import description, sources
from layermatch_jax.errors import InputError

CLASSES = ("ant", "bear", "cat")


def dataset(name, data_dir, **changed):
    return settings(name, data_dir, **{"evaluate_on": "test", **changed})


def described(config):
    source = sources.load(config)
    return description.describe(source, config, sources.channel_statistics(source.train))


def write_noise(path):
    write(path, noise(8, 8, 3), compress_level=0)  # all files have one size


@pytest.fixture
def root(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            for i in range(count):
                write_noise(tmp_path / "birds" / part / name / f"{i}.png")
    for i in range(3):
        write_noise(tmp_path / "birds" / "unlabeled" / f"{i}.png")
    return tmp_path / "birds"


def test_what_is_kept_of_a_folder(root):
    kept = described(dataset("folder", root))
    assert json.loads(json.dumps(kept)) == kept
    assert (kept["data_set"], kept["stored_size"]) == ("folder", 8)
    assert kept["class_names"] == list(CLASSES)
    assert [kept[part]["images"] for part in ("train", "unlabeled", "test")] == [12, 3, 6]
    files = sorted((root / "test").rglob("*.png"))
    labels = np.array([0, 0, 1, 1, 2, 2], "<i4").tobytes()
    names = b"".join(
        f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode() for file in files
    )
    content = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    assert kept["test"] == {
        "images": 6,
        "labels_sha256": hashlib.sha256(labels).hexdigest(),
        "names_sha256": hashlib.sha256(names).hexdigest(),
        "content_sha256": hashlib.sha256(content).hexdigest(),
    }


def test_what_is_kept_of_arrays(tmp_path):
    data = npz_arrays(train_images=noise(600, 8, 8, 3), train_labels=np.arange(600) % 3)
    np.savez(tmp_path / "data.npz", **data)
    kept = described(dataset("npz", tmp_path / "data.npz"))
    pixels = data["train_images"] / 255
    np.testing.assert_allclose(kept["channel_mean"], pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(kept["channel_std"], pixels.std(axis=(0, 1, 2)))
    assert description.statistics(kept)[1] == tuple(kept["channel_std"])
    some = b"".join(data["train_images"][i * 600 // 256].tobytes() for i in range(256))
    assert kept["train"]["content_sha256"] == hashlib.sha256(some).hexdigest()
    assert kept["train"]["names_sha256"] is None
    assert kept["unlabeled"] is None


def test_a_data_set_may_be_moved(root, tmp_path):
    before = described(dataset("folder", root))
    shutil.move(root, tmp_path / "other")
    assert described(dataset("folder", tmp_path / "other")) == before


def rename_class(root):
    for part in ("train", "test"):
        (root / part / "bear").rename(root / part / "ursus")


def swap_classes(root):
    for part in ("train", "test"):
        for old, new in (("ant", "x"), ("bear", "ant"), ("x", "bear")):
            (root / part / old).rename(root / part / new)


def make_gray(root, part):
    for file in (root / part).rglob("*.png"):
        write(file, np.full((8, 8, 3), 128, np.uint8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rename_class, "classes: missing: 'bear'; new: 'ursus'"),
        (swap_classes, "train: the same number of images with different content"),
        (lambda root: make_gray(root, "train"), "train: the same number of images; their files"),
        (lambda root: make_gray(root, "test"), "test: the same number of images; their files"),
        (lambda root: make_gray(root, "unlabeled"), "unlabeled: the same number of images; the"),
        (
            lambda root: write_noise(root / "train/cat/0.png"),
            "train: the same number of images with different content",
        ),
        (
            lambda root: write_noise(root / "unlabeled/9.png"),
            "unlabeled: 3 images before, 4 now",
        ),
        (lambda root: (root / "train/ant/0.png").unlink(), "train: 12 images before, 11 now"),
        (lambda root: shutil.rmtree(root / "unlabeled"), "unlabeled: 3 images before, 0 now"),
        (
            lambda root: (root / "train/ant/0.png").rename(root / "train/cat/00.png"),
            "train: the same number of images with different labels",
        ),
        (
            lambda root: (root / "train/ant/0.png").rename(root / "train/ant/9.png"),
            "train: the same number of images; their files have different names",
        ),
    ],
)
def test_a_run_is_not_opened_on_other_data(root, tmp_path, change, told):
    config, workdir = dataset("folder", root), epath.Path(tmp_path)
    description.write(workdir, described(config))
    description.check(workdir, described(config))
    change(root)
    other = described(config)
    with pytest.raises(InputError, match=f"started with different data:\n(.*\n)*  {told}"):
        description.check(workdir, other)
    description.write(workdir, other)  # the first description stays
    with pytest.raises(InputError, match=r"The run in .* started with different data"):
        description.check(workdir, other)


def test_test_images_that_are_not_used_may_change(root):
    config = dataset("folder", root, evaluate_on="validation")
    before = described(config)
    assert before["test"] is None
    make_gray(root, "test")
    assert described(config) == before


def test_arrays_that_were_replaced(tmp_path):
    data, workdir = npz_arrays(class_names=["a", "b", "c"]), epath.Path(tmp_path)
    config = dataset("npz", tmp_path / "data.npz")
    np.savez(tmp_path / "data.npz", **data)
    description.write(workdir, described(config))
    for changed, told in (
        ({"test_images": noise(5, 8, 8, 3)}, "test: .* with different content"),
        ({"train_labels": data["train_labels"][::-1]}, "train: .* with different labels"),
        ({"class_names": ["b", "a", "c"]}, "order differs .before: 'a', 'b', 'c'; now: 'b', 'a"),
    ):
        np.savez(tmp_path / "data.npz", **data | changed)
        with pytest.raises(InputError, match=told):
            description.check(workdir, described(config))


def test_statistics_are_kept_and_not_compared(tmp_path):
    """Other versions of decoders may give slightly different pixels."""
    np.savez(tmp_path / "data.npz", **npz_arrays())
    kept = described(dataset("npz", tmp_path / "data.npz"))
    description.write(epath.Path(tmp_path), kept)
    description.check(epath.Path(tmp_path), kept | {"channel_mean": [0.1, 0.2, 0.3]})


def test_a_run_of_an_earlier_version_is_accepted_with_a_warning(tmp_path, caplog):
    workdir = epath.Path(tmp_path)
    description.check(workdir, {})
    assert not caplog.text  # a folder without a run
    (workdir / "config.json").write_text("{}")
    description.check(workdir, {})
    assert "has no data.json" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"class_names": []}'])
def test_damaged(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(InputError, match=r"data\.json is damaged: .*Delete it"):
        description.read(epath.Path(tmp_path))


def test_a_file_that_is_gone(root):
    config = dataset("folder", root)
    source = sources.load(config)
    (root / "test/cat/1.png").unlink()
    with pytest.raises(InputError, match=r"Cannot read the image .*test/cat/1\.png"):
        description.describe(source, config, ((0.0,) * 3, (1.0,) * 3))
