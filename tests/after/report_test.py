"""Reports of runs: the file needs nothing else, and what stands in it is what the runs did."""

import html
import html.parser
import json
import os
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from etils import epath
from runs_test import files, make_config

from layermatch_jax import automatic, main, presets, setup, train
from layermatch_jax import config as config_lib
from layermatch_jax.after import figures, pictures, predict, report, runs
from layermatch_jax.after.report import curves, logs, model, pages, tables
from layermatch_jax.data import pipeline
from layermatch_jax.data.augment import crop
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import metrics, workdir

pytest.importorskip("matplotlib")


class Page(html.parser.HTMLParser):
    """What a reader gets of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.rows, self.headings = [], "", [], []
        self.feed(text)
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        tag = self.tags[-1][0] if self.tags else ""
        if tag in ("td", "th") and self.rows:
            self.rows[-1][-1] += data.strip("\n")
        if tag in ("h1", "h2") and data.strip():
            self.headings.append(data)

    def row(self, name):
        """The only row that begins with this."""
        (row,) = [row for row in self.rows if row[0] == name]
        return row[1:]


def read(path) -> Page:
    """The page, after it was found to stand alone."""
    text = path.read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or (
            "src" not in attributes
        )
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {f"#{i}" for i in ids} == {a["href"] for _, a in page.tags if "href" in a}
    for image in page.images:
        assert len(image["alt"]) > 20
    assert ("html", {"lang": "en"}) in page.tags
    assert page.headings[0]
    return page


# ---------------------------------------------------------------------------------------------
# One run.


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on images in a file, which can go missing; six of the unlabelled are of no class."""
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
    path = report.report(str(made))
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
    assert page.row("labelled split (SHA-256 of its indices)") == [result["split_sha256"]]
    assert page.row("labelled images") == ["6, 2 of each class"]
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
    assert any(alt.startswith("8 unlabelled images of step 12, each above its") for alt in alts)
    assert any(alt.startswith("Confusion matrix of 30 test images in 3 classes") for alt in alts)
    assert f"{last['accuracy_ema']:.1%} of 30 images are right" in page.text
    assert "averaged classifier" in page.text
    assert "R&D" in page.text  # as a class is called, and not as markup
    assert "a<b>" in page.text
    assert path.stat().length < 3e6


