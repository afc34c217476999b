"""Which layers gain from pseudo-labels, and which are harmed: their gradient, layer by layer.

For one state and many batches of draws that no training step sees, four gradients are taken of each
batch and averaged: of the labelled images (g_s); of the unlabelled rows with right pseudo-labels
(g_right) and with wrong ones (g_wrong), through the heads and with the weights of the run; and of
the same rows, heads and weights with the true labels (g_true). With g_u = g_right + g_wrong, a
layer gains as far as g_u points where g_true does.

Everything compared is a ratio of scalar products of mean gradients. So each layer's products of all
batches with all (a Gram matrix) are enough. A batch's noise is in its product with itself, which
makes lengths too large and cosines wrong: so only products of two different batches count.
"""

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import scipy.special
from etils import epath

from layermatch_jax.after import drawing
from layermatch_jax.batch import TrainBatch
from layermatch_jax.data.feed import Feed
from layermatch_jax.data.splits import Partition
from layermatch_jax.errors import InputError
from layermatch_jax.method import assembly, backprop, reductions
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import files, metrics, parallel

FILES = FILE, TABLE, FIGURE = "layer_report.json", "layer_report.csv", "layer_report.png"
KINDS = ("supervised", "true", "right", "wrong")
QUANTITIES = {
    "cosine_true": "cos(g_u, g_true)",
    "cosine_supervised": "cos(g_u, g_s)",
    "norm_ratio": "λ_u ‖g_u‖ / ‖g_s‖",
    "noise_share": "‖g_wrong‖² / (‖g_right‖² + ‖g_wrong‖²)",
}
_LIMITS = {  # of the quantities, which an estimate may exceed
    "cosine_true": (-1, 1),
    "cosine_supervised": (-1, 1),
    "norm_ratio": (0, np.inf),
    "noise_share": (0, 1),
}
# Gradients that the host keeps at a time. What is more is computed again, some leaves in each pass
# over the batches: with 128 batches WRN-28-2's 3 GB take 2 passes, WRN-28-8's 48 GB 24, with 32 6.
_BYTES = 2**31


# ---------------------------------------------------------------------------------------------
# Layers.


def layer(path: str) -> str:
    """The group of a parameter: 'backbone/stage1_block0/conv1/kernel' -> 'stage1_block0'."""
    whose, name = path.split("/")[:2]
    return name if whose == "backbone" else whose


def forward_order(layers: Iterable[str]) -> list[str]:
    """Stem, blocks by stage, what follows them, classifier."""

    def place(name: str) -> tuple:
        block = re.fullmatch(r"stage(\d+)_block(\d+)", name)
        known = {"stem": 0, "final_norm": 3, "classifier": 4}
        return (1, *map(int, block.groups())) if block else (known.get(name, 2), 0, 0)

    return sorted(set(layers), key=place)


# ---------------------------------------------------------------------------------------------
# Gradients of one batch, on the devices.


def gradients(
    state: TrainState,
    resident: Any,
    rows: Any,
    *,
    batch: Callable[[Any, Any], TrainBatch],
    method: assembly.Method,
    axis_name: str | None = None,
) -> tuple[dict, dict]:
    """What one batch would give; pure, and nothing of it is kept.

    The unsupervised gradients are of L_u alone: without λ_u, gradient mask and a policy's
    regulariser. Rows whose truth is not known, and labelled images among the unlabelled ones, are
    in none of them.

    Args:
      state: the same on every device.
      resident: what the feed keeps on every device.
      rows: this device's rows of one step of a call.
      batch: (resident, rows) -> TrainBatch, of the feed.
      method: the parts of a step.
      axis_name: the device axis to reduce over; None when `rows` are of the global batch.

    Returns:
      Of the global batch: {kind of KINDS: tree like params}, and {'known', 'used', 'right': sums
      over the rows of known truth of 1, of their weight, of it where right; 'strength': λ_u with
      the policy's ramp}.
    """
    own_batch = batch(resident, rows)
    seen = backprop.run_forward(state, own_batch, method, axis_name)
    targets, weights, truth = seen.answer.targets, seen.answer.weights, seen.true_labels
    known, right = truth >= 0, jnp.argmax(targets, axis=-1) == truth

    def unsupervised(targets, counted):
        answer = seen.answer._replace(targets=targets, weights=weights * counted)
        only = "unsupervised"  # a policy's other terms have no pseudo-labels
        return backprop.unsupervised_gradients(state, seen, answer, method, axis_name, only)[1]

    at_heads = {
        "supervised": backprop.supervised_gradients(state, own_batch, seen, method, axis_name)[1],
        "true": unsupervised(jax.nn.one_hot(truth, targets.shape[-1]), known),
        "right": unsupervised(targets, right),
        "wrong": unsupervised(targets, known & ~right),
    }
    trees = {
        kind: {
            "backbone": seen.pull_back(of_kind.features)[0],
            "classifier": of_kind.heads["classifier"],
        }
        for kind, of_kind in at_heads.items()
    }
    trees = reductions.total(trees, axis_name)
    sums = {
        "known": jnp.sum(known),
        "used": jnp.sum(weights * known),
        "right": jnp.sum(weights * right),
    }
    strength = method.unsupervised_weight * seen.answer.scale
    return trees, sums | {"strength": strength}


