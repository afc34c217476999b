"""The learning-rate schedule and the optimizer of the field's classic setting."""

import jax
import ml_collections
import numpy as np
import optax


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The rate lr · cos(7πk / 16K) at step k of K (Sohn 2020, section 2.4): at last 0.195 lr."""
    peak, steps = config.optimizer.learning_rate, config.train_steps
    return lambda step: peak * jax.numpy.cos(7 * np.pi / 16 * step / steps)


def decayed(params) -> dict:
    """True for the leaves that weight decay acts on: convolution and dense kernels, nothing else.

    Args:
      params: any tree of parameters.

    Returns:
      The same tree of bools.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def create(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """SGD with (Nesterov) momentum; weight decay is coupled: added to the gradient before momentum.

    No gradient mask touches the decay: the optimizer sees gradients that are masked already.
    """
    settings = config.optimizer
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
        optax.sgd(learning_rate(config), momentum=settings.momentum, nesterov=settings.nesterov),
    )
