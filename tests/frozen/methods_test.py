"""The methods probe and self_training: whole runs that train no step."""

import numpy as np
import pytest
from runs_of_tests import KilledError, assert_same, die, tiny
from scipy import special
from sklearn import linear_model

from layermatch_jax import setup, train
from layermatch_jax.after import report, runs, trained
from layermatch_jax.after.predict import apply
from layermatch_jax.errors import InputError
from layermatch_jax.frozen import probe, self_training
from layermatch_jax.runtime import checkpoint, metrics


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A run whose backbone the others freeze."""
    workdir = tmp_path_factory.mktemp("backbone")
    train.train_and_evaluate(tiny(train_steps=4), str(workdir))
    return str(workdir)


@pytest.mark.parametrize("method", ["probe", "self_training"])
def test_a_run_is_logistic_regression_on_the_features(backbone, tmp_path, method, capsys):
    # The steps of a sweep's common flags do not reach these methods.
    config = tiny(method, **{"model.pretrained": backbone, "train_steps": 8})
    result = train.train_and_evaluate(config, str(tmp_path))
    assert "logistic regression on the features of the 20 labeled" in capsys.readouterr().err

    images = setup.load(config).partition
    model = trained.read(backbone)
    labeled, unlabeled, test = (
        np.asarray(apply.predict(model, part).features)
        for part in (images.labeled, images.unlabeled, images.evaluation)
    )
    if method == "probe":
        found = probe.fit(labeled, images.labeled.labels, 10, config.seed)
    else:
        found = self_training.fit(labeled, images.labeled.labels, unlabeled, 10, config.seed)
    right = np.argmax(test @ found.kernel + found.bias, axis=1) == images.evaluation.labels
    assert result["test_accuracy"]["raw"]["last"] == pytest.approx(right.mean(), abs=1e-6)
    assert result["test_accuracy"]["ema"]["last"] == result["test_accuracy"]["raw"]["last"]
    assert (result["method"], result["train_steps"]) == (method, 0)
    assert result["images_per_second"] is None
    # What one does with runs works with this one.
    run = runs.read(str(tmp_path))
    assert run.step == 0
    predicted = apply.predict(trained.of_run(run), images.evaluation).probabilities
    assert np.mean(np.argmax(predicted, 1) == images.evaluation.labels) == pytest.approx(
        right.mean(), abs=1e-6
    )
    report.write(str(tmp_path), "")
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("where", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_an_interrupted_run_is_finished_by_the_same_command(backbone, tmp_path, monkeypatch, where):
    config = tiny("probe", **{"model.pretrained": backbone})
    train.train_and_evaluate(config, str(tmp_path / "whole"))
    save = checkpoint.save

    def saved_or_not(*args):
        if where == "after":
            save(*args)
        die()

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", saved_or_not)
        with pytest.raises(KilledError):
            train.train_and_evaluate(config, str(tmp_path / "cut"))
    train.train_and_evaluate(config, str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert len(metrics.read(tmp_path / "cut")) == 1


def test_the_start_is_evaluated_and_is_not_part_of_the_result(backbone, tmp_path):
    config = tiny("supervised", **{"model.pretrained": backbone, "train_steps": 4})
    result = train.train_and_evaluate(config, str(tmp_path))
    tests = [line for line in metrics.read(tmp_path) if line["split"] == "test"]
    assert [line["step"] for line in tests] == [0, 4]
    assert result["evaluations_in_median"] == 1
    assert result["test_accuracy"]["ema"]["best"] == tests[1]["accuracy_ema"]


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("probe", {}, "needs a backbone with pretrained weights"),
        ("fixmatch", {"train_steps": 0}, "train_steps=0 must be at least 1"),
        ("probe", {"model.head_init": "zeros"}, "leave model.head_init out"),
        ("probe", {"avg_clustering.centers": "classifier"}, "probe has no unsupervised gradient"),
        ("fixmatch", {"model.head_init": "probe"}, "needs a backbone with pretrained weights"),
    ],
)
def test_settings_that_are_refused(tmp_path, method, fields, message):
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(tiny(method, **fields), str(tmp_path))


def test_self_training_against_three_rounds_by_hand():
    rng = np.random.RandomState(0)
    centers = 1.5 * rng.randn(3, 6)
    labels, truths = np.arange(9) % 3, np.arange(60) % 3
    labeled = np.float32(centers[labels] + rng.randn(9, 6))
    unlabeled = np.float32(centers[truths] + rng.randn(60, 6))
    C = probe.fit(labeled, labels, 3, seed=0).C

    def regression(x, y, w):
        scaled = x / np.sqrt(np.mean(x**2))
        fitted = linear_model.LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(scaled, y, w)
        of_unlabeled = unlabeled / np.sqrt(np.mean(x**2))
        return special.softmax(of_unlabeled @ fitted.coef_.T + fitted.intercept_, axis=1)

    p = regression(np.float64(labeled), labels, np.ones(9))
    for _ in range(3):
        x = np.float64(np.concatenate([labeled, unlabeled]))
        y = np.concatenate([labels, p.argmax(1)])
        # The weights of all 60 pseudo-labels together are 9, as those of the labels.
        p = regression(x, y, np.concatenate([np.ones(9), 9 * p.max(1) / p.max(1).sum()]))
    found = self_training.fit(labeled, labels, unlabeled, 3, seed=0).probabilities(unlabeled)
    np.testing.assert_allclose(found, p, atol=2e-3)
