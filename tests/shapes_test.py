"""Signatures and records with shapes: what does not fit them is refused, by the tests alone.

conftest.py has all calls checked. So each test of a function also tests its signature, and here are
the calls that must fail.
"""

import builders
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from beartype.roar import BeartypeDoorHintViolation
from jaxtyping import TypeCheckError

from layermatch_jax.data.augment import crop
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.method import backprop, linear_head, losses, steps
from layermatch_jax.method.policies import interface, parts
from layermatch_jax.models import layers
from layermatch_jax.models.small import Linear
from layermatch_jax.views import Layout, Views

f32 = jnp.zeros


def u8(*shape):
    return np.zeros(shape, np.uint8)


def int32(*shape):
    return np.zeros(shape, np.int32)


INPUTS = builders.make_inputs(*[f32((6, 3))] * 2, f32((2, 3)), jnp.arange(2), jnp.arange(6))
CLASSIFIER = {"kernel": f32((4, 3)), "bias": f32(3)}


@pytest.mark.parametrize(
    ("function", "arguments", "wrong"),
    [
        (layers.global_average, (f32((5, 3)),), "x"),  # features already
        (losses.squared_error, (f32((5, 3)), f32((1, 3))), "targets"),  # would be broadcast
        (linear_head.linear, (CLASSIFIER, f32((2, 5, 4))), "features"),  # views, not flat
        (parts.hard_labels, (jnp.zeros((5, 3), jnp.int32),), "probabilities"),
        (interface.make_assignment, (INPUTS, f32((6, 3)), f32((6, 1))), "weights"),
        # divided by 255 already
        (backprop.normalize, (f32((2, 4, 4, 3)), (0.5,) * 3, (0.5,) * 3), "images"),
        (Linear(4, jnp.dtype("float32")).apply, ({}, f32((2, 5, 4, 4, 3)), False), "images"),
        (Layout(Views(), 1).split, (f32(6),), "x"),
        (crop.crop_and_flip, (u8(3, 8, 8, 3), int32(2, 2), int32(3) > 0, 0, 8), "offset"),
        (crop.center_crop, (u8(3, 8, 9, 3), 4), "images"),
    ],
)
def test_a_wrong_shape_is_refused(function, arguments, wrong):
    with pytest.raises(TypeCheckError, match=f"typechecking parameter '{wrong}'"):
        function(*arguments)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # by builders
def test_what_a_step_makes_of_a_batch():
    batch, params = builders.make_batch(), builders.make_params()
    method = builders.make_method(params)
    forward = backprop.run_forward(builders.make_state(params, method), batch, method, None)
    rows = steps._members(forward, batch, method, None)
    shapes.check(batch, forward, forward.outputs, forward.assignment)
    shapes.check(rows)
    with pytest.raises(BeartypeDoorHintViolation):
        shapes.check(batch._replace(labels=batch.labels[1:]))
    with pytest.raises(BeartypeDoorHintViolation):
        shapes.check(rows._replace(weights=rows.weights[:, 1:]))
    of_fewer = {name: logits[1:] for name, logits in forward.outputs.logits.items()}
    with pytest.raises(BeartypeDoorHintViolation):
        shapes.check(forward.assignment, forward.outputs._replace(logits=of_fewer))


@pytest.mark.parametrize("mu", [0, 3])
def test_draws(mu):
    draws = Sampler(
        seed=0,
        num_labeled=5,
        num_unlabeled=20,
        batch_size=4,
        layout=Layout(Views(), mu),
        image_size=8,
        crop_range=2,
        flip=True,
        randaugment_ops=2,
    ).draw(0)
    shapes.check(draws)
    with pytest.raises(BeartypeDoorHintViolation):
        shapes.check(draws._replace(flip=draws.flip[:, 1:]))
