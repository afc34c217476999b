"""What a trained model says of images.

`predict` is for images at hand; `of_files` is --mode=predict, for any number of image files.
"""

from layermatch_jax.after.predict.apply import predict
from layermatch_jax.after.predict.mode import of_files

__all__ = ["of_files", "predict"]
