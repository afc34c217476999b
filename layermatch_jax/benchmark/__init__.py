"""Measures how fast the parts of a run are."""
