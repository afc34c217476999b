"""The training state that a run carries from step to step, and its initialization."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.training import train_state

from layermatch_jax import models
from layermatch_jax.method import avg_clustering, optimizer, policies


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, opt_state, apply_fn, tx) with what LayerMatch adds.

    `params` is {'backbone': tree, 'classifier': {'kernel': [D, K], 'bias': [K]}}; if the policy
    has policy heads, it also holds {'heads': {name: tree}}.
    """

    step: Any  # [] int32
    params: Any
    batch_stats: Any  # running statistics of BatchNorm in the backbone, float32
    head_stats: Any  # and in the policy heads, {name: tree}
    ema_params: Any  # exponential moving average of params
    centers: Any  # Avg-Clustering's state
    policy: Any  # the pseudo-label policy's state


def initializer(
    config: ml_collections.ConfigDict,
    num_classes: int,
    num_unlabeled: int,
    labels: np.ndarray,
    axis_name: str | None = None,
) -> Callable[[], TrainState]:
    """Returns a function that makes the state before the first step; JAX can trace the function.

    `jax.eval_shape` of the function gives the shapes of a state without computing one.

    Args:
      config: the whole config, resolved; `config.seed` is the only source of randomness.
      num_classes: K.
      num_unlabeled: size of the unlabeled set, for per-sample state.
      labels: [N_l] int32, of the labeled images, for a policy that keeps them in its state.
      axis_name: the device axis over which BatchNorm takes its statistics in training.

    Returns:
      () -> TrainState.
    """
    model = models.create_model(config.model, axis_name)
    tx = optimizer.create(config)
    centers = avg_clustering.create_centers(config)
    policy = policies.create(config)
    side = config.dataset.image_size

    def init() -> TrainState:
        rng = jax.random.key(config.seed)
        rng_backbone, rng_classifier = jax.random.split(rng)
        images = jnp.zeros((1, side, side, 3), jnp.float32)
        features, variables = model.init_with_output(rng_backbone, images, train=False)
        zeros = config.model.head_init == "zeros"
        start = nn.initializers.zeros if zeros else nn.initializers.glorot_normal()
        kernel = start(rng_classifier, (features.shape[-1], num_classes), jnp.float32)
        params = {
            "backbone": variables["params"],
            "classifier": {"kernel": kernel, "bias": jnp.zeros(num_classes, jnp.float32)},
        }
        dim, head_stats = features.shape[-1], {}
        for i, (name, create_head) in enumerate(policy.heads.items()):
            head = create_head(dim, num_classes, axis_name)
            # Separate keys, so that the backbone starts the same with and without policy heads.
            made = head.init(jax.random.fold_in(rng, 2 + i), features, train=False)
            params.setdefault("heads", {})[name] = made["params"]
            head_stats |= {name: made["batch_stats"]} if "batch_stats" in made else {}
        spec = policies.Spec(
            num_classes=num_classes,
            feature_dim=dim,
            batch_size=config.batch_size,
            unlabeled_ratio=config.unlabeled_ratio,
            num_unlabeled=num_unlabeled,
            labels=labels,
        )
        return TrainState(
            step=jnp.int32(0),
            apply_fn=model.apply,
            params=params,
            tx=tx,
            opt_state=tx.init(params),
            batch_stats=variables.get("batch_stats", {}),
            head_stats=head_stats,
            # A copy: the state is donated, and one buffer cannot be donated twice.
            ema_params=jax.tree.map(jnp.copy, params),
            centers=centers.init(params["classifier"], num_unlabeled),
            policy=policy.init(spec),
        )

    return init


def with_weights(
    state: TrainState,
    config: ml_collections.ConfigDict,
    backbone: Any,
    batch_stats: Any,
    classifier: Any,
    num_unlabeled: int,
) -> TrainState:
    """Replaces the weights in a state before the first step; their averages start there, too.

    Args:
      state: from `create`.
      config: the whole config, resolved.
      backbone: a tree like `state.params['backbone']`.
      batch_stats: a tree like `state.batch_stats`.
      classifier: a tree like `state.params['classifier']`.
      num_unlabeled: size of the unlabeled set.
    """
    backbone, batch_stats, classifier = jax.tree.map(
        jnp.asarray, (backbone, batch_stats, classifier)
    )
    params = state.params | {"backbone": backbone, "classifier": classifier}
    return state.replace(
        params=params,
        batch_stats=batch_stats,
        ema_params=jax.tree.map(jnp.copy, params),
        centers=avg_clustering.create_centers(config).init(classifier, num_unlabeled),
    )


def create(*args, **kwargs) -> TrainState:
    """Makes the state before the first step on the default device; arguments of `initializer`."""
    # One program, because hundreds of initializers would otherwise compile one by one. The program
    # runs once, so it is not optimized on a CPU, where optimization takes about 15 seconds.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(initializer(*args, **kwargs), compiler_options=quick)()
