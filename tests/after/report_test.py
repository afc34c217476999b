"""Reports of one run: the file needs no others, and its content agrees with the run."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from report_pages import config_of, read
from runs_test import files, make_config

from layermatch_jax import presets, setup, train
from layermatch_jax.after import figures, pictures, predict, report, runs, trained
from layermatch_jax.after.model import Outputs
from layermatch_jax.after.report import model, pages
from layermatch_jax.data import pipeline
from layermatch_jax.data.augment import crop
from layermatch_jax.runtime import metrics

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on an .npz file, which tests delete; six unlabeled images have no class."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.RandomState(0)
    labels = {"train": np.arange(60) % 3, "test": np.arange(30) % 3}
    data = {f"{part}_labels": of_part for part, of_part in labels.items()}
    for part, of_part in labels.items():
        noise = rng.randint(0, 128, (len(of_part), 8, 8, 3))
        data[f"{part}_images"] = (noise + 60 * of_part[:, None, None, None]).astype(np.uint8)
    data["unlabeled_images"] = rng.randint(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    np.savez(root / "images.npz", class_names=np.array(["a<b>", "R&D", "c"]), **data)
    config = presets.apply_method(make_config(), "layermatch")
    config.dataset.name, config.dataset.data_dir = "npz", str(root / "images.npz")
    config.dataset.num_labels, config.policy.threshold = 6, 0.4
    config.batch_size, config.unlabeled_ratio, config.train_steps = 8, 3, 12
    config.augment.randaugment_ops, config.seed = 1, 7
    train.train_and_evaluate(config, str(root / "run"))
    return root / "run"


@pytest.fixture
def workdir_(made, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "run")


def test_a_run_from_result_to_settings(made):
    before = files(made)
    path = report.write(str(made))
    assert path == epath.Path(made) / "report.html"
    after = files(made)
    assert after.pop(pathlib.Path(path))
    assert after == before
    page = read(path)
    assert page.headings == [
        "layermatch on npz, 6 labels (label seed 0, seed 7)",
        "Result",
        "Training",
        "Pseudo-labels by class",
        "Images and their views",
        "Predictions",
        "Features",
        "Settings",
    ]
    result = json.loads((made / "result.json").read_text())
    for kind, name in (("ema", "EMA"), ("raw", "raw")):
        scores = result["test_accuracy"][kind]
        assert page.row(name) == [f"{100 * scores[k]:.2f}" for k in ("last", "median20", "best")]
    assert page.row("labeled split (SHA-256 of its indices)") == [result["split_sha256"]]
    assert page.row("labeled images") == ["6, 2 of each class"]
    assert page.row("code (git commit)") == [result["git_commit"] or "not known"]
    assert page.row("dataset.num_labels") == ["6", "250"]  # value, default
    assert page.row("layerwise.gradient_mask") == ['[["classifier/.*", 0.0]]', "[]"]
    alts = [image["alt"] for image in page.images]
    last = [line for line in metrics.read(epath.Path(made)) if line["split"] == "test"][-1]
    assert alts[0] == (
        f"Accuracy, over training steps: EMA of the parameters {last['accuracy_ema']:.1%} at step "
        f"12; raw parameters {last['accuracy']:.1%} at step 12."
    )
    beginnings = [re.match(r"[\w ]*", alt)[0].strip() for alt in alts[1:]]
    assert beginnings[:5] == [
        "Pseudo", "Losses in training", "Loss on test images", "Thresholds", "Learning rate",
    ]  # fmt: skip
    assert any(alt.startswith("8 unlabeled images of step 12, each above its") for alt in alts)
    assert any(alt.startswith("Confusion matrix of 30 test images in 3 classes") for alt in alts)
    assert f"{last['accuracy_ema']:.1%} of 30 predictions are right" in page.text
    assert "averaged classifier" in page.text
    assert "R&D" in page.text  # the name of a class, not markup
    assert "a<b>" in page.text
    assert path.stat().length < 3e6


def test_numbers_behind_the_pictures_of_a_model(made, monkeypatch):
    """The drawing functions get the values that the parts of the run give."""
    drawn = {}
    for name in ("confusion", "draw_images", "feature_map"):
        original = getattr(pictures, name)

        def record(*args, original=original, name=name):
            drawn.setdefault(name, []).append(args)
            return original(*args)

        monkeypatch.setattr(pictures, name, record)
    monkeypatch.setattr(figures, "png", lambda figure: b"")
    run = runs.read(str(made))
    data = runs.read_data(epath.Path(made), run.config)
    evaluation = data.partition.evaluation
    answer = predict.predict(trained.of_run(run), evaluation)
    # A confident model that predicts the next class for 3 images of each class.
    sure = np.full((30, 3), 0.1)
    guesses = np.where(np.arange(30) < 9, (evaluation.labels + 1) % 3, evaluation.labels)
    sure[np.arange(30), guesses] = 0.5 + np.arange(30) / 100
    table = model.predictions(run, data, Outputs(answer.features, sure))
    ((matrix, names),) = drawn["confusion"]
    np.testing.assert_array_equal(matrix, [[7, 3, 0], [0, 7, 3], [3, 0, 7]])
    assert names == ("a<b>", "R&D", "c")
    assert [row[:3] for row in table[2].rows] == [
        ("a<b>", "R&D", "3"), ("R&D", "c", "3"), ("c", "a<b>", "3"),
    ]  # fmt: skip
    ((rows, titles),) = drawn.pop("draw_images")
    middle = crop.center_crop(evaluation.read(np.arange(30)), 6)
    np.testing.assert_array_equal(rows[0], middle[8:0:-1])  # 8 is the most confident of those 9
    np.testing.assert_array_equal(rows[1], middle[:1])
    assert titles[0][0] == "c → a<b>\n58.0%"
    assert titles[1] == ["a<b> → R&D\n50.0%"]

    # The views are those of the twelfth step.
    model.draw_views(run.config, data, 11)
    ((pixels, titles, kinds),) = drawn["draw_images"]
    sampler = setup.create_sampler(run.config, data.partition)
    draws = sampler.draw(11)
    unlabeled = data.partition.unlabeled
    positions = draws.unlabeled.reshape(-1)[:8]
    np.testing.assert_array_equal(pixels[0], crop.center_crop(unlabeled.read(positions), 6))
    weak, _ = pipeline.moved_views(data.partition, sampler, 1, 11, slice(None))
    np.testing.assert_array_equal(pixels[1], weak.images[:, 1:4].reshape(-1, 6, 6, 3)[:8])
    _, chunk = next(iter(data.feed.chunks(range(11, 12))))
    chunk = jax.tree.map(lambda x: x[:, 0], chunk)
    batch = jax.jit(data.feed.batch)(data.feed.resident("jit"), chunk)
    np.testing.assert_array_equal(pixels[2], batch.images[:, 4:].reshape(-1, 6, 6, 3)[:8])
    assert np.any(pixels[2] != pixels[1])
    hidden = "unknown or labeled"
    truths = [hidden if c < 0 else names[c] for c in unlabeled.labels[positions]]
    assert hidden in truths
    assert titles == [truths, [""] * 8, [""] * 8]
    assert kinds == ["image", "weak view", "strong view"]

    # The centers are columns of the averaged classifier minus their mean, in the features' plane.
    model.features(run, data, answer)
    ((points, labels, _, _, stars, wrong),) = drawn["feature_map"]
    centered = answer.features - answer.features.mean(axis=0)
    axes = np.linalg.svd(centered.astype(float), full_matrices=False)[2][:2].T
    axes *= np.sign(np.sum(points * (centered @ axes), axis=0))
    np.testing.assert_allclose(points, centered @ axes, atol=1e-4)
    columns = run.state.centers["kernel"].T
    expected = (columns - columns.mean(axis=0)) @ axes
    farthest = np.linalg.norm(stars, axis=1).max()
    assert np.sum(np.linalg.norm(points, axis=1) < farthest) == 27  # nine tenths of 30
    np.testing.assert_allclose(
        stars, expected * farthest / np.linalg.norm(expected, axis=1).max(), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_array_equal(labels, evaluation.labels)
    np.testing.assert_array_equal(wrong, answer.probabilities.argmax(axis=1) != labels)


def test_centers_are_those_of_the_reading(made):
    run = runs.read(str(made))
    of_ema = model._centers(run._replace(config=config_of("fixmatch")))
    np.testing.assert_array_equal(of_ema.vectors, run.state.ema_params["classifier"]["kernel"].T)
    assert not of_ema.places
    state = {"centers": np.arange(6.0).reshape(3, 2), "updates": np.array([1, 0, 4])}
    config = config_of("layermatch", **{"avg_clustering.centers": "features"})
    averages = model._centers(run._replace(config=config, state=run.state.replace(centers=state)))
    np.testing.assert_array_equal(averages.vectors, [[0, 1], [np.nan, np.nan], [4, 5]])
    assert averages.places


def test_what_is_missing_is_named_and_the_rest_is_there(workdir_, tmp_path, monkeypatch, caplog):
    """Without checkpoints; then without data, too; then with only a config."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # the figures are not checked
    shutil.rmtree(workdir_ / "checkpoints")
    (workdir_ / "result.json").unlink()
    lines = (workdir_ / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir_ / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])  # being written
    page = read(report.write(str(workdir_)))
    assert "There are no predictions. " in page.text
    assert "has no checkpoint yet" in page.text
    assert page.row("steps") == ["4 of 12, not finished"]
    assert "Images and their views" in page.headings
    assert not {"Predictions", "Features"} & set(page.headings)

    config = json.loads((workdir_ / "config.json").read_text())
    data_dir = config["dataset.data_dir"]
    config["dataset.data_dir"] = str(tmp_path / "gone.npz")
    (workdir_ / "config.json").write_text(json.dumps(config))
    caplog.clear()
    page = read(report.write(str(workdir_)))
    assert "The run's images cannot be shown. " in page.text
    assert "The run's images cannot be shown. " in caplog.text  # and in the terminal
    assert "gone.npz" in page.text
    assert page.headings[1:] == ["Result", "Training", "Pseudo-labels by class", "Settings"]
    assert any("Pseudo-labels, over training" in image["alt"] for image in page.images)

    told = {"parameters": 1, "cosine_supervised": [0.1, 0, 0.2], "norm_ratio": [1.0, 0.5, 2.0]}
    told |= {"noise_share": [0.5, 0.4, 0.6]}
    layers = {"stem": told | {"cosine_true": [0.871, 0.8, 0.9]}}
    layers["head"] = dict.fromkeys(told, [None] * 3) | {"cosine_true": [None] * 3}
    layers = [{"step": step, "batches": 2, "layers": layers} for step in (2, 4)]
    (workdir_ / "layer_report.json").write_text(json.dumps(layers))
    page = read(report.write(str(workdir_), data_dir))  # the present location
    assert page.headings[4:] == ["Images and their views", "Layers", "Settings"]
    assert page.images[-1]["alt"].endswith("and of true labels: stem 0.87")
    (workdir_ / "layer_report.json").unlink()

    (workdir_ / "metrics.jsonl").unlink()
    (workdir_ / "labeled_split.json").unlink()
    page = read(report.write(str(workdir_)))
    assert "The run has not logged anything yet." in page.text
    assert page.headings[1:] == ["Result", "Settings"]
    assert not page.images


def test_markup_in_texts_is_text(tmp_path):
    nasty = "<script>alert('&amp;')</script>\"'"
    section = pages.Section(
        nasty,
        [
            nasty,
            pages.Note(nasty),
            pages.Table(nasty, (nasty, "x"), [(nasty, nasty)]),
            pages.Table("folded " + nasty, (), [(nasty, "")], folded=True),
            pages.Picture(b"png", 300, f"what is seen: {nasty}", nasty),
        ],
    )
    (tmp_path / "page.html").write_text(pages.page(nasty, [section, pages.Section("none", [])]))
    page = read(tmp_path / "page.html")
    # title, h1, link, h2, p, note, caption, header, 2 cells, summary, cell, figcaption
    assert page.text.count(nasty) == 13
    assert page.images[0]["alt"] == f"what is seen: {nasty}"
    assert page.images[0]["src"] == "data:image/png;base64,cG5n"
    assert "none" not in page.headings
