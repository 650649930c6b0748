"""Scores of answers: every reward model reads them, and the recipe's rule combines their scores.

Shapes: B answers. All scores are fp32 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.answers.responses import Response
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.errors import ConfigError
from llamachat.models.roles import REWARD_ROLES
from llamachat.scoring.combining import Combine
from llamachat.scoring.scores import Answers, Combined, Scores

if TYPE_CHECKING:
    from llamachat.config.sections import Base, Rollout
    from llamachat.models.roles import RewardRole, RoleBank


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The reward models' scores of some answers; the judge's scores decide nothing."""

    scores: Scores
    combined: Combined
    judge_B: Tensor | None


@dataclass(frozen=True, slots=True)
class Scorer:
    """The reward models of the bank, and the rule that combines their scores."""

    bank: "RoleBank"
    combine: Combine

    def score(self, responses: Sequence[Response], *, with_judge: bool, reads_text: bool = False) -> Scored:
        """The scores of these answers. With `reads_text`, their texts are encoded and scored instead of the sampled
        ids, as for answers from another source, which have no ids."""
        answers = Answers(
            prompts=[response.prompt.messages for response in responses],
            completions=[response.text for response in responses],
            is_safety_prompt_B=torch.tensor([response.prompt.is_safety for response in responses]),
            is_finished_B=torch.tensor([response.is_finished for response in responses]),
            columns={"id": [response.prompt.name for response in responses]},
        )
        helpfulness_B, safety_B = (self._by(role, responses, reads_text) for role in ("helpfulness", "safety"))
        scores = Scores(helpfulness_B=helpfulness_B, safety_B=safety_B)
        judge_B = self._by("judge", responses, reads_text) if with_judge else None
        # Only the first process combines the scores: a user's function may not be deterministic.
        combined = distributed.broadcast_object(self.combine(scores, answers) if distributed.is_first() else None)
        assert combined is not None, "the first process has combined them"
        return Scored(scores=scores, combined=combined, judge_B=judge_B)

    def _by(self, role: "RewardRole", responses: Sequence[Response], reads_text: bool) -> Tensor | None:
        if role not in self.bank.roles:
            return None
        if self.bank.reads_policy_ids(role) and not reads_text:
            return self._read(role, [self._ids(response) for response in responses])
        return self._by_text(role, responses)

    def _read(self, role: "RewardRole", rows: Sequence[tuple[int, ...]]) -> Tensor:
        """The scores of these rows; several processes share the reading."""
        return torch.tensor(distributed.scatter_map(rows, lambda mine: self.bank.scores(role, mine).tolist()))

    def _ids(self, response: Response) -> tuple[int, ...]:
        """Prompt and answer as sampled, closed with the space and EOS that end every answer of a training pair.

        The policy chooses the last ids itself, and a reward model scores an answer only by its last position: an ending
        that training never showed (EOS without the space, a line break before it) gets a meaningless score,
        which PPO would exploit. So all ids at the end that add nothing to the text are replaced by the closing.
        """
        chat_format, ids = self.bank.chat_format, response.ids
        text = chat_format.decode_answer(ids)
        while ids and chat_format.decode_answer(ids[:-1]) == text:
            ids = ids[:-1]
        return (*response.prompt.ids, *ids, *chat_format.closing_ids)

    def _by_text(self, role: "RewardRole", responses: Sequence[Response]) -> Tensor:
        """Scores by a model with another tokenizer. An answer that it cannot read gets the lowest score of the
        batch."""
        model = self.bank.reward_model(role)
        rows: list[tuple[int, ...]] = []
        readable: list[int] = []
        for index, response in enumerate(responses):
            try:
                rows.append(model.encode((*response.prompt.messages, Message("assistant", response.text))))
                readable.append(index)
            except DialogError:  # empty, with a tag of the chat format, or too long in its tokens
                continue
        scores_B = torch.zeros(len(responses))
        if rows:
            readable_scores_N = self._read(role, rows)
            scores_B[:] = readable_scores_N.min()
            scores_B[torch.tensor(readable)] = readable_scores_N
        return scores_B


def longest_prompt(base: "Base", rollout: "Rollout", bank: "RoleBank") -> int:
    """Tokens of a prompt that leave room for an answer and its closing, for the policy and for each reward model."""
    readable = [bank.reward_model(role).max_tokens for role in REWARD_ROLES if role in bank.roles]
    longest = min([base.max_tokens, *readable]) - rollout.max_new_tokens - len(bank.chat_format.closing_ids)
    if longest < 1:
        raise ConfigError(
            f"rollout.max_new_tokens: {rollout.max_new_tokens}, but a reward model reads at most {min(readable)} "
            "tokens of prompt and answer together, so no prompt fits. Lower it, or train the reward models longer."
        )
    return longest
