"""Π-model: two weak views of an image should be classified alike."""

import jax
import ml_collections

from layermatch_jax.method import losses
from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import Policy
from layermatch_jax.views import Views

SETTINGS = {"ramp": parts.RAMP}
PRESET = {"unsupervised_weight": 10.0, "unlabeled_ratio": 1}
CENTERS = ("none", "classifier")


def create(config: ml_collections.ConfigDict) -> Policy:
    """Loss: mean_k (softmax(a)_k − softmax(b)_k)², a and b the logits of two weak views.

    b is the target, so the loss has no gradient with respect to it (Laine 2017, section 2.1; the
    paper's network also draws new noise for each view). λ_u rises linearly over the first 40 % of
    the steps; the paper's ramp is Gaussian, over the first 80 epochs. λ_u = 10 and μ = 1 are the
    values of the published tables (USB). BatchNorm's running statistics are those of all views;
    TorchSSL keeps only those of the labeled batch.

    Args:
      config: the whole config; reads policy.ramp and train_steps.

    Returns:
      A policy. Its state counts steps. Diagnostics: ramp in [0, 1].
    """
    init, assign = parts.ramped(
        config.policy.ramp * config.train_steps,
        targets=lambda inputs: jax.nn.softmax(inputs.target_logits["weak"]),
    )
    return Policy(
        init,
        assign,
        parts.unsupervised(losses.squared_error, view="second_weak"),
        views=Views(unlabeled={"weak": "weak", "second_weak": "weak"}),
        pseudo_labels=False,
    )
