"""The benchmark runs, and its arithmetic is right."""

import json
import statistics

import pytest
from runs_of_tests import tiny

from layermatch_jax import automatic, config, presets
from layermatch_jax.benchmark import measure, summary


@pytest.mark.parametrize("backend", ["device", pytest.param("tf_data", marks=pytest.mark.slow)])
def test_what_is_measured_and_told(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    periods = {"train_steps": 8, "log_every": 4, "eval_every": 8, "checkpoint_every": 8}
    c = tiny("layermatch", **{"model.name": "linear", "input.backend": backend}, **periods)
    K = c.input.steps_per_call = 4 if backend == "device" else 1
    c.profile = backend == "device"
    report = measure.run_benchmark(c, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "benchmark.json").read_text()) == json.loads(
        json.dumps(report)
    )
    assert not (tmp_path / "new" / "metrics.jsonl").exists(), "what was trained is kept"
    traces = list((tmp_path / "new").rglob("*.xplane.pb"))
    assert bool(traces) == c.profile

    parts = report["parts"]
    expected = {"train step", "train step, jit", "train step, fixmatch", "input", "whole loop"}
    if backend == "tf_data":
        expected |= {"input, image by image"}
    assert set(parts) == expected | {"evaluation"}
    step = parts["train step"]
    assert step["steps_per_second"] == pytest.approx(K / statistics.median(step["seconds"]))
    images = 8 * (1 + 2 * 2)
    for name in expected - {"input, image by image"}:
        part = parts[name]
        assert part["images_per_second"] == pytest.approx(images * part["steps_per_second"])
        ratios = [a / b for a, b in zip(step["seconds"], part["seconds"], strict=True)]
        assert part["relative_speed"] == pytest.approx(statistics.median(ratios))
    assert step["relative_speed"] == 1
    evaluation = parts["evaluation"]
    assert evaluation["steps_per_second"] is None
    assert evaluation["images_per_second"] == pytest.approx(
        100 / statistics.median(evaluation["seconds"])
    )

    # A linear backbone: the forward pass, and the backward pass to its kernel; 2 FLOP per MAC.
    products = 2 * 2 * images * (8 * 8 * 3) * c.model.width
    assert products < report["program"]["flops_per_step"] < 3 * products
    assert report["program"]["peak_share"] is None  # the peak of a CPU is not known

    text = summary.as_table(report, tmp_path / "new")
    assert f"{images} images a step, input by {backend}; 8 x cpu" in text
    for name in parts:
        assert f"\n{name} " in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ratios", "unlabeled_views"),
    # The Π-model and VAT set μ = 1, so FixMatch gets the default; otherwise the user's μ is kept.
    [("pi_model", (1, 7), 2), ("comatch", (2, 2), 3), ("vat", (1, 7), 2)],
)
def test_a_method_with_other_views(method, ratios, unlabeled_views, tmp_path, monkeypatch):
    """Images are counted by the views of each method; image-by-image input lacks such views."""
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    c = tiny(method, **{"model.name": "linear", "input.backend": "tf_data", "train_steps": 8})
    parts = measure.run_benchmark(c, tmp_path / "new")["parts"]
    assert "input, image by image" not in parts
    measured = (("train step", unlabeled_views), ("train step, fixmatch", 2))
    for (name, views), mu in zip(measured, ratios, strict=True):
        images = 8 * (1 + mu * views)
        part = parts[name]
        assert part["images_per_second"] == pytest.approx(images * part["steps_per_second"]), name
    # The input does not make the view that VAT makes in the step.
    drawn = {"vat": 1}.get(method, unlabeled_views)
    images = 8 * (1 + ratios[0] * drawn)
    part = parts["input"]
    assert part["images_per_second"] == pytest.approx(images * part["steps_per_second"])


def test_shares_of_the_peak(monkeypatch):
    part = measure.Part(run=None, steps=2, images=10)
    monkeypatch.setitem(summary.PEAK, "cpu", 4e9)
    report = summary.make_report(
        config.base(),
        type("Data", (), {"images_per_step": 5}),
        {"flops_per_step": 1e9},
        {"train step": part},
        {"train step": [0.5, 0.25, 1.0]},
    )
    assert report["parts"]["train step"]["steps_per_second"] == 4  # median 0.5 s for 2 steps
    assert report["program"]["flops_per_second"] == 4e9
    assert report["program"]["peak_share"] == 1 / 8  # there are eight devices


def test_the_other_method_differs_in_its_choices_alone():
    c = tiny("freematch+layerwise", **{"model.width": 7})
    other = config.fields(automatic.resolve(presets.exchange_method(c, "fixmatch")))
    changed = {name for name, value in config.fields(c).items() if other[name] != value}
    assert changed == {
        "method", "applied_method", "policy.name", "policy.threshold", "policy.momentum",
        "policy.fairness_weight",
        "layerwise.gradient_mask", "avg_clustering.centers",
    }  # fmt: skip
    assert other["policy.name"] == "fixed_threshold"
    assert other["policy.threshold"] == 0.95
    assert (
        other["policy.momentum"] is other["policy.fairness_weight"] is None
    )  # settings of FreeMatch alone
