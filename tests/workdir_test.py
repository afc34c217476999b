import json
import os

import pytest
from absl import logging
from etils import epath

from layermatch_jax import config as config_lib
from layermatch_jax import workdir
from layermatch_jax.errors import InputError

RECORD = {"data_set": "toy", "num_labels": 2, "num_train": 9, "sha256": "ab", "indices": [3, 5]}
MEASURED = {
    "test_accuracy": {
        "raw": {"last": 0.5, "median20": 0.5125, "best": 0.75},
        "ema": {"last": 0.8125, "median20": 0.8, "best": 0.9},
    },
    "evaluations_in_median": 7,
    "mask_rate": 0.321,
    "pseudo_label_accuracy": 0.654,
    "pseudo_label_accuracy_all": 0.432,
    "wall_seconds": 61.4,
    "images_per_second": 1234.5,
}


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def configured(method="layermatch", **fields):
    """`fields`: dotted names with '__' for the dot."""
    config = config_lib.apply_method(config_lib.base(), method)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


# ---- Where ----


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "runs/cifar10-250-layermatch-l0-s0"),
        ({"seed": 3, "dataset__label_seed": 2}, "runs/cifar10-250-layermatch-l2-s3"),
        ({"dataset__label_fraction": 0.1}, "runs/cifar10-10%-layermatch-l0-s0"),
        # Two shares must not fall into one folder.
        ({"dataset__label_fraction": 0.005}, "runs/cifar10-0.5%-layermatch-l0-s0"),
        ({"dataset__label_fraction": 0.07}, "runs/cifar10-7%-layermatch-l0-s0"),
    ],
)
def test_default_folder(fields, name):
    assert workdir.default(configured(**fields)) == name


def test_folder_that_cannot_be(folder):
    (folder / "file").write_text("")
    for bad in ("file", "file/run", "file/a/b"):
        with pytest.raises(InputError) as caught:
            workdir.check(folder / bad, configured())
        assert f"--workdir={folder / bad}: {folder / 'file'} is no folder" in str(caught.value)
    workdir.check(folder, configured())
    workdir.check(folder / "new" / "run", configured())
    assert [p.name for p in folder.iterdir()] == ["file"]  # a check leaves nothing behind


# ---- With what ----


def test_config_comes_back_as_it_was(folder):
    config = configured(dataset__label_fraction=0.1, avg_clustering__momentum=None)
    workdir.write_config(folder, config)
    workdir.check(folder, config)
    written = json.loads((folder / "config.json").read_text())
    assert written.keys() == config_lib.fields(config).keys()
    assert written["dataset.label_fraction"] == 0.1
    assert written["avg_clustering.momentum"] is None
    assert written["layerwise.gradient_mask"] == [["classifier/.*", 0.0]]  # JSON has no tuples
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_lists_and_tuples_are_one(folder):
    workdir.write_config(folder, configured(layerwise__gradient_mask=(("a", 0.0), ("b", 0.5))))
    workdir.check(folder, configured(layerwise__gradient_mask=(["a", 0], ["b", 0.5])))
    with pytest.raises(InputError, match=r"gradient_mask: \[\['a', 0.0\], \['b', 0.5\]\] before"):
        workdir.check(folder, configured(layerwise__gradient_mask=(("b", 0.5), ("a", 0.0))))


def test_fields_that_change_the_result_are_told(folder):
    workdir.write_config(folder, configured())
    with pytest.raises(InputError) as caught:
        workdir.check(folder, configured(seed=1, optimizer__learning_rate=0.1, log_every=5))
    assert str(caught.value).split("\n") == [
        f"{folder} holds a run with other settings:",
        "  optimizer.learning_rate: 0.03 before, 0.1 now",
        "  seed: 0 before, 1 now",
        "Take the same settings to go on with it, or another --workdir to start anew.",
    ]


def test_another_method_is_told_with_what_it_changes(folder):
    workdir.write_config(folder, configured("layermatch"))
    with pytest.raises(InputError) as caught:
        workdir.check(folder, configured("fixmatch"))
    assert str(caught.value).split("\n")[1:-1] == [
        "  avg_clustering.centres: 'classifier' before, 'none' now",
        "  layerwise.gradient_mask: [['classifier/.*', 0.0]] before, [] now",
        "  method: 'layermatch' before, 'fixmatch' now",
    ]


@pytest.mark.parametrize("name", sorted(set(config_lib.RESULT_NEUTRAL) - {"applied_method"}))
def test_fields_that_change_nothing_may_change(folder, name):
    config = configured()
    value = config_lib.fields(config)[name]
    value = "" if value is None else value
    workdir.write_config(folder, config)
    other = {
        bool: lambda x: not x,
        int: lambda x: x + 1,
        str: lambda x: x + "x",
        tuple: lambda x: (*x, 1),
    }[type(value)]
    workdir.check(folder, configured(**{name: other(value)}))


