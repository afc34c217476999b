import functools
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from layermatch_jax.errors import InputError, NonFiniteLossError
from layermatch_jax.method import windows
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import clock, metrics

RNG = np.random.RandomState(0)


def pairs(values, weights):
    """Returns [sum, weight] pairs of means that were taken over `weights` values each."""
    return np.stack([np.multiply(values, weights), weights], axis=-1).astype(np.float32)


def window_of(steps, first=1):
    """Accumulates a list of {name: [sum, weight]}."""
    window = windows.empty_window({"sums": steps[0]})
    for step, step_metrics in enumerate(steps, first):
        window = windows.join(window, windows.window_of(step_metrics, step))
    return window


def losses(*values):
    return [{"loss": np.array([value, 1], np.float32)} for value in values]


def window(step_count=1, **means):
    """Makes a window for Log.train: the mean loss and other means over some steps."""
    means = {"loss": 1.0, "mask_rate": None, "pseudo_label_accuracy": None} | means
    sums = {k: (0, 0) if v is None else (v * step_count, step_count) for k, v in means.items()}
    return {"sums": sums, "nonfinite_step": windows.NEVER}


def scores(accuracy, **changed):
    return {"accuracy": accuracy, "accuracy_ema": 1, "loss": 1.0, "loss_ema": 1.0} | changed


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def open_log(folder, step=0, images_per_step=7):
    """A log, and its clock."""
    ticking = clock.Clock(step, clock.EMPTY)
    return metrics.Log(folder, step, ticking, images_per_step, tensorboard=False), ticking


# ---- Windows ----


def test_windows_average_over_what_was_counted():
    # 2 of 10 right, then 60 of 60: the mean is 62 of 70, not the mean of the two shares.
    values, weights = [0.2, 1.0], [10, 60]
    steps = [{"loss": pair, "right": pair} for pair in pairs(values, weights)]
    means = windows.means(window_of(steps)["sums"])
    assert means["right"] == pytest.approx(62 / 70)

    values, weights = RNG.rand(9), RNG.randint(1, 100, 9)
    steps = [{"loss": np.float32([v, 1]), "x": x}
             for v, x in zip(values, pairs(values, weights), strict=True)]  # fmt: skip
    means = windows.means(window_of(steps)["sums"])
    assert means["x"] == pytest.approx(np.average(values, weights=weights), rel=1e-6)
    assert means["loss"] == pytest.approx(values.mean(), rel=1e-6)


def test_steps_that_counted_nothing_change_nothing():
    steps = [{"loss": np.float32([1, 1]), "right": np.float32(x)} for x in ([0, 0], [3, 4], [0, 0])]
    assert windows.means(window_of(steps)["sums"])["right"] == 0.75


def test_means_of_nothing_are_unknown():
    assert windows.means({"a": (0.0, 0.0), "b": (1.0, 4.0)}) == {"a": None, "b": 0.25}
    by_class = {"a": np.array([[0.0, 3.0], [0.0, 4.0]]), "b": np.zeros((2, 2))}
    assert windows.means(by_class) == {"a": [None, 0.75], "b": None}


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ((1, 2, 3), None),
        ((1, math.nan, 3), 12),
        ((1, math.nan, math.inf), 12),
        ((math.inf, 1, math.nan), 11),
        ((1, 2, -math.inf), 13),
    ],
)
def test_first_step_whose_loss_is_not_finite(values, first):
    window = window_of(losses(*values), first=11)
    if first is None:
        windows.check_finite(window)
    else:
        with pytest.raises(NonFiniteLossError, match=f"the loss is not finite at step {first}$"):
            windows.check_finite(window)


def test_other_metrics_may_be_infinite():
    steps = [{"loss": np.float32([1, 1]), "norm": np.float32([math.inf, 1])}]
    windows.check_finite(window_of(steps))


