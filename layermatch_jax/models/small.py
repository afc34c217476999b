"""Small backbones for two CPU cores: four convolutions for the demo, one matrix for tests."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from layermatch_jax.models.layers import Layers, global_average, leaky_relu


class ConvNorm(nn.Module):
    """3x3 convolution, BN, LeakyReLU."""

    channels: int
    stride: int
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, ⌈h / stride⌉, ⌈w / stride⌉, channels]."""
        x = self.layers.conv(self.channels, 3, self.stride, name="conv")(x)
        return leaky_relu(self.layers.norm(self.train, name="norm")(x))


class Conv4(nn.Module):
    """Four convolutions with BatchNorm, for images of 16 to 32 pixels; ours.

    The names are those of a residual network (stem, then one block a stage), so that a regular
    expression such as "backbone/stage3.*" means the same for the demo as for a WideResNet.

    Attributes:
      width: channels of the first convolution; the others have 2, 4 and 4 times as many. All halve
        the image: on a CPU, stride-1 convolutions cost two to three times the whole step's time.
      layers: the settings of convolutions and BatchNorm.
    """

    width: int
    layers: Layers

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Features of images.

        Args:
          images: [n, H, W, 3] float, normalised.
          train: normalise by the batch's statistics and update the running ones.

        Returns:
          [n, 4·width] float32.
        """
        x = ConvNorm(self.width, 2, self.layers, train, name="stem")(images)
        x = ConvNorm(2 * self.width, 2, self.layers, train, name="stage1_block0")(x)
        x = ConvNorm(4 * self.width, 2, self.layers, train, name="stage2_block0")(x)
        x = ConvNorm(4 * self.width, 2, self.layers, train, name="stage3_block0")(x)
        return global_average(x)


class Linear(nn.Module):
    """One matrix and nothing else, so that a few lines of NumPy can follow a whole training step.

    It has no batch statistics: its variables are {"params": {"stem": {"kernel": [H·W·3, width]}}}.

    Attributes:
      width: D, the features.
      dtype: of the computation.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Features of images.

        Args:
          images: [n, H, W, 3] float, normalised.
          train: without meaning here; every backbone is called alike.

        Returns:
          [n, width] float32.
        """
        del train
        x = images.reshape(len(images), -1)
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="stem")(x)
        return x.astype(jnp.float32)
