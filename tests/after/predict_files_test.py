"""Predictions of image files: numbers, continuation, errors and broken images."""

import concurrent.futures
import importlib.util
import json
import re
import shlex
import shutil
import time

import numpy as np
import pytest
from command_line import ROOT
from etils import epath
from PIL import Image
from predict_runs import CLASSES, expected, make_bundle, make_images, make_model, rows
from runs_test import make_config

from layermatch_jax import train
from layermatch_jax.after import predict
from layermatch_jax.after.predict import apply, output, telling
from layermatch_jax.data import reading_ahead
from layermatch_jax.data.sources import decoding
from layermatch_jax.errors import BrokenImagesError, InputError
from layermatch_jax.runtime import metrics

COUNT = 37  # batches of 16, 16 and 5


@pytest.fixture
def place(tmp_path):
    """A bundle and a folder of images."""
    make_bundle(tmp_path)
    make_images(tmp_path / "images", COUNT)
    return tmp_path


def predicted(place, out="out.csv", **changed):
    given = {
        "workdir": f"{place}/model.layermatch",
        "images": f"{place}/images",
        "out": f"{place}/{out}",
        **changed,
    }
    return predict.of_files(**given)


def count_decoded(monkeypatch):
    asked, attempt = [], decoding.attempt

    def counted(path, **settings):
        asked.append(path)
        return attempt(path, **settings)

    monkeypatch.setattr(decoding, "attempt", counted)
    return asked


# ---- Numbers ----


