"""WideResNet (Zagoruyko & Komodakis 2016, arXiv 1605.07146) as in FixMatch's code."""

import functools

import flax.linen as nn
import jax
from jaxtyping import Float

from layermatch_jax.arrays import Array
from layermatch_jax.models.layers import Layers, global_average, leaky_relu, run


class Block(nn.Module):
    """Pre-activation residual block: BN, LeakyReLU, 3x3, BN, LeakyReLU, 3x3, plus the shortcut.

    Attributes:
      channels: output channels of both convolutions.
      stride: of the first convolution and of the shortcut.
      activate_shortcut: whether the shortcut takes the input after BN and LeakyReLU.
      layers: the settings of convolutions and BatchNorm.
      train: normalize by the batch's statistics and update the running ones.
    """

    channels: int
    stride: int
    activate_shortcut: bool
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, ⌈h / stride⌉, ⌈w / stride⌉, channels]."""
        conv, norm = self.layers.conv, self.layers.norm
        y = leaky_relu(norm(self.train, name="norm1")(x))
        shortcut = y if self.activate_shortcut else x
        y = conv(self.channels, 3, self.stride, name="conv1")(y)
        y = leaky_relu(norm(self.train, name="norm2")(y))
        y = conv(self.channels, 3, name="conv2")(y)
        if shortcut.shape != y.shape:
            shortcut = conv(self.channels, 1, self.stride, name="shortcut")(shortcut)
        return shortcut + y


class WideResNet(nn.Module):
    """WideResNet without its classifier.

    Only the shortcut of the first block takes the input after BN and LeakyReLU. All other shortcuts
    take the raw input, so that a path of additions leads from the first block to the last.

    Attributes:
      depth: 6·b + 4 for b blocks a stage. The formula counts three stages; with four, the network
        is deeper than `depth` (FixMatch's "WRN-37-2" for STL-10 has depth 28 here).
      widen_factor: k; the stages have 16k, 32k, 64k, ... channels.
      stages: 3, or 4 for 96-pixel images.
      first_stride: stride of the first stage; every later stage halves the image. FixMatch always
        uses 1; TorchSSL and USB use 2 for STL-10, with a quarter of the arithmetic.
      layers: the settings of convolutions and BatchNorm.
      remat: compute each block's activations again in the backward pass instead of storing them.
    """

    depth: int
    widen_factor: int
    stages: int
    first_stride: int
    layers: Layers
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "n ..."], train: bool, after: str = "", until: str = ""
    ) -> Float[jax.Array, "n ..."]:
        """Computes the features of images.

        Args:
          images: normalized.
          train: normalize by the batch's statistics and update the running ones.
          after: the layer whose output `images` is; see `layers.run`.
          until: the layer whose output is wanted, not pooled; see `layers.run`.

        Returns:
          D = 16k·2^(stages-1).
        """
        block = nn.remat(Block) if self.remat else Block
        layers = [("stem", lambda x: self.layers.conv(16, 3, name="stem")(x))]
        for stage in range(self.stages):
            for i in range((self.depth - 4) // 6):
                create = functools.partial(
                    block,
                    channels=16 * self.widen_factor * 2**stage,
                    stride=1 if i > 0 else self.first_stride if stage == 0 else 2,
                    activate_shortcut=stage == 0 and i == 0,
                    layers=self.layers,
                    train=train,
                    name=f"stage{stage + 1}_block{i}",
                )
                layers.append((create.keywords["name"], lambda x, create=create: create()(x)))
        norm = self.layers.norm
        layers += [("final_norm", lambda x: leaky_relu(norm(train, name="final_norm")(x)))]
        x = run(layers, images, after, until)
        return x if until else global_average(x)
