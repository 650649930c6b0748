"""Estimates of a recipe's cost, whether it fits a card, what a machine lacks, and a first recipe for the user's
data."""
