"""The learning-rate schedule and the optimizer."""

import jax
import ml_collections
import numpy as np
import optax

from layermatch_jax.method import freezing
from layermatch_jax.setting import Setting

SETTINGS: dict[str, Setting] = {
    "optimizer.name": Setting(
        "sgd",
        "Optimizer: sgd (with momentum) or adamw, which transformers need.",
        choices=("sgd", "adamw"),
    ),
    "optimizer.learning_rate": Setting(
        0.03,
        "Learning rate at step 0, which optimizer.schedule lowers. With AdamW, use about 0.001.",
        above=0,
    ),
    "optimizer.schedule": Setting(
        "classic",
        "Factor of the learning rate at step k of K = train_steps. classic: cos(7πk / (16 · K)), "
        "down to 0.195; cosine: (1 + cos(πk / K)) / 2, down to 0.",
        choices=("classic", "cosine"),
    ),
    "optimizer.warm_up": Setting(
        0, "Steps over which the learning rate also rises linearly from 0. 0: none.", low=0
    ),
    "optimizer.backbone_rate": Setting(
        1.0, "Learning rate of the backbone, as a share of that of the classifier.", above=0
    ),
    "optimizer.layer_decay": Setting(
        1.0,
        "Factor of the learning rate from each layer of the backbone to the one below it: lower "
        "layers are trained more slowly. 1: all alike.",
        above=0,
        high=1,
    ),
    "optimizer.momentum": Setting(0.9, "Momentum of SGD; b1 of AdamW.", low=0, below=1),
    "optimizer.b2": Setting(
        0.999, "For adamw: decay of the average of squared gradients.", low=0, below=1
    ),
    "optimizer.nesterov": Setting(True, "For sgd: whether it uses Nesterov momentum."),
    "optimizer.weight_decay": Setting(
        5e-4, "Weight decay, on convolution and dense kernels only.", low=0
    ),
}


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Returns the learning rate of step k of K.

    With the schedule `classic` it is lr · cos(7πk / 16K) (Sohn 2020, section 2.4), which falls from
    lr to 0.195 lr; with `cosine` it is lr · (1 + cos(πk / K)) / 2 (Loshchilov & Hutter 2017,
    equation 5), which falls to 0. With a warm-up of w steps, the first w rates are multiplied by
    (k + 1) / w.
    """
    peak, steps = config.optimizer.learning_rate, max(1, config.train_steps)
    warm_up = config.optimizer.warm_up
    schedule = {
        "classic": lambda step: peak * jax.numpy.cos(7 * np.pi / 16 * step / steps),
        "cosine": lambda step: peak * (1 + jax.numpy.cos(np.pi * step / steps)) / 2,
    }[config.optimizer.schedule]
    if not warm_up:
        return schedule
    return lambda step: schedule(step) * jax.numpy.minimum(1, (step + 1) / warm_up)


def decayed(params) -> dict:
    """Marks the parameters that weight decay acts on: the kernels of convolutions and dense layers.

    Args:
      params: any tree of parameters.

    Returns:
      A tree of the same structure, of bools.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def rates(params, layer_decay: float, backbone_rate: float) -> dict:
    """Returns the share of the learning rate that each parameter gets.

    The backbone's layers, in order, are the stem and the blocks; layer i of n, from 0, gets
    backbone_rate · layer_decay^(n − i). So the share falls from the last block to the stem (Clark
    2020, arXiv 2003.10555, appendix A; with the exponents of BEiT's code, arXiv 2106.08254). The
    last normalization layer gets backbone_rate, all that follows the backbone gets 1.

    Args:
      params: a tree of parameters with the backbones' names (models/__init__.py).
      layer_decay: in (0, 1]; 1 = the same rate for all layers.
      backbone_rate: at least 0.

    Returns:
      A tree of the same structure, of Python floats.
    """
    layers = [name for name in freezing.in_order(params["backbone"]) if name != "final_norm"]
    exponents = {name: len(layers) - i for i, name in enumerate(layers)} | {"final_norm": 0}

    def rate(path, _) -> float:
        part, *rest = (key.key for key in path)
        return backbone_rate * layer_decay ** exponents[rest[0]] if part == "backbone" else 1.0

    return jax.tree_util.tree_map_with_path(rate, params)


def create(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Makes the optimizer that config.optimizer describes.

    sgd has (Nesterov) momentum and coupled weight decay, added before the momentum; adamw is that
    of Loshchilov & Hutter 2019 (arXiv 1711.05101), with decoupled decay. Gradient masks do not
    change the decay: they are applied before the optimizer gets a gradient. Frozen parameters do
    not decay.

    Args:
      config: the whole config; reads optimizer, model.freeze and train_steps.
    """
    settings, rate = config.optimizer, learning_rate(config)

    def decays(params):
        frozen = freezing.frozen_parameters(config.model.freeze, params)
        return jax.tree.map(lambda kernel, stays: kernel and not stays, decayed(params), frozen)

    if settings.name == "adamw":
        steps = optax.adamw(
            rate,
            b1=settings.momentum,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=decays,
        )
    else:
        steps = optax.chain(
            optax.add_decayed_weights(settings.weight_decay, mask=decays),
            optax.sgd(rate, momentum=settings.momentum, nesterov=settings.nesterov),
        )
    if settings.layer_decay == 1 and settings.backbone_rate == 1:
        return steps

    def scale(updates, params):
        shares = rates(params, settings.layer_decay, settings.backbone_rate)
        return jax.tree.map(lambda update, share: share * update, updates, shares)

    return optax.chain(steps, optax.stateless(scale))
