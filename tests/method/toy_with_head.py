"""A policy that uses every feature of the interface.

It has a head with BatchNorm, draws, a second labeled view, a view of kind MADE, the positions of
labeled images, a loss between rows of different devices, and a scale.
"""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layermatch_jax.method import policies
from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import make_assignment
from layermatch_jax.views import MADE, Views

WIDTH = 5  # of the toy's head
DECAY, EPSILON = 0.9, 1e-3  # of its BatchNorm
TOY_SCALE = 0.5


class NormHead(nn.Module):
    """Maps features [n, D] to [n, 5]: Dense, BatchNorm, tanh, Dense."""

    axis_name: str | None

    @nn.compact
    def __call__(self, features, train):
        x = nn.Dense(WIDTH, use_bias=False, name="first")(features)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=DECAY,
            epsilon=EPSILON,
            axis_name=self.axis_name,
            name="norm",
        )(x)
        return nn.Dense(WIDTH, name="last")(jnp.tanh(x))


def toy_draws(rng, rows, mu):
    return {
        "direction": rng.normal(size=(rows, WIDTH)),
        "order": rng.integers(1000, size=(rows, mu), dtype=np.int32),
    }


def agreement(labeled, turned, strong, direction, order):
    """Computes a loss that compares each row of the global batch with every other one."""
    between = jnp.tanh(turned @ strong.T) * jnp.cos(order.reshape(-1)[:, None])
    return jnp.mean(between) + jnp.mean(jnp.sum(labeled * direction, axis=-1) ** 2)


def turned(weak, strong, logits, order, seen):
    """Makes a view: weak upside down if the class is the one drawn, otherwise strong mirrored."""
    upside_down = logits.argmax(-1) == (order.reshape(-1) + (seen != 0)) % logits.shape[-1]
    return jnp.where(upside_down[:, None, None, None], weak[:, ::-1], strong[:, :, ::-1])


def create_toy(config):
    threshold = config.policy.threshold

    def prepare(apply, images, draws, policy_state):
        weak, strong = images.unlabeled["weak"], images.unlabeled["strong"]
        return {"turned": turned(weak, strong, apply(weak), draws["order"], policy_state["seen"])}

    def assign(policy_state, inputs):
        q = jax.nn.softmax(inputs.target_logits["weak"])
        targets = jnp.eye(q.shape[-1], dtype=jnp.float32)[jnp.argmax(q, axis=-1)]
        seen = policy_state["seen"] + jnp.sum(inputs.draws["direction"])
        return make_assignment(
            inputs,
            targets=targets,
            weights=jnp.max(q, axis=-1) >= threshold,
            scale=jnp.float32(TOY_SCALE),
            state={
                "seen": seen.astype(jnp.float32),
                "visits": policy_state["visits"].at[inputs.labeled_indices].add(1),
            },
            extra=inputs.draws,
        )

    def loss(outputs, assignment):
        log_p = jax.nn.log_softmax(outputs.logits["strong"])
        head = outputs.heads["projection"]
        return {
            "unsupervised": -jnp.mean(
                assignment.weights * jnp.sum(assignment.targets * log_p, axis=-1)
            ),
            "agreement": agreement(
                head.labeled["strong"],
                head.unlabeled["turned"],
                head.unlabeled["strong"],
                assignment.extra["direction"],
                assignment.extra["order"],
            ),
        }

    return policies.Policy(
        lambda spec: {"seen": jnp.float32(0), "visits": jnp.zeros(len(spec.labels), jnp.int32)},
        assign,
        loss,
        views=Views(
            {"weak": "weak", "strong": "strong"},
            {"strong": "strong", "turned": MADE, "weak": "weak"},
        ),
        heads={"projection": lambda dim, num_classes, axis_name: NormHead(axis_name)},
        draws=toy_draws,
        prepare=prepare,
    )


TOY = types.SimpleNamespace(create=create_toy, SETTINGS={"threshold": parts.THRESHOLD})
