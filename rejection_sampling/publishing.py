"""The pool of a round and of those before it, published as dialogs to be learnt."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llamachat.answers.desk import Desk
from llamachat.answers.scorer import longest_prompt
from llamachat.errors import DataError
from llamachat.runs.artifacts import DIALOGS, HELD_OUT_DIALOGS, Artifact, Manifest, publish
from llamachat.runs.atomic import write_text
from llamachat.runs.folder import StepFolder
from llamachat.scoring.models import named_models
from rejection_sampling.config import Inputs
from rejection_sampling.sampling import Round
from rejection_sampling.winners import Winner, dialog_line, earlier_winners, pooled_winners

log = logging.getLogger(__name__)


def earlier_of(inputs: Inputs, desk: Desk, dropped: Counter[str]) -> list[Winner]:
    """The winners of earlier rounds; `dropped` counts those that are left out."""
    longest = longest_prompt(inputs.base, inputs.rollout, desk.bank)
    return earlier_winners(inputs.pooled, desk.bank.chat_format, max_tokens=longest, dropped=dropped)


def pool_of(sampled: Round, earlier: Sequence[Winner]) -> list[Winner]:
    """The round's winners and those of earlier rounds, as the recipe pools them."""
    inputs, desk, config = sampled.inputs, sampled.desk, sampled.config
    pool = pooled_winners(desk, sampled.winners, earlier, keeps_all=config.pool == "all")
    if not pool:
        raise DataError(
            f"{inputs.step}: no answer can be learnt from ({_counted(sampled.counts)}). Raise rollout.max_new_tokens or "
            "rejection_sampling.samples_per_prompt, or tune the policy (`make sft`) until its answers end."
        )
    from_earlier = sum(winner.round != inputs.step for winner in pool)
    log.info(
        "%d winners in the pool, %d of them of earlier rounds (%s); %s",
        len(pool),
        from_earlier,
        ", ".join(inputs.pooled) or "none",
        _counted(sampled.counts),
    )
    return pool


def pool_figures(pool: Sequence[Winner], step: str) -> dict[str, float]:
    """How much is learnt, and how much of it from earlier rounds."""
    from_earlier = sum(winner.round != step for winner in pool)
    return {"rs/pool_size": float(len(pool)), "rs/pool_from_earlier": float(from_earlier)}


def publish_dialogs(sampled: Round, pool: Sequence[Winner]) -> Artifact:
    """Publish what is to be learnt, and the winners of the validation side."""
    inputs, desk = sampled.inputs, sampled.desk
    taken = {"policy": str(inputs.policy.path)} if inputs.policy else {"base": inputs.base.model}
    models = named_models(inputs.scoring, inputs.reward_models)
    taken |= {f"reward_model/{role}": _place(model) for role, model in models.items()}
    taken |= {f"dialogs/{step}": str(artifact.path) for step, artifact in inputs.pooled.items()}
    manifest = Manifest(
        kind="dialogs",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs=taken,
        seed=inputs.run.seed,
        dropped_records=dict(sampled.counts) | desk.questions.dropped,
        details={"dialogs": len(pool), "temperatures": list(sampled.temperatures)},
    )

    def write(place: Path) -> None:
        write_text(place / DIALOGS, "".join(map(dialog_line, pool)))
        if sampled.held_out:
            write_text(place / HELD_OUT_DIALOGS, "".join(map(dialog_line, sampled.held_out)))

    return publish(StepFolder(inputs.folder), manifest, write)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing left out"


def _place(model: Artifact | str) -> str:
    return str(model.path) if isinstance(model, Artifact) else model
