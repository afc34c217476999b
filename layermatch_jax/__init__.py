"""Semi-supervised image classification in JAX around LayerMatch.

Pseudo-labels help the feature extractor to cluster, but their noise harms the linear classifier
("Do Pseudo-labels Benefit All Layers?", arXiv 2406.14207). LayerMatch therefore gives the two
kinds of layers different unsupervised gradients: none for the classifier (Grad-ReLU), and for the
features one toward averaged clustering centers (Avg-Clustering). `method/layerwise.py` is the
method, `train.py` the protocol of a run, `config.py` every setting.
"""

__version__ = "0.2.0.dev0"
