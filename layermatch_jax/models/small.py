"""Small backbones: four convolutions for the demo on two CPU cores, one matrix for tests."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from layermatch_jax.arrays import Array
from layermatch_jax.models.layers import Layers, global_average, leaky_relu, run


def matrix_convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    **unused,
) -> jax.Array:
    """Computes a convolution as a matrix product, for nn.Conv(conv_general_dilated=...).

    With XLA's convolutions, a step of the demo, including its input, takes 1.4 times as long on two
    CPU cores.

    Args:
      x: [n, h, w, c].
      kernel: [kh, kw, c, d].
      strides: of rows and columns.
      padding: the number of zeros (before, after) for rows and for columns.
      **unused: further arguments from nn.Conv, at their neutral values.

    Returns:
      [n, h', w', d].
    """
    (rows, columns), (down, right) = kernel.shape[:2], strides
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = (x.shape[1] - rows) // down + 1, (x.shape[2] - columns) // right + 1
    patches = jnp.concatenate(
        [
            x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
            for i in range(rows)
            for j in range(columns)
        ],
        axis=-1,
    )
    # Flattened, because products with more than two axes are also slow on a CPU.
    product = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(*patches.shape[:-1], kernel.shape[-1])


class ConvNorm(nn.Module):
    """3x3 convolution, BN, LeakyReLU."""

    channels: int
    stride: int
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, ⌈h / stride⌉, ⌈w / stride⌉, channels]."""
        x = self.layers.conv(
            self.channels, 3, self.stride, name="conv", conv_general_dilated=matrix_convolution
        )(x)
        return leaky_relu(self.layers.norm(self.train, name="norm")(x))


class Conv4(nn.Module):
    """Four convolutions with BatchNorm, for images of 16 to 32 pixels; not from a paper.

    The names are those of a residual network (stem, then one block a stage), so that a regular
    expression such as "backbone/stage3.*" means the same for the demo as for a WideResNet.

    Attributes:
      width: channels of the first convolution; the others have 2, 4 and 4 times as many. Each
        convolution halves the image, to keep steps fast.
      layers: the settings of convolutions and BatchNorm.
    """

    width: int
    layers: Layers

    @nn.compact
    def __call__(
        self, images: Float[Array, "n ..."], train: bool, after: str = "", until: str = ""
    ) -> Float[jax.Array, "n ..."]:
        """Features of images.

        Args:
          images: normalized.
          train: normalize by the batch's statistics and update the running ones.
          after: the layer whose output `images` is; see `layers.run`.
          until: the layer whose output is wanted, not pooled; see `layers.run`.

        Returns:
          D = 4·width.
        """
        widths = {"stem": 1, "stage1_block0": 2, "stage2_block0": 4, "stage3_block0": 4}

        def layer(x, name):
            return ConvNorm(widths[name] * self.width, 2, self.layers, train, name=name)(x)

        layers = [(name, functools.partial(layer, name=name)) for name in widths]
        x = run(layers, images, after, until)
        return x if until else global_average(x)


class Linear(nn.Module):
    """One matrix and nothing else, so that a few lines of NumPy can compute a whole train step.

    It has no batch statistics. Its variables are {"params": {"stem": {"kernel": [H·W·3, width]}}}.

    Attributes:
      width: D, the number of features.
      dtype: of the computation.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "n H W 3"], train: bool) -> Float32[jax.Array, "n D"]:
        """Features of images.

        Args:
          images: normalized.
          train: without effect; present because all backbones have the same call.

        Returns:
          D = width.
        """
        del train
        x = images.reshape(images.shape[0], -1)
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="stem")(x)
        return x.astype(jnp.float32)
