import json
import os
import subprocess

import pytest
from absl import logging
from etils import epath

import layermatch_jax
from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import result as result_lib
from layermatch_jax.runtime import workdir

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


@pytest.fixture
def begun(folder):
    """A run's folder in which a checkpoint was saved."""
    (folder / "checkpoints" / "2").mkdir(parents=True)
    return folder


def configured(method="layermatch", **fields):
    """`fields`: dotted names with '__' for the dot."""
    config = presets.apply_method(config_lib.base(), method)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return automatic.resolve(config)


# ---- The place ----


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "runs/cifar10-250-layermatch-l0-s0"),
        ({"seed": 3, "dataset__label_seed": 2}, "runs/cifar10-250-layermatch-l2-s3"),
        ({"dataset__label_fraction": 0.1}, "runs/cifar10-10%-layermatch-l0-s0"),
        # Two label fractions must not share a folder.
        ({"dataset__label_fraction": 0.005}, "runs/cifar10-0.5%-layermatch-l0-s0"),
        ({"dataset__label_fraction": 0.07}, "runs/cifar10-7%-layermatch-l0-s0"),
        # Nor must two methods.
        ({"layerwise__gradient_mask": ()}, "runs/cifar10-250-avg_clustering-l0-s0"),
    ],
)
def test_default_folder(fields, name):
    assert workdir.default(configured(**fields)) == name


def test_folder_that_cannot_be(folder):
    (folder / "file").write_text("")
    for bad in ("file", "file/run", "file/a/b"):
        with pytest.raises(InputError) as caught:
            workdir.check(folder / bad, configured())
        assert f"--workdir={folder / bad}: {folder / 'file'} is not a writable folder" in str(
            caught.value
        )
    workdir.check(folder, configured())
    workdir.check(folder / "new" / "run", configured())
    with pytest.raises(InputError, match=r"b'.*\\xe4': this path is not in UTF-8"):
        workdir.check(folder / os.fsdecode(b"\xe4"), configured())
    assert [p.name for p in folder.iterdir()] == ["file"]  # a check leaves nothing behind


# ---- The settings ----


def test_config_comes_back_as_it_was(folder):
    config = configured(dataset__label_fraction=0.1, compilation_cache=None, train_steps=1000)
    workdir.write_config(folder, config)
    workdir.check(folder, config)
    written = json.loads((folder / "config.json").read_text())
    assert written.keys() == config_lib.fields(config).keys()
    assert written["dataset.label_fraction"] == 0.1
    assert written["compilation_cache"] is None
    assert written["ema_decay"] == written["avg_clustering.momentum"] == 0.99  # of 1,000 steps
    assert written["layerwise.gradient_mask"] == [["classifier/.*", 0.0]]  # JSON has no tuples
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_lists_and_tuples_are_one(begun):
    workdir.write_config(begun, configured(layerwise__gradient_mask=(("a", 0.0), ("b", 0.5))))
    workdir.check(begun, configured(layerwise__gradient_mask=(["a", 0], ["b", 0.5])))
    with pytest.raises(InputError, match=r"gradient_mask: \[\['a', 0.0\], \['b', 0.5\]\] before"):
        workdir.check(begun, configured(layerwise__gradient_mask=(("b", 0.5), ("a", 0.0))))


def test_fields_that_change_the_result_are_told(begun):
    workdir.write_config(begun, configured())
    with pytest.raises(InputError) as caught:
        workdir.check(begun, configured(seed=1, optimizer__learning_rate=0.1, log_every=5))
    assert str(caught.value).split("\n") == [
        f"{begun} holds a run with other settings:",
        "  optimizer.learning_rate: 0.03 before, 0.1 now",
        "  seed: 0 before, 1 now",
        "Use the same settings to resume it, or another --workdir to start a new run.",
    ]


def test_another_method_is_told_with_what_it_changes(begun):
    workdir.write_config(begun, configured("layermatch"))
    with pytest.raises(InputError) as caught:
        workdir.check(begun, configured("fixmatch"))
    assert str(caught.value).split("\n")[1:-1] == [
        "  avg_clustering.centers: 'classifier' before, 'none' now",
        "  avg_clustering.momentum: 0.999 before, None now",
        "  layerwise.gradient_mask: [['classifier/.*', 0.0]] before, [] now",
        "  method: 'layermatch' before, 'fixmatch' now",
    ]


@pytest.mark.parametrize("name", sorted(set(config_lib.RESULT_NEUTRAL) - {"applied_method"}))
def test_fields_that_change_nothing_may_change(begun, name):
    config = configured()
    value = config_lib.fields(config)[name]
    value = "" if value is None else value
    workdir.write_config(begun, config)
    other = {
        bool: lambda x: not x,
        int: lambda x: x + 1,
        str: lambda x: x + "x",
        tuple: lambda x: (*x, 1),
    }[type(value)]
    workdir.check(begun, configured(**{name: other(value)}))


