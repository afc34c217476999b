"""ResNet v1.5 with bottleneck blocks (He 2016, arXiv 1512.03385)."""

import functools

import flax.linen as nn
import jax
from jaxtyping import Float

from layermatch_jax.arrays import Array
from layermatch_jax.models.layers import Layers, global_average, run


class Stem(nn.Module):
    """7x7 convolution of stride 2, BN, ReLU, 3x3 max-pooling of stride 2.

    A separate module, so that "stem/.*" matches all of its parameters.
    """

    channels: int
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, images: Array) -> jax.Array:
        """Maps [n, H, W, 3] to [n, ⌈H / 4⌉, ⌈W / 4⌉, channels]."""
        x = self.layers.conv(self.channels, 7, 2, name="conv")(images)
        x = nn.relu(self.layers.norm(self.train, name="norm")(x))
        padding = ((1, 1), (1, 1))  # Flax accepts pairs, but does not declare this type
        return nn.max_pool(x, (3, 3), (2, 2), padding)  # pyright: ignore[reportArgumentType]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with BN; ReLU between them and after the sum.

    v1.5: the 3x3 convolution has the stride. (In the paper the first 1x1 convolution has it, which
    ignores three of four positions.) The scale of the last BN starts at 1, like the others. A start
    at 0 (Goyal 2017) is for very large batches; it would make every gradient inside the branch 0 in
    the first step, which gradient masks and layer reports should see.

    Attributes:
      channels: of the 3x3 convolution; the output of the block has 4 times as many.
      stride: of the 3x3 convolution and of the shortcut.
      layers: the settings of convolutions and BatchNorm.
      train: normalize by the batch's statistics and update the running ones.
    """

    channels: int
    stride: int
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, ⌈h / stride⌉, ⌈w / stride⌉, 4·channels]."""
        conv, norm = self.layers.conv, self.layers.norm
        y = conv(self.channels, 1, name="conv1")(x)
        y = nn.relu(norm(self.train, name="norm1")(y))
        y = conv(self.channels, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(self.train, name="norm2")(y))
        y = conv(4 * self.channels, 1, name="conv3")(y)
        y = norm(self.train, name="norm3")(y)
        if x.shape != y.shape:
            x = conv(4 * self.channels, 1, self.stride, name="shortcut")(x)
            x = norm(self.train, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Bottleneck ResNet without its classifier.

    Attributes:
      blocks: number of blocks in each stage; (3, 4, 6, 3) is ResNet-50.
      layers: the settings of convolutions and BatchNorm.
      width: channels of the stem and of the first stage's 3x3 convolutions.
      remat: compute each block's activations again in the backward pass instead of storing them.
    """

    blocks: tuple[int, ...]
    layers: Layers
    width: int = 64
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
          D = 4·width·2^(len(blocks)-1), 2048 for ResNet-50.
        """
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        layers = [("stem", lambda x: Stem(self.width, self.layers, train, name="stem")(x))]
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                create = functools.partial(
                    block,
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    layers=self.layers,
                    train=train,
                    name=f"stage{stage + 1}_block{i}",
                )
                layers.append((create.keywords["name"], lambda x, create=create: create()(x)))
        x = run(layers, images, after, until)
        return x if until else global_average(x)
