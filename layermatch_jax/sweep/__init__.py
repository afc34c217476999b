"""A grid of runs, and its table: see command.py."""
