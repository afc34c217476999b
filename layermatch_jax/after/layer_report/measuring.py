"""Computes the four gradients of a batch, and the layer report of a state."""

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
    """Computes the four gradients of one batch; a pure function that does not change the state.

    The unsupervised gradients are those of L_u, without λ_u, gradient mask and the policy's
    regularizer. They leave out unlabeled images of unknown class, and labeled images among the
    unlabeled ones.

    Args:
      state: the same on every device.
      resident: the feed's arrays on every device.
      rows: this device's rows of one step of a chunk.
      batch: the feed's function (resident, rows) -> TrainBatch.
      method: the parts of a step.
      axis_name: the device axis to reduce over; None if `rows` are the global batch.

    Returns:
      For the global batch, ({kind of KINDS: tree like params}; a dictionary of sums). The sums are
      over unlabeled images of known class: 'known' (their number), 'used' (sum of weights) and
      'right' (sum of weights of right pseudo-labels); 'strength' is λ_u with the policy's ramp.
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
        only = "unsupervised"  # the other terms of a policy's loss use no pseudo-labels
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
    """Compiles `gradients` for all devices: (state, resident, placed rows) -> its outputs."""
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
    """Creates the function that makes the layer report of a state; it does not change the state.

    Its batches are those of the steps after the run's last step: the same batches for all states of
    a run, and never used for training. With several processes, all of them must call the function.

    Args:
      config: the whole config; reads `layer_report.batches`.
      partition: the run's images, with the true labels of the unlabeled images.
      feed: the feed of the run.
      resident: the feed's arrays on the devices.
      program: from `compile_gradients`.

    Returns:
      state on the devices -> {'step', 'batches', 'known' (number of unlabeled images of known
      class), 'mask_rate' and 'pseudo_label_accuracy' (of these images), 'strength' (λ_u with its
      ramp), 'layers': {layer, in forward order: {'parameters' (their number), and the quantities
      from `compare`}}}. For a policy without pseudo-labels, the quantities of OF_PSEUDO_LABELS are
      not known.

    Raises:
      InputError: the method has no pseudo-labels, or no true label is known.
    """
    if config.unsupervised_weight == 0:
        raise InputError(
            f"a layer report needs pseudo-labels, and {config.method} makes none: use a run of "
            "another method"
        )
    if not np.any(partition.unlabeled.labels >= 0):
        raise InputError(
            "a layer report compares pseudo-labels with true labels, but "
            f"{metrics.TRUTH_UNKNOWN}. It needs training images of known class outside the labeled "
            "split: lower --config.dataset.num_labels"
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
            if estimates.layer(estimates.path_name(path)) in sizes:
                sizes[estimates.layer(estimates.path_name(path))] += leaf.size
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
    """Makes the layer report of a saved run.

    Args:
      run: the run, from `runs.read`.
      data: its data, from `runs.read_data`.
      batches: number of batches to average over; None = the run's `layer_report.batches`.

    Returns:
      The report; see `create`.

    Raises:
      InputError: see `create`; or the batch size is not a multiple of the number of devices.
    """
    config = run.config.copy_and_resolve_references()
    config.parallelism = "jit"  # a state from `runs.read` has no device axis
    config.layer_report.batches = batches or config.layer_report.batches
    method = assembly.create_method(config, run.state.params, data.statistics)
    parallel.check_room(data.feed.resident_bytes)
    resident = data.feed.resident(config.parallelism)
    program = compile_gradients(config, data.feed, method)
    measure_layers = create(config, data.partition, data.feed, resident, program)
    return measure_layers(parallel.replicate(run.state, config.parallelism))
