"""The layer report of a run: its files and errors; it does not change the run."""

import contextlib
import csv
import json
import re
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath
from runs_of_tests import KilledError, assert_same, tiny

from layermatch_jax import config as config_lib
from layermatch_jax import main, modes, rules, setup, train
from layermatch_jax.after import runs
from layermatch_jax.after.layer_report import estimates, measuring, picture, record
from layermatch_jax.errors import InputError, Stopped
from layermatch_jax.runtime import checkpoint

BATCHES = 32


def reported(**fields):
    fields = {"model.name": "linear", "layer_report.batches": BATCHES} | fields
    return tiny("layermatch", **fields)


@pytest.fixture(scope="module")
def prepared():
    c = reported()
    return setup.prepare(c, setup.load(c))


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """A run of 8 steps on 8 devices, with reports at four of them."""
    c = reported(**{"layer_report.at_steps": (2, 4, 6, 8)})
    folder = tmp_path_factory.mktemp("reported")
    train.train_and_evaluate(c, folder, prepared=prepared)
    return folder


def test_a_run_with_reports_is_the_run_without(whole, prepared, tmp_path):
    train.train_and_evaluate(reported(), tmp_path, prepared=prepared)
    assert_same(tmp_path, whole)
    assert not (tmp_path / record.FILE).exists()


@pytest.mark.parametrize("K", [1, 2])
def test_its_batches_are_those_that_would_follow_the_last_step(K, prepared):
    periods = {"log_every": 4, "input.steps_per_call": K}
    c = reported(**{"layer_report.batches": 5}, **periods)
    data, seen = setup.load(c), []

    def program(state, resident, rows):
        seen.append(np.concatenate(rows.unlabeled))  # of 8 devices
        sums = dict.fromkeys(("known", "used", "right", "strength"), 1.0)
        return {kind: state.params for kind in estimates.KINDS}, sums

    report = measuring.create(c, data.partition, data.feed, None, program)(prepared.initial)
    assert (report["step"], report["batches"], report["known"]) == (0, 5, 5)
    sampler = setup.create_sampler(c, data.partition)
    expected = [sampler.draw(step).unlabeled for step in range(8, 13)]
    np.testing.assert_array_equal(seen, expected)


def known_rows(prepared):
    """Counts unlabeled images of known class in the report's batches, without labeled images."""
    partition = prepared.data.partition
    sampler = setup.create_sampler(reported(), partition)
    drawn = [sampler.draw(step).unlabeled for step in range(8, 8 + BATCHES)]
    return int((~np.isin(drawn, partition.record["indices"])).sum())


