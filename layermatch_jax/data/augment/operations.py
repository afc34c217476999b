"""RandAugment's operations for the sampler and both backends: ranges, affine maps, Cutout's color.

The backends get affine maps as integers: the last bit of a coefficient decides which pixel is
nearest, and JAX computes in float32 by default.
"""

import numpy as np

# (operation, lowest magnitude, highest magnitude); `Draws.op` has positions in this list. The list
# is that of the reference codes (FixMatch, Sohn et al. 2020, table 12; TorchSSL; USB). Units:
# rotate degrees, shear a slope, translate a share of the side, posterize bits (integer part),
# solarize a gray level, brightness, color, contrast and sharpness PIL's factor; others none.
RANDAUGMENT = (
    ("autocontrast", 0.0, 1.0),
    ("brightness", 0.05, 0.95),
    ("color", 0.05, 0.95),
    ("contrast", 0.05, 0.95),
    ("equalize", 0.0, 1.0),
    ("identity", 0.0, 1.0),
    ("posterize", 4.0, 8.0),
    ("rotate", -30.0, 30.0),
    ("sharpness", 0.05, 0.95),
    ("shear_x", -0.3, 0.3),
    ("shear_y", -0.3, 0.3),
    ("solarize", 0.0, 256.0),
    ("translate_x", -0.3, 0.3),
    ("translate_y", -0.3, 0.3),
)
NAMES = tuple(name for name, *_ in RANDAUGMENT)
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
CUTOUT_COLOR = (125, 123, 114)  # red, green, blue


def coefficients(op: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """Computes the affine maps of the geometric operations as Pillow does.

    The pixel at column x, line y comes from column (ax + by + c) >> 16 of line (dx + ey + f) >> 16,
    and is black if that place is outside. Angles are counterclockwise about the center. Positive
    slopes move the lower lines left (shear_x) or the right columns up (shear_y); positive shares
    move the image left or up. Pillow looks up pixels at their centers and rounds coefficients to
    16.16 fixed-point numbers, except for pure shifts (here the maps with b = d = 0); truncated,
    these give the same pixels. `image.transform(image.size, Image.Transform.AFFINE, map)`.

    Args:
      op: int [...], operations by their position in `RANDAUGMENT`.
      value: float32 [...], their magnitudes in the units given there.
      size: side of the image, pixels.

    Returns:
      int32 [..., 6], a to f, in units of 1/65536; the identity for all other operations.
    """
    value = value.astype(np.float64)
    half = size / 2

    def of(name):
        return np.where(op == NAMES.index(name), value, 0.0)

    angle = of("rotate") * (-np.pi / 180)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b, c = cos, sin + of("shear_x"), half - (cos + sin) * half + of("translate_x") * size
    d, e, f = of("shear_y") - sin, cos, half + (sin - cos) * half + of("translate_y") * size
    fixed = np.stack([a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2], axis=-1) * 2**16
    rounding = np.where((b == 0) & (d == 0), 0.0, 0.5)
    return np.floor(fixed + rounding[..., None]).astype(np.int32)
