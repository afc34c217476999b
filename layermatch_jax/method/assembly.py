"""Builds, once per run, the parts of a step that do not change: everything except the state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import ml_collections

from layermatch_jax.method import avg_clustering, freezing, layerwise, optimizer, policies
from layermatch_jax.views import Layout


class Method(NamedTuple):
    """The parts of a step that do not change: everything except the state."""

    policy: policies.Policy
    layout: Layout  # of the policy's views
    heads: Mapping[str, nn.Module]  # the policy heads, by name
    centers: avg_clustering.Centers
    multipliers: Any  # from layerwise.mask_multipliers
    frozen: Any  # from freezing.frozen_parameters
    unsupervised_weight: float  # λ_u
    ema_decay: float
    mean: tuple[float, ...]  # of red, green and blue, in [0, 1]; images are normalized by it
    std: tuple[float, ...]  # in the same unit
    learning_rate: Callable  # step -> rate, for the log
    drop_path_seed: int | None  # None = the backbone does not drop branches
    after: str  # the layer whose activations a batch holds; '' = a batch holds images


def create_method(
    config: ml_collections.ConfigDict,
    params,
    channel_statistics: tuple[tuple[float, ...], tuple[float, ...]],
    axis_name: str | None = None,
) -> Method:
    """Builds the parts of a step from the config.

    Args:
      config: the whole config.
      params: the tree of parameters, or of their shapes.
      channel_statistics: means and standard deviations of red, green and blue, in [0, 1].
      axis_name: the device axis over which BatchNorm in the policy heads takes its statistics.

    Raises:
      InputError: an expression of the gradient mask or config.model.freeze matches none of
        `params`, or all are frozen.
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
        frozen=freezing.frozen_parameters(config.model.freeze, params),
        unsupervised_weight=config.unsupervised_weight,
        ema_decay=config.ema_decay,
        mean=mean,
        std=std,
        learning_rate=optimizer.learning_rate(config),
        drop_path_seed=config.seed if config.model.drop_path else None,
        after=freezing.last_frozen_layer(config.model.freeze, params)
        if config.input.cache_views
        else "",
    )


def create_layout(config: ml_collections.ConfigDict, policy: policies.Policy) -> Layout:
    """Returns the layout of the views that the policy needs and the network processes."""
    # Without an unsupervised loss, unlabeled images would only change BatchNorm's statistics.
    return Layout(policy.views, config.unlabeled_ratio if config.unsupervised_weight > 0 else 0)
