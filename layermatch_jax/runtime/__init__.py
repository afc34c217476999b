"""What a run needs of the machine: devices, processes, files, checkpoints, the log."""
