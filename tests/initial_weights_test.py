"""Runs that start from the weights of another run: from which, and what they keep of them."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs_of_tests import KilledError, assert_same, before_step, die, final_state, tiny

from layermatch_jax import initial_weights, setup, train
from layermatch_jax.after import runs, trained
from layermatch_jax.errors import InputError
from layermatch_jax.frozen import features, probe
from layermatch_jax.method import state
from layermatch_jax.models.pretrained import Normalization, Weights


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of four steps."""
    workdir = tmp_path_factory.mktemp("first")
    train.train_and_evaluate(tiny(train_steps=4), str(workdir))
    return workdir


def continued(first, **fields):
    return tiny(**({"model.pretrained": str(first), "seed": 1, "train_steps": 4} | fields))


def test_a_run_starts_from_the_averaged_parameters_of_another(first):
    config = continued(first)
    initial = setup.prepare(config, setup.load(config)).initial
    saved = final_state(first)

    def of_first(part):
        return {
            name.removeprefix(f"['state']['{part}']"): x
            for name, x in saved.items()
            if name.startswith(f"['state']['{part}']")
        }

    def flat(tree):
        return {
            jax.tree_util.keystr(path): np.asarray(x)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    assert any((of_first("params")[k] != x).any() for k, x in of_first("ema_params").items())
    jax.tree.map(np.testing.assert_array_equal, flat(initial.params), of_first("ema_params"))
    jax.tree.map(np.testing.assert_array_equal, flat(initial.ema_params), of_first("ema_params"))
    jax.tree.map(np.testing.assert_array_equal, flat(initial.batch_stats), of_first("batch_stats"))
    # Centers begin at the classifier; the optimizer and the step begin anew.
    jax.tree.map(np.testing.assert_array_equal, initial.centers, initial.params["classifier"])
    assert int(initial.step) == 0
    assert not any(np.any(x) for x in jax.tree.leaves(initial.opt_state))


def weights_with_classes(initial, class_names):
    """The backbone of a state as Weights, with a classifier of three classes."""

    def flat(tree):
        return initial_weights.traverse_util.flatten_dict(tree, sep="/")

    return Weights(
        params=flat(initial.params["backbone"]),
        batch_stats=flat(initial.batch_stats),
        classifier={"kernel": np.arange(48.0).reshape(16, 3), "bias": np.array([7.0, 8, 9])},
        class_names=class_names,
        bn_epsilon=None,
        normalization=Normalization((0, 0, 0), (1, 1, 1), "bicubic"),
        looks_like="conv4",
        source="a test",
        sha256="",
        license="",
    )


def three_classes(config):
    """The images of `config`, reduced to the classes dog, cat and fox, with two labels each."""
    statistics = (0, 0, 0), (1, 1, 1)  # so that the weights are not read
    partition = setup.load(config, statistics).partition
    labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    labeled = partition.labeled._replace(labels=labels)
    return partition._replace(labeled=labeled, class_names=("dog", "cat", "fox"))


@pytest.mark.parametrize("head", ["weights", "random", "zeros", "probe"])
def test_the_classifier_that_a_run_starts_with(head):
    config = tiny(**{"dataset.num_labels": 10, "model.pretrained": "x", "model.head_init": head})
    partition = three_classes(config)
    initial = state.create(config, 3, len(partition.unlabeled.labels), partition.labeled.labels)
    weights = weights_with_classes(initial, ("fox", "dog", "cat"))
    begun, notes = initial_weights.first_classifier(initial, config, weights, partition)
    found = begun.params["classifier"]
    jax.tree.map(np.testing.assert_array_equal, begun.ema_params["classifier"], found)
    if head == "weights":  # in the order of the run's classes
        np.testing.assert_array_equal(found["kernel"], weights.classifier["kernel"][:, [1, 2, 0]])
        np.testing.assert_array_equal(found["bias"], [8, 9, 7])
    if head == "random":  # Glorot: variance 2 / (16 + 3)
        np.testing.assert_allclose(np.std(found["kernel"]), (2 / 19) ** 0.5, rtol=0.3)
    if head == "zeros":
        assert not np.any(found["kernel"])
    if head == "probe":
        labels = partition.labeled.labels
        x = features.of_images(initial, ((0,) * 3, (1,) * 3), partition.labeled, config)
        expected = probe.fit(x, labels, 3, config.seed)
        np.testing.assert_array_equal(found["kernel"], expected.kernel)
        np.testing.assert_array_equal(found["bias"], expected.bias)
    assert [bool(notes)] == [head in ("weights", "probe")]


def test_weights_without_one_of_the_classes_give_way_to_the_probe():
    config = tiny(**{"dataset.num_labels": 10, "model.pretrained": "x"})
    partition = three_classes(config)
    initial = state.create(config, 3, len(partition.unlabeled.labels), partition.labeled.labels)
    for names in (("fox", "dog", "cow"), None):
        weights = weights_with_classes(initial, names)
        begun, notes = initial_weights.first_classifier(initial, config, weights, partition)
        assert "logistic regression on the features of the 6 labeled images" in notes[0]
        assert np.any(
            begun.params["classifier"]["kernel"] != initial.params["classifier"]["kernel"]
        )


def test_what_a_run_keeps_of_its_weights(first, tmp_path, capsys):
    # A data set of other statistics: the weights' own count.
    data = json.loads((first / "data.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    data |= {"channel_mean": [0.25, 0.5, 0.75], "channel_std": [0.125, 0.25, 0.5]}
    (moved / "data.json").write_text(json.dumps(data))
    workdir = tmp_path / "second"
    train.train_and_evaluate(continued(moved), str(workdir))

    record = json.loads((workdir / "weights.json").read_text())
    assert record["source"] == f"the run in {moved}, step 4"
    assert len(record["sha256"]) == 64
    assert (record["mean"], record["std"]) == (data["channel_mean"], data["channel_std"])
    assert f"starts from the run in {moved}, step 4 (license: " in capsys.readouterr().err
    # What predicts and reports with the run reads it there.
    shutil.rmtree(moved)
    run = runs.read(str(workdir))
    assert run.statistics == ((0.25, 0.5, 0.75), (0.125, 0.25, 0.5))
    told = trained.of_run(run).about["weights"]
    assert told == {"source": record["source"], "license": record["license"]}


def test_to_go_on_needs_no_weights_again(first, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(first, source)
    config = continued(source, train_steps=8)
    train.train_and_evaluate(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        before_step(patched, 6, die)
        with pytest.raises(KilledError):
            train.train_and_evaluate(config, str(tmp_path / "cut"))
    shutil.rmtree(source)
    train.train_and_evaluate(config, str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    # A new run does need them.
    with pytest.raises(InputError, match="is neither a file, nor a folder of a run"):
        train.train_and_evaluate(config, str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model.width": 8},
            r"do not fit.*stage1_block0/conv/kernel is \[3, 3, 4, 8\], not \[3, 3, 8",
        ),
        ({"model.name": "linear"}, r"missing: stem/kernel; left over: .*They look like conv4"),
        ({"model.bn_epsilon": 1e-5}, r"bn_epsilon=1e-05: .* trained with 0.001"),
    ],
)
def test_a_run_of_another_network_is_refused(first, fields, message):
    config = continued(first, **fields)
    with pytest.raises(InputError, match=message):
        setup.prepare(config, setup.load(config))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"is a folder, but holds no run: there is no config\.json"
    ):
        initial_weights.read(continued(tmp_path))
