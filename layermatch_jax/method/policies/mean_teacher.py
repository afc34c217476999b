"""Mean Teacher: the average of the model's past selves tells the probabilities."""

import jax
import ml_collections

from layermatch_jax.method import losses
from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import Inputs, Policy

SETTINGS = {"ramp": parts.RAMP}
PRESET = {"unsupervised_weight": 50.0}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Targets: the EMA model's probabilities of the weak view; squared error on the strong one.

    Tarvainen 2017, with the field's linear ramp (over the first 40 % of the steps; theirs
    is a Gaussian one). The weight of 50 is λ_u of the method. The teacher normalizes the weak views
    by their own batch's statistics, as the student does its batch. (In USB's code student and
    teacher logits are the same tensor, so that its consistency loss is always 0.)

    Args:
      config: the whole config; reads policy.ramp and train_steps.

    Returns:
      A policy whose state counts steps. Diagnostics: ramp in [0, 1].
    """

    def targets(inputs: Inputs) -> jax.Array:
        assert inputs.teacher_logits is not None, "needs_teacher"
        return jax.nn.softmax(inputs.teacher_logits)

    init, assign = parts.ramped(config.policy.ramp * config.train_steps, targets)
    return Policy(init, assign, parts.unsupervised(losses.squared_error), needs_teacher=True)