def test_the_numbers_are_those_of_numpy(place, capsys):
    pixels = make_images(place / "images", COUNT)
    features, probabilities = expected(make_model(), pixels)
    said = predicted(place, top=3, features=f"{place}/f.npy")
    table = rows(place / "out.csv")
    assert [row["path"] for row in table] == [f"{n:03}.png" for n in range(COUNT)]
    order = np.argsort(-probabilities, axis=1)
    assert len(set(order[:, 0])) > 1
    for n, suffix in enumerate(("", "_2", "_3")):
        assert [row[f"class{suffix}"] for row in table] == [CLASSES[c] for c in order[:, n]]
        told = [float(row[f"probability{suffix}"]) for row in table]
        of_order = np.take_along_axis(probabilities, order[:, n : n + 1], axis=1)[:, 0]
        np.testing.assert_allclose(told, of_order, rtol=2e-4, atol=1e-7)
    entropy = -np.sum(probabilities * np.log(probabilities), axis=1)
    np.testing.assert_allclose([float(r["entropy"]) for r in table], entropy, rtol=1e-3, atol=1e-6)
    written = np.load(place / "f.npy", mmap_mode="r")
    np.testing.assert_allclose(written, features, rtol=1e-3, atol=1e-5)
    assert written.dtype == np.float32

    assert said.startswith("37 of 37 images are predicted in ")
    counts = np.bincount(order[:, 0], minlength=3)
    for c in np.flatnonzero(counts):
        assert f"{CLASSES[c]:<10}{counts[c]:>10}{counts[c] / COUNT:>8.1%}" in said
    assert said.endswith(f"files: {place}/out.csv, {place}/f.npy, {place}/out.csv.about.json")
    err = capsys.readouterr().err
    assert "fixmatch on folder, linear, 3 classes, 6 pixels, step 3 of 8 (the run is not" in err
    assert f"{place}/f.npy: float32 [37, 4], 0.0 MB" in err

    predicted(place, "out.jsonl")
    of_json = rows(place / "out.jsonl")
    assert [row["class"] for row in of_json] == [row["class"] for row in table]
    assert [row["entropy"] for row in of_json] == [float(row["entropy"]) for row in table]
    assert "top" not in of_json[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images of many kinds and sizes; its training images are deleted."""
    root, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 40)):
        for c, name in enumerate(("a", "b", "c")):
            folder = root / "data" / part / name
            folder.mkdir(parents=True)
            for n in range(count):
                size = (*rng.integers(7, 30, 2), 4 if n % 5 == 0 else 3)
                pixels = rng.integers(0, 160, size) + 25 * c
                kind = "png" if n % 2 == 0 else "jpg"
                image = Image.fromarray(pixels.astype(np.uint8))
                image.convert("RGB" if kind == "jpg" else image.mode).save(folder / f"{n}.{kind}")
    config = make_config()
    config.dataset.name, config.dataset.data_dir = "folder", str(root / "data")
    config.dataset.num_labels, config.train_steps, config.ema_decay = 18, 20, 0.5
    train.train_and_evaluate(config, str(root / "run"))
    shutil.rmtree(root / "data" / "train")
    return root


def test_a_test_folder_has_the_accuracy_of_the_evaluation(trained, tmp_path, call):
    """The images are resized and cropped as in the run."""
    flags = [f"--workdir={trained}/run", f"--images={trained}/data/test"]
    status, said, err = call("--mode=predict", *flags, f"--out={tmp_path}/out.csv", "--top=3")
    assert status == 0, err
    assert "120 of 120 images are predicted" in said
    assert "transparent pixels become white (dataset.alpha=white) in 12 of 120 images" in err
    table = rows(tmp_path / "out.csv")
    right = sum(row["path"].split("/")[0] == row["class"] for row in table)
    last = [x for x in metrics.read(epath.Path(trained / "run")) if x["split"] == "test"][-1]
    assert right == round(120 * last["accuracy_ema"])
    assert last["accuracy_ema"] == pytest.approx(right / 120, abs=1e-7)
    assert 20 < right < 120
    of_truth = [
        float(row[f"probability{suffix}"])
        for row in table
        for suffix in ("", "_2", "_3")
        if row[f"class{suffix}"] == row["path"].split("/")[0]
    ]
    assert len(of_truth) == 120
    assert -np.mean(np.log(of_truth)) == pytest.approx(last["loss_ema"], rel=1e-4)


def test_one_program_for_any_number_of_images(place):
    predicted(place, images=f"{place}/images/000.png", out="one.csv")
    assert rows(place / "one.csv")[0]["path"] == f"{place}/images/000.png"
    predicted(place)
    compiled = apply._summary._cache_size()
    make_images(place / "more", 50)
    predicted(place, "more.csv", images=f"{place}/more")
    assert apply._summary._cache_size() == compiled
    # Eight devices: a multiple of them, and no more than are needed.
    sizes = [reading_ahead.batch_size(16, n) for n in (0, 1, 8, 9, 16, 99)]
    assert sizes == [8, 8, 8, 16, 16, 16]
    assert [reading_ahead.batch_size(n) for n in (1, 512, 513)] == [8, 512, 520]


class _Later:
    """An array that a device has after some time, as JAX's are."""

    def __init__(self, future):
        self._future = future

    def __array__(self, dtype=None, copy=None):
        return self._future.result()


def test_reading_computing_and_writing_go_on_at_once():
    """20 batches of 20 ms each on the device, 15 ms to be read and 10 ms to be written."""
    device = concurrent.futures.ThreadPoolExecutor(1)

    def compute(pixels):
        time.sleep(0.020)
        return pixels[:, 0, 0, 0].astype(np.float32)

    def read(part):
        time.sleep(0.015)
        return np.full((len(part), 2, 2, 3), part.start, np.uint8), f"from {part.start}"

    began, seen = time.monotonic(), []
    batches = reading_ahead.in_batches(
        lambda pixels: {"first": _Later(device.submit(compute, pixels))}, read, range(4, 82), 4
    )
    for part, said, answer in batches:
        time.sleep(0.010)
        seen.append((part, said, answer["first"].tolist()))
    seconds = time.monotonic() - began
    # The last batch has two images, and is filled up to four for the device.
    parts = [range(start, min(start + 4, 82)) for start in range(4, 82, 4)]
    assert seen == [(part, f"from {part.start}", [part.start] * len(part)) for part in parts]
    assert len(parts) == 20
    assert 0.4 <= seconds < 0.75  # in turn it would be 0.9


# ---- Continuation ----


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl"])
def test_an_interrupted_prediction_goes_on(place, out, monkeypatch, capsys):
    features, whole_features = f"{place}/f.npy", f"{place}/whole.npy"
    predicted(place, f"whole{out[3:]}", features=whole_features, top=2)
    append, batches = output.Output.append, []

    def interrupted(self, some, of_some):
        append(self, some, of_some)
        batches.append(len(some))
        if len(batches) == 2:
            self._table.write(b"017.png,do")  # Ctrl-C interrupts this line
            raise KeyboardInterrupt

    monkeypatch.setattr(output.Output, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predicted(place, out, features=features, top=2)
    told = f"32 of 37 images are in {place}/{out}: the same command continues"
    assert told in capsys.readouterr().err

    decoded = count_decoded(monkeypatch)
    said = predicted(place, out, features=features, top=2)
    assert sorted(decoded) == [f"{place}/images/{n:03}.png" for n in range(32, COUNT)]
    assert f"32 of 37 images are already in {place}/{out}\n" in capsys.readouterr().err
    assert (place / out).read_bytes() == (place / f"whole{out[3:]}").read_bytes()
    assert (place / "f.npy").read_bytes() == (place / "whole.npy").read_bytes()
    again = predicted(place, out, features=features, top=2)
    assert len(decoded) == 5
    assert again.split("\n\n")[1:] == said.split("\n\n")[1:]
    assert f"37 of 37 images are already in {place}/{out}: nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl"])
