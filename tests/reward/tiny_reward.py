"""Preferences and labels at toy size, and what `pipelines` would hand to the reward stage for them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamachat.config.sections import Data, DataSource, Split, Tuning
from llamachat.models.reward_model import build_reward_model
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs, Which
from llamachat.training.session import Session, resume
from reward.config import Config
from reward.pairs import load_examples
from reward.ranking import Ranking, plan_training
from tests.sft.tiny_sft import FULL, SELDOM
from tests.tiny_steps import toy_inputs

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better", None)


def preference(question: str, chosen: str, rejected: str, **marks: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **{name: value for name, value in marks.items() if value is not None},
    }


def toy_pairs(count: int, word: str = "the capital", **marks: Any) -> list[dict[str, Any]]:
    """Good answers name the word, bad ones name a cat; questions, lengths and ratings differ."""
    return [
        preference(
            f"What is {word} {number:o}?",
            f"It is {word}." + " Yes." * (number % 4),
            "the cat" + " and the cat" * (number % 3) + f" {number:o}",
            rating=RATINGS[number % len(RATINGS)],
            **marks,
        )
        for number in range(count)
    ]


def toy_labels(count: int) -> list[dict[str, Any]]:
    """Every third answer is unsafe: it says so."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Tell me {number:o}"},
                {"role": "assistant", "content": "bad bad" if number % 3 == 0 else "good and kind"},
            ],
            "is_safe": number % 3 != 0,
        }
        for number in range(count)
    ]


def write(path: Path, records: Sequence[dict[str, Any]]) -> tuple[DataSource, ...]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (DataSource(path=str(path)),) if records else ()


def data_of(
    folder: Path,
    *,
    helpfulness: Sequence[dict[str, Any]] = (),
    safety: Sequence[dict[str, Any]] = (),
    open: Sequence[dict[str, Any]] = (),
    labels: Sequence[dict[str, Any]] = (),
    sft: Sequence[dict[str, Any]] = (),
    split: Split | None = None,
) -> Data:
    folder.mkdir(parents=True, exist_ok=True)
    return Data(
        sft=write(folder / "sft.jsonl", sft),
        helpfulness=write(folder / "helpfulness.jsonl", helpfulness),
        safety=write(folder / "safety.jsonl", safety),
        open=write(folder / "open.jsonl", open),
        labels=write(folder / "labels.jsonl", labels),
        split=split or Split(test=0.2, validation=0.2, judge=0),
    )


def reward_inputs(
    folder: Path,
    base: Path,
    *,
    which: Which = "helpfulness",
    data: Data | None = None,
    tuning: Tuning = FULL,
    tracking: dict[str, Any] | None = None,
    policy: Artifact | None = None,
    **base_changes: Any,
) -> StepInputs:
    """What `pipelines` would hand to the stage for a run in `folder`."""
    records: dict[str, Any] = {
        "helpfulness": toy_pairs(40),
        "safety": toy_pairs(20, "the moon"),
        "labels": toy_labels(24),
    }
    return toy_inputs(
        f"rm/{which}",
        folder,
        base,
        base_changes=base_changes,
        tracking=SELDOM | (tracking or {}),
        which=which,
        tuning=tuning,
        data=data or data_of(folder, **records),
        policy=policy,
    )


@contextmanager
def open_session(config: Config, inputs: StepInputs) -> Iterator[tuple[Session, Ranking]]:
    """The stage up to where it begins to train, as `reward.train.run` builds it, without its attention for CPUs."""
    assert inputs.which is not None
    resumed = resume(inputs, "reward", config)
    start = build_reward_model(inputs.base, inputs.tuning, policy=inputs.policy, seed=inputs.run.seed, device="cpu")
    examples = load_examples(
        config,
        inputs.data,
        start.chat_format,
        which=inputs.which,
        system=inputs.base.system,
        max_tokens=inputs.base.max_tokens,
        seed=inputs.run.seed,
    )
    batches = plan_training(config, inputs, examples, device=start.device)
    ranking = Ranking(
        config,
        inputs.step,
        inputs.which,
        start.model,
        start.chat_format,
        examples,
        batches,
        start.language_head() if config.language_weight else None,
    )
    with resumed.session(ranking, prefix=inputs.step, unit="pair") as session:
        yield session, ranking
