"""Tensor maths: masked statistics, KL, log-probabilities, confidence intervals."""

TOKENS_PER_CHUNK = 2048  # whose logits exist at once: [2048, 32000] in fp32 is a quarter of a GiB
CPU_TOKENS_PER_CHUNK = 256  # logits of 4,096 tokens then stay in a core's cache: 3 times the speed of 2,048


def tokens_per_chunk(*, on_cpu: bool) -> int:
    """Tokens whose logits exist at once."""
    return CPU_TOKENS_PER_CHUNK if on_cpu else TOKENS_PER_CHUNK
