"""The pool of a round and of those before it, published as dialogs to be learnt."""

import logging
from collections import Counter
from collections.abc import Sequence

from llamachat.answers.desk import Desk
from llamachat.answers.making import counted
from llamachat.answers.making import publish_dialogs as publish_made
from llamachat.answers.scorer import longest_prompt
from llamachat.errors import DataError
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from rejection_sampling.sampling import Round
from rejection_sampling.winners import Winner, dialog_line, earlier_winners, pooled_winners

log = logging.getLogger(__name__)


def earlier_of(inputs: StepInputs, desk: Desk, dropped: Counter[str]) -> list[Winner]:
    """The winners of earlier rounds; `dropped` counts those that are left out."""
    longest = longest_prompt(inputs.base, inputs.rollout, desk.bank)
    return earlier_winners(inputs.pooled, desk.bank.chat_format, max_tokens=longest, dropped=dropped)


def pool_of(sampled: Round, earlier: Sequence[Winner]) -> list[Winner]:
    """The round's winners and those of earlier rounds, as the recipe pools them."""
    inputs, desk, config = sampled.inputs, sampled.desk, sampled.config
    pool = pooled_winners(desk, sampled.winners, earlier, keeps_all=config.pool == "all")
    if not pool:
        raise DataError(
            f"{inputs.step}: no answer can be learnt from ({counted(sampled.counts)}). Raise rollout.max_new_tokens or "
            "rejection_sampling.samples_per_prompt, or tune the policy (`make sft`) until its answers end."
        )
    from_earlier = sum(winner.round != inputs.step for winner in pool)
    log.info(
        "%d winners in the pool, %d of them of earlier rounds (%s); %s",
        len(pool),
        from_earlier,
        ", ".join(inputs.pooled) or "none",
        counted(sampled.counts),
    )
    return pool


def pool_figures(pool: Sequence[Winner], step: str) -> dict[str, float]:
    """How much is learnt, and how much of it from earlier rounds."""
    from_earlier = sum(winner.round != step for winner in pool)
    return {"rs/pool_size": float(len(pool)), "rs/pool_from_earlier": float(from_earlier)}


def publish_dialogs(sampled: Round, pool: Sequence[Winner]) -> Artifact:
    """Publish what is to be learnt, and the winners of the validation side."""
    inputs = sampled.inputs
    return publish_made(
        inputs,
        map(dialog_line, pool),
        [dialog_line(winner) for winner in sampled.held_out],
        dropped=dict(sampled.counts) | sampled.desk.prompts.dropped,
        details={"dialogs": len(pool), "temperatures": list(sampled.temperatures)} | sampled.hours.details,
        read={f"dialogs/{step}": artifact for step, artifact in inputs.pooled.items()},
    )
