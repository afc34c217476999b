"""Depthwise and pointwise convolutions against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from layermatch_jax.models.convolutions import depthwise, pointwise


def by_xla(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def draw(*shape):
    return jnp.array(np.random.RandomState(len(shape)).randn(*shape), jnp.float32)


# (images, rows, columns, side of the kernel, stride, padding): even and odd sides, more images than
# the parts of a sum, sides that are not multiples of the stride.
@pytest.mark.parametrize(
    ("n", "height", "width", "k", "stride", "padding"),
    [
        (2, 8, 8, 3, 1, "SAME"),
        (1, 8, 6, 3, 2, "SAME"),
        (19, 5, 7, 3, 2, "SAME"),
        (3, 9, 8, 5, 2, "SAME"),
        (2, 2, 2, 5, 1, "SAME"),
        (2, 6, 7, 3, 2, ((1, 1), (1, 1))),
        (2, 8, 8, 3, 1, "VALID"),
    ],
)
def test_depthwise_is_xlas_with_its_gradients(n, height, width, k, stride, padding):
    x, kernel = draw(n, height, width, 4), draw(k, k, 1, 4)

    def both(x, kernel, function):
        y, pull_back = jax.vjp(function, x, kernel)
        return y, pull_back(jnp.cos(y))

    run = jax.jit(both, static_argnums=2)
    ours = run(x, kernel, lambda x, k: depthwise(x, k, (stride, stride), padding))
    theirs = run(x, kernel, lambda x, k: by_xla(x, k, stride, padding))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_depthwise_by_hand():
    # One channel, all weights 1: each output is the sum of the pixels under the kernel.
    x = jnp.array([[1.0, 4.0], [9.0, 16.0]]).reshape(1, 2, 2, 1)
    y = depthwise(x, jnp.ones((3, 3, 1, 1)), (2, 2), "SAME")
    assert y.shape == (1, 1, 1, 1)
    assert float(y[0, 0, 0, 0]) == 30


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 3), ("tpu", 3)])
def test_the_platform_decides(platform, convolutions):
    # A forward pass and two gradients.
    def gradients(x, kernel):
        y, pull_back = jax.vjp(lambda x, k: depthwise(x, k, (1, 1), "SAME"), x, kernel)
        return y, pull_back(y)

    traced = jax.jit(gradients).trace(draw(2, 8, 8, 4), draw(3, 3, 1, 4))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution(") == convolutions


def test_depthwise_computes_in_float32():
    x, kernel = draw(2, 8, 8, 4), draw(3, 3, 1, 4)
    low = [a.astype(jnp.bfloat16) for a in (x, kernel)]

    @jax.jit
    def both(*inputs):
        y, pull_back = jax.vjp(lambda x, k: depthwise(x, k, (1, 1), "SAME"), *inputs)
        return y, *pull_back(y)

    y, *gradients = both(*low)
    assert {a.dtype for a in (y, *gradients)} == {jnp.dtype("bfloat16")}
    exact = by_xla(*(a.astype(jnp.float32) for a in low), 1, "SAME")
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_pointwise_is_xlas():
    x, kernel = draw(2, 3, 4, 5), draw(1, 1, 5, 6)
    np.testing.assert_allclose(
        pointwise(x, kernel, (1, 1), "SAME"), by_xla(x, kernel, 1, "SAME"), rtol=1e-5, atol=1e-5
    )