def test_a_table_that_was_cut_anywhere_goes_on(place, out):
    predicted(place, out)
    whole = (place / out).read_bytes()
    for keep in [*range(0, 150, 7), len(whole) - 1]:
        (place / out).write_bytes(whole[:keep])
        predicted(place, out)
        assert (place / out).read_bytes() == whole


def test_other_predictions_are_not_gone_on_with(place):
    features = f"{place}/f.npy"
    predicted(place, features=features)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    (place / "other").mkdir()
    other = make_bundle(place / "other", std=(0.5, 0.5, 0.125))
    for changed, told in (
        ({"top": 2}, "inputs: --top differed. To continue them, use the same inputs; else start"),
        ({"features": None}, "--features differed"),
        ({"workdir": str(other)}, "inputs: the model differed"),
        ({"images": f"{place}/images/000.png"}, "the list of images, the number of images differ"),
    ):
        with pytest.raises(InputError, match=told):
            predicted(place, **{"features": features} | changed)
    assert {p: p.read_bytes() for p in before} == before

    table = (place / "out.csv").read_text()
    for line, content in (
        (1, table.replace("entropy", "Entropy")),
        (3, table.replace("001.png", "991.png")),
        (5, table.replace("003.png,", "")),
    ):
        (place / "out.csv").write_text(content)
        with pytest.raises(InputError, match=rf"line {line} was altered"):
            predicted(place, features=features)
    (place / "out.csv").write_text(table)
    (place / "f.npy").unlink()
    with pytest.raises(
        InputError, match=r"f.npy is missing, but the predictions have begun. Restore"
    ):
        predicted(place, features=features)
    (place / "f.npy").write_bytes(b"other")
    with pytest.raises(InputError, match=r"f.npy is not a .npy file of float32 \[37, 4\]"):
        predicted(place, features=features)


def test_two_processes_do_not_write_one_table(place):
    predicted(place)
    about = json.loads((place / "out.csv.about.json").read_text())
    with (
        output.opened(f"{place}/out.csv", None, 4, about),
        pytest.raises(InputError, match="is being written by another process"),
    ):
        predicted(place)
    predicted(place)


# ---- Broken images ----


