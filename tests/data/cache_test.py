"""The cache of decoded images: the pixels of the files as they are now, each decoded only once."""

import collections
import errno
import json
import os
import shutil
import threading
import time

import filelock
import jax
import numpy as np
import pytest
from image_builders import all_of, noise, settings, write
from PIL import Image

from layermatch_jax import config as config_lib
from layermatch_jax import setup
from layermatch_jax.data import feed, images, sources, splits
from layermatch_jax.data.sources import cache, cache_files, decoding, folder
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import parallel


@pytest.fixture
def root(tmp_path):
    """Two classes with 5 training and one test image each, and 3 images without a label."""
    for name in ("cat", "owl"):
        for i in range(5):
            write(tmp_path / f"data/train/{name}/{i}.png", noise(30 + i, 24, 3))
        write(tmp_path / f"data/test/{name}/0.jpg", noise(24, 30, 3))
    for i in range(3):
        write(tmp_path / f"data/unlabeled/{i}.png", noise(8, 8, 3))
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch):
    """The paths of the files that are decoded, each as often as that happens."""
    paths, attempt = [], decoding.attempt

    def counted(path, side, alpha):
        paths.append(path)
        return attempt(path, side, alpha)

    monkeypatch.setattr(decoding, "attempt", counted)
    return paths


def load(root, **changed):
    changed = {"cache_dir": str(root.parent / "cache"), **changed}
    return sources.load(settings("folder", **{"data_dir": root} | changed))


def cached(root):
    """The one cache of a root."""
    (found,) = (root.parent / "cache").iterdir()
    return found


def names(paths):
    return sorted("/".join(path.split(os.sep)[-2:]) for path in paths)


