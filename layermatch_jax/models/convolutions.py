"""Faster convolutions on a CPU, for nn.Conv(conv_general_dilated=...).

On a CPU, XLA's depthwise convolution takes 25 to 60 times as long as the sum of its k·k shifted
products, and the gradient of the kernel 4 times as long. So programs that are compiled for a CPU
compute the sum; other programs use XLA's convolution. The results are equal up to rounding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_PARTS = 8  # number of slices in `_sum_of_parts`
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def pointwise(x: jax.Array, kernel: jax.Array, *unused, **neutral) -> jax.Array:
    """Computes a 1x1 convolution with stride 1 as one matrix product.

    Args:
      x: [n, h, w, c].
      kernel: [1, 1, c, d].
      *unused: strides and padding from nn.Conv; without effect on a 1x1 convolution of stride 1.
      **neutral: further arguments from nn.Conv, at their neutral values.

    Returns:
      [n, h, w, d].
    """
    product = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return product.reshape(*x.shape[:-1], -1)


def depthwise(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding, **unused
) -> jax.Array:
    """Computes a depthwise convolution: each channel has its own kernel.

    It supports only reverse-mode differentiation (jax.grad, jax.vjp), not jax.jvp.

    Args:
      x: [n, h, w, c].
      kernel: [k, k, 1, c].
      strides: of rows and columns; they must be equal.
      padding: "SAME", or the number of zeros (before, after) for rows and for columns.
      **unused: further arguments from nn.Conv, at their neutral values.

    Returns:
      [n, h', w', c].
    """
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _depthwise(x, kernel, strides[0], tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride, padding):
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: _products(x, kernel, stride, padding),
        default=lambda x, kernel: _by_xla(x, kernel, stride, padding),
    )


def _forward(x, kernel, stride, padding):
    return _depthwise(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, inputs, gradient):
    def by_xla(x, kernel, gradient):
        return jax.vjp(lambda x, k: _by_xla(x, k, stride, padding), x, kernel)[1](gradient)

    def by_products(x, kernel, gradient):
        return (
            _gradient_of_input(gradient, kernel, stride, padding, x.shape),
            _gradient_of_kernel(x, gradient, kernel, stride, padding),
        )

    return lax.platform_dependent(*inputs, gradient, cpu=by_products, default=by_xla)


_depthwise.defvjp(_forward, _backward)


def _by_xla(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=_LAYOUT,
        feature_group_count=x.shape[-1],
    )


def _windows(x, sides, stride, padding) -> list[jax.Array]:
    """Returns, for each of the k·k weights, the pixels that it multiplies: [n, h', w', c]."""
    (rows, columns), pads = sides, ((0, 0), *padding, (0, 0))
    x = jnp.pad(x, pads)
    height, width = (x.shape[1] - rows) // stride + 1, (x.shape[2] - columns) // stride + 1
    # Take every stride-th row and column once, not once for each weight.
    phases = [[x[:, i::stride, j::stride] for j in range(stride)] for i in range(stride)]
    if stride > 1:
        phases = lax.optimization_barrier(phases)
    return [
        phases[i % stride][j % stride][:, i // stride :, j // stride :][:, :height, :width]
        for i in range(rows)
        for j in range(columns)
    ]


def _products(x, kernel, stride, padding):
    windows = _windows(x, kernel.shape[:2], stride, padding)
    weights = _wide(kernel.reshape(len(windows), 1, 1, 1, -1))
    return _sum(window * weight for window, weight in zip(windows, weights, strict=True)).astype(
        x.dtype
    )


def _gradient_of_input(gradient, kernel, stride, padding, shape):
    """Computes the gradient of the input, one phase (row and column modulo stride) at a time."""
    rows, columns = kernel.shape[:2]
    (top, _), (left, _) = padding
    height, width = (-(-side // stride) for side in shape[1:3])
    gradient = jnp.pad(gradient, ((0, 0), (rows, rows + 1), (columns, columns + 1), (0, 0)))
    kernel = _wide(kernel)

    def of_phase(a, b):
        # Weight i multiplied row stride·u + a for the output row u + (a + top - i) / stride.
        parts = []
        for i in range((a + top) % stride, rows, stride):
            for j in range((b + left) % stride, columns, stride):
                down, right = rows + (a + top - i) // stride, columns + (b + left - j) // stride
                window = gradient[:, down:, right:][:, :height, :width]
                parts.append(window * kernel[i, j, 0][None, None, None])
        return _sum(parts)

    phases = [[of_phase(a, b) for b in range(stride)] for a in range(stride)]
    whole = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)
    whole = whole.reshape(shape[0], height * stride, width * stride, shape[3])
    return whole[:, : shape[1], : shape[2]].astype(gradient.dtype)


def _gradient_of_kernel(x, gradient, kernel, stride, padding):
    # XLA sums over all rows channel by channel, without vector instructions. So the rows are cut
    # into parts, which are added, again and again. The barriers keep XLA from fusing these sums.
    windows = _windows(x, kernel.shape[:2], stride, padding)
    sums = [_sum_of_parts(lambda rows, of=of: of[rows] * gradient[rows], len(of)) for of in windows]
    sums = jnp.stack(lax.optimization_barrier(sums)).reshape(len(windows), -1, x.shape[-1])
    while sums.shape[1] > 1:
        sums = _sum_of_parts(lambda rows, of=sums: of[:, rows], sums.shape[1], axis=1)
        sums = lax.optimization_barrier(sums)
    return sums.reshape(kernel.shape).astype(kernel.dtype)


def _sum_of_parts(part: Callable[[slice], jax.Array], rows: int, axis: int = 0) -> jax.Array:
    """Adds up to _PARTS slices of equal size; zeros pad the last slice if it is shorter."""
    size = -(-rows // _PARTS)
    parts = [_wide(part(slice(i, i + size))) for i in range(0, rows, size)]
    if missing := size - parts[-1].shape[axis]:
        pads = [(0, 0)] * parts[-1].ndim
        pads[axis] = (0, missing)
        parts[-1] = jnp.pad(parts[-1], pads)
    return _sum(parts)


def _wide(x: jax.Array) -> jax.Array:
    """Converts narrower types to float32: sums in bfloat16 would lose small summands."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(arrays) -> jax.Array:
    first, *others = arrays
    return functools.reduce(jnp.add, others, first)
