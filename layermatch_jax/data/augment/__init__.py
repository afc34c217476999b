"""Crops, flips, RandAugment and Cutout; host and devices make identical views."""