def test_every_other_field_counts(begun):
    # Listed here, so that nobody makes another setting neutral by mistake.
    assert set(config_lib.RESULT_NEUTRAL) == {
        "applied_method", "parallelism", "dataset.data_dir", "dataset.on_broken",
        "dataset.cache_dir", "input.backend", "input.prefetch", "input.steps_per_call",
        "log_every", "checkpoint_every", "checkpoints_kept", "compilation_cache", "tensorboard",
        "profile", "layer_report.at_steps", "layer_report.batches",
    }  # fmt: skip
    config = configured()
    workdir.write_config(begun, config)
    before = json.loads((begun / "config.json").read_text())
    of_other_policies = {n for n, x in before.items() if n.startswith("policy.") and x is None}
    for name in before.keys() - set(config_lib.RESULT_NEUTRAL) - of_other_policies:
        (begun / "config.json").write_text(json.dumps(before | {name: "other"}))
        with pytest.raises(InputError, match=f"  {name}: 'other' before"):
            workdir.check(begun, config)
    # A setting that the run's policy does not read does not change the result.
    assert "policy.signal_annealing" in of_other_policies
    unread = before | {"policy.signal_annealing": "linear"}
    (begun / "config.json").write_text(json.dumps(unread))
    workdir.check(begun, config)


def test_a_run_of_an_older_version_goes_on_with_a_word_on_what_is_new(begun, caplog):
    logging.set_verbosity(logging.WARNING)
    config = configured()
    workdir.write_config(begun, config)
    before = json.loads((begun / "config.json").read_text())
    del before["avg_clustering.warm_up"]
    (begun / "config.json").write_text(json.dumps(before))
    caplog.clear()
    workdir.check(begun, config)
    said = f"{begun} is from a version without these settings: avg_clustering.warm_up=10.0"
    assert [record.getMessage() for record in caplog.records] == [said]
    # A run with a setting that this version does not know cannot be resumed.
    (begun / "config.json").write_text(json.dumps(before | {"policy.mood": "good"}))
    with pytest.raises(InputError, match=r"policy\.mood: 'good' before, None now"):
        workdir.check(begun, config)


def test_a_run_whose_settings_were_written_before_they_were_resolved_goes_on(begun):
    """Older versions wrote None, and the method as the user had written it."""
    now = configured("layermatch", train_steps=1000)
    written = json.loads(json.dumps(config_lib.fields(now))) | {
        "method": "fixmatch+layerwise", "applied_method": "fixmatch+layerwise",
        "avg_clustering.momentum": None, "ema_decay": 0.99, "model.bn_decay": 0.99,
    }  # fmt: skip
    (begun / "config.json").write_text(json.dumps(written))
    workdir.check(begun, now)
    assert config_lib.fields(workdir.read_config(begun)) == config_lib.fields(now)
    # The classic decay in a short run: this version would use another one, and says so.
    (begun / "config.json").write_text(json.dumps(written | {"ema_decay": 0.999}))
    with pytest.raises(InputError, match=r"\n  ema_decay: 0\.999 before, 0\.99 now\n"):
        workdir.check(begun, now)
    workdir.check(begun, configured("layermatch", train_steps=1000, ema_decay=0.999))


def test_config_is_written_whole_or_not_at_all(folder, monkeypatch):
    workdir.write_config(folder, configured())
    before = (folder / "config.json").read_text()

    def dies(before, after):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        workdir.write_config(folder, configured(seed=1))
    assert (folder / "config.json").read_text() == before


@pytest.mark.parametrize("content", ["", '{"seed": 0,', "\0\0\0", "[1]"])
def test_a_damaged_file_is_named_and_can_be_mended(begun, content):
    config = configured()
    path = begun / "config.json"
    path.write_text(content)
    for read in (lambda: workdir.check(begun, config), lambda: workdir.read_config(begun)):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(f"{path} is damaged: ")
        assert "Bring it back from a backup" in str(caught.value)
    path = begun / "labeled_split.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        workdir.check_split(begun, RECORD)
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert "Or delete it: " in str(caught.value)
    path = begun / "result.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        result_lib.read_result(begun)
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert "Delete it: the command of the run writes it again" in str(caught.value)


def test_what_cannot_be_checked_is_said(begun, caplog):
    logging.set_verbosity(logging.WARNING)
    workdir.check_split(begun, RECORD)
    workdir.write_config(begun, configured())
    assert [record.getMessage() for record in caplog.records] == [
        f"{begun}/labeled_split.json is missing: the images of the run may have been different.",
        f"{begun}/config.json was missing: the settings of the run may have been different.",
    ]


# ---- A new run does not delete an earlier one ----


def start_in(folder, **fields):
    """A folder with the files of a run that ended before its first checkpoint."""
    workdir.write_config(folder, configured(**fields))
    (folder / "labeled_split.json").write_text(json.dumps(RECORD))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / ".lock").write_text("")
    (folder / "notes.txt").write_text("the user's")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_without_a_checkpoint_gives_way(folder, capsys):
    for number in (1, 2):
        start_in(folder, seed=number)
        workdir.check(folder, configured(seed=7))
        workdir.set_aside(folder)
        to = folder / f"before-{number}"
        assert names(to) == ["config.json", "labeled_split.json", "metrics.jsonl", "tensorboard"]
        assert json.loads((to / "config.json").read_text())["seed"] == number
        assert capsys.readouterr().err == (
            f"{folder} held a run without any checkpoint: its files are now in "
            f"{to}, and this run starts at step 0.\n"
        )
    left = [".lock", "before-1", "before-2", "checkpoints", "notes.txt"]
    assert names(folder) == left
    workdir.set_aside(folder)  # nothing is left to be moved
    assert names(folder) == left


