"""The best and the median of N answers, estimated without bias from K of them: every subset of N counts alike.

Taking the best of the first N of K samples would waste the others, and reusing the same K for each N by drawing at
random would add noise; the mean over all subsets is exact and has the least variance (the estimator of pass@k, Chen et
al., arXiv:2107.03374, for values instead of passes). Shapes: N prompts, K answers, one column for each n from 1 to K.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def expected_best(ranked_NK: Floats) -> Floats:
    """E[value of the best ranked of n of the K answers] for n = 1 .. K, by prompt, [N, K]; worst ranked first."""
    return ranked_NK @ best_weights(ranked_NK.shape[1])


def expected_median(values_NK: Floats) -> Floats:
    """E[median of n of the K values] for n = 1 .. K, by prompt, [N, K]; of an even n the mean of the two in the middle."""
    return np.sort(values_NK, axis=1) @ median_weights(values_NK.shape[1])


def best_weights(count: int) -> Floats:
    """Weight of the i-th worst of K answers (rows) in the expected best of n (columns): C(i - 1, n - 1) / C(K, n)."""
    return np.array([[comb(i - 1, n - 1) / comb(count, n) for n in range(1, count + 1)] for i in range(1, count + 1)])


def median_weights(count: int) -> Floats:
    """Weight of the i-th smallest of K values (rows) in the expected median of n (columns)."""

    def weight(i: int, n: int) -> float:
        middle = {(n + 1) // 2, n // 2 + 1}  # places of an ordered subset, from 1
        ways = sum(comb(i - 1, j - 1) * comb(count - i, n - j) for j in middle)
        return ways / (comb(count, n) * len(middle))

    return np.array([[weight(i, n) for n in range(1, count + 1)] for i in range(1, count + 1)])