def test_numbers_behind_the_pictures_of_a_model(made, monkeypatch):
    """What is handed to the drawing functions is what the run's own parts say."""
    drawn = {}
    for name in ("confusion", "images", "feature_map"):
        original = getattr(pictures, name)

        def record(*args, original=original, name=name):
            drawn.setdefault(name, []).append(args)
            return original(*args)

        monkeypatch.setattr(pictures, name, record)
    monkeypatch.setattr(figures, "png", lambda figure: b"")
    run = runs.read(str(made))
    evaluation = run.data.partition.evaluation
    answer = predict.predict(run, evaluation)
    # A model that is sure of itself: 3 images of each class are taken for the next.
    sure = np.full((30, 3), 0.1)
    guesses = np.where(np.arange(30) < 9, (evaluation.labels + 1) % 3, evaluation.labels)
    sure[np.arange(30), guesses] = 0.5 + np.arange(30) / 100
    table = model.predictions(run, predict.Predictions(answer.features, sure))
    ((matrix, names),) = drawn["confusion"]
    np.testing.assert_array_equal(matrix, [[7, 3, 0], [0, 7, 3], [3, 0, 7]])
    assert names == ("a<b>", "R&D", "c")
    assert [row[:3] for row in table[2].rows] == [
        ("a<b>", "R&D", "3"), ("R&D", "c", "3"), ("c", "a<b>", "3"),
    ]  # fmt: skip
    ((rows, titles),) = drawn.pop("images")
    middle = crop.center_crop(evaluation.read(np.arange(30)), 6)
    np.testing.assert_array_equal(rows[0], middle[8:0:-1])  # 8 is the surest of those 9
    np.testing.assert_array_equal(rows[1], middle[:1])
    assert titles[0][0] == "c → a<b>\n58.0%"
    assert titles[1] == ["a<b> → R&D\n50.0%"]

    # The views: those that the twelfth step was given.
    model.views(run.config, run.data, 11)
    ((pixels, titles, kinds),) = drawn["images"]
    sampler = setup.create_sampler(run.config, run.data.partition)
    draws = sampler.draw(11)
    unlabeled = run.data.partition.unlabeled
    positions = draws.unlabeled.reshape(-1)[:8]
    np.testing.assert_array_equal(pixels[0], crop.center_crop(unlabeled.read(positions), 6))
    weak, _ = pipeline.moved_views(run.data.partition, sampler, 1, 11, slice(None))
    np.testing.assert_array_equal(pixels[1], weak.images[:, 1:4].reshape(-1, 6, 6, 3)[:8])
    _, call = next(iter(run.data.feed.calls(range(11, 12))))
    call = jax.tree.map(lambda x: x[:, 0], call)
    batch = jax.jit(run.data.feed.batch)(run.data.feed.resident("jit"), call)
    np.testing.assert_array_equal(pixels[2], batch.images[:, 4:].reshape(-1, 6, 6, 3)[:8])
    assert np.any(pixels[2] != pixels[1])
    hidden = "unknown or labelled"
    truths = [hidden if c < 0 else names[c] for c in unlabeled.labels[positions]]
    assert hidden in truths
    assert titles == [truths, [""] * 8, [""] * 8]
    assert kinds == ["image", "weak view", "strong view"]

    # The centres: columns of the averaged classifier, from their mean, in the features' plane.
    model.features(run, answer)
    ((points, labels, _, _, stars, wrong),) = drawn["feature_map"]
    centred = answer.features - answer.features.mean(axis=0)
    axes = np.linalg.svd(centred.astype(float), full_matrices=False)[2][:2].T
    axes *= np.sign(np.sum(points * (centred @ axes), axis=0))
    np.testing.assert_allclose(points, centred @ axes, atol=1e-4)
    columns = run.state.centres["kernel"].T
    expected = (columns - columns.mean(axis=0)) @ axes
    farthest = np.linalg.norm(stars, axis=1).max()
    assert np.sum(np.linalg.norm(points, axis=1) < farthest) == 27  # nine tenths of 30
    np.testing.assert_allclose(
        stars, expected * farthest / np.linalg.norm(expected, axis=1).max(), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_array_equal(labels, evaluation.labels)
    np.testing.assert_array_equal(wrong, answer.probabilities.argmax(axis=1) != labels)


def test_centres_are_those_of_the_reading(made):
    run = runs.read(str(made))
    of_ema = model._centres(run._replace(config=config_of("fixmatch")))
    np.testing.assert_array_equal(of_ema.vectors, run.state.ema_params["classifier"]["kernel"].T)
    assert not of_ema.places
    state = {"centres": np.arange(6.0).reshape(3, 2), "updates": np.array([1, 0, 4])}
    config = config_of("layermatch", **{"avg_clustering.centres": "features"})
    averages = model._centres(run._replace(config=config, state=run.state.replace(centres=state)))
    np.testing.assert_array_equal(averages.vectors, [[0, 1], [np.nan, np.nan], [4, 5]])
    assert averages.places


def test_what_is_missing_is_named_and_the_rest_is_there(workdir_, tmp_path, monkeypatch):
    """No checkpoint; then no data either; then nothing but a config."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")  # they are not looked at
    shutil.rmtree(workdir_ / "checkpoints")
    (workdir_ / "result.json").unlink()
    lines = (workdir_ / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir_ / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:30])  # being written
    page = read(report.report(str(workdir_)))
    assert "There are no predictions. " in page.text
    assert "has no checkpoint yet" in page.text
    assert page.row("steps") == ["4 of 12, not finished"]
    assert "Images and their views" in page.headings
    assert not {"Predictions", "Features"} & set(page.headings)

    config = json.loads((workdir_ / "config.json").read_text())
    data_dir = config["dataset.data_dir"]
    config["dataset.data_dir"] = str(tmp_path / "gone.npz")
    (workdir_ / "config.json").write_text(json.dumps(config))
    page = read(report.report(str(workdir_)))
    assert "The run's images cannot be shown. " in page.text
    assert "gone.npz" in page.text
    assert page.headings[1:] == ["Result", "Training", "Pseudo-labels by class", "Settings"]
    assert any("Pseudo-labels, over training" in image["alt"] for image in page.images)

    told = {"parameters": 1, "cosine_supervised": [0.1, 0, 0.2], "norm_ratio": [1.0, 0.5, 2.0]}
    told |= {"noise_share": [0.5, 0.4, 0.6]}
    layers = {"stem": told | {"cosine_true": [0.871, 0.8, 0.9]}}
    layers["head"] = dict.fromkeys(told, [None] * 3) | {"cosine_true": [None] * 3}
    layers = [{"step": step, "batches": 2, "layers": layers} for step in (2, 4)]
    (workdir_ / "layer_report.json").write_text(json.dumps(layers))
    page = read(report.report(str(workdir_), data_dir))  # where they are now
    assert page.headings[4:] == ["Images and their views", "Layers", "Settings"]
    assert page.images[-1]["alt"].endswith("of the true labels: stem 0.87")
    (workdir_ / "layer_report.json").unlink()

    (workdir_ / "metrics.jsonl").unlink()
    (workdir_ / "labeled_split.json").unlink()
    page = read(report.report(str(workdir_)))
    assert "The run has not logged anything yet." in page.text
    assert page.headings[1:] == ["Result", "Settings"]
    assert not page.images


# ---------------------------------------------------------------------------------------------
# Several runs, written by hand.


def config_of(method, **fields):
    config = presets.apply_method(config_lib.base(), method)
    config.update_from_flattened_dict({"train_steps": 4, **fields})
    return automatic.resolve(config)


def write_run(folder, config, accuracies, finished=True, num_train=100, **train_fields):
    """A folder with a line of training and an evaluation at steps 2 and 4."""
    folder.mkdir(parents=True)
    workdir.write_config(epath.Path(folder), config)
    split = {
        "data_set": "cifar10",
        "num_labels": 20,
        "num_train": num_train,
        "sha256": f"{num_train}-x",
    }
    split |= {"class_counts": [10, 10], "num_unlabeled": 100, "num_evaluation": 10}
    (folder / "labeled_split.json").write_text(json.dumps(split))
    lines = []
    for step, accuracy in zip((2, 4), accuracies, strict=False):
        fields = {"mask_rate": 0.5, "pseudo_label_accuracy": 0.75, "images_per_second": 9.0}
        fields |= {"pseudo_label_accuracy_all": 0.25, "seconds": 1.0} | train_fields
        lines.append({"step": step, "split": "train"} | fields)
        scores = {
            "accuracy": accuracy - 0.1,
            "accuracy_ema": accuracy,
            "loss": 1.0,
            "loss_ema": 1.0,
        }
        lines.append({"step": step, "split": config.dataset.evaluate_on, "seconds": 1.0} | scores)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {"device": {"kind": "cpu", "count": 1}, "git_commit": "0f0f"}
        result |= {"versions": {"layermatch_jax": "0", "jax": "1", "flax": "2"}}
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def sweep(tmp_path):
    """Two methods with two finished runs each, a third of one under way, and what is no run."""
    folder = tmp_path / "a<b> & c"
    for seed, fixmatch, layermatch in ((0, 0.5, 0.7), (1, 0.6, 0.7)):
        seeds = {"seed": seed, "dataset.label_seed": seed}
        write_run(folder / f"f{seed}", config_of("fixmatch", **seeds), (0.2, fixmatch))
        write_run(folder / f"l{seed}", config_of("layermatch", **seeds), (0.3, layermatch))
    config = config_of("layermatch", seed=2, **{"dataset.label_seed": 2})
    write_run(folder / "l2", config, (0.9,), finished=False)
    (folder / "table.md").write_text("")
    (folder / "empty").mkdir()
    return folder


def test_a_table_says_why_accuracies_of_pseudo_labels_are_missing(tmp_path):
    unknown = dict.fromkeys(("pseudo_label_accuracy", "pseudo_label_accuracy_all"))
    for name, fields in (("known", {}), ("unknown", unknown)):
        write_run(tmp_path / name, config_of("fixmatch"), (0.5,), **fields)
        (table, _) = tables.results(logs.by_method([logs.read(epath.Path(tmp_path / name))]))
        told = "are missing where no unlabelled image has a known class" in table.caption
        assert told == (name == "unknown")
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["used"], row["used right"], row["all right"]) == ("50.0", "", "")


def test_several_runs_by_method(sweep):
    path = report.report(str(sweep))
    assert path == epath.Path(sweep) / "report.html"
    page = read(path)
    assert page.headings == ["5 runs on cifar10", "Results", "Training", "Settings"]
    # median20 of (0.2, 0.5), (0.2, 0.6) and of (0.3, 0.7) twice; differences 15 and 10 points.
    assert page.row("fixmatch") == [
        "none", "none", "2 of 2", "37.5 ± 3.5", "", "55.0 ± 7.1", "55.0 ± 7.1", "45.0 ± 7.1",
        "50.0 ± 0.0", "75.0 ± 0.0", "25.0 ± 0.0", "4.0 ± 0.0",
    ]  # fmt: skip
    assert page.row("layermatch")[:6] == [
        "classifier", "classifier", "2 of 3", "50.0 ± 0.0", "+12.5 ± 2.5", "70.0 ± 0.0",
    ]  # fmt: skip
    assert page.row("l2")[:7] == [
        "layermatch", "classifier", "classifier", "2", "2", "2 of 4, not finished", "90.0",
    ]  # fmt: skip
    assert f"Left out of the table by method: {sweep}/l2 (2 of 4, not finished)" in page.text
    assert "Bands: ± one standard deviation (sd) over these runs." in page.text
    assert page.row("avg_clustering.centres") == ["none", "classifier"]
    assert page.row("layerwise.gradient_mask") == ["none", "classifier"]
    # fixmatch's 55 %, and layermatch's up to where all three have come: (30 + 30 + 90) / 3.
    assert page.images[0]["alt"] == (
        "Accuracy: EMA of the parameters, over training steps: fixmatch (2 runs) 55.0% at step 4; "
        "layermatch (3 runs) 50.0% at step 2."
    )
    # A seed that only one of the methods has finished is compared to nothing.
    (sweep / "f1" / "result.json").unlink()
    page = read(report.report(str(sweep)))
    assert page.row("layermatch")[2:5] == ["2 of 3", "50.0 ± 0.0", "+15.0"]
    assert path.stat().length < 3e6


def test_bands_are_drawn_around_means(sweep, monkeypatch):
    drawn = {}

    def record(series, title, *args, **kwargs):
        drawn[title] = series

    monkeypatch.setattr(figures, "curves", record)
    monkeypatch.setattr(curves, "picture", lambda figure, alt, caption: alt)
    read_logs = [logs.read(folder) for folder in logs.folders(str(sweep))]
    groups = logs.by_method(read_logs)
    curves.of_several(groups)
    fixmatch, layermatch = drawn["Accuracy: raw parameters"]
    np.testing.assert_array_equal(fixmatch.steps, [2, 4])
    np.testing.assert_allclose(fixmatch.values, [0.1, 0.45])
    deviation = 0.005**0.5  # of 0.4 and 0.5
    np.testing.assert_allclose(fixmatch.low, [0.1, 0.45 - deviation])
    np.testing.assert_allclose(fixmatch.high, [0.1, 0.45 + deviation])
    np.testing.assert_allclose(layermatch.values, [0.4])
    # Of many methods, bands would hide each other.
    many = {f"method {i}": groups["fixmatch"] for i in range(7)}
    reading, *_ = curves.of_several(many)
    assert "no bands" in reading
    assert all(series.low is None for series in drawn["Accuracy: raw parameters"])
    reading, *_ = curves.of_several({m: of_m[:1] for m, of_m in groups.items()})
    assert reading.startswith("One run of each method")
    assert all(series.low is None for series in drawn["Accuracy: raw parameters"])


def test_runs_with_other_settings_are_no_repetitions(tmp_path):
    mask = {"layerwise.gradient_mask": presets.MASKS["from_stage3"]}
    own = {"layerwise.gradient_mask": (("classifier/bias", 0.5),)}
    for name, config in {
        "a": config_of("fixmatch"),
        "b": config_of("fixmatch", seed=3, log_every=7, **{"dataset.data_dir": "/elsewhere"}),
        "c": config_of("fixmatch", **mask),
        "d": config_of("fixmatch", **own),
        "e": config_of("layermatch", **{"policy.threshold": 0.5}),
    }.items():
        write_run(tmp_path / name, config, (0.5, 0.5))
    groups = logs.by_method([logs.read(folder) for folder in logs.folders(str(tmp_path))])
    named = {name: [log.folder.name for log in of_name] for name, of_name in groups.items()}
    assert named == {
        "fixmatch": ["a", "b"],
        "fixmatch+mask=from_stage3": ["c"],
        "fixmatch+mask=custom-78c103": ["d"],
        "layermatch": ["e"],
    }


def test_classes_over_training(tmp_path, monkeypatch):
    drawn = {}
    for name in ("class_counts", "class_map"):
        monkeypatch.setattr(
            figures, name, lambda *a, name=name, **k: drawn.setdefault(name, []).append((a, k))
        )
    monkeypatch.setattr(curves, "picture", lambda figure, alt, caption: alt)
    write_run(
        tmp_path / "run",
        config_of("freematch"),
        (0.5, 0.5),
        class_pseudo_labels=[3.0, 1.0],
        class_truths=[2.0, 6.0],
        class_acceptance=[0.5, None],
        class_threshold=[0.25, 0.75],
    )
    alts = curves.of_classes(logs.read(epath.Path(tmp_path / "run")), ["a", "b"])
    assert "In the end, 50% of the images have a pseudo-label that is used" in alts[0]
    (((steps, counted, truths, names), _),) = drawn["class_counts"]
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_array_equal(counted, [[3, 1], [3, 1]])
    np.testing.assert_array_equal(truths, [[2, 6], [2, 6]])
    assert names == ["a", "b"]
    (acceptance, limits), (threshold, high) = drawn["class_map"]
    np.testing.assert_array_equal(acceptance[1], [[0.5, np.nan], [0.5, np.nan]])
    np.testing.assert_array_equal(threshold[1], [[0.25, 0.75], [0.25, 0.75]])
    assert (limits["limits"], high["limits"]) == ((0, 1), (0, 0.75))
    # One threshold for all classes is no map; an older run has not counted; supervised has none.
    of_all = {"class_acceptance": [0.5, 1.0], "class_threshold": [0.9, 0.9]}
    write_run(tmp_path / "old", config_of("fixmatch"), (0.5, 0.5), **of_all)
    note, *alts = curves.of_classes(logs.read(epath.Path(tmp_path / "old")), ["a", "b"])
    assert "a version that did not count" in note.text
    assert alts == ["Pseudo-labels used, by class, as colours over training steps."]
    of_all |= {"class_truths": [0.0, 0.0], "class_pseudo_labels": [0.0, 0.0]}
    write_run(tmp_path / "unknown", config_of("fixmatch"), (0.5, 0.5), **of_all)
    note, *alts = curves.of_classes(logs.read(epath.Path(tmp_path / "unknown")), ["a", "b"])
    assert note.text == (
        "How many pseudo-labels are right is not known: no unlabelled image has a known class "
        "(labelled images do not count)."
    )
    assert len(alts) == 1
    none = dict.fromkeys(("mask_rate", "pseudo_label_accuracy", "pseudo_label_accuracy_all"))
    none |= {"class_threshold": [0.9, 0.8], "class_truths": [0.0, 0.0]}
    none |= {"class_pseudo_labels": [0.0, 0.0], "loss_unsupervised": 0.0, "loss_supervised": 1.0}
    write_run(tmp_path / "supervised", config_of("supervised"), (0.5, 0.5), **none)
    log = logs.read(epath.Path(tmp_path / "supervised"))
    assert curves.of_classes(log, ["a", "b"]) == []
    alts = curves.of_one(log)
    assert not any("pseudo-label" in alt.lower() or "Threshold" in alt for alt in alts)
    assert tables.provenance(log)


def test_the_file_goes_where_the_runs_are(tmp_path):
    for seed, name in enumerate(("x/one", "x/y/two")):
        write_run(tmp_path / name, config_of("fixmatch", seed=seed), (0.5, 0.5))
    one, two = tmp_path / "x/one", tmp_path / "x/y/two"
    assert report.report(f"{one},{two},{one}/") == epath.Path(tmp_path / "x/report.html")
    page = read(tmp_path / "x/report.html")
    assert page.headings[0] == "2 runs on cifar10"
    shared = report._shared([epath.Path("gs://bucket/a/b"), epath.Path("gs://bucket/a/c")])
    assert str(shared) == "gs://bucket/a"


def test_commas_separate_but_in_the_names_of_folders(tmp_path, monkeypatch, without_images):
    names = ("a", "b", "lr=1,wd=2", "x,y,z", "[1] é\n")
    for seed, name in enumerate(names):
        write_run(tmp_path / name, config_of("fixmatch", seed=seed), (0.5, 0.5))
    monkeypatch.chdir(tmp_path)

    def found(text):
        return [str(folder) for folder in logs.folders(text)]

    assert found("a,b") == ["a", "b"]
    assert found("lr=1,wd=2") == ["lr=1,wd=2"]
    assert found("a,x,y,z,,lr=1,wd=2,b,") == ["a", "x,y,z", "lr=1,wd=2", "b"]
    assert found("[1] é\n,a") == ["[1] é\n", "a"]
    assert found("nowhere,b,x,y") == ["nowhere", "b", "x", "y"]
    assert found(str(tmp_path)) == sorted(str(tmp_path / name) for name in names)
    (tmp_path / "a,b").mkdir()  # what is there as a whole is meant as a whole
    assert found("a,b") == ["a,b"]
    page = read(report.report(f"{tmp_path}/lr=1,wd=2,{tmp_path}/[1] é\n"))
    assert page.row("lr=1,wd=2")[0] == "fixmatch"
    assert page.headings[0] == "2 runs on cifar10"


@pytest.fixture
def without_images(monkeypatch):
    """The runs' images are not looked for, and pictures are not made."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")

    def gone(folder, config):
        raise InputError("they are gone")

    monkeypatch.setattr(runs, "read_data", gone)


def test_a_folder_whose_name_is_no_utf8(tmp_path, without_images):
    folder = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))  # Latin-1
    try:
        write_run(folder, config_of("fixmatch"), (0.5, 0.5))
    except OSError:
        pytest.skip("this disk holds no such names")
    page = read(report.report(str(folder)))
    assert page.row("folder") == [f"{tmp_path}/caf\\xe9"]


