"""RandAugment's operations as the sampler and both backends know them: ranges, affine maps, color.

The geometric ones are integers already when they get to a backend: accelerators have no float64,
and the last bit of a coefficient decides which pixel is nearest.
"""

import numpy as np

# (operation, lowest magnitude, highest magnitude). The order is the meaning of `Draws.op`.
# The list of the field's reference code (FixMatch, Sohn 2020, table 12; TorchSSL, USB).
# rotate is in degrees, shear a slope, translate a share of the side, posterize bits (the integer
# part counts), solarize a gray level, the four enhancements PIL's factor; the rest take none.
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
    """The maps of the geometric operations, as Pillow computes them.

    The pixel at column x, line y comes from column (ax + by + c) >> 16 of line (dx + ey + f) >> 16,
    and is black if that is outside. Angles are counter-clockwise, about the center; positive slopes
    move the lower lines to the left, the columns at the right up; positive shares move the image to
    the left, or up. Pillow looks up pixels at their centers, in 16.16 fixed-point numbers, except
    that pure shifts (the only maps here with b = d = 0) are not rounded to those: cut off instead,
    they give the same whole numbers. `image.transform(image.size, Image.Transform.AFFINE, map)`.

    Args:
      op: int [...], operations by their position in `RANDAUGMENT`.
      value: float32 [...], their magnitudes in the units given there.
      size: side of the image, pixels.

    Returns:
      int32 [..., 6], a to f, 1/65536 pixels; of the other operations, the identity's.
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
