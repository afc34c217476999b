"""Runs a grid of configs and makes a table of the results; see command.py."""