@pytest.mark.parametrize("spoilt", [None, "params", "batch_stats", "centers"])
def test_state_that_is_no_good_checkpoint(spoilt):
    parts = {"params": 1e38, "batch_stats": 0.0, "centers": -1e9}
    trees = {name: {"x": jnp.array([1.0, value])} for name, value in parts.items()}
    if spoilt:
        trees[spoilt] = {"x": jnp.array([1.0, math.inf])}
    state = TrainState(
        step=jnp.int32(7), apply_fn=print, tx=optax.identity(), opt_state=(), policy=(),
        head_stats={}, ema_params=trees["params"], **trees,
    )  # fmt: skip
    window = window_of(losses(1))
    if spoilt is None:
        windows.check_finite(window, state)
    else:
        with pytest.raises(NonFiniteLossError, match="the update of step 7 is not finite"):
            windows.check_finite(window, state)
        windows.check_finite(window)


# ---- The log ----


def test_log_writes_what_it_is_given(folder):
    log, ticking = open_log(folder)
    ticking.done(1)
    ticking.done(10)
    log.train(10, window(10, loss=2.5, mask_rate=0.25))
    log.evaluation(10, "test", scores(0.5), 3.5)
    log.train(20, window(10, loss=1.5, mask_rate=0.75, pseudo_label_accuracy=0.9))
    log.close()

    text = (folder / metrics.FILE).read_text()
    first, evaluation, last = (json.loads(line) for line in text.splitlines())
    assert metrics.read(folder) == [first, evaluation, last]
    assert (first["step"], first["split"], first["loss"], first["mask_rate"]) == (
        10, "train", 2.5, 0.25,
    )  # fmt: skip
    assert '"pseudo_label_accuracy": null' in text.splitlines()[0]  # unknown, not 0
    assert first["images_per_second"] == pytest.approx(7 * first["steps_per_second"])
    assert set(metrics.TIME_FIELDS) < first.keys()
    assert evaluation == {"step": 10, "split": "test", "seconds": 3.5} | scores(0.5)
    assert last["pseudo_label_accuracy"] == 0.9
    assert [(split, line["loss"]) for split, line in log.latest.items()] == [
        ("train", 1.5), ("test", 1.0),
    ]  # fmt: skip


def test_a_window_that_only_compiled_has_no_speed(folder):
    log, ticking = open_log(folder)
    ticking.done(1)
    log.train(1, window())
    (line,) = metrics.read(folder)
    assert line["seconds"] > 0
    assert line["steps_per_second"] is line["images_per_second"] is None


