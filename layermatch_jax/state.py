"""What a run carries from step to step, and how it begins."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax.training import train_state

from layermatch_jax import layerwise, models, optimizer, policies


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, opt_state, apply_fn, tx) with what LayerMatch adds.

    `params` is {'backbone': the model's tree, 'classifier': {'kernel' [D, K], 'bias' [K]}}.
    """

    batch_stats: Any  # BatchNorm's running statistics, float32
    ema_params: Any  # exponential moving average of params
    centres: Any  # Avg-Clustering's state
    policy: Any  # the pseudo-label policy's state


def create(
    config: ml_collections.ConfigDict,
    num_classes: int,
    num_unlabeled: int,
    axis_name: str | None = None,
) -> TrainState:
    """The state before the first step; a function of the config (its seed) alone.

    Args:
      config: the whole config.
      num_classes: K.
      num_unlabeled: size of the unlabelled set, for per-sample state.
      axis_name: the device axis that BatchNorm's statistics are taken over in training.

    Returns:
      A TrainState on the default device.
    """
    model = models.create_model(config.model, axis_name)
    tx = optimizer.create(config)
    centres = layerwise.create_centres(config)
    policy = policies.create(config)
    side = config.dataset.image_size

    def init() -> TrainState:
        rng_backbone, rng_classifier = jax.random.split(jax.random.key(config.seed))
        images = jnp.zeros((1, side, side, 3), jnp.float32)
        variables = model.init(rng_backbone, images, train=False)
        features = model.apply(variables, images, train=False)
        kernel = nn.initializers.glorot_normal()(
            rng_classifier, (features.shape[-1], num_classes), jnp.float32
        )
        params = {
            "backbone": variables["params"],
            "classifier": {"kernel": kernel, "bias": jnp.zeros(num_classes, jnp.float32)},
        }
        return TrainState(
            step=jnp.int32(0),
            apply_fn=model.apply,
            params=params,
            tx=tx,
            opt_state=tx.init(params),
            batch_stats=variables.get("batch_stats", {}),
            # A copy: the state is donated, and one buffer cannot be donated twice.
            ema_params=jax.tree.map(jnp.copy, params),
            centres=centres.init(params["classifier"], num_unlabeled),
            policy=policy.init(num_classes, num_unlabeled),
        )

    # One program: hundreds of initialisers would otherwise compile one by one. It runs once, so it
    # is not optimised on a CPU, where that takes a quarter of a minute.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=quick)()
