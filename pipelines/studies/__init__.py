"""Variants of a recipe over seeds, and the comparison of runs."""
