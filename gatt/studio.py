"""What dialogs are made and measured with: a policy at work, the instructions, and what is said to it."""

from collections.abc import Mapping
from dataclasses import dataclass

from gatt.config import Config
from gatt.values import lists_of
from llamachat.answers.consistency import Outcome, Trial, held_out_trials, measure
from llamachat.answers.desk import Desk, open_desk
from llamachat.answers.making import setting_of
from llamachat.answers.sequences import Sequences, load_sequences
from llamachat.answers.store import Store
from llamachat.constraints import CHECKABLE, Family, families
from llamachat.rollout.engine import Sampling
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs

TURN_SHARE = 8  # a user turn takes at most one in so many tokens of the context: several must fit, with their answers
_MEASURED = ("figure", "hobby", *CHECKABLE)  # families that can be measured without people
_VALUES_SEED, _EVALUATION_SEED = 800_000, 900_000  # past those of the batches


@dataclass(frozen=True, slots=True)
class Studio:
    """One policy, before or after."""

    config: Config
    inputs: StepInputs
    desk: Desk
    families: Mapping[str, Family]
    sequences: Sequences
    longest: int  # tokens of a prompt

    def samplings(self, first: int, turns: int) -> list[Sampling]:
        """How the turns of a batch are sampled, from this number on."""
        return [self.desk.sampling(first + turn, temperature=self.config.temperature) for turn in range(turns)]

    def trials(self) -> list[Trial]:
        """Held-out dialogs, each with one constraint of a held-out value, all families alike."""
        return held_out_trials(
            {name: family for name, family in self.families.items() if name in _MEASURED},
            self.sequences.test,
            count=self.config.evaluation_dialogs,
            seed=self.inputs.run.seed,
        )

    def measure(self, *, is_told: bool) -> Outcome:
        """How far the policy keeps the instructions of the trials, or what it does without being told them."""
        turns = self.config.evaluation_turns
        return measure(
            self.desk.engine,
            self.desk.bank.chat_format,
            self.trials(),
            turns=turns,
            samplings=self.samplings(_EVALUATION_SEED, max(turns)),
            max_tokens=self.longest,
            is_told=is_told,
        )


def open_studio(config: Config, inputs: StepInputs, policy: Artifact | None) -> Studio:
    """Load the policy, and the reward models where answers are ranked by them; read dialogs and values."""
    desk = open_desk(
        setting_of(inputs),
        policy=policy,
        reward_models=inputs.reward_models,
        held_out=None,
        scores=config.ranks_by_reward,
    )
    sequences = load_sequences(
        inputs.data,
        desk.bank.chat_format,
        turns=max(config.turns, *config.evaluation_turns),
        most_tokens=inputs.base.max_tokens // TURN_SHARE,
        seed=inputs.run.seed,
    )
    sampling = desk.sampling(_VALUES_SEED, temperature=config.temperature)
    # Once for the whole step: the policy that was tuned would name others, and before and after could not be compared.
    lists = Store(inputs.folder.sampling).kept(
        "values", lambda: lists_of(config, desk.engine, desk.bank.chat_format, sampling)
    )
    longest = inputs.base.max_tokens - inputs.rollout.max_new_tokens - 1
    return Studio(config, inputs, desk, families(config.families, lists=lists), sequences, longest)
