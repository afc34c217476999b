"""Crops, flips, RandAugment and Cutout: the same views on the host and on the devices."""
