"""Runs without test images: the estimate by cross-validation, and no evaluation at all."""

import json

import numpy as np
import pytest
from image_builders import write
from runs_of_tests import tiny
from sklearn import metrics as sklearn_metrics

from layermatch_jax import automatic, evaluate, presets, train
from layermatch_jax.after import report
from layermatch_jax.frozen import probe
from layermatch_jax.runtime import metrics
from layermatch_jax.runtime import result as result_lib

COUNTS = {"ant": 9, "bee": 5, "cat": 1}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three uneven classes, one with a single image, and unlabeled images; no test set."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.RandomState(0)
    for color, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            pixels = rng.randint(0, 60, (8, 8, 3))
            pixels[..., color] += 150
            write(root / f"train/{name}/{i}.png", pixels.astype(np.uint8))
    for i in range(20):
        write(root / f"unlabeled/{i}.png", rng.randint(0, 255, (8, 8, 3)).astype(np.uint8))
    return root


def of_folder(root, method="fixmatch", **fields):
    config = tiny(
        method,
        **{"dataset.name": "folder", "dataset.data_dir": str(root), "dataset.label_fraction": 1.0},
        **{"train_steps": 4, "policy.threshold": None, "dataset.evaluate_on": None},
    )
    config.update_from_flattened_dict(fields)
    return automatic.resolve(config)


def test_a_folder_without_test_images_is_cross_validated(photographs, tmp_path, capsys):
    config = of_folder(photographs)
    assert config.dataset.evaluate_on == "cross_validation"
    result = train.train_and_evaluate(config, str(tmp_path))
    assert "an estimate by cross-validation of the labels" in capsys.readouterr().err
    assert result["num_labels"] == 15
    assert result["held_out"] == 14  # the only image of a class is never held out
    (line,) = [line for line in metrics.read(tmp_path) if line["split"] == "cross_validation"]
    assert line["step"] == 4
    p = result["cross_validation_accuracy"]["ema"]["last"]
    assert set(result["cross_validation_accuracy"]) == {"ema"}
    assert p > 0.9  # colors are easily told apart
    # Wilson's interval: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)
    n, z = 14, 1.959964
    middle, spread = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = np.array([middle - spread, middle + spread]) / (1 + z**2 / n)
    np.testing.assert_allclose(result["interval_ema"], expected, atol=1e-6)
    text = result_lib.as_text(result, tmp_path)
    assert "accuracy by cross-validation" in text
    assert "no test images" in text
    assert "too high after training, because the backbone was trained with all of these" in text
    report.write(str(tmp_path), "")
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy by cross-validation" in page
    assert "The run has no test images" in page


@pytest.mark.slow
def test_before_and_after_training_from_pretrained_weights(photographs, tmp_path):
    train.train_and_evaluate(of_folder(photographs), str(tmp_path / "first"))
    config = of_folder(photographs, **{"model.pretrained": str(tmp_path / "first")})
    result = train.train_and_evaluate(config, str(tmp_path / "second"))
    start, end = (x for x in metrics.read(tmp_path / "second") if x["split"] != "train")
    assert (start["step"], end["step"]) == (0, 4)
    assert result["before_training"] == {
        "accuracy_ema": start["accuracy_ema"], "interval_ema": start["interval_ema"],
    }  # fmt: skip
    assert result["cross_validation_accuracy"]["ema"]["best"] == end["accuracy_ema"]
    text = result_lib.as_text(result, tmp_path)
    assert f"before training:  {start['accuracy_ema']:.1%} (95 % interval" in text
    report.write(str(tmp_path / "second"), "")
    page = (tmp_path / "second/report.html").read_text()
    assert "before training" in page


def test_without_evaluation(photographs, tmp_path):
    config = of_folder(photographs, "supervised", **{"dataset.evaluate_on": "none"})
    result = train.train_and_evaluate(config, str(tmp_path))
    assert {line["split"] for line in metrics.read(tmp_path)} == {"train"}
    assert not [name for name in result if name.endswith("_accuracy") and name[:6] != "pseudo"]
    assert "no accuracy: the run has no images for an evaluation" in result_lib.as_text(
        result, tmp_path
    )
    report.write(str(tmp_path), "")
    assert json.loads((tmp_path / "result.json").read_text())["train_steps"] == 4


def test_with_test_images_the_test_set_is_the_default(photographs, tmp_path):
    (tmp_path / "train/ant").mkdir(parents=True)
    (tmp_path / "Val").mkdir()
    assert of_folder(tmp_path).dataset.evaluate_on == "test"
    assert of_folder(tmp_path / "nothing").dataset.evaluate_on == "test"


def test_classes_of_one_image_each_have_no_estimate(tmp_path):
    for color, name in enumerate("abc"):
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[..., color] = 200
        write(tmp_path / f"images/train/{name}/0.png", pixels)
    result = train.train_and_evaluate(
        of_folder(tmp_path / "images", "supervised"), str(tmp_path / "run")
    )
    assert "cross_validation_accuracy" not in result
    assert "no accuracy" in result_lib.as_text(result, tmp_path)


@pytest.mark.slow
def test_the_estimate_is_that_of_the_probe(photographs, tmp_path, monkeypatch):
    seen = {}
    original = probe.cross_validated

    def recorded(features, labels, num_classes, seed):
        seen.update(features=features, labels=labels, K=num_classes, seed=seed)
        return original(features, labels, num_classes, seed)

    monkeypatch.setattr(probe, "cross_validated", recorded)
    config = of_folder(photographs)
    result = train.train_and_evaluate(config, str(tmp_path))
    assert seen["features"].shape == (15, 16)
    np.testing.assert_array_equal(seen["labels"], [0] * 9 + [1] * 5 + [2])
    found = original(seen["features"], seen["labels"], 3, config.seed)
    right = found.probabilities.argmax(1) == seen["labels"][found.held_out]
    assert result["cross_validation_accuracy"]["ema"]["last"] == right.mean()


def test_scores_of_classes_against_scikit_learn():
    rng = np.random.RandomState(0)
    true = rng.choice(4, 200, p=[0.5, 0.3, 0.2, 0])
    guess = np.where(rng.rand(200) < 0.6, true, rng.choice([0, 1, 3], 200))
    confusion = sklearn_metrics.confusion_matrix(true, guess, labels=range(4))
    found = evaluate.class_scores(confusion)
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
        true, guess, labels=range(4), zero_division=np.nan
    )
    np.testing.assert_allclose(found["class_precision_ema"], precision)
    np.testing.assert_allclose(found["class_recall_ema"], recall)
    assert np.isnan(recall[3])  # no image of this class, which is left out of the mean
    np.testing.assert_allclose(found["macro_f1_ema"], f1[:3].mean())


def test_labels_all():
    for arg, fraction in (("labels=all", 1.0), ("labels=100%", 1.0), ("labels=7", 0.0)):
        config = presets.apply_arg(tiny(), arg)
        assert config.dataset.label_fraction == fraction