@pytest.mark.parametrize("what", ["checkpoints/4", "checkpoints_damaged/4", "result.json"])
def test_a_run_with_progress_is_never_moved(folder, what):
    start_in(folder)
    if what == "result.json":
        (folder / what).write_text("{}")
    else:
        (folder / what).mkdir(parents=True)
    before = names(folder)
    with pytest.raises(InputError, match="seed: 0 before, 7 now"):
        workdir.check(folder, configured(seed=7))
    workdir.set_aside(folder)
    assert names(folder) == before


def test_a_half_written_checkpoint_is_none(folder):
    start_in(folder)
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    workdir.set_aside(folder)
    assert "before-1" in names(folder)


# ---- The images ----


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
        "Restore the data set of the run to resume it, or use another --workdir to start a new "
        "run.",
    ]


# ---- The result ----


def test_result_comes_back(folder):
    assert result_lib.read_result(folder) is None
    config = configured(seed=4, dataset__label_seed=5, dataset__num_labels=99)
    result = result_lib.write_result(folder, config, RECORD, MEASURED)
    assert result_lib.read_result(folder) == result
    assert result | MEASURED == result
    told = {
        "method": "layermatch", "mask": "classifier", "centers": "classifier",
        "dataset": "cifar10", "num_labels": 2, "label_seed": 5, "seed": 4,
        "train_steps": 2**20, "split_sha256": "ab", "parallelism": "pmap",
    }  # fmt: skip
    assert result | told == result  # the labels that the split has, not those of the config
    assert result["device"]["count"] >= 1
    assert result["versions"].keys() == {"layermatch_jax", "jax", "flax"}
    commit = result["git_commit"]
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_an_installed_package_does_not_take_the_commit_of_the_repository_around_it(
    tmp_path, monkeypatch
):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m."], cwd=tmp_path, check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()

    def told(package):
        package.mkdir(parents=True)
        monkeypatch.setattr(layermatch_jax, "__file__", str(package / "__init__.py"))
        return result_lib.provenance()["git_commit"]

    assert told(tmp_path / "layermatch_jax") == commit  # a checkout
    assert told(tmp_path / ".venv" / "site-packages" / "layermatch_jax") is None


def test_summary_shows_the_numbers(folder):
    result = result_lib.write_result(folder, configured(), RECORD, MEASURED)
    text = result_lib.as_text(result, folder)
    assert "layermatch on cifar10, 2 labels (label seed 0, seed 0): 1048576 steps in 61 s" in text
    assert "1234 images/s" in text
    assert text.splitlines()[1] == "gradient mask classifier, centers classifier"
    lines = [line.split() for line in text.splitlines()]
    assert ["test", "accuracy", "last", "median7", "best"] in lines
    assert ["raw", "50.00", "%", "51.25", "%", "75.00", "%"] in lines
    assert ["ema", "81.25", "%", "80.00", "%", "90.00", "%"] in lines
    assert "32.1% used, 65.4% of these right, 43.2% of all right" in text
    assert str(folder) in text


def test_summary_leaves_out_what_is_unknown(folder):
    result = result_lib.write_result(folder, configured(), RECORD, MEASURED)
    result["validation_accuracy"] = result.pop("test_accuracy")
    assert "32.1% used, 43.2% of all right" in result_lib.as_text(
        result | {"pseudo_label_accuracy": None}, folder
    )
    unknown = {"mask_rate": None, "pseudo_label_accuracy": None, "pseudo_label_accuracy_all": None}
    text = result_lib.as_text(result | unknown | {"images_per_second": None}, folder)
    assert "steps in 61 s\n" in text
    assert "validation accuracy" in text
    for name in ("mask", "centers"):  # as in results of older versions
        del result[name]
    assert "gradient mask" not in result_lib.as_text(result | unknown, folder)
    assert "pseudo-labels" not in text
    text = result_lib.as_text(result | unknown | {"mask_rate": 0.25}, folder)
    assert (
        "pseudo-labels over the run: 25.0% used; how many are right is not known: no unlabeled "
        "image has a known class (labeled images do not count)\n"
    ) in text


def test_a_run_among_the_images_is_refused(tmp_path):
    config = configured(**{"dataset.name": "folder", "dataset.data_dir": str(tmp_path / "data")})
    (tmp_path / "data/Train/cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data/Train")
    for place in (tmp_path / "data/Train", tmp_path / "data/test/run", tmp_path / "link/run"):
        with pytest.raises(InputError, match="lies among the images"):
            workdir.check(epath.Path(place), config)
    workdir.check(epath.Path(tmp_path / "data/runs/1"), config)
    workdir.check(epath.Path(tmp_path / "data_test"), config)
