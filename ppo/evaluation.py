"""The policy on held-out prompts, always the same with the same seeds, and how far it has gone from the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat import distributed
from llamachat.answers.evaluation import Evaluation, evaluation_of
from llamachat.answers.packed import packed_rows, sequence_of
from llamachat.answers.responses import sample
from llamachat.answers.scorer import Scorer
from llamachat.data.prompts import EncodedPrompt
from llamachat.maths.logprobs import response_kl
from llamachat.rollout.engine import LocalEngine, Sampling
from llamachat.scoring.standardising import Constants
from ppo.experience import measure

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Whatever an evaluation needs beside the prompts."""

    bank: "RoleBank"
    engine: LocalEngine
    scorer: Scorer
    sampling: Sampling
    row_tokens: int

    def evaluate(self, prompts: Sequence[EncodedPrompt], constants: Constants | None) -> tuple[Evaluation, Constants]:
        """The policy's answers to these prompts; without constants they are taken from these very answers."""
        responses = sample(self.engine, self.bank.chat_format, prompts, self.sampling)
        scored = self.scorer.score(responses, with_judge=True)
        sequences = [sequence_of(response) for response in responses]
        rows = packed_rows(
            sequences,
            range(len(sequences)),
            row_tokens=self.row_tokens,
            device=self.bank.device,
            shares=distributed.count(),
        )
        measured = measure(self.bank, sequences, rows, temperature=self.sampling.temperature, with_values=False)
        kl_B = response_kl(measured.token_kl(), response_mask_BR=measured.response_mask_BR)
        return evaluation_of(responses, scored, constants, kl=kl_B.tolist())


def mean_kl(evaluation: Evaluation) -> float:
    """KL to the starting policy, nats a response."""
    assert evaluation.kl is not None, "the evaluator measures it"
    return sum(evaluation.kl) / len(evaluation.kl)


def heldout_figures(evaluation: Evaluation) -> dict[str, float]:
    """Figures on validation prompts under names of the table."""
    return {f"ppo/heldout/{name}": value for name, value in evaluation.figures().items()}
