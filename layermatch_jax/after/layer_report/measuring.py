"""The four gradients of a batch, and a report of a state of a run."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from layermatch_jax.after.layer_report import estimates
from layermatch_jax.batches import TrainBatch
from layermatch_jax.data.feed import Feed
from layermatch_jax.data.splits import Partition
from layermatch_jax.errors import InputError
from layermatch_jax.method import assembly, backprop, policies, reductions
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import metrics, parallel


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
    regularizer. Rows whose truth is not known, and labeled images among the unlabeled ones, are
    in none of them.

    Args:
      state: the same on every device.
      resident: what the feed keeps on every device.
      rows: this device's rows of one step of a chunk.
      batch: (resident, rows) -> TrainBatch, of the feed.
      method: the parts of a step.
      axis_name: the device axis to reduce over; None when `rows` are of the global batch.

    Returns:
      Of the global batch: {kind of KINDS: tree like params}, and {'known', 'used', 'right': sums
      over the rows of known truth of 1, of their weight, of it where right; 'strength': λ_u with
      the policy's ramp}.
    """
    step_batch = batch(resident, rows)
    forward = backprop.run_forward(state, step_batch, method, axis_name)
    targets, weights, truth = (
        forward.assignment.targets,
        forward.assignment.weights,
        forward.true_labels,
    )
    known, right = truth >= 0, jnp.argmax(targets, axis=-1) == truth

    def unsupervised(targets, counted):
        assignment = forward.assignment._replace(targets=targets, weights=weights * counted)
        only = "unsupervised"  # a policy's other terms have no pseudo-labels
        return backprop.unsupervised_gradients(state, forward, assignment, method, axis_name, only)[
            1
        ]

    at_heads = {
        "supervised": backprop.supervised_gradients(state, step_batch, forward, method, axis_name)[
            1
        ],
        "true": unsupervised(jax.nn.one_hot(truth, targets.shape[-1]), known),
        "right": unsupervised(targets, right),
        "wrong": unsupervised(targets, known & ~right),
    }
    trees = {
        kind: {
            "backbone": forward.pull_back(of_kind.features)[0],
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
    strength = method.unsupervised_weight * forward.assignment.scale
    return trees, sums | {"strength": strength}


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
      partition: the run's images; the unlabeled ones' true labels are read.
      feed: of the run.
      resident: what it keeps on the devices.
      program: of `compile_gradients`.

    Returns:
      state on the devices -> {'step', 'batches', 'known' (unlabeled rows of known truth),
      'mask_rate' and 'pseudo_label_accuracy' of these, 'strength' (λ_u with its ramp), 'layers':
      {layer, in forward order: {'parameters': their number, and what `compare` tells}}}. Of a
      policy without pseudo-labels, what asks whether they are right is not known.

    Raises:
      InputError: the method has no pseudo-labels, or no true label is known.
    """
    if config.unsupervised_weight == 0:
        raise InputError(f"a layer report is about pseudo-labels: {config.method} has none")
    if not np.any(partition.unlabeled.labels >= 0):
        raise InputError(
            "a layer report compares pseudo-labels with true labels, but "
            f"{metrics.TRUTH_UNKNOWN}. It needs training images whose class is known and that the "
            "run does not learn as labeled ones: lower --config.dataset.num_labels"
        )
    first, count = config.train_steps, config.layer_report.batches
    unknown = () if policies.create(config).pseudo_labels else estimates.OF_PSEUDO_LABELS

    def measure_layers(state: TrainState) -> dict[str, Any]:
        def step_batches():
            for _, chunk in feed.chunks(range(first, first + count)):
                for k in range(jax.tree.leaves(chunk)[0].shape[1]):
                    rows = jax.tree.map(lambda x, k=k: x[:, k], chunk)
                    placed = parallel.place_batch(rows, config.parallelism)
                    yield program(state, resident, placed)

        grams, sums = estimates.products(step_batches, state.params, count)
        sizes = dict.fromkeys(grams, 0)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            if estimates.layer(estimates._path(path)) in sizes:
                sizes[estimates.layer(estimates._path(path))] += leaf.size
        return {
            "step": int(state.step),
            "batches": count,
            "known": round(sums["known"] * count),
            "mask_rate": sums["used"] / sums["known"] if sums["known"] else None,
            "pseudo_label_accuracy": sums["right"] / sums["used"] if sums["used"] else None,
            "strength": sums["strength"],
            "layers": {
                name: {
                    "parameters": sizes[name],
                    **estimates.compare(gram, sums["strength"]),
                    **dict.fromkeys(unknown, [None] * 3),
                }
                for name, gram in grams.items()
            },
        }

    return measure_layers


def of_run(run: Any, data: Any, batches: int | None = None) -> dict[str, Any]:
    """The report of a saved run.

    Args:
      run: of `runs.read`.
      data: of `runs.read_data`.
      batches: to average over; None = the run's `layer_report.batches`.

    Returns:
      As the function that `create` gives.

    Raises:
      InputError: as `create`, or the run's batches do not divide among the devices.
    """
    config = run.config.copy_and_resolve_references()
    config.parallelism = "jit"  # of which a state that was read is
    config.layer_report.batches = batches or config.layer_report.batches
    method = assembly.create_method(config, run.state.params, data.statistics)
    parallel.check_room(data.feed.resident_bytes)
    resident = data.feed.resident(config.parallelism)
    program = compile_gradients(config, data.feed, method)
    measure_layers = create(config, data.partition, data.feed, resident, program)
    return measure_layers(parallel.replicate(run.state, config.parallelism))
