"""What a trained model says of images."""

from layermatch_jax.after.predict.apply import predict

__all__ = ["predict"]
