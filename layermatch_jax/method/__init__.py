"""The method: what a step computes. This code does not depend on devices, files or data sets."""
