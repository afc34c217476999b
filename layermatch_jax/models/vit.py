"""Vision transformer (Dosovitskiy 2021, arXiv 2010.11929; DINOv2: Oquab 2024, arXiv 2304.07193).

The architecture is that of the timm models with these names, so that their weights fit: augreg
(Steiner 2022) and DINOv2, with or without registers (Darcet 2024, arXiv 2309.16588).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from layermatch_jax.arrays import Array
from layermatch_jax.errors import InputError
from layermatch_jax.models.layers import run

STAGES = 4  # with the same number of blocks each
_EPSILON = 1e-6  # added to LayerNorm's variances
_NORMAL = nn.initializers.normal(0.02)


def block_names(depth: int = 12) -> list[str]:
    """Returns the module names of the blocks in order; a stage is a quarter of the network."""
    of_stage = depth // STAGES
    return [f"stage{1 + i // of_stage}_block{i % of_stage}" for i in range(depth)]


def resample_positions(positions: Array, grid: tuple[int, int]) -> jax.Array:
    """Resamples position embeddings to another grid: bicubic and antialiased, as in timm.

    Args:
      positions: [1, s·s, D], of a square grid of patches.
      grid: rows and columns of patches of the new grid.

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
    """Embeds patches linearly, adds positions, and prepends a class token and registers.

    The class token includes its position embedding, because the network only uses their sum.
    Registers have no position embedding.

    Attributes:
      width: D.
      patch: side of a patch, pixels.
      registers: number of register tokens.
      class_token: whether to add a class token.
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
        if self.has_variable("params", "positions"):  # may belong to another image size
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
    """Self-attention between all tokens, with heads of 64 features."""

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
    """Pre-norm block: two residual branches, attention and a two-layer MLP.

    Attributes:
      dtype: of the computation; LayerNorm computes its statistics in float32.
      layer_scale: whether `Scale` multiplies the output of each branch (Touvron 2021).
      drop_path: probability that a branch is dropped for an image in training (Huang 2016). Kept
        branches are divided by 1 - drop_path. The random stream is named "drop_path".
      train: whether branches are dropped.
      axis_name: the device axis over which the images of a batch are divided.
    """

    dtype: jnp.dtype
    layer_scale: bool
    drop_path: float
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, tokens, D] to [n, tokens, D]."""
        y = Attention(self.dtype, name="attention")(self._norm("norm1")(x))
        x = x + self._part(y, "scale1")
        y = nn.Dense(4 * x.shape[-1], dtype=self.dtype, name="dense1")(self._norm("norm2")(x))
        # Exact GELU, as in timm and PyTorch. big_vision trained its models with the tanh
        # approximation; published accuracies are those of the exact function, too.
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="dense2")(y)
        return x + self._part(y, "scale2")

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name=name)

    def _part(self, y: jax.Array, name: str) -> jax.Array:
        if self.layer_scale:
            y = Scale(name=name)(y)
        if self.train and self.drop_path:
            kept = 1 - self.drop_path
            y = jnp.where(self._kept_branches(len(y), kept), y / kept, 0)
        return y

    def _kept_branches(self, images: int, probability: float) -> jax.Array:
        """Draws for the global batch, so that the number of devices does not change a run."""
        axis = self.axis_name
        devices = jax.lax.axis_size(axis) if axis else 1
        shape = (images * devices, 1, 1)
        drawn = jax.random.bernoulli(self.make_rng("drop_path"), probability, shape)
        start = jax.lax.axis_index(axis) * images if axis else 0
        return jax.lax.dynamic_slice_in_dim(drawn, start, images)


class Scale(nn.Module):
    """LayerScale: a learned factor for each feature, initially 1e-5."""

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
      layer_scale: as in `Block`.
      registers: number of register tokens, which the features leave out.
      pool: how features are computed from the output of the last LayerNorm. token: the class
        token; average: the mean over the patches, without a class token.
      drop_path: `Block.drop_path` of the last block; it grows linearly from 0 in the first block.
      remat: compute each block's activations again in the backward pass instead of storing them.
      axis_name: as in `Block`.
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
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "n ..."], train: bool, after: str = "", until: str = ""
    ) -> Float[jax.Array, "n ..."]:
        """Computes the features of images.

        Args:
          images: [n, H, W, 3] float, normalized; H and W are multiples of `patch`. Position
            embeddings of another image size are resampled.
          train: whether `drop_path` drops branches.
          after: the layer whose output `images` is; see `layers.run`.
          until: the layer whose output is wanted, not pooled; see `layers.run`.

        Returns:
          [n, D] float32; with `until`, [n, tokens, D].

        Raises:
          InputError: H or W is not a multiple of `patch`.
        """
        if not after and any(side % self.patch for side in images.shape[1:3]):
            raise InputError(
                f"--config.dataset.image_size={images.shape[1]} is not a multiple of "
                f"{self.patch}, the side of this transformer's patches. Set it to such a multiple"
            )
        token = self.pool == "token"
        block = nn.remat(Block) if self.remat else Block

        def stem(x):
            return Stem(self.width, self.patch, self.registers, token, self.dtype, name="stem")(x)

        def nth_block(x, i, name):
            drop_path = self.drop_path * i / max(self.depth - 1, 1)
            settings = self.dtype, self.layer_scale, drop_path, train, self.axis_name
            return block(*settings, name=name)(x)

        def final_norm(x):
            return nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="final_norm")(x)

        blocks = [
            (name, functools.partial(nth_block, i=i, name=name))
            for i, name in enumerate(block_names(self.depth))
        ]
        x = run([("stem", stem), *blocks, ("final_norm", final_norm)], images, after, until)
        x = x.astype(jnp.float32)
        if until:
            return x
        return x[:, 0] if token else jnp.mean(x[:, self.registers :], axis=1)