# ---------------------------------------------------------------------------------------------
# From gradients to what is told of a layer.


def products(
    batches: Callable[[], Iterator[tuple[dict, dict]]], params: Any, count: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scalar products of all kinds of gradients of all batches, by layer.

    Args:
      batches: () -> what `gradients` gives for each batch. Called as often as it takes to keep no
        more than 2 GiB (or the largest single parameter's gradients) on the host at a time.
      params: tree; its shapes and dtypes are read.
      count: batches, n.

    Returns:
      {layer, in forward order: [4, n, 4, n] float64, by kind of KINDS and batch}, and the sums'
      means over batches.
    """
    params = {name: params[name] for name in ("backbone", "classifier")}  # own heads have no part
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    order = forward_order(layer(path) for path in leaves)
    size = len(KINDS) * count
    grams, sums = {name: np.zeros((size, size)) for name in order}, {}
    for part in _parts({p: size * leaf.size * leaf.dtype.itemsize for p, leaf in leaves.items()}):
        kept = {p: np.empty((len(KINDS), count, leaves[p].size), leaves[p].dtype) for p in part}
        sums = []
        for i, (trees, of_batch) in enumerate(batches()):
            sums.append(jax.device_get(of_batch))
            for k, kind in enumerate(KINDS):
                for path, leaf in jax.tree_util.tree_leaves_with_path(trees[kind]):
                    if _path(path) in kept:
                        kept[_path(path)][k, i] = np.ravel(leaf)
        for path in part:
            rows = kept.pop(path).reshape(size, -1)
            grams[layer(path)] += rows @ rows.T
    shape = (len(KINDS), count, len(KINDS), count)
    means = {name: float(np.mean([one[name] for one in sums])) for name in sums[0]}
    return {name: gram.reshape(shape) for name, gram in grams.items()}, means


def _path(path) -> str:
    return "/".join(key.key for key in path)


def _parts(sizes: dict[str, int]) -> list[list[str]]:
    """Cuts names into runs of at most _BYTES each; one that is larger is alone."""
    parts, room = [], 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts, room = [*parts, []], _BYTES
        parts[-1].append(name)
        room -= size
    return parts


def compare(gram: np.ndarray, strength: float = 1.0) -> dict[str, list[float | None]]:
    """Estimates the quantities of a layer's mean gradients, those of infinitely many batches.

    Each scalar product of two mean gradients is estimated without bias, by the mean over pairs of
    different batches (a U-statistic). The 95 % interval is value ± t · standard error, cut at the
    quantity's limits. The standard error is the jackknife's (Arvesen 1969, "Jackknifing
    U-statistics"; Efron and Stein 1981: it is on average not too small), and t is Student's with
    n − 1 degrees of freedom.

    Args:
      gram: float [4, n, 4, n], of `products`; n is 3 or more.
      strength: λ_u.

    Returns:
      {name of QUANTITIES: [value, low, high]}. All three are None where the quantity is not known:
      where a gradient that it divides by is 0, as where no pseudo-label was used, and where the
      estimate of a squared length is negative, with all batches or without one of them: there the
      noise of so few batches hides the gradient.
    """
    count = gram.shape[1]
    apart = np.array(gram)
    apart[:, np.arange(count), :, np.arange(count)] = 0
    total = np.sum(apart, axis=(1, 3))
    with_batch = np.sum(apart, axis=3).swapaxes(1, 2) + np.sum(apart, axis=1)
    # Over all pairs, and over those without each of the batches: [4, 4, 1 + n]. The number of
    # pairs is left out, for it is the same in all products of a ratio.
    dots = np.concatenate([total[..., None], total[..., None] - with_batch], axis=2)

    s, t, right, wrong = range(len(KINDS))
    uu = dots[right, right] + dots[wrong, wrong] + 2 * dots[right, wrong]
    rows = dots[right, right] + dots[wrong, wrong]
    with np.errstate(divide="ignore", invalid="ignore"):
        length_u, length_t, length_s = np.sqrt(uu), np.sqrt(dots[t, t]), np.sqrt(dots[s, s])
        values = {
            "cosine_true": (dots[right, t] + dots[wrong, t]) / (length_u * length_t),
            "cosine_supervised": (dots[right, s] + dots[wrong, s]) / (length_u * length_s),
            "norm_ratio": strength * length_u / length_s,
            "noise_share": np.where(rows > 0, dots[wrong, wrong] / rows, np.nan),
        }
    return {name: _with_interval(value, *_LIMITS[name]) for name, value in values.items()}


def _with_interval(estimates: np.ndarray, least: float, most: float) -> list[float | None]:
    """[1 + n], of all batches and without each of them -> [value, low, high]."""
    if not np.isfinite(estimates).all():
        return [None, None, None]
    value, without = estimates[0], estimates[1:]
    degrees = len(without) - 1
    error = np.sqrt(degrees * np.var(without))
    half = scipy.special.stdtrit(degrees, 0.975) * error
    return [float(np.clip(x, least, most)) for x in (value, value - half, value + half)]


# ---------------------------------------------------------------------------------------------
# A report.


def compile_gradients(
    config: ml_collections.ConfigDict, feed: Feed, method: assembly.Method
) -> Callable:
    """`gradients` for all devices: (state, resident, placed rows) -> its outputs."""
    return parallel.compile_step(
        functools.partial(gradients, batch=feed.batch, method=method),
        config.parallelism,
        resident=True,
        donate_state=False,
    )


def create(
    config: ml_collections.ConfigDict,
    partition: Partition,
    feed: Feed,
    resident: Any,
    program: Callable,
) -> Callable[[TrainState], dict[str, Any]]:
    """A function that looks at states of a run, and changes nothing.

    Its batches are those of the steps that would follow the run's last one: the same for all states
    of a run, and seen by none. With several processes all of them call it.

    Args:
      config: the whole config; reads `layer_report.batches`.
      partition: the run's images; the unlabelled ones' true labels are read.
      feed: of the run.
      resident: what it keeps on the devices.
      program: of `compile_gradients`.

    Returns:
      state on the devices -> {'step', 'batches', 'known' (unlabelled rows of known truth),
      'mask_rate' and 'pseudo_label_accuracy' of these, 'strength' (λ_u with its ramp), 'layers':
      {layer, in forward order: {'parameters': their number, and what `compare` tells}}}.

    Raises:
      InputError: the method has no pseudo-labels, or no true label is known.
    """
    if config.unsupervised_weight == 0:
        raise InputError(f"a layer report is about pseudo-labels: {config.method} has none")
    if not np.any(partition.unlabeled.labels >= 0):
        raise InputError(
            "a layer report compares pseudo-labels with true labels, but "
            f"{metrics.TRUTH_UNKNOWN}. It needs training images whose class is known and that the "
            "run does not learn as labelled ones: lower --config.dataset.num_labels"
        )
    first, count = config.train_steps, config.layer_report.batches

    def report(state: TrainState) -> dict[str, Any]:
        def batches():
            for _, call in feed.calls(range(first, first + count)):
                for k in range(jax.tree.leaves(call)[0].shape[1]):
                    rows = jax.tree.map(lambda x, k=k: x[:, k], call)
                    placed = parallel.place_batch(rows, config.parallelism)
                    yield program(state, resident, placed)

        grams, sums = products(batches, state.params, count)
        sizes = dict.fromkeys(grams, 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            if layer(_path(path)) in sizes:
                sizes[layer(_path(path))] += leaf.size
        return {
            "step": int(state.step),
            "batches": count,
            "known": round(sums["known"] * count),
            "mask_rate": sums["used"] / sums["known"] if sums["known"] else None,
            "pseudo_label_accuracy": sums["right"] / sums["used"] if sums["used"] else None,
            "strength": sums["strength"],
            "layers": {
                name: {"parameters": sizes[name], **compare(gram, sums["strength"])}
                for name, gram in grams.items()
            },
        }

    return report


def of_run(run: Any, batches: int | None = None) -> dict[str, Any]:
    """The report of a saved run: `of_run(runs.read(workdir))`.

    Args:
      run: of `runs.read`.
      batches: to average over; None = the run's `layer_report.batches`.

    Returns:
      As the function that `create` gives.

    Raises:
      InputError: as `create`, or the run's batches do not divide among the devices.
    """
    config = run.config.copy_and_resolve_references()
    config.parallelism = "jit"  # of which a state that was read is
    config.layer_report.batches = batches or config.layer_report.batches
    data = run.data
    method = assembly.create_method(config, run.state.params, data.statistics)
    parallel.check_room(data.feed.resident_bytes)
    resident = data.feed.resident(config.parallelism)
    program = compile_gradients(config, data.feed, method)
    report = create(config, data.partition, data.feed, resident, program)
    return report(parallel.replicate(run.state, config.parallelism))


# ---------------------------------------------------------------------------------------------
# Its files.


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """The reports of a run so far, by step; none if there is no file."""
    path = workdir / FILE
    mend = "Delete it, which costs the layer reports so far, or bring it back from a backup."
    return files.read_json(path, mend, list) if path.exists() else []


def add(workdir: epath.Path, report: dict[str, Any]) -> None:
    """Writes a report to the others of its run, in place of one of the same step."""
    others = [one for one in read(workdir) if one["step"] != report["step"]]
    _write(workdir, sorted([*others, report], key=lambda one: one["step"]))


def cut_back(workdir: epath.Path, step: int) -> None:
    """Removes the reports of later steps than the one that a run goes on from."""
    before = read(workdir)
    kept = [one for one in before if one["step"] <= step]
    if len(kept) < len(before):
        _write(workdir, kept)


def _write(workdir: epath.Path, reports: list[dict[str, Any]]) -> None:
    """All three files, each whole or not at all."""
    files.write_text(workdir / FILE, json.dumps(reports, indent=1) + "\n")
    files.write_text(workdir / TABLE, comma_separated(reports))
    if reports:
        drawing.save(lambda: draw(reports), workdir / FIGURE)
    else:
        (workdir / FIGURE).unlink(missing_ok=True)


def comma_separated(reports: list[dict[str, Any]]) -> str:
    """A line for each step and layer, each quantity with the ends of its interval."""
    file = io.StringIO()
    ends = [f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["step", "layer", "parameters", *ends])
    for report in reports:
        for name, told in report["layers"].items():
            values = [x for quantity in QUANTITIES for x in told[quantity]]
            writer.writerow([report["step"], name, told["parameters"], *values])
    return file.getvalue()


def draw(reports: list[dict[str, Any]]) -> Any:
    """Reports of one or several steps as a Figure: a map of layers by steps for each quantity."""
    layers, at_steps = list(reports[0]["layers"]), [one["step"] for one in reports]

    def values(name):  # [3, layers, steps]
        told = [[one["layers"][x][name] for one in reports] for x in layers]
        return np.moveaxis(np.array(told, float), -1, 0)

    colours = {
        "cosine_true": ("RdBu", -1, 1),
        "cosine_supervised": ("RdBu", -1, 1),
        "norm_ratio": ("viridis", None, None),
        "noise_share": ("cividis", 0, 1),
    }
    panels = [drawing.Panel(QUANTITIES[name], *values(name), *colours[name]) for name in QUANTITIES]
    counts = " or ".join(map(str, sorted({one["batches"] for one in reports})))
    title = f"mean gradients, of {counts} batches; below: 95 % interval; empty: not known"
    return drawing.maps(panels, layers, [f"{step:,}" for step in at_steps], "step", title)


def table(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    used, right = report["mask_rate"], report["pseudo_label_accuracy"]
    shown = "" if used is None else f", {used:.1%} of them used"
    shown += "" if right is None else f", {right:.1%} of these right"
    lines = [
        f"step {report['step']}: {report['batches']} batches, {report['known']} unlabelled rows of "
        f"known truth{shown}",
        "",
        f"{'':16}" + "".join(f"{name:>25}" for name in QUANTITIES),
    ]
    for name, told in report["layers"].items():
        cells = [
            "–" if told[q][0] is None else "{:.3f} ({:.3f}, {:.3f})".format(*told[q])
            for q in QUANTITIES
        ]
        lines.append(f"{name:16}" + "".join(f"{cell:>25}" for cell in cells))
    named = ", ".join(f"{name} = {meaning}" for name, meaning in QUANTITIES.items())
    lines += ["", f"{named}; in brackets the 95 % interval"]
    if any(None in told[q] for told in report["layers"].values() for q in QUANTITIES):
        lines.append(
            "–: not known. No row was used, or the noise of so few batches hides the gradient; "
            "then give more of them: --config.layer_report.batches=N"
        )
    return "\n".join(lines)
