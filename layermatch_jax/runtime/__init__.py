"""Devices, processes, checkpoints, the folder of a run, and its log."""
