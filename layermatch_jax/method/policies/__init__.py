"""Pseudo-label policies: the rules that give unlabeled images pseudo-labels and weights.

A policy is a module with

- SETTINGS: {name: Setting}, the fields of config.policy that it reads;
- create(config) -> Policy;
- optionally PRESET: {dotted field: value}, further settings of the method with the same name;
- optionally CENTERS: the values of avg_clustering.centers that it supports; default all.

To add a policy, write the module and add it to POLICIES. A method with its name then exists.
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
    """Makes the policy that `config.policy.name` names; takes the whole config."""
    return POLICIES[config.policy.name].create(config)
