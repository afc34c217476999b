"""What a backbone can do without training it: features, and linear classifiers on them."""