def test_the_same_run_in_several_folders_counts_once(sweep, caplog, without_images):
    """By hand: three pairs differ by 10, 20 and 0 points, not four by 10, 20, 20 and 0."""
    config = config_of("layermatch", seed=2, **{"dataset.label_seed": 2})
    write_run(sweep / "f2", config_of("fixmatch", seed=2, **{"dataset.label_seed": 2}), (0.2, 0.3))
    write_run(sweep / "l2 finished", config, (0.2, 0.3))
    shutil.copytree(sweep / "l1", sweep / "a copy of l1")
    elsewhere = {"dataset.data_dir": "/elsewhere", "log_every": 1, "seed": 0}
    write_run(sweep / "z", config_of("layermatch", **elsewhere), (0.3,), finished=False)
    page = read(report.report(str(sweep)))
    assert page.headings[0] == "6 runs on cifar10"
    # median20 of fixmatch: 35, 40, 25; of layermatch: 50, 50, 25; their differences: 15, 10, 0.
    assert page.row("fixmatch")[:2] == ["3 of 3", "33.3 ± 7.6"]
    assert page.row("layermatch")[:3] == ["3 of 3", "41.7 ± 14.4", "+8.3 ± 4.4"]
    reason = "with the same settings, seeds and images."
    for left_out, kept in (("l1", "a copy of l1"), ("l2", "l2 finished"), ("z", "l0")):
        sentence = f"{sweep}/{left_out} is left out: it is the same run as {sweep}/{kept}, {reason}"
        assert sentence in page.text
        assert sentence in caplog.messages
    # Of two that are not finished, the one that has come farther.
    for name in ("l2", "l2 finished"):
        (sweep / name / "result.json").unlink(missing_ok=True)
    page = read(report.report(f"{sweep}/l2,{sweep}/l2 finished"))
    assert page.headings[0] == "layermatch on cifar10, 20 labels (label seed 2, seed 2)"
    assert page.row("folder") == [f"{sweep}/l2 finished"]
    assert f"{sweep}/l2 is left out" in page.text
    # Other labelled images by a split file are another run, and no pair of those of the seed.
    split = json.loads((sweep / "l0" / "labeled_split.json").read_text()) | {"sha256": "other"}
    (sweep / "l0" / "labeled_split.json").write_text(json.dumps(split))
    page = read(report.report(f"{sweep}/l0,{sweep}/l1,{sweep}/f0,{sweep}/f1,{sweep}/z"))
    assert page.headings[0] == "5 runs on cifar10"
    assert page.row("layermatch")[2] == "+10.0"


