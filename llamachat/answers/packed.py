"""Prompts with their responses as packed rows: the input of a forward pass, and where its results belong.

Shapes: B responses, R response positions, 1 a packed row, T its positions, N response tokens of the row.
A row holds whole sequences; the positions of each restart at 0, which keeps them apart without an attention mask. The
state that predicts a response token is one position before it, and the value of that state is the critic's estimate
before the token is known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.answers.responses import Response
from llamachat.chat_format.tokenizer import FILLER_ID
from llamachat.data.packing import pack_evenly
from llamachat.maths.logprobs import Head, token_logprobs

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank

# A CPU caches a compiled kernel for each shape: rows are padded to a multiple.
SHAPE_MULTIPLE = 64
_ROW_TOKENS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and a response to it; neither is empty."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.prompt and self.response, "a prompt has its BOS, and a response its EOS"

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt + self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """Some sequences of a batch as one row."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    places_N: Tensor  # positions of the states that predict the response tokens
    tokens_N: Tensor  # the response tokens
    rows_N: Tensor  # the response of the batch that each belongs to,
    columns_N: Tensor  # and its position in it

    @property
    def batch(self) -> dict[str, Tensor]:
        """The input of the role bank."""
        return {"input_ids": self.input_ids_1T, "position_ids": self.position_ids_1T}

    def taken(self, x_BR: Tensor) -> Tensor:
        """The values at these tokens, [1, N]."""
        return x_BR[self.rows_N, self.columns_N].unsqueeze(0)

    def put(self, x_BR: Tensor, x_N: Tensor) -> None:
        """Write the values of these tokens to their places."""
        x_BR[self.rows_N, self.columns_N] = x_N.to(x_BR)


def sequence_of(response: Response) -> TokenSequence:
    """A prompt and the answer that was sampled for it."""
    return TokenSequence(response.prompt.ids, response.ids)


def packed_rows(
    sequences: Sequence[TokenSequence],
    indices: Sequence[int],
    *,
    row_tokens: int,
    device: torch.device,
    shares: int = 1,
) -> list[PackedRow]:
    """The sequences with these indices in few rows of `row_tokens`, the fullest first, so that a lack of memory shows
    at once.

    A longer sequence gets its own row. `shares` is the number of processes that take rows in turn; none waits for
    another.
    """
    rows = pack_evenly([len(sequences[index].ids) for index in indices], row_tokens, shares=shares)
    return [_packed(sequences, [indices[place] for place in row], device) for row in rows]


def response_mask(sequences: Sequence[TokenSequence], device: torch.device) -> Tensor:
    """True on response tokens, [B, R]; responses begin at the first column."""
    lengths_B = torch.tensor([len(sequence.response) for sequence in sequences], device=device)
    return torch.arange(int(lengths_B.max()), device=device) < lengths_B.unsqueeze(1)


def answer_logprobs(bank: "RoleBank", sequences: Sequence[TokenSequence], *, temperature: float) -> list[float]:
    """log p(response | prompt) of each sequence under the bank's policy at this temperature: in nats, summed in fp32.

    Several processes share the work.
    """
    return distributed.scatter_map(
        sequences,
        lambda mine: response_logprobs(
            mine,
            states=lambda batch, places: bank.states("policy", batch, places),
            head=bank.lm_head("policy"),
            device=bank.device,
            temperature=temperature,
        ),
    )


@torch.no_grad()
def response_logprobs(
    sequences: Sequence[TokenSequence],
    *,
    states: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    head: Head,
    device: torch.device,
    temperature: float,
) -> list[float]:
    """The same by a model whose `states` gives the final states [N, D] at places of a packed row, and `head` the logits
    of states."""
    sums_B = torch.zeros(len(sequences), dtype=torch.float64)
    row_tokens = _ROW_TOKENS.get(device.type, _ROW_TOKENS["cpu"])
    for row in packed_rows(sequences, range(len(sequences)), row_tokens=row_tokens, device=device):
        hidden_ND = states(row.batch, row.places_N)
        logprobs_N = token_logprobs(hidden_ND, row.tokens_N, head=head, temperature=temperature).logprobs
        sums_B.index_add_(0, row.rows_N.cpu(), logprobs_N.double().cpu())
    return sums_B.tolist()


def _packed(sequences: Sequence[TokenSequence], indices: Sequence[int], device: torch.device) -> PackedRow:
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    cells: list[tuple[int, int, int]] = []  # response, position in it, token
    for index in indices:
        sequence = sequences[index]
        first = len(ids) + len(sequence.prompt) - 1
        places += range(first, first + len(sequence.response))
        cells += [(index, column, token) for column, token in enumerate(sequence.response)]
        positions += range(len(sequence.ids))
        ids += sequence.ids
    missing = -len(ids) % SHAPE_MULTIPLE
    ids += [FILLER_ID] * missing
    positions += range(missing)
    rows_N, columns_N, tokens_N = torch.tensor(cells, device=device).unbind(1)
    return PackedRow(
        input_ids_1T=torch.tensor([ids], device=device),
        position_ids_1T=torch.tensor([positions], device=device),
        places_N=torch.tensor(places, device=device),
        tokens_N=tokens_N,
        rows_N=rows_N,
        columns_N=columns_N,
    )