def test_every_other_field_counts(folder):
    # Written out, so that a field that joins the neutral ones does it knowingly.
    assert set(config_lib.RESULT_NEUTRAL) == {
        "applied_method", "parallelism", "dataset.data_dir", "input.backend", "input.prefetch",
        "input.steps_per_call", "log_every", "checkpoint_every", "checkpoints_kept",
        "compilation_cache", "tensorboard", "profile",
        "layer_report.at_steps", "layer_report.batches",
    }  # fmt: skip
    config = configured()
    workdir.write_config(folder, config)
    before = json.loads((folder / "config.json").read_text())
    for name in before.keys() - set(config_lib.RESULT_NEUTRAL):
        (folder / "config.json").write_text(json.dumps(before | {name: "other"}))
        with pytest.raises(InputError, match=f"  {name}: 'other' before"):
            workdir.check(folder, config)


def test_a_run_of_an_older_version_goes_on_with_a_word_on_what_is_new(folder, caplog):
    logging.set_verbosity(logging.WARNING)
    config = configured()
    workdir.write_config(folder, config)
    before = json.loads((folder / "config.json").read_text())
    del before["avg_clustering.warm_up"]
    (folder / "config.json").write_text(json.dumps(before))
    workdir.check(folder, config)
    said = f"{folder} is from a version without these settings: avg_clustering.warm_up=10.0"
    assert [record.getMessage() for record in caplog.records] == [said]
    # What this version does not know any more cannot be gone on with.
    (folder / "config.json").write_text(json.dumps(before | {"policy.mood": "good"}))
    with pytest.raises(InputError, match=r"policy\.mood: 'good' before, None now"):
        workdir.check(folder, config)


def test_config_is_written_whole_or_not_at_all(folder, monkeypatch):
    workdir.write_config(folder, configured())
    before = (folder / "config.json").read_text()

    def dies(before, after):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        workdir.write_config(folder, configured(seed=1))
    assert (folder / "config.json").read_text() == before


# ---- On what ----


def test_same_images_may_go_on(folder):
    workdir.check_split(folder, RECORD)  # there was no run before
    (folder / "labeled_split.json").write_text(json.dumps(RECORD))
    workdir.check_split(folder, RECORD | {"indices": (3, 5)})


def test_other_images_are_refused(folder):
    (folder / "labeled_split.json").write_text(json.dumps(RECORD))
    with pytest.raises(InputError) as caught:
        workdir.check_split(folder, RECORD | {"num_train": 8, "sha256": "cd", "indices": [2, 4]})
    assert str(caught.value).split("\n") == [
        f"{folder} holds a run on other images:",
        "  num_train: 9 before, 8 now",
        "  sha256: 'ab' before, 'cd' now",
        "Bring the data set back to what it was to go on with the run, or take another --workdir "
        "to start anew.",
    ]


# ---- How it ended ----


def test_result_comes_back(folder):
    assert workdir.read_result(folder) is None
    config = configured(seed=4, dataset__label_seed=5, dataset__num_labels=99)
    result = workdir.write_result(folder, config, RECORD, MEASURED)
    assert workdir.read_result(folder) == result
    assert result | MEASURED == result
    told = {
        "method": "layermatch", "dataset": "cifar10", "num_labels": 2, "label_seed": 5, "seed": 4,
        "train_steps": 2**20, "split_sha256": "ab", "parallelism": "pmap",
    }  # fmt: skip
    assert result | told == result  # of labels, those that there are, not those asked for
    assert result["device"]["count"] >= 1
    assert result["versions"].keys() == {"layermatch_jax", "jax", "flax"}
    commit = result["git_commit"]
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_summary_shows_the_numbers(folder):
    result = workdir.write_result(folder, configured(), RECORD, MEASURED)
    text = workdir.summary(result, folder)
    assert "layermatch on cifar10, 2 labels (label seed 0, seed 0): 1048576 steps in 61 s" in text
    assert "1234 images/s" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["test", "accuracy", "last", "median7", "best"] in lines
    assert ["raw", "50.00", "%", "51.25", "%", "75.00", "%"] in lines
    assert ["ema", "81.25", "%", "80.00", "%", "90.00", "%"] in lines
    assert "32.1% used, 65.4% of these right, 43.2% of all right" in text
    assert str(folder) in text


def test_summary_leaves_out_what_is_unknown(folder):
    result = workdir.write_result(folder, configured(), RECORD, MEASURED)
    result["validation_accuracy"] = result.pop("test_accuracy")
    assert "32.1% used, 43.2% of all right" in workdir.summary(
        result | {"pseudo_label_accuracy": None}, folder
    )
    unknown = {"mask_rate": None, "pseudo_label_accuracy": None, "pseudo_label_accuracy_all": None}
    text = workdir.summary(result | unknown | {"images_per_second": None}, folder)
    assert "steps in 61 s\n" in text
    assert "validation accuracy" in text
    assert "pseudo-labels" not in text
    text = workdir.summary(result | unknown | {"mask_rate": 0.25}, folder)
    assert (
        "pseudo-labels over the run: 25.0% used; how many are right is not known: no unlabelled "
        "image has a known class (labelled images do not count)\n"
    ) in text
