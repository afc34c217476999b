"""Predictions of a trained model.

`predict` takes Images and returns arrays; `of_files` is --mode=predict, for any number of files.
"""

from layermatch_jax.after.predict.apply import predict
from layermatch_jax.after.predict.mode import of_files

__all__ = ["of_files", "predict"]
