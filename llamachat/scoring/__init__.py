"""Reward models to one score: gate, combiners, whitening, ranking of K samples, constants for evaluation."""
