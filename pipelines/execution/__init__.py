"""Runs the steps of a recipe: inputs, state, resume."""
