"""Direct preference optimisation at toy size: pairs, and what a stage is handed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo.config import Config
from dpo.pairs import load_examples
from dpo.tuning import Tuning as Pairs
from dpo.tuning import open_reference, plan_training, row_tokens
from llamachat.config.sections import Data, Tuning
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.training.policy import load_start
from llamachat.training.session import Session, resume
from tests.reward.tiny_reward import data_of, toy_pairs
from tests.sft.tiny_sft import FULL, SELDOM
from tests.tiny_steps import toy_inputs


def dpo_inputs(
    folder: Path,
    base: Path,
    *,
    data: Data | None = None,
    tuning: Tuning = FULL,
    tracking: dict[str, Any] | None = None,
    policy: Artifact | None = None,
    **base_changes: Any,
) -> StepInputs:
    """What `pipelines` would hand to the stage for a run in `folder`."""
    return toy_inputs(
        "dpo",
        folder,
        base,
        base_changes=base_changes,
        tracking=SELDOM | (tracking or {}),
        tuning=tuning,
        data=data or data_of(folder, helpfulness=toy_pairs(30), safety=toy_pairs(20, "the moon")),
        policy=policy,
    )


@contextmanager
def open_session(config: Config, inputs: StepInputs) -> Iterator[tuple[Session, Pairs]]:
    """The stage up to where it begins to train, as `dpo.train.run` builds it."""
    resumed = resume(inputs, "dpo", config)
    start = load_start(inputs)
    use_sequence_attention(start.model)
    examples = load_examples(
        inputs.data, start.chat_format, base=inputs.base, num_prompts=config.sample_prompts, seed=inputs.run.seed
    )
    path = inputs.folder.checkpoints / "reference.safetensors"
    reference = open_reference(path, start.model, examples, row_tokens=row_tokens(config, inputs, start.model))
    plan = plan_training(config, inputs, examples, model=start.model)
    tuning = Pairs(config, inputs, start.model, start.chat_format, examples, *reference, plan)
    with resumed.session(tuning, prefix="dpo", unit="pair") as session:
        yield session, tuning