def test_the_files(whole, prepared):
    reports = json.loads((whole / "layer_report.json").read_text())
    assert [one["step"] for one in reports] == [2, 4, 6, 8]
    for one in reports:
        assert (one["batches"], one["strength"]) == (BATCHES, 1.0)
        assert one["known"] == known_rows(prepared) < BATCHES * 16
        assert 0.2 < one["mask_rate"] < 1
        assert 0 < one["pseudo_label_accuracy"] < 1
        assert {name: told["parameters"] for name, told in one["layers"].items()} == {
            "stem": 8 * 8 * 3 * 4,
            "classifier": 4 * 10 + 10,
        }
    with (whole / "layer_report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2
    for row, (one, name) in zip(rows, [(r, x) for r in reports for x in r["layers"]], strict=True):
        told = one["layers"][name]
        assert (int(row["step"]), row["layer"]) == (one["step"], name)
        assert int(row["parameters"]) == told["parameters"]
        for quantity in estimates.QUANTITIES:
            ends = [float(row[quantity + end]) for end in ("", "_low", "_high")]
            assert ends == told[quantity]
            assert ends[1] < ends[2]


def test_a_killed_run_ends_with_the_same_reports(whole, prepared, tmp_path, monkeypatch):
    c = reported(**{"layer_report.at_steps": (2, 4, 6, 8)})
    feed = prepared.data.feed

    def dying(steps):
        for last, chunk in feed.chunks(steps):
            if last == 7:
                raise KilledError
            yield last, chunk

    save, written = checkpoint.save, []

    def noticed(manager, step, tree):
        written.append((step, [one["step"] for one in record.read(epath.Path(tmp_path))]))
        save(manager, step, tree)

    monkeypatch.setattr(checkpoint, "save", noticed)
    mortal = prepared._replace(data=prepared.data._replace(feed=feed._replace(chunks=dying)))
    with pytest.raises(KilledError):
        train.train_and_evaluate(c, tmp_path, prepared=mortal)
    assert [one["step"] for one in record.read(epath.Path(tmp_path))] == [2, 4, 6]
    # On from step 4; step 6 is not there twice, and what it says is not taken over.
    text = re.sub('"known": [0-9]+', '"known": 7', (tmp_path / record.FILE).read_text())
    (tmp_path / record.FILE).write_text(text)
    train.train_and_evaluate(c, tmp_path, prepared=prepared)
    *before, sixth, eighth = record.read(epath.Path(tmp_path))
    assert [one["known"] for one in before] == [7, 7]
    assert [sixth, eighth] == record.read(epath.Path(whole))[2:]
    # Before the checkpoint of its step: a run that dies between them makes it again.
    assert written == [(4, [2, 4]), (8, [2, 4, 6, 8])]


def test_cut_back(tmp_path):
    folder = epath.Path(tmp_path)
    record.cut_back(folder, 5)
    assert not list(tmp_path.iterdir())
    told = {"parameters": 1} | {name: [0.5, 0.4, 0.6] for name in estimates.QUANTITIES}
    reports = [{"step": step, "batches": 2, "layers": {"stem": told}} for step in (4, 5, 6)]
    for one in reversed(reports):
        record.add(folder, one)
    assert record.read(folder) == reports
    record.cut_back(folder, 5)
    assert record.read(folder) == reports[:2]
    assert len((tmp_path / record.TABLE).read_text().splitlines()) == 3
    picture.write(folder)
    record.cut_back(folder, 3)
    assert record.read(folder) == []
    picture.write(folder)
    assert not (tmp_path / record.FIGURE).exists()


def test_the_report_of_a_finished_run_is_that_of_its_last_step(whole, tmp_path):
    """The report uses one program for all devices, although the run had one for each."""
    values = config_lib.base()
    values.layer_report.batches = BATCHES
    before = {name: (whole / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    *_, expected = record.read(epath.Path(whole))
    said = modes.MODES["layer_report"](values, str(whole), {"layer_report.batches"})
    *earlier, again = record.read(epath.Path(whole))
    assert [one["step"] for one in earlier] == [2, 4, 6]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=2e-3), expected, again
    )
    assert {name: (whole / name).read_bytes() for name in before} == before
    known = again["known"]
    assert said.startswith(f"step 8: {BATCHES} batches, {known} unlabeled images of known class, ")
    value, low, high = again["layers"]["classifier"]["cosine_true"]
    line = next(x for x in said.splitlines() if x.startswith("classifier"))
    assert line.split(maxsplit=1)[1].startswith(f"{value:.3f} ({low:.3f}, {high:.3f})  ")


@pytest.mark.slow
def test_a_method_without_pseudo_labels_is_compared_with_the_labeled_images_alone(tmp_path):
    fields = {"model.name": "linear", "layer_report.batches": 8, "layer_report.at_steps": (8,)}
    c = tiny("vat", **fields, **{"policy.ramp": 0.5})
    train.train_and_evaluate(c, tmp_path)
    (report,) = record.read(epath.Path(tmp_path))
    assert report["mask_rate"] == 1
    assert report["strength"] == pytest.approx(c.unsupervised_weight)
    for told in report["layers"].values():
        assert told["cosine_true"] == told["noise_share"] == [None] * 3
        assert None not in told["cosine_supervised"] + told["norm_ratio"]
    assert "–: not known. The method has no pseudo-labels, " in record.as_table(report)


def test_a_table_without_a_known_row():
    """Without images of known class, or without used ones, nothing is known of any layer."""
    told = {"parameters": 1} | {name: [None] * 3 for name in estimates.QUANTITIES}
    report = {"step": 8, "batches": 3, "known": 0, "mask_rate": None, "strength": 1.0}
    report |= {"pseudo_label_accuracy": None, "layers": {"stem": told}}
    first, _, _, stem, _, _, legend = record.as_table(report).splitlines()
    assert first == "step 8: 3 batches, 0 unlabeled images of known class"
    assert stem.split() == ["stem", "–", "–", "–", "–"]
    assert legend.startswith("–: not known. ")
    first, *_ = record.as_table(report | {"known": 5, "mask_rate": 0.0}).splitlines()
    assert first == "step 8: 3 batches, 5 unlabeled images of known class, 0.0% of them used"
    assert record.comma_separated([report]).splitlines()[1] == "8,stem,1" + 12 * ","


@pytest.mark.parametrize(("flags_", "batches"), [([], None), (["128"], 128), (["7"], 7)])
def test_the_batches_are_the_run_s_unless_the_command_line_gives_them(
    flags_, batches, tmp_path, monkeypatch, capsys
):
    asked = []
    told = {"parameters": 1} | {name: [0.5, 0.4, 0.6] for name in estimates.QUANTITIES}
    report = {"step": 8, "batches": 3, "known": 9, "mask_rate": 0.5, "layers": {"stem": told}}
    report |= {"pseudo_label_accuracy": 0.5}
    run = types.SimpleNamespace(config="its config")
    monkeypatch.setattr(runs, "read", lambda folder, data_dir: run)
    monkeypatch.setattr(runs, "read_data", lambda folder, config: f"the data of {config}")
    monkeypatch.setattr(measuring, "of_run", lambda *args: asked.append(args) or report)
    argv = ["main", "--mode=layer_report", f"--workdir={tmp_path}"]
    argv += [f"--config.layer_report.batches={value}" for value in flags_]
    values = flags.FlagValues()
    assert main.main(main.parse_flags(argv, values), values) == 0
    assert asked == [(run, "the data of its config", batches)]
    assert "stem" in capsys.readouterr().out


def test_the_figure(whole, monkeypatch):
    pytest.importorskip("matplotlib")
    picture.write(epath.Path(whole))
    reports = record.read(epath.Path(whole))
    assert (whole / "layer_report.png").stat().st_size > 10_000
    for shown in (reports, reports[:1]):
        chart = picture.draw(shown)
        maps = [axes for axes in chart.axes if axes.get_title()]
        assert [axes.get_title() for axes in maps] == list(estimates.QUANTITIES.values())
        for axes, name in zip(maps, estimates.QUANTITIES, strict=True):
            layers = [text.get_text() for text in axes.get_yticklabels()]
            assert layers == list(reports[0]["layers"])
            assert [text.get_text() for text in axes.get_xticklabels()] == [
                str(one["step"]) for one in shown
            ]
            written = {text.get_position(): text.get_text() for text in axes.texts}
            value = shown[-1]["layers"]["classifier"][name][0]
            number = written[len(shown) - 1, 1 - 0.02].replace("−", "-")
            assert float(number) == pytest.approx(value, rel=0.01, abs=0.006)
    nothing = json.loads(json.dumps(reports[0]))
    for told in nothing["layers"].values():
        told |= {name: [None] * 3 for name in estimates.QUANTITIES}
    picture.draw([nothing])


def test_without_matplotlib_the_numbers_are_written_all_the_same(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record.add(epath.Path(tmp_path), record.read(epath.Path(whole))[0])
    picture.write(epath.Path(tmp_path))
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "layer_report.csv").exists()
    assert not (tmp_path / "layer_report.png").exists()


def test_what_cannot_be_reported_on(prepared):
    unlabeled = prepared.data.partition.unlabeled
    unknown = unlabeled._replace(labels=np.full_like(unlabeled.labels, -1))
    of_run = (prepared.data.feed, prepared.resident, prepared.layer_gradients)
    with pytest.raises(InputError, match="but no unlabeled image has a known class"):
        measuring.create(reported(), prepared.data.partition._replace(unlabeled=unknown), *of_run)
    one_known = unlabeled._replace(labels=np.append(unknown.labels[1:], 0))
    measuring.create(reported(), prepared.data.partition._replace(unlabeled=one_known), *of_run)
    with pytest.raises(InputError, match="supervised makes none"):
        measuring.create(tiny("supervised"), prepared.data.partition, *of_run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_report.at_steps": (0,)},
            "at_steps: 0 is not allowed. Give whole numbers from 1 to train",
        ),
        ({"layer_report.at_steps": (4, 9)}, "9 is not allowed"),
        ({"layer_report.at_steps": (1.5,)}, "1.5 is not allowed"),
        ({"layer_report.batches": 2}, "layer_report.batches=2 must be at least 3"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(InputError, match=message):
        rules.validate(tiny("layermatch", **fields))


def test_refused_steps_between_calls_and_methods():
    periods = {"log_every": 4, "input.steps_per_call": 4}
    rules.validate(tiny("layermatch", **{"layer_report.at_steps": (4, 8)}, **periods))
    with pytest.raises(
        InputError, match=r"6 is not allowed.*multiples of input.steps_per_call = 4"
    ):
        rules.validate(tiny("layermatch", **{"layer_report.at_steps": (6,)}, **periods))
    with pytest.raises(InputError, match="supervised has no pseudo-labels"):
        rules.validate(tiny("supervised", **{"layer_report.at_steps": (4,)}))


@pytest.mark.parametrize(
    ("end", "drawn"), [(None, True), (Stopped("told to"), True), (InputError("another's"), False)]
)
def test_training_draws_when_it_ends_but_not_in_a_refused_folder(end, drawn, tmp_path, monkeypatch):
    folders = []

    def end_early(*args):
        if end:
            raise end

    monkeypatch.setattr(train, "train_and_evaluate", end_early)
    monkeypatch.setattr(picture, "write", folders.append)
    config = config_lib.base()
    config.layer_report.at_steps = (2,)
    with pytest.raises(type(end)) if end else contextlib.nullcontext():
        modes.run_train(config, str(tmp_path), ())
    assert folders == [epath.Path(tmp_path)] * drawn
