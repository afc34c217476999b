"""Prepared tfds sets, damaged ones, and none while offline."""

import http.server
import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from image_builders import all_of, noise, settings
from PIL import Image

from layermatch_jax.data import sources
from layermatch_jax.data.sources import tfds_sets
from layermatch_jax.errors import InputError


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
    with pytest.raises(InputError, match=r"cifar10/3\.0\.2 is damaged: split 'train': .*Delete"):
        sources.load(settings("cifar10", tmp_path, stored_size=32))
    path.write_bytes(whole)
    for count in (89, 91):
        info = path.parent / "dataset_info.json"
        data = json.loads(info.read_text())
        data["splits"][0]["shardLengths"] = [str(count)]
        info.write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"is damaged: split 'train': "):
            sources.load(settings("cifar10", tmp_path, stored_size=32))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("dataset_info.json", b"", r"cannot be opened by tfds \(.*{}/cifar10 is damaged.*Delete"),
        ("dataset_info.json", b'{"name": "cif', r"cannot be opened by tfds \("),
        ("dataset_info.json", b"\xff\xfe", r"cannot be opened by tfds \("),
        ("dataset_info.json", b"{}", r"cannot be opened by tfds \("),
        ("label.labels.txt", b"name 0\nname 1", "it names 2 classes, but has the label 9"),
    ],
)
def test_tfds_damaged_description(tmp_path, file, content, message):
    prepare(tmp_path, "cifar10", "3.0.2", cifar())
    (tmp_path / "cifar10/3.0.2" / file).write_bytes(content)
    with pytest.raises(InputError, match="(?s)" + message.replace("{}", str(tmp_path))):
        sources.load(settings("cifar10", tmp_path, stored_size=32))


def test_tfds_split_missing(tmp_path):
    prepare(tmp_path, "cifar10", "3.0.2", {"train": cifar()["train"]})
    with pytest.raises(InputError, match="is damaged: it has no split test"):
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
    # Without asking the network, tfds opens the file and finds a wrong checksum.
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
    """Compares about 50 images of each split with the stored records, read without tfds."""
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


@pytest.mark.parametrize("character", "*?[")
def test_a_folder_that_tfds_would_read_as_a_pattern_is_refused(character, tmp_path, monkeypatch):
    place = f"{tmp_path}/a{character}b"
    with pytest.raises(InputError, match=r"as a pattern\. Rename the folder, or make a link"):
        tfds_sets.load(settings("cifar10", place))
    monkeypatch.setenv("TFDS_DATA_DIR", place)
    with pytest.raises(InputError, match="as a pattern"):
        tfds_sets.load(settings("cifar10"))
