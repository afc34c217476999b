"""Pseudo-label policies: who gets which pseudo-label, and with what weight."""

import ml_collections

from layermatch_jax.policies import (
    adamatch,
    comatch,
    dash,
    fixed_threshold,
    flexmatch,
    freematch,
    mean_teacher,
    pi_model,
    pseudo_label,
    softmatch,
    uda,
)
from layermatch_jax.policies.interface import Assignment, Inputs, Outputs, Policy, Spec

__all__ = ["POLICIES", "Assignment", "Inputs", "Outputs", "Policy", "Spec", "create"]

POLICIES = {
    "adamatch": adamatch.create,
    "comatch": comatch.create,
    "dash": dash.create,
    "fixed_threshold": fixed_threshold.create,
    "flexmatch": flexmatch.create,
    "freematch": freematch.create,
    "mean_teacher": mean_teacher.create,
    "pi_model": pi_model.create,
    "pseudo_label": pseudo_label.create,
    "softmatch": softmatch.create,
    "uda": uda.create,
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """The policy that `config.policy.name` names, with its settings; reads the whole config."""
    return POLICIES[config.policy.name](config)
