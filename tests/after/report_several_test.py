"""Reports of several runs, written by hand."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from etils import epath
from report_pages import config_of, read, write_run

from layermatch_jax import main, presets
from layermatch_jax.after import figures, report, runs
from layermatch_jax.after.report import curves, logs, tables
from layermatch_jax.errors import InputError

pytest.importorskip("matplotlib")


@pytest.fixture
def sweep(tmp_path):
    """Two methods with two finished runs each, an unfinished run, and a folder without a run."""
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
        told = "are missing where no unlabeled image has a known class" in table.caption
        assert told == (name == "unknown")
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["used"], row["used right"], row["all right"]) == ("50.0", "", "")


def test_several_runs_by_method(sweep):
    path = report.write(str(sweep))
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
    assert (
        f"Not finished, so not in the table by method: {sweep}/l2 (2 of 4, not finished)"
        in page.text
    )
    assert "Bands: ± one standard deviation (sd) over these runs." in page.text
    assert page.row("avg_clustering.centers") == ["none", "classifier"]
    assert page.row("layerwise.gradient_mask") == ["none", "classifier"]
    # fixmatch's 55 %, and layermatch's at the last step of all three runs: (30 + 30 + 90) / 3.
    assert page.images[0]["alt"] == (
        "Accuracy: EMA of the parameters, over training steps: fixmatch (2 runs) 55.0% at step 4; "
        "layermatch (3 runs) 50.0% at step 2."
    )
    # A seed that only one method has finished is not compared.
    (sweep / "f1" / "result.json").unlink()
    page = read(report.write(str(sweep)))
    assert page.row("layermatch")[2:5] == ["2 of 3", "50.0 ± 0.0", "+15.0"]
    assert path.stat().length < 3e6


def test_bands_are_drawn_around_means(sweep, monkeypatch):
    drawn = {}

    def record(series, title, *args, **kwargs):
        drawn[title] = series

    monkeypatch.setattr(figures, "draw_curves", record)
    monkeypatch.setattr(curves, "as_picture", lambda figure, alt, caption: alt)
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
    # With many methods, bands would hide each other.
    many = {f"method {i}": groups["fixmatch"] for i in range(7)}
    reading, *_ = curves.of_several(many)
    assert "No bands for more than 6 methods" in reading
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
    monkeypatch.setattr(curves, "as_picture", lambda figure, alt, caption: alt)
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
    assert "At the end, 50% of the images have a used pseudo-label" in alts[0]
    (((steps, counted, truths, names), _),) = drawn["class_counts"]
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_array_equal(counted, [[3, 1], [3, 1]])
    np.testing.assert_array_equal(truths, [[2, 6], [2, 6]])
    assert names == ["a", "b"]
    (acceptance, limits), (threshold, high) = drawn["class_map"]
    np.testing.assert_array_equal(acceptance[1], [[0.5, np.nan], [0.5, np.nan]])
    np.testing.assert_array_equal(threshold[1], [[0.25, 0.75], [0.25, 0.75]])
    assert (limits["limits"], high["limits"]) == ((0, 1), (0, 0.75))
    # No map: for one common threshold, for an old run without counts, for supervised training.
    of_all = {"class_acceptance": [0.5, 1.0], "class_threshold": [0.9, 0.9]}
    write_run(tmp_path / "old", config_of("fixmatch"), (0.5, 0.5), **of_all)
    note, *alts = curves.of_classes(logs.read(epath.Path(tmp_path / "old")), ["a", "b"])
    assert "a version that did not count" in note.text
    assert alts == ["Pseudo-labels used, by class, as colors over training steps."]
    of_all |= {"class_truths": [0.0, 0.0], "class_pseudo_labels": [0.0, 0.0]}
    write_run(tmp_path / "unknown", config_of("fixmatch"), (0.5, 0.5), **of_all)
    note, *alts = curves.of_classes(logs.read(epath.Path(tmp_path / "unknown")), ["a", "b"])
    assert note.text == (
        "The accuracy of pseudo-labels is not known: no unlabeled image has a known class "
        "(labeled images do not count)."
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
    assert report.write(f"{one},{two},{one}/") == epath.Path(tmp_path / "x/report.html")
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
    (tmp_path / "a,b").mkdir()  # an existing name is not split at its comma
    assert found("a,b") == ["a,b"]
    page = read(report.write(f"{tmp_path}/lr=1,wd=2,{tmp_path}/[1] é\n"))
    assert page.row("lr=1,wd=2")[0] == "fixmatch"
    assert page.headings[0] == "2 runs on cifar10"


@pytest.fixture
def without_images(monkeypatch):
    """Skips the images of runs and the drawing of figures."""
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
    page = read(report.write(str(folder)))
    assert page.row("folder") == [f"{tmp_path}/caf\\xe9"]


def test_the_same_run_in_several_folders_counts_once(sweep, caplog, without_images):
    """By hand: three pairs differ by 10, 20 and 0 points, not four by 10, 20, 20 and 0."""
    config = config_of("layermatch", seed=2, **{"dataset.label_seed": 2})
    write_run(sweep / "f2", config_of("fixmatch", seed=2, **{"dataset.label_seed": 2}), (0.2, 0.3))
    write_run(sweep / "l2 finished", config, (0.2, 0.3))
    shutil.copytree(sweep / "l1", sweep / "a copy of l1")
    elsewhere = {"dataset.data_dir": "/elsewhere", "log_every": 1, "seed": 0}
    write_run(sweep / "z", config_of("layermatch", **elsewhere), (0.3,), finished=False)
    page = read(report.write(str(sweep)))
    assert page.headings[0] == "6 runs on cifar10"
    # median20 of fixmatch: 35, 40, 25; of layermatch: 50, 50, 25; their differences: 15, 10, 0.
    assert page.row("fixmatch")[2:4] == ["3 of 3", "33.3 ± 7.6"]
    assert page.row("layermatch")[2:5] == ["3 of 3", "41.7 ± 14.4", "+8.3 ± 4.4"]
    reason = "with the same settings, seeds and images."
    for left_out, kept in (("l1", "a copy of l1"), ("l2", "l2 finished"), ("z", "l0")):
        sentence = f"{sweep}/{left_out} is left out: it is the same run as {sweep}/{kept}, {reason}"
        assert sentence in page.text
        assert sentence in caplog.messages
    # Of two unfinished runs, the one with more steps is kept.
    for name in ("l2", "l2 finished"):
        (sweep / name / "result.json").unlink(missing_ok=True)
    page = read(report.write(f"{sweep}/l2,{sweep}/l2 finished"))
    assert page.headings[0] == "layermatch on cifar10, 20 labels (label seed 2, seed 2)"
    assert page.row("folder") == [f"{sweep}/l2 finished"]
    assert f"{sweep}/l2 is left out" in page.text
    # With a split file, the run has other labeled images: it is not paired by its seed.
    split = json.loads((sweep / "l0" / "labeled_split.json").read_text()) | {"sha256": "other"}
    (sweep / "l0" / "labeled_split.json").write_text(json.dumps(split))
    page = read(report.write(f"{sweep}/l0,{sweep}/l1,{sweep}/f0,{sweep}/f1,{sweep}/z"))
    assert page.headings[0] == "5 runs on cifar10"
    assert page.row("layermatch")[4] == "+10.0"


def test_what_cannot_be_reported(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"holds no run: there is no .*nowhere/config\.json"):
        report.write(str(tmp_path / "nowhere"))
    write_run(tmp_path / "a", config_of("fixmatch"), (0.5, 0.5))
    with pytest.raises(InputError, match="nowhere holds no run"):
        report.write(f"{tmp_path}/a,{tmp_path}/nowhere")
    validation = config_of("fixmatch", **{"dataset.evaluate_on": "validation"})
    write_run(tmp_path / "b", validation, (0.5, 0.5))
    write_run(tmp_path / "c", config_of("fixmatch", seed=1), (0.5, 0.5), num_train=50)
    with pytest.raises(InputError) as error:
        report.write(str(tmp_path))
    assert str(error.value).splitlines()[1:] == [
        f"  cifar10, 2 classes, 100 training images, evaluated on test images: {tmp_path}/a",
        f"  cifar10, 2 classes, 100 training images, evaluated on validation images: {tmp_path}/b",
        f"  cifar10, 2 classes, 50 training images, evaluated on test images: {tmp_path}/c",
        "Make one report for each of these groups.",
    ]
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        report.write(f"{tmp_path}/a")
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