def test_the_same_data_set_as_without_a_cache(root):
    write(root / "train/cat/clear.png", np.zeros((8, 8, 4), np.uint8))
    (root / "train/cat/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    without = load(root, cache_dir="none", on_broken="skip")
    for _ in range(2):  # decoded, and from the cache
        made = load(root, on_broken="skip")
        assert made.class_names == without.class_names
        assert made.notes == without.notes
        assert len(made.notes) == 2  # the transparent image and the broken one
        for part in ("train", "test", "unlabeled"):
            got, want = getattr(made, part), getattr(without, part)
            assert len(want.labels) > 1
            np.testing.assert_array_equal(all_of(got), all_of(want))
            np.testing.assert_array_equal(got.labels, want.labels)
            np.testing.assert_array_equal(got.files, want.files)
        statistics = sources.channel_statistics(made.train)
        assert statistics == sources.channel_statistics(without.train)
        pixels = all_of(without.train).reshape(-1, 3) / 255
        np.testing.assert_allclose(statistics, [pixels.mean(0), pixels.std(0)], rtol=1e-12)
        few = sources.channel_statistics(made.train, limit=4)
        assert few == sources.channel_statistics(without.train, limit=4) != statistics
    assert (root.parent / "cache").exists()


@pytest.mark.parametrize("backend", ["tf_data", "device"])
def test_the_same_batches_as_without_a_cache(root, backend):
    batches = []
    for place in ("none", str(root.parent / "cache")):
        config = config_lib.base()
        config.dataset.update(settings("folder", root, stored_size=16, cache_dir=place))
        config.dataset.num_labels, config.dataset.image_size = 4, 12
        config.batch_size, config.unlabeled_ratio, config.input.backend = 8, 2, backend
        partition = splits.partition(sources.load(config.dataset), config.dataset)
        sampler = setup.create_sampler(config, partition)
        created = feed.create(config, partition, sampler, parallel.host_rows(8))
        resident = created.resident("jit")
        step = jax.jit(created.batch)
        chunks = [jax.tree.map(lambda x: x[:, 0], c) for _, c in created.chunks(range(3))]
        batches.append([step(resident, chunk) for chunk in chunks])
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert np.std(batches[0][0].images) > 20


def test_an_image_is_decoded_once(root, decoded, capsys):
    load(root, evaluate_on="validation")  # reads no test images
    assert len(decoded) == 13
    assert capsys.readouterr().err == (  # 13 · 8 · 8 · 3 = 2496 bytes
        f"decoding 13 images, once, to 8 x 8 pixels: 2.5 kB in {cached(root)}\n"
    )
    for i in range(2):
        made = load(root)
        all_of(made.train), sources.channel_statistics(made.train)
        said = capsys.readouterr().err
        if i == 0:
            assert "decoding 2 images" in said
            assert said.endswith("; 13 others are there\n")
        else:
            assert said == f"15 decoded images are read from {cached(root)} (2.9 kB)\n"
    assert names(decoded[13:]) == ["cat/0.jpg", "owl/0.jpg"]
    assert (cached(root) / "pixels").stat().st_size == 15 * 8 * 8 * 3
    assert json.loads((cached(root) / "about.json").read_text())["root"] == str(root)


def test_one_root_has_one_cache_however_it_is_written(root, decoded, monkeypatch):
    load(root)
    monkeypatch.chdir(root.parent)
    (root.parent / "link").symlink_to(root)
    for spelled in ("data", "./data/", f"{root}/", "link", "../" + root.parent.name + "/data"):
        load(root, data_dir=spelled)
    assert len(decoded) == 15
    load(root, stored_size=9)
    load(root, alpha="drop")
    assert len(decoded) == 45
    assert len(list((root.parent / "cache").iterdir())) == 3


def test_what_changes_is_decoded_again(root, decoded):
    path = root / "train/cat/2a.bmp"  # BMP files of one shape have one size
    write(path, noise(8, 8, 3))
    before = all_of(load(root).train)
    state = path.stat()

    def changed():
        """What a new start decodes, and the training images that it reads."""
        decoded.clear()
        pixels = all_of(load(root).train)
        again = names(decoded)
        np.testing.assert_array_equal(pixels, all_of(load(root, cache_dir="none").train))
        return again, pixels

    # Other content, with the old size and modification time.
    new = write(path, noise(8, 8, 3))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    again, pixels = changed()
    assert again == ["cat/2a.bmp"]
    np.testing.assert_array_equal(pixels[3], new)
    np.testing.assert_array_equal(np.delete(pixels, 3, 0), np.delete(before, 3, 0))

    # Only the modification time is new.
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert changed()[0] == ["cat/2a.bmp"]

    # An image is added and one removed: the others move to other positions.
    write(root / "train/cat/00.png", noise(8, 8, 3))
    (root / "train/cat/1.png").unlink()
    again, pixels = changed()
    assert again == ["cat/00.png"]
    np.testing.assert_array_equal(pixels[4:], before[4:])

    # Two images change places.
    for a, b in (("3", "x"), ("4", "3"), ("x", "4")):
        (root / f"train/cat/{a}.png").rename(root / f"train/cat/{b}.png")
    np.testing.assert_array_equal(changed()[1][[5, 4]], before[[4, 5]])


def test_rows_in_any_order(root):
    made = load(root).train
    pixels = all_of(made)
    for wanted in ([7], [3, 3, 3], [0, 1, 2, 9, 8, 4, 5, 5, 6, 0], []):
        np.testing.assert_array_equal(made.read(np.array(wanted, int)), pixels[wanted])


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="the system lacks it anyway")
def test_systems_without_preadv(root, monkeypatch):
    pixels = all_of(load(root).train)
    monkeypatch.delattr(os, "preadv")
    np.testing.assert_array_equal(all_of(load(root).train), pixels)


