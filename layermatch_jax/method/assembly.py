"""What a step is made of apart from its state: read out of the config once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import ml_collections

from layermatch_jax.method import avg_clustering, layerwise, optimizer, policies
from layermatch_jax.views import Layout


class Method(NamedTuple):
    """What a step is made of apart from its state."""

    policy: policies.Policy
    layout: Layout  # of the policy's views
    heads: Mapping[str, nn.Module]  # the policy's
    centers: avg_clustering.Centers
    multipliers: Any  # of layerwise.mask_multipliers
    unsupervised_weight: float  # λ_u
    ema_decay: float
    mean: tuple[float, ...]  # of the data set's channels, in [0, 1]
    std: tuple[float, ...]
    learning_rate: Callable  # step -> rate, for the log


def create_method(
    config: ml_collections.ConfigDict,
    params,
    channel_statistics: tuple[tuple[float, ...], tuple[float, ...]],
    axis_name: str | None = None,
) -> Method:
    """Reads the method's parts out of the config.

    Args:
      config: the whole config.
      params: the tree of parameters, or of their shapes.
      channel_statistics: means and standard deviations of red, green and blue, in [0, 1].
      axis_name: the device axis that BatchNorm's statistics of the policy's heads are taken over.

    Raises:
      InputError: an expression of the gradient mask matches none of `params`.
    """
    mean, std = channel_statistics
    policy = policies.create(config)
    dim, num_classes = params["classifier"]["kernel"].shape
    return Method(
        policy=policy,
        layout=create_layout(config, policy),
        heads={name: create(dim, num_classes, axis_name) for name, create in policy.heads.items()},
        centers=avg_clustering.create_centers(config),
        multipliers=layerwise.mask_multipliers(config.layerwise.gradient_mask, params),
        unsupervised_weight=config.unsupervised_weight,
        ema_decay=config.ema_decay,
        mean=mean,
        std=std,
        learning_rate=optimizer.learning_rate(config),
    )


def create_layout(config: ml_collections.ConfigDict, policy: policies.Policy) -> Layout:
    """The layout of the views that pass through the network: those that the policy wants."""
    # Without a loss on them, unlabeled images would only change BatchNorm's statistics.
    return Layout(policy.views, config.unlabeled_ratio if config.unsupervised_weight > 0 else 0)
