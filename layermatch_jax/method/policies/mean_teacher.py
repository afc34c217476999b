"""Mean Teacher: the EMA of the parameters, the teacher, computes the targets."""

import jax
import ml_collections

from layermatch_jax.method import losses
from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import Inputs, Policy

SETTINGS = {"ramp": parts.RAMP}
PRESET = {"unsupervised_weight": 50.0}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Targets: the teacher's probabilities for the weak view; squared error on the strong view.

    Tarvainen 2017, with the linear ramp over the first 40 % of the steps that is common in the
    field (the paper's ramp is Gaussian). The method sets λ_u = 50. In the teacher, BatchNorm uses
    the statistics of the batch of weak views. (In USB's code, student and teacher logits are the
    same tensor, so its consistency loss is always 0.)

    Args:
      config: the whole config; reads policy.ramp and train_steps.

    Returns:
      A policy. Its state counts steps. Diagnostics: ramp in [0, 1].
    """

    def targets(inputs: Inputs) -> jax.Array:
        assert inputs.teacher_logits is not None, "needs_teacher"
        return jax.nn.softmax(inputs.teacher_logits)

    init, assign = parts.ramped(config.policy.ramp * config.train_steps, targets)
    return Policy(init, assign, parts.unsupervised(losses.squared_error), needs_teacher=True)
