"""Semi-supervised image classification in JAX around LayerMatch.

Pseudo-labels help the feature extractor to cluster, but their noise harms the linear classifier
("Do Pseudo-labels Benefit All Layers?", arXiv 2406.14207). LayerMatch therefore gives the two
kinds of layers different unsupervised gradients: the classifier gets none (Grad-ReLU), and the
features are pulled toward averaged clustering centers (Avg-Clustering). `method/layerwise.py` has
the method, `train.py` the course of a run, `config.py` all settings.
"""

__version__ = "0.2.0.dev0"
