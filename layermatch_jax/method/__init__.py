"""The method: what a step computes. It knows nothing of devices, files or data sets."""