def test_broken_images_are_named_and_all_others_predicted(place, call):
    predicted(place, "whole.csv")
    whole = rows(place / "whole.csv")
    (place / "images" / "005.png").write_bytes(b"no image")
    (place / "images" / "036.png").unlink()
    names = [f"images/{n:03}.png" for n in range(COUNT)]
    (place / "list.txt").write_text("\n".join(names))
    flags = [f"--workdir={place}/model.layermatch", f"--images={place}/list.txt"]
    flags += [f"--out={place}/out.csv", f"--features={place}/f.npy"]
    for _ in range(2):  # the second has nothing to do, but fails, too
        status, said, err = call("--mode=predict", *flags)
        assert status == 3
        assert "35 of 37 images are predicted" in said
        assert (
            "BrokenImagesError: 2 of 37 images cannot be decoded; all others are predicted:\n"
            "  images/005.png (not an image of a known format)\n"
            "  images/036.png (No such file or directory)\n"
        ) in err
    table = rows(place / "out.csv")
    for n, (row, before) in enumerate(zip(table, whole, strict=True)):
        if n in (5, 36):
            assert row["class"] == row["probability"] == row["entropy"] == ""
            assert row["error"]
        else:
            assert row == before | {"path": names[n]}
    missing = np.isnan(np.load(place / "f.npy"))
    assert np.flatnonzero(missing.any(axis=1)).tolist() == [5, 36]
    assert missing[[5, 36]].all()


def test_a_long_list_of_broken_images_is_cut(place):
    (place / "list.txt").write_text("".join(f"no/{n}.png\n" for n in range(103)))
    with pytest.raises(BrokenImagesError, match=r"no/99.png \(No such file.*\)\n  and 3 more\n"):
        predicted(place, images=f"{place}/list.txt")
    with pytest.raises(BrokenImagesError, match="103 of 103"):
        predicted(place, images=f"{place}/list.txt")


def test_a_folder_that_goes_away_is_not_a_folder_of_broken_images(place, monkeypatch):
    append = output.Output.append

    def gone(self, *batch):
        append(self, *batch)
        if (place / "images").exists():
            (place / "images").rename(place / "moved")

    monkeypatch.setattr(output.Output, "append", gone)
    monkeypatch.setattr(reading_ahead, "_AHEAD", 0)
    with pytest.raises(
        InputError, match=r"images no longer exists. Restore it; then the same command"
    ):
        predicted(place, batch_size=8)
    table = rows(place / "out.csv")
    assert 8 <= len(table) < COUNT
    assert not any(row["error"] for row in table)
    (place / "moved").rename(place / "images")
    monkeypatch.undo()
    predicted(place)
    assert len(rows(place / "out.csv")) == COUNT


# ---- The commands of docs/predict.md ----


def test_the_commands_of_the_docs(trained, tmp_path, call, monkeypatch):
    page = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", "runs/mine")
    make_images(tmp_path / "new", 5, "jpg")
    (tmp_path / "new" / "list.txt").write_text("001.jpg\n000.jpg\n")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in "".join(blocks).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "layermatch"
        status, _, err = call(*arguments)
        if "--format=onnx" in arguments and not importlib.util.find_spec("jax2onnx"):
            assert (status, "pip install 'jax2onnx>=0.17'" in err) == (2, True)
            continue
        assert status == 0, err
    table = rows(tmp_path / "predictions.csv")
    header, _ = re.search(r"```text\n(.*?)\n(.*?)```", page, re.DOTALL).groups()
    assert list(table[0]) == header.split(",")
    assert [row["path"] for row in table] == [f"{n:03}.jpg" for n in range(5)]
    assert [len(row["top"]) for row in rows(tmp_path / "top.jsonl")] == [2] * 5
    assert np.load("features.npy", mmap_mode="r").shape == (5, 4)
    listed = rows(tmp_path / "listed.csv")
    assert listed == [table[1], table[0]]

    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (python,) = (block for block in blocks if "trained.read" in block)  # others: export_slow_test
    names = {}
    exec(python.replace("new/1.jpg", "new/001.jpg").replace("new/2.jpg", "new/002.jpg"), names)
    for n, row in enumerate(table[1:3]):
        assert names["names"][names["probabilities"][n].argmax()] == row["class"]
        assert names["probabilities"][n].max() == pytest.approx(float(row["probability"]), rel=1e-4)


