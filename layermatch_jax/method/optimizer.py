"""The learning-rate schedule and the optimizer of the field's classic setting."""

import jax
import ml_collections
import numpy as np
import optax


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Returns the schedule lr · cos(7πk / 16K) for step k of K (Sohn 2020, section 2.4).

    The rate falls from lr to 0.195 lr.
    """
    peak, steps = config.optimizer.learning_rate, config.train_steps
    return lambda step: peak * jax.numpy.cos(7 * np.pi / 16 * step / steps)


def decayed(params) -> dict:
    """Marks the parameters that weight decay acts on: the kernels of convolutions and dense layers.

    Args:
      params: any tree of parameters.

    Returns:
      A tree of the same structure, of bools.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def create(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Makes SGD with (Nesterov) momentum and coupled weight decay, added before the momentum.

    Gradient masks do not change the decay: they are applied before the optimizer gets a gradient.
    """
    settings = config.optimizer
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
        optax.sgd(learning_rate(config), momentum=settings.momentum, nesterov=settings.nesterov),
    )
