"""How likely answers are to a policy that did not sample them, or did: what KL between two policies is made of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llamachat import distributed
from llamachat.answers.packed import TokenSequence, packed_rows
from llamachat.maths.logprobs import token_logprobs

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank

_ROW_TOKENS = 1024


def answer_logprobs(bank: "RoleBank", sequences: Sequence[TokenSequence], *, temperature: float) -> list[float]:
    """log p(response | prompt) of each by the bank's policy at this temperature, nats, summed over its tokens in fp32.

    Several processes share the work.
    """
    return distributed.scatter_map(sequences, lambda mine: _logprobs(bank, mine, temperature))


@torch.no_grad()
def _logprobs(bank: "RoleBank", sequences: Sequence[TokenSequence], temperature: float) -> list[float]:
    sums_B = torch.zeros(len(sequences), dtype=torch.float64)
    for row in packed_rows(sequences, range(len(sequences)), row_tokens=_ROW_TOKENS, device=bank.device):
        hidden_ND = bank.hidden("policy", row.batch)[0, row.places_N]
        found = token_logprobs(hidden_ND, row.tokens_N, head=bank.lm_head("policy"), temperature=temperature)
        sums_B.index_add_(0, row.rows_N.cpu(), found.logprobs.double().cpu())
    return sums_B.tolist()