def test_what_cannot_be_reported(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"holds no run: there is no .*nowhere/config\.json"):
        report.report(str(tmp_path / "nowhere"))
    write_run(tmp_path / "a", config_of("fixmatch"), (0.5, 0.5))
    with pytest.raises(InputError, match="nowhere holds no run"):
        report.report(f"{tmp_path}/a,{tmp_path}/nowhere")
    validation = config_of("fixmatch", **{"dataset.evaluate_on": "validation"})
    write_run(tmp_path / "b", validation, (0.5, 0.5))
    write_run(tmp_path / "c", config_of("fixmatch", seed=1), (0.5, 0.5), num_train=50)
    with pytest.raises(InputError) as error:
        report.report(str(tmp_path))
    assert str(error.value).splitlines()[1:] == [
        f"  cifar10, 2 classes, 100 training images, evaluated on test images: {tmp_path}/a",
        f"  cifar10, 2 classes, 100 training images, evaluated on validation images: {tmp_path}/b",
        f"  cifar10, 2 classes, 50 training images, evaluated on test images: {tmp_path}/c",
        "Give those of one kind together.",
    ]
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        report.report(f"{tmp_path}/a")
    assert not list(tmp_path.rglob("report*"))


def test_command_line(sweep, capsys):
    from absl import flags

    def call(*args):
        values = flags.FlagValues()
        status = main.main(main.parse_flags(["main", "--mode=report", *args], values), values)
        return status, *capsys.readouterr()

    status, out, err = call(f"--workdir={sweep}/f0,{sweep}/l0")
    assert (status, err) == (0, "")
    assert out == f"report: {sweep}/report.html\n"
    status, out, err = call(f"--workdir={sweep}/none")
    assert (status, out) == (2, "")
    assert err.startswith(f"InputError: --workdir={sweep}/none holds no run")


# ---------------------------------------------------------------------------------------------
# The page.


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
