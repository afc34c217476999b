"""Handwritten digits, the demo: the 1,797 8x8 images of scikit-learn, enlarged to 16 pixels.

Command:  python -m layermatch_jax.main --config=digits
          ...:labels=10,method=fixmatch --config.policy.threshold=0.6
Cost:     half a minute on two CPU cores, start-up included.
Expected: about 96 % with 40 labels, 80 % with 10 (docs/results.md). There are no published numbers.
"""

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.dataset.name = "digits"
    config.dataset.num_labels = 40
    config.dataset.stored_size = config.dataset.image_size = 16
    config.dataset.padding = 2
    config.dataset.flip = False  # a mirrored 2 is no 2

    config.train_steps = 1000
    config.batch_size = 32
    config.unlabeled_ratio = 3

    config.model.name = "conv4"
    config.model.width = 16

    config.input.backend = "device"
    config.eval_batch_size = 512
    config.log_every = 20
    config.eval_every = 20
    config.checkpoint_every = 500
    return presets.apply_arg(config, arg)
