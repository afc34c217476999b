"""The convolution, the BatchNorm and the pooling that backbones share."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from layermatch_jax.arrays import Array

# Fan-out (He 2015, eq. 14) rather than fan-in, and an untruncated normal, as in FixMatch's code and
# torchvision's ResNet.
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Settings that all layers of a backbone share, and the layers made from them.

    Parameters and running statistics are always float32; BatchNorm also computes its mean and
    variance in float32. The running variance is the biased one, as in Flax. (PyTorch stores the
    unbiased one; over the thousands of values in a batch, the difference is negligible.)
    """

    dtype: jnp.dtype | str  # of the computation: float32 or bfloat16
    bn_decay: float = 0.999  # the share of the old running statistics that is kept per step
    bn_epsilon: float = 1e-3
    axis_name: str | None = None  # device axis over which BatchNorm averages its statistics
    # Regular expression on the paths of BatchNorm's parameters: these layers normalize by the
    # running statistics in training, too, and keep them. '' = none
    kept: str = ""

    def conv(
        self, features: int, kernel_size: int, stride: int = 1, *, name: str, **options
    ) -> nn.Conv:
        """Makes a square convolution without bias, zero-padded by kernel_size // 2 on every side.

        The padding is explicit because, with stride 2, "SAME" pads more on the right and at the
        bottom. That shifts the features and does not match PyTorch checkpoints. `options` are
        arguments of nn.Conv; they override these defaults.
        """
        defaults = {
            "padding": kernel_size // 2,
            "use_bias": False,
            "dtype": self.dtype,
            "kernel_init": HE_NORMAL,
        }
        size = (kernel_size, kernel_size)
        return nn.Conv(features, size, strides=stride, name=name, **(defaults | options))

    def norm(self, train: bool, *, name: str) -> nn.BatchNorm:
        """Makes a BatchNorm; if `train`, it uses the batch's statistics, else the running ones.

        Layers that `kept` names always use the running ones.
        """
        return _BatchNorm(
            train=train,
            kept=self.kept,
            momentum=self.bn_decay,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )


class _BatchNorm(nn.BatchNorm):
    """nn.BatchNorm that knows from its path whether it keeps its running statistics."""

    train: bool = False
    kept: str = ""

    def __call__(self, x, use_running_average=None, *, mask=None):
        path = "/".join(("backbone", *self.path, "scale"))
        kept = bool(self.kept and re.fullmatch(self.kept, path))
        return super().__call__(x, kept or not self.train, mask=mask)


def run(
    layers: Sequence[tuple[str, Callable[[jax.Array], jax.Array]]], x, after: str, until: str
) -> jax.Array:
    """Applies the layers of a backbone in order, or a part of them.

    Args:
      layers: (name, function) of each layer.
      x: the input of the first layer that is applied.
      after: name of the layer whose output `x` is; '' = x is the input of the backbone.
      until: name of the last layer to apply; '' = all.
    """
    names = [name for name, _ in layers]
    start = names.index(after) + 1 if after else 0
    stop = names.index(until) + 1 if until else len(layers)
    for _, layer in layers[start:stop]:
        x = layer(x)
    return x


def leaky_relu(x: jax.Array) -> jax.Array:
    """Computes LeakyReLU with slope 0.1, as WideResNets in the field do."""
    return nn.leaky_relu(x, 0.1)


def global_average(x: Float[Array, "n h w D"]) -> Float32[jax.Array, "n D"]:
    """Averages over rows and columns, in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
