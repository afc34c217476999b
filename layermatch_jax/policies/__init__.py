"""Pseudo-label policies: who gets which pseudo-label, and with what weight."""

import ml_collections

from layermatch_jax.policies import fixed_threshold
from layermatch_jax.policies.interface import Assignment, Inputs, Policy

__all__ = ["POLICIES", "Assignment", "Inputs", "Policy", "create"]

POLICIES = {
    "fixed_threshold": fixed_threshold.create,
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """The policy that `config.policy` names, with its settings."""
    return POLICIES[config.name](config)
