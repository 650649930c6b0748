"""Tensor maths: masked statistics, KL, log-probabilities, confidence intervals."""

TOKENS_PER_CHUNK = 2048  # whose logits exist at once: [2048, 32000] in fp32 is a quarter of a GiB
