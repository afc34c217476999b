"""EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946; without squeeze-and-excitation, with ReLU6).

https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Float

from layermatch_jax.arrays import Array
from layermatch_jax.models.convolutions import depthwise, pointwise
from layermatch_jax.models.layers import Layers, global_average, run

# Fan-in, because an output of a depthwise kernel has k·k inputs; fan-out would count all channels.
_DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Group(NamedTuple):
    """Consecutive blocks with the same settings: one row of table 1 of the paper."""

    stage: int  # in parameter paths; stages 2 to 4 begin where the image is halved
    blocks: int
    kernel_size: int
    stride: int  # of the first block
    expansion: int  # channels of the depthwise convolution per channel of the input
    channels: int


LITE0 = (
    Group(1, 1, 3, 1, 1, 16),
    Group(1, 2, 3, 2, 6, 24),
    Group(2, 2, 5, 2, 6, 40),
    Group(3, 3, 3, 2, 6, 80),
    Group(3, 3, 5, 1, 6, 112),
    Group(4, 4, 5, 2, 6, 192),
    Group(4, 1, 3, 1, 6, 320),
)


def block_names(groups: tuple[Group, ...] = LITE0) -> list[str]:
    """Returns the module names of the blocks in order, then that of the last 1x1 convolution."""
    stages = [group.stage for group in groups for _ in range(group.blocks)]
    stages.append(stages[-1])
    return [f"stage{s}_block{stages[:i].count(s)}" for i, s in enumerate(stages)]


class ConvNorm(nn.Module):
    """Convolution, BN, ReLU6."""

    channels: int
    kernel_size: int
    stride: int
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, ⌈h / stride⌉, ⌈w / stride⌉, channels]."""
        one = {"conv_general_dilated": pointwise} if self.kernel_size == 1 else {}
        x = self.layers.conv(
            self.channels, self.kernel_size, self.stride, name="conv", padding="SAME", **one
        )(x)
        return nn.relu6(self.layers.norm(self.train, name="norm")(x))


class Block(nn.Module):
    """Inverted residual (Sandler 2018): 1x1 that widens, depthwise, 1x1 that narrows.

    BN follows each, and ReLU6 the first two. The padding is TensorFlow's "SAME": with stride 2, an
    image with an even side gets more padding on the right and at the bottom. Without expansion,
    there are no `conv1` and `norm1`.

    Attributes:
      group: the settings of the block.
      stride: of the depthwise convolution.
      layers: the settings of convolutions and BatchNorm.
      train: normalize by the batch's statistics and update the running ones.
    """

    group: Group
    stride: int
    layers: Layers
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, h, w, c] to [n, ⌈h / stride⌉, ⌈w / stride⌉, group.channels]."""
        conv, norm, group = self.layers.conv, self.layers.norm, self.group
        wide, y = group.expansion * x.shape[-1], x
        if group.expansion > 1:
            y = conv(wide, 1, name="conv1", conv_general_dilated=pointwise)(y)
            y = nn.relu6(norm(self.train, name="norm1")(y))
        y = conv(
            wide,
            group.kernel_size,
            self.stride,
            name="conv2",
            padding="SAME",
            feature_group_count=wide,
            kernel_init=_DEPTHWISE_INIT,
            conv_general_dilated=depthwise,
        )(y)
        y = nn.relu6(norm(self.train, name="norm2")(y))
        y = conv(group.channels, 1, name="conv3", conv_general_dilated=pointwise)(y)
        y = norm(self.train, name="norm3")(y)
        return x + y if x.shape == y.shape else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite without its classifier.

    Attributes:
      layers: the settings of convolutions and BatchNorm.
      groups: the groups of blocks in order.
      stem: channels of the first convolution.
      features: D, channels of the last convolution.
      remat: compute each block's activations again in the backward pass instead of storing them.
    """

    layers: Layers
    groups: tuple[Group, ...] = LITE0
    stem: int = 32
    features: int = 1280
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "n ..."], train: bool, after: str = "", until: str = ""
    ) -> Float[jax.Array, "n ..."]:
        """Computes the features of images.

        Args:
          images: [n, H, W, 3] float, normalized.
          train: normalize by the batch's statistics and update the running ones.
          after: the layer whose output `images` is; see `layers.run`.
          until: the layer whose output is wanted, not pooled; see `layers.run`.

        Returns:
          [n, D] float32; D is 1280 for Lite0.
        """
        block = nn.remat(Block) if self.remat else Block
        *names, last = block_names(self.groups)
        forms = [(g, g.stride if i == 0 else 1) for g in self.groups for i in range(g.blocks)]

        def nth_block(x, form, name):
            group, stride = form
            return block(group, stride, self.layers, train, name=name)(x)

        layers = [
            ("stem", lambda x: ConvNorm(self.stem, 3, 2, self.layers, train, name="stem")(x)),
            *(
                (name, functools.partial(nth_block, form=form, name=name))
                for name, form in zip(names, forms, strict=True)
            ),
            (last, lambda x: ConvNorm(self.features, 1, 1, self.layers, train, name=last)(x)),
        ]
        x = run(layers, images, after, until)
        return x if until else global_average(x)
