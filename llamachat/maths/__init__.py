"""Tensor maths: masked statistics, KL, log-probabilities, confidence intervals."""
