"""Log-probabilities of given tokens, and the entropy, from hidden states and an output head; imports torch alone.

Shapes: B sequences, T positions, N tokens asked for, D hidden, V vocabulary. The head runs on a chunk of tokens at a
time, and a chunk is computed again in the backward pass: neither [B, T, V] nor [N, V] ever exists, forward or backward.
All sums are in fp32, whatever the dtype of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # hidden states [n, D] -> logits [n, V]: `model.get_output_embeddings()`

TOKENS_PER_CHUNK = 2048  # logits of so many tokens at once: [2048, 32000] in fp32 is a quarter of a GiB
# A CPU keeps a compiled kernel for each shape it has met: lengths are filled up to a multiple.
SHAPE_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of each token asked for: its log-probability and the entropy of what it was drawn from, in nats, fp32."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden_ND: Tensor,
    token_ids_N: Tensor,
    *,
    head: Head,
    temperature: float = 1.0,
    with_entropy: bool = False,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
) -> TokenLogprobs:
    """log softmax(head(hidden) / temperature) at the given ids, [N].

    Gradients flow to the hidden states and to the head, through both results. `temperature` is the one the tokens were
    sampled with: another one would make the ratio of PPO start off from 1.
    """
    assert temperature > 0, "at temperature 0 nothing is drawn, and no token has a probability"
    assert tokens_per_chunk > 0 and hidden_ND.shape[:1] == token_ids_N.shape
    count = len(token_ids_N)
    missing = -count % SHAPE_MULTIPLE
    hidden_ND = nn.functional.pad(hidden_ND, (0, 0, 0, missing))
    token_ids_N = nn.functional.pad(token_ids_N, (0, missing))

    def chunk(hidden_nD: Tensor, token_ids_n: Tensor) -> tuple[Tensor, ...]:
        logits_nV = head(hidden_nD).float() / temperature
        normalizer_n = logits_nV.logsumexp(dim=-1)
        logprobs_n = logits_nV.gather(1, token_ids_n.unsqueeze(1)).squeeze(1) - normalizer_n
        if not with_entropy:
            return (logprobs_n,)
        probabilities_nV = (logits_nV - normalizer_n.unsqueeze(1)).exp()
        # A token that the head rules out (-inf) takes no part: 0 * log 0 is 0.
        expected_logit_n = (probabilities_nV * logits_nV.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
        return logprobs_n, normalizer_n - expected_logit_n

    parts = []
    for hidden_nD, token_ids_n in zip(
        hidden_ND.split(tokens_per_chunk), token_ids_N.split(tokens_per_chunk), strict=True
    ):
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, hidden_nD, token_ids_n, use_reentrant=False))
        else:
            parts.append(chunk(hidden_nD, token_ids_n))
    columns = [torch.cat(column)[:count] for column in zip(*parts, strict=True)]
    return TokenLogprobs(columns[0], columns[1] if with_entropy else None)


def sequence_logprobs(
    hidden_BTD: Tensor,
    token_ids_BT: Tensor,
    *,
    response_mask_BT: Tensor,
    head: Head,
    temperature: float = 1.0,
    with_entropy: bool = False,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
) -> TokenLogprobs:
    """The same at each token that the mask counts, where that token stands, [B, T]; 0 elsewhere.

    The state at t - 1 says what stands at t, so the first position of a row can never be counted. The head runs on no
    prompt and no padding.
    """
    assert response_mask_BT.dtype == torch.bool and response_mask_BT.shape == token_ids_BT.shape
    assert not bool(response_mask_BT[:, 0].any()), "nothing stands before the first token that could predict it"
    found = token_logprobs(
        hidden_BTD[:, :-1][response_mask_BT[:, 1:]],
        token_ids_BT[response_mask_BT],
        head=head,
        temperature=temperature,
        with_entropy=with_entropy,
        tokens_per_chunk=tokens_per_chunk,
    )

    def placed(x_N: Tensor) -> Tensor:
        return torch.zeros(response_mask_BT.shape, dtype=x_N.dtype, device=x_N.device).masked_scatter(
            response_mask_BT, x_N
        )

    return TokenLogprobs(placed(found.logprobs), None if found.entropy is None else placed(found.entropy))
