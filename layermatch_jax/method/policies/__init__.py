"""Pseudo-label policies: who gets which pseudo-label, and with what weight.

A policy is a module with

- SETTINGS: {name: Setting}, what it reads of config.policy;
- create(config) -> Policy;
- optionally PRESET: {dotted field: value}, what the method of its name sets beside the policy;
- optionally CENTERS: the readings of avg_clustering.centers that make sense with it; default all.

To add one, write the module and name it in POLICIES. The method of its name then exists.
"""

import ml_collections

from layermatch_jax.method.policies import (
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
    vat,
)
from layermatch_jax.method.policies.interface import Assignment, Inputs, Outputs, Policy, Spec

__all__ = ["POLICIES", "Assignment", "Inputs", "Outputs", "Policy", "Spec", "create"]

POLICIES = {
    "adamatch": adamatch,
    "comatch": comatch,
    "dash": dash,
    "fixed_threshold": fixed_threshold,
    "flexmatch": flexmatch,
    "freematch": freematch,
    "mean_teacher": mean_teacher,
    "pi_model": pi_model,
    "pseudo_label": pseudo_label,
    "softmatch": softmatch,
    "uda": uda,
    "vat": vat,
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """The policy that `config.policy.name` names, with its settings; reads the whole config."""
    return POLICIES[config.policy.name].create(config)
