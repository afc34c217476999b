"""Vision transformer (Dosovitskiy 2021, arXiv 2010.11929; DINOv2: Oquab 2024, arXiv 2304.07193).

In the form of timm's models of these names, so that their weights fit: augreg (Steiner 2022) and
DINOv2, with or without registers (Darcet 2024, arXiv 2309.16588).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from layermatch_jax.arrays import Array
from layermatch_jax.errors import InputError

STAGES = 4  # that the blocks are counted in, of equally many each
_EPSILON = 1e-6  # added to LayerNorm's variances
_NORMAL = nn.initializers.normal(0.02)


def block_names(depth: int = 12) -> list[str]:
    """The modules of the blocks, from the first to the last: stages are quarters of the network."""
    of_stage = depth // STAGES
    return [f"stage{1 + i // of_stage}_block{i % of_stage}" for i in range(depth)]


def resample_positions(positions: Array, grid: tuple[int, int]) -> jax.Array:
    """Position embeddings for another number of patches: bicubic, antialiased (as timm's).

    Args:
      positions: [1, s·s, D], of a square of patches.
      grid: rows and columns of patches that are wanted.

    Returns:
      [1, rows · columns, D].
    """
    _, count, width = positions.shape
    side = round(count**0.5)
    if (side, side) == tuple(grid):
        return jnp.asarray(positions)
    square = positions.reshape(side, side, width)
    resized = jax.image.resize(square, (*grid, width), method="cubic", antialias=True)
    return resized.reshape(1, -1, width).astype(positions.dtype)


class Stem(nn.Module):
    """Patches, linearly embedded, behind a class token and registers; with position embeddings.

    The class token's own position is part of it: their sum is all that the network sees. Registers
    have no position.

    Attributes:
      width: D.
      patch: side of a patch, pixels.
      registers: how many there are.
      class_token: whether there is one.
      dtype: of the computation.
    """

    width: int
    patch: int
    registers: int
    class_token: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> jax.Array:
        """Maps [n, H, W, 3] to [n, tokens, width]: class token, registers, patches."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, "VALID", dtype=self.dtype, name="patches")(images)
        n, rows, columns, width = x.shape
        if self.has_variable("params", "positions"):  # of images of any size
            positions = self.get_variable("params", "positions")
        else:
            positions = self.param("positions", _NORMAL, (1, rows * columns, width))
        positions = resample_positions(positions, (rows, columns))
        tokens = [x.reshape(n, -1, width) + positions.astype(self.dtype)]
        if self.registers:
            tokens.insert(0, self.param("registers", _NORMAL, (1, self.registers, width)))
        if self.class_token:
            tokens.insert(0, self.param("class_token", _NORMAL, (1, 1, width)))
        tokens = [jnp.broadcast_to(x, (n, *x.shape[1:])).astype(self.dtype) for x in tokens]
        return jnp.concatenate(tokens, axis=1)


class Attention(nn.Module):
    """Self-attention of all tokens, by heads of 64 features."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, tokens, D] to [n, tokens, D]."""
        n, tokens, width = x.shape
        heads = (n, tokens, width // 64, 64)
        query, key, value = (
            nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        x = jax.nn.dot_product_attention(query, key, value)
        return nn.Dense(width, dtype=self.dtype, name="out")(x.reshape(n, tokens, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and added to its input.

    Attributes:
      dtype: of the computation; LayerNorm takes its statistics in float32.
      layer_scale: whether each sum's second part has a factor for every feature (Touvron 2021).
      drop_path: probability that a part is left out for an image, in training (Huang 2016); what
        is not left out is divided by 1 - drop_path. It draws from the stream of the name drop_path.
      train: whether parts are left out.
    """

    dtype: jnp.dtype
    layer_scale: bool
    drop_path: float
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, tokens, D] to [n, tokens, D]."""
        y = Attention(self.dtype, name="attention")(self._norm("norm1")(x))
        x = x + self._part(y, "scale1")
        y = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="dense1")(self._norm("norm2")(x))
        # The error function itself, as in timm and PyTorch. big_vision's models were trained with
        # an approximation of it by tanh; published accuracies are those of the former, too.
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="dense2")(y)
        return x + self._part(y, "scale2")

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name=name)

    def _part(self, y: jax.Array, name: str) -> jax.Array:
        if self.layer_scale:
            y = Scale(name=name)(y)
        if self.train and self.drop_path:
            shape, kept = (len(y), 1, 1), 1 - self.drop_path
            mask = jax.random.bernoulli(self.make_rng("drop_path"), kept, shape)
            y = jnp.where(mask, y / kept, 0)
        return y


class Scale(nn.Module):
    """A factor for every feature, 1e-5 at first."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, tokens, D] to the same shape and dtype."""
        scale = self.param("scale", nn.initializers.constant(1e-5), (x.shape[-1],))
        return x * scale.astype(x.dtype)[None, None]


class VisionTransformer(nn.Module):
    """Vision transformer without its classifier.

    Attributes:
      width: D, of the tokens and the features; 384 for ViT-S, 768 for ViT-B.
      patch: side of a patch, pixels.
      dtype: of the computation.
      depth: blocks, a multiple of 4.
      layer_scale: as of `Block`.
      registers: tokens beside the patches' that nothing reads.
      pool: what the features are, behind the last LayerNorm. token: the class token; average: the
        mean over the patches, and there is no class token.
      drop_path: as of `Block` for the last block; from 0 for the first one, it grows linearly.
      remat: compute each block's activations again in the backward pass instead of storing them.
    """

    width: int
    patch: int
    dtype: jnp.dtype
    depth: int = 12
    layer_scale: bool = False
    registers: int = 0
    pool: str = "token"
    drop_path: float = 0.0
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "n H W 3"], train: bool) -> Float32[jax.Array, "n D"]:
        """Features of images.

        Args:
          images: [n, H, W, 3] float, normalized; H and W are multiples of `patch`. Position
            embeddings of another image size are resampled.
          train: whether `drop_path` leaves parts out.

        Returns:
          [n, D] float32.

        Raises:
          InputError: the image is no whole number of patches.
        """
        if any(side % self.patch for side in images.shape[1:3]):
            raise InputError(
                f"--config.dataset.image_size={images.shape[1]} is no multiple of {self.patch}, "
                "the side of this transformer's patches"
            )
        token = self.pool == "token"
        x = Stem(self.width, self.patch, self.registers, token, self.dtype, name="stem")(images)
        block = nn.remat(Block) if self.remat else Block
        for i, name in enumerate(block_names(self.depth)):
            drop_path = self.drop_path * i / max(self.depth - 1, 1)
            x = block(self.dtype, self.layer_scale, drop_path, train, name=name)(x)
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="final_norm")(x)
        x = x.astype(jnp.float32)
        return x[:, 0] if token else jnp.mean(x[:, self.registers :], axis=1)