# ---- Errors and messages ----


def test_places_that_cannot_be_written(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "folder.csv").mkdir()
    (place / "mine.csv").write_text("mine")
    (place / "mine.npy").write_text("mine")
    for given, told in (
        ({"out": ""}, "--out is needed: the output file"),
        ({"out": "out.txt"}, "--out=out.txt: the name must end with .csv or .jsonl"),
        ({"out": "none/out.csv"}, "there is no folder none. Make it"),
        ({"out": "folder.csv"}, "--out=folder.csv is a folder. Give the name of a file"),
        ({"out": "gs://b/out.csv"}, "give a local path, and copy the file"),
        ({"out": "mine.csv"}, "--out=mine.csv already exists, but mine.csv.about.json"),
        ({"out": "out.csv", "features": "f.npz"}, "--features=f.npz: the name must end with .npy"),
        ({"out": "out.csv", "features": "mine.npy"}, "--features=mine.npy already exists"),
        ({"out": "out.csv", "top": 0}, "--top=0: allowed are 1..3, the number of classes"),
        ({"out": "out.csv", "top": 4}, "--top=4: allowed are 1..3, the number of classes"),
    ):
        before = sorted(place.rglob("*"))
        with pytest.raises(InputError, match=told):
            predict.of_files("model.layermatch", "images", **given)
        assert sorted(place.rglob("*")) == before
    assert (place / "mine.csv").read_text() == (place / "mine.npy").read_text() == "mine"
    predict.of_files("model.layermatch", "images", "out.csv")  # a path without a folder
    assert len(rows(place / "out.csv")) == COUNT


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--mode=train", "--images=x"],
            "--images is not read by --mode=train, but by --mode=pred",
        ),
        (["--mode=report", "--out=x"], "--out is not read by --mode=report, but by --mode=predict"),
        (["--mode=predict", "--format=bundle"], "--format is not read by --mode=predict, but by"),
        (
            ["--mode=predict", "--images=.", "--out=a.csv", "--config.seed=1"],
            "--config.seed is not",
        ),
        (["--mode=predict", "--top=many"], "flag --top=many"),
        (["--mode=predict", "--images=.", "--workdir=none", "--out=a.csv"], "has no images"),
    ],
)
def test_flags_that_are_refused(flags, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, err = call(*flags)
    assert (status, said) == (2, "")
    assert told in err
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint(trained, tmp_path, call):
    without = shutil.ignore_patterns("checkpoints")
    shutil.copytree(trained / "run", tmp_path / "run", ignore=without)
    make_images(tmp_path / "images", 1)
    flags = [f"--workdir={tmp_path}/run", f"--images={tmp_path}/images", f"--out={tmp_path}/o.csv"]
    status, _, err = call("--mode=predict", *flags)
    assert status == 2
    assert "run has no checkpoint yet" in err
    assert not (tmp_path / "o.csv").exists()


def test_the_time_left_is_told(monkeypatch, capsys):
    now = iter([10.0, 11.0, 14.0])
    monkeypatch.setattr(telling.time, "monotonic", lambda: next(now))
    told = telling.Progress(1000, 5000)
    for done in (1500, 1600, 2500):  # the first compiles; the second is too soon; 1,000 in 4 s
        told.update(done)
    line = "2,500/5,000 images  250 images/s  0:10 left"
    assert capsys.readouterr().err == f"compiling the model ...\n{line}\n"