def test_each_line_has_its_own_seconds(folder, monkeypatch):
    """As in the loop, if log_every=20 does not divide eval_every=30."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    log, ticking = open_log(folder)

    def train(step, seconds):
        now[0] += seconds
        ticking.done(step)

    train(10, 100)  # compiles
    train(20, 2)
    log.train(20, window(20))
    train(30, 3)
    with ticking.paused():
        now[0] += 50
        log.evaluation(30, "test", scores(0.5), 50.0)
    train(40, 5)
    log.train(40, window(20))
    lines = metrics.read(folder)
    assert [line["seconds"] for line in lines] == [102, 50, 8]
    assert [line.get("steps_per_second") for line in lines] == [10 / 2, None, 20 / 8]
    assert [line.get("images_per_second") for line in lines] == [7 * 5, None, 7 * 2.5]


def test_log_has_no_word_for_infinity(folder):
    open_log(folder)[0].train(1, window(norm=math.inf, mask_rate=math.nan))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((folder / metrics.FILE).read_text(), parse_constant=refuse)
    assert line["norm"] is None
    assert line["mask_rate"] is None
    assert line["loss"] == 1


def test_log_refuses_losses_that_are_not_finite(folder):
    log, _ = open_log(folder)
    with pytest.raises(NonFiniteLossError, match="the loss is not finite at step 3"):
        log.train(4, window() | {"nonfinite_step": 3})
    for field in ("loss", "loss_ema"):
        with pytest.raises(NonFiniteLossError, match="the test loss is not finite at step 4"):
            log.evaluation(4, "test", scores(0.1, **{field: math.nan}), 1.0)
    assert metrics.read(folder) == []


WRITTEN = [
    {"step": 4, "split": "train"},
    {"step": 5, "split": "train"},
    {"step": 5, "split": "test"},
    {"step": 10, "split": "train"},
]


def write_lines(folder, lines=WRITTEN, rest=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return (folder / metrics.FILE).write_text(text + rest)


@pytest.mark.parametrize("count", range(5))
def test_log_is_cut_back_to_the_lines_of_a_checkpoint(folder, count):
    write_lines(folder, rest='{"step": 15, "spl')
    metrics.cut_back(folder, count, step=10)
    assert metrics.read(folder) == WRITTEN[:count]
    log, _ = open_log(folder, step=10)
    assert log.lines == count
    log.train(20, window())
    assert log.lines == count + 1
    assert metrics.read(folder)[:-1] == WRITTEN[:count]
    assert metrics.read(folder)[-1]["step"] == 20
    assert [p.name for p in folder.iterdir()] == [metrics.FILE]


@pytest.mark.parametrize("rest", ['{"step": 6, "spl', '{"step": 6}', "{", "", "\0\0\0"])
def test_last_line_that_was_cut_off_is_left_out(folder, rest):
    write_lines(folder, rest=rest)
    assert metrics.read(folder) == WRITTEN
    metrics.cut_back(folder, 4, step=10)
    assert metrics.read(folder) == WRITTEN
    assert (folder / metrics.FILE).read_text().endswith('"split": "train"}\n')


@pytest.mark.parametrize("missing", range(4))
def test_lines_that_are_missing_are_not_passed_over(folder, missing):
    write_lines(folder, WRITTEN[:missing] + WRITTEN[missing + 1 :])
    for read in (metrics.read, functools.partial(metrics.cut_back, step=10)):
        with pytest.raises(InputError, match=r"metrics\.jsonl holds 3 of the 4 lines "):
            read(folder, 4)
    (folder / metrics.FILE).unlink()
    with pytest.raises(InputError, match="holds 0 of the 4 lines"):
        metrics.cut_back(folder, 4, step=10)


@pytest.mark.parametrize("line", ["", '{"step": 5, "sp', "\0" * 40, "\xff"])
def test_a_damaged_line_is_named(folder, line):
    text = "".join(json.dumps(line) + "\n" for line in WRITTEN[:2])
    (folder / metrics.FILE).write_bytes(f"{text}{line}\n{text}".encode("latin-1"))
    before = (folder / metrics.FILE).read_bytes()
    for read in (lambda: metrics.read(folder), lambda: metrics.cut_back(folder, 5, step=15)):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(f"{folder / metrics.FILE} is damaged in line 3 (")
    assert (folder / metrics.FILE).read_bytes() == before
    metrics.cut_back(folder, 2, step=10)  # lines after the checkpoint are written again
    assert metrics.read(folder) == WRITTEN[:2]


def test_the_lines_are_on_the_disk_before_a_checkpoint_counts_them(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda d: synced.append(os.readlink(f"/proc/self/fd/{d}")))
    log, _ = open_log(folder)
    log.train(1, window())
    log.to_disk()
    assert synced == [str(folder / metrics.FILE)]


def test_log_of_nothing(folder):
    assert metrics.read(folder) == []


# ---- The result ----


def evaluated(accuracies, split="test", ema_offset=0.0):
    return [
        {"step": 10 * i, "split": split, "accuracy": a, "accuracy_ema": a + ema_offset,
         "seconds": 0.5}
        for i, a in enumerate(accuracies, 1)
    ]  # fmt: skip


def trained(step, mask_rate=None, right=None, right_all=None, seconds=1.0, speed=100.0):
    return {
        "step": step, "split": "train", "mask_rate": mask_rate, "pseudo_label_accuracy": right,
        "pseudo_label_accuracy_all": right_all, "seconds": seconds, "images_per_second": speed,
    }  # fmt: skip


def test_result_of_few_evaluations_is_the_median_of_all():
    got = metrics.summarize(
        [trained(10), *evaluated([0.1, 0.9, 0.4, 0.3], ema_offset=0.05)], "test"
    )
    assert got["test_accuracy"]["raw"] == pytest.approx(
        {"last": 0.3, "median20": 0.35, "best": 0.9}
    )
    assert got["test_accuracy"]["ema"] == pytest.approx(
        {"last": 0.35, "median20": 0.4, "best": 0.95}
    )
    assert got["evaluations_in_median"] == 4


def test_result_of_many_evaluations_is_the_median_of_the_last_twenty():
    # The first value is the best, but not among the last twenty (1..20 / 100, median 0.105).
    accuracies = [0.99, 0.98, 0.97] + [i / 100 for i in range(20, 0, -1)]
    got = metrics.summarize([trained(10), *evaluated(accuracies)], "test")
    assert got["test_accuracy"]["raw"] == pytest.approx(
        {"last": 0.01, "median20": 0.105, "best": 0.99}
    )
    assert got["evaluations_in_median"] == 20


def test_result_is_of_the_split_asked_for():
    lines = [trained(10), *evaluated([0.5], "validation"), *evaluated([0.9], "test")]
    got = metrics.summarize(lines, "validation")
    assert got["validation_accuracy"]["raw"]["last"] == 0.5
    assert "test_accuracy" not in got


def test_result_counts_pseudo_labels_and_not_windows():
    # 8 steps, then 2, with 100 pseudo-labels each: 80 and 100 are used, 20 and 90 of these right.
    lines = [trained(8, 0.1, 0.25, 0.5), trained(10, 0.5, 0.9, 1.0), *evaluated([0.5])]
    got = metrics.summarize(lines, "test")
    assert got["mask_rate"] == pytest.approx(180 / 1000)
    assert got["pseudo_label_accuracy"] == pytest.approx(110 / 180)
    assert got["pseudo_label_accuracy_all"] == pytest.approx(600 / 1000)


def test_result_leaves_out_what_is_unknown():
    lines = [trained(2, 0.0, None, 0.1), trained(4, 0.5, 0.8, 0.3), *evaluated([0.5])]
    got = metrics.summarize(lines, "test")
    assert got["mask_rate"] == pytest.approx(0.25)
    assert got["pseudo_label_accuracy"] == pytest.approx(0.8)
    assert got["pseudo_label_accuracy_all"] == pytest.approx(0.2)
    got = metrics.summarize([trained(2), *evaluated([0.5])], "test")
    assert got["mask_rate"] is got["pseudo_label_accuracy"] is None


def test_result_counts_the_pseudo_labels_whose_truth_is_known():
    # A step has 100 pseudo-labels. In the first window 4 of them have a known truth, of which 2 are
    # used and 1 of these is right; in the second 40, 20 and 19. So 20 of 22 used ones are right.
    lines = [trained(1, 0.9, 1 / 2, 3 / 4), trained(2, 0.1, 19 / 20, 30 / 40), *evaluated([0.5])]
    lines[0] |= {"class_pseudo_labels": [2.0, 0.0], "class_truths": [1.0, 3.0]}
    lines[1] |= {"class_pseudo_labels": [5.0, 15.0], "class_truths": [20.0, 20.0]}
    got = metrics.summarize(lines, "test")
    assert got["pseudo_label_accuracy"] == pytest.approx(20 / 22)
    assert got["pseudo_label_accuracy_all"] == pytest.approx(33 / 44)
    assert got["mask_rate"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("results", "missing"),
    [
        ([], False),
        ([(0.5, 0.9)], False),
        ([(None, None)], False),
        ([(0.5, 0.9), (0.5, None)], True),
    ],
)
def test_missing_accuracies_of_pseudo_labels_are_told_of(results, missing):
    names = ("mask_rate", "pseudo_label_accuracy_all")
    told = metrics.missing_accuracy(dict(zip(names, one, strict=True)) for one in results)
    assert bool(told) == missing
    if missing:
        assert "no unlabeled image has a known class (labeled images do not count)" in told


def test_result_times():
    lines = [trained(1, seconds=20, speed=5), trained(2, speed=90), trained(3, speed=100)]
    got = metrics.summarize(lines + evaluated([0.5, 0.5]), "test")
    assert got["wall_seconds"] == 23.0  # 20 + 1 + 1 + 2 · 0.5
    assert got["images_per_second"] == 90  # the first window compiled
    unknown = metrics.summarize([trained(1, speed=None), *evaluated([0.5])], "test")
    assert unknown["images_per_second"] is None
    known = metrics.summarize(
        [trained(1, speed=None), trained(2, speed=7), *evaluated([0.5])], "test"
    )
    assert known["images_per_second"] == 7