def test_a_start_that_is_killed_leaves_what_it_decoded(root, decoded, monkeypatch, capsys):
    monkeypatch.setattr(cache, "_COMMIT", 0.0)
    monkeypatch.setattr(decoding, "_AT_ONCE", (1, 1))  # nothing is decoded ahead of the stop
    commit, rows = cache_files.Appender.commit, []

    def stop(self):
        rows.append(len(commit(self).rows))
        if rows[-1] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(cache_files.Appender, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            load(root)
    assert rows == [1, 2, 3, 4]
    with open(cached(root) / "pixels", "ab") as file:
        file.write(b"half a row")  # was written, but is not in the index
    decoded.clear()
    made = load(root)
    assert len(decoded) == 11
    assert "decoding 11 images" in (said := capsys.readouterr().err)
    assert said.endswith("; 4 others are there\n")
    for part in ("train", "test", "unlabeled"):
        want = getattr(load(root, cache_dir="none"), part)
        np.testing.assert_array_equal(all_of(getattr(made, part)), all_of(want))


@pytest.mark.parametrize("damage", ["index", "empty", "other", "pixels", "no pixels"])
def test_a_damaged_cache_is_made_anew(root, decoded, damage, capsys):
    under_way = load(root).train
    pixels = all_of(under_way)
    place = cached(root)
    if damage == "index":
        (place / "index.npz").write_bytes((place / "index.npz").read_bytes()[:-30])
    elif damage == "empty":
        (place / "index.npz").write_bytes(b"")
    elif damage == "other":
        np.savez(place / "index.npz", x=1)
    elif damage == "pixels":
        os.truncate(place / "pixels", 100)
    else:
        (place / "pixels").unlink()
    new = write(root / "train/cat/0.png", noise(8, 8, 3))
    decoded.clear()
    made = load(root)
    assert len(decoded) == 15
    assert ("is damaged: its images are decoded again" in capsys.readouterr().err) == (
        damage != "no pixels"
    )
    np.testing.assert_array_equal(all_of(made.train), [new, *pixels[1:]])
    if damage != "pixels":  # a run that has the old file open keeps it
        np.testing.assert_array_equal(all_of(under_way), pixels)


def test_pixels_that_are_lost_while_a_run_reads_them(root):
    made = load(root)
    os.truncate(cached(root) / "pixels", 100)
    with pytest.raises(InputError, match=r"pixels cannot be read \(it is too short\)\. Start ag"):
        made.train.read(np.array([5]))


def test_broken_images_are_tried_again(root, decoded):
    path = root / "train/owl/1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:99])
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 of 15 images cannot be decoded:\n.*owl/1\.png"):
            load(root)
    assert collections.Counter(names(decoded))["owl/1.png"] == 2
    assert len(decoded) == 16
    path.write_bytes(whole)
    assert len(load(root).train.labels) == 10
    assert len(decoded) == 17


def test_a_full_disk(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=2879)  # a byte less than 15 images
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError) as caught:
        load(root)
    said = str(caught.value)
    assert said.startswith("15 decoded images of 8 x 8 pixels need 2.9 kB in ")
    assert "where 2.9 kB are free" in said
    assert said.endswith("decode each image whenever it is needed, with "
                         "--config.dataset.cache_dir=none.")  # fmt: skip

    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2880))
    monkeypatch.setattr(os, "fsync", failing(errno.EDQUOT))
    with pytest.raises(InputError, match=r"15 decoded images of 8 x 8 pixels need 2\.9 kB"):
        load(root)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(InputError, match=r"cannot be used \(\[Errno 5\] .*cache_dir=FOLDER"):
        load(root)
    monkeypatch.undo()
    load(root)


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_an_error_of_the_machine_is_not_blamed_on_the_cache(root, monkeypatch):
    monkeypatch.setattr(Image, "open", failing(errno.EMFILE))
    with pytest.raises(OSError, match="Too many open files"):
        load(root)


def test_places_that_cannot_be_used(root):
    (root.parent / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be used .*--config\.dataset\.cache_dir=none"):
        load(root, cache_dir=str(root.parent / "file"))
    with pytest.raises(InputError, match=r"cache_dir=gs://x: give a local folder, or none"):
        load(root, cache_dir="gs://x")


def test_the_default_is_the_users_cache_folder(root, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "xdg"))
    load(root, cache_dir="none")
    folder.from_files([str(root / "train/cat/0.png")], 8).read(np.array([0]))
    assert not (root.parent / "xdg").exists()
    load(root, cache_dir="")
    (place,) = (root.parent / "xdg/layermatch_jax/images").iterdir()
    assert place.name.startswith("data-8px-")


def test_starts_at_the_same_time_share_the_work(root, decoded, monkeypatch):
    made, said = [], []
    monkeypatch.setattr(cache, "_say", said.append)
    waiting = "another process decodes these images: waiting for it"
    with filelock.FileLock(make_folder(root) / ".lock"):
        threads = [threading.Thread(target=lambda: made.append(load(root))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 60
        while said.count(waiting) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert said == [waiting] * 3
        assert not decoded
    for thread in threads:
        thread.join()
    assert len(decoded) == 15
    assert len(said) == 4  # one of them decodes
    for one in made:
        np.testing.assert_array_equal(all_of(one.train), all_of(made[0].train))
    assert len(made) == 3


def make_folder(root):
    place = cache._folder(settings("folder", root, cache_dir=str(root.parent / "cache")))
    place.mkdir(parents=True)
    return place


def test_large_images_do_not_pile_up(monkeypatch):
    """The threads are at most a few images ahead of the reader, whatever the number of images."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    begun = []
    results = decoding.ahead(
        lambda path: begun.append(path) or path, [str(i) for i in range(99)], 999
    )
    assert [next(results) for _ in range(10)] == [str(i) for i in range(10)]
    assert len(begun) <= 10 + 5
    assert list(results) == [str(i) for i in range(10, 99)]


def test_moments_of_the_largest_values():
    white = np.full((66_000, 2, 3), 255, np.uint8)
    sums, squares = images.moments(white)
    assert sums.tolist() == [255 * 132_000] * 3
    assert squares.tolist() == [255**2 * 132_000] * 3
