"""Inputs of Ghost Attention's sampling and evaluation: a policy, constraint values, and sequences of user turns.

Public figures, hobbies and languages are read from files or sampled from the policy, as in the paper (Llama 2, section
3.3).
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gatt.config import Config
from llamachat.answers.cache import StepCache
from llamachat.answers.consistency import Outcome, Sequences, Trial, held_out_trials, load_sequences, run_trials
from llamachat.answers.session import AnswerSession, open_session
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.config.sections import here_or_bundled
from llamachat.constraints.families import CHECKABLE, LISTS, Family, families
from llamachat.constraints.values import parse_list, read_list
from llamachat.errors import DataError
from llamachat.rollout.engine import RolloutEngine, Sampling, scatter_generate
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs

log = logging.getLogger(__name__)

FEWEST = 12  # minimum number of values in a family, some of which are held out
LISTS_SAMPLED = 32  # answers sampled for each list
QUESTIONS = {
    "figures": "Write a list of twenty famous public figures, one name a line.",
    "hobbies": "Write a list of twenty hobbies, one a line.",
    "languages": "Write a list of twenty languages, one a line.",
}
_MEASURED = ("figure", "hobby", *CHECKABLE)  # families that can be measured automatically
_VALUES_SEED = 800_000  # above the seeds of the batches


@dataclass(frozen=True, slots=True)
class GattSession:
    """A policy, before or after tuning, with constraints and user turns."""

    config: Config
    answers: AnswerSession
    families: Mapping[str, Family]
    sequences: Sequences

    def trials(self) -> list[Trial]:
        """Held-out dialogs, each with one constraint with a held-out value; the same number for each family."""
        return held_out_trials(
            {name: family for name, family in self.families.items() if name in _MEASURED},
            self.sequences.test,
            count=self.config.evaluation_dialogs,
            seed=self.answers.inputs.run.seed,
        )

    def measure(self, *, has_instruction: bool) -> Outcome:
        """Measure how well the policy keeps the trials' instructions, or the chance level without them."""
        return run_trials(
            self.answers,
            self.trials(),
            turns=self.config.evaluation_turns,
            has_instruction=has_instruction,
            temperature=self.config.temperature,
        )


def open_gatt(config: Config, inputs: StepInputs, policy: Artifact | None) -> GattSession:
    """Load the policy, the reward models if they rank answers, dialogs and values."""
    session = open_session(inputs, policy=policy, held_out=None, scores=config.ranks_by_reward)
    sequences = load_sequences(
        inputs.data,
        session.chat_format,
        turns=max(config.turns, *config.evaluation_turns),
        context=inputs.base.max_tokens,
        seed=inputs.run.seed,
    )
    sampling = session.sampling(_VALUES_SEED, temperature=config.temperature)
    # Once for the whole step: the tuned policy would name other values, and results would not be comparable.
    lists = StepCache(inputs.folder.sampling).get_or_make(
        "values", lambda: lists_of(config, session.engine, session.chat_format, sampling)
    )
    return GattSession(config, session, families(config.families, lists=lists), sequences)


def lists_of(
    config: Config, engine: RolloutEngine, chat_format: ChatFormat, sampling: Sampling
) -> dict[str, list[str]]:
    """Values by list, for the recipe's families that use a list."""
    names = [name for family, name in LISTS.items() if family in config.families]
    if config.values == "policy":
        return {name: _from_policy(name, engine, chat_format, sampling) for name in names}
    places = {name: getattr(config.lists, name) for name in names}
    lists = {name: list(read_list(here_or_bundled(places[name]))) for name in names}
    for name, values in lists.items():
        for value in values:
            reason = _fault(value, chat_format)
            if reason:
                raise DataError(f"{places[name]}: the entry {value!r} {reason} Reword it, or remove it.")
    return lists


def _from_policy(name: str, engine: RolloutEngine, chat_format: ChatFormat, sampling: Sampling) -> list[str]:
    """Entries in the policy's answers to a request for a list, the most frequent first."""
    prompt = chat_format.encode_prompt([Message("user", QUESTIONS[name])])
    (completions,) = scatter_generate(engine, [prompt], samples_per_prompt=LISTS_SAMPLED, sampling=sampling)
    counts: Counter[str] = Counter()
    spelling: dict[str, str] = {}
    for completion in completions:
        for entry in parse_list(chat_format.decode_answer(completion.token_ids)):
            if _fault(entry, chat_format) is None:
                spelling.setdefault(entry.casefold(), entry)
                counts[entry.casefold()] += 1
    if len(counts) < FEWEST:
        raise DataError(
            f"gatt.values: policy, but the policy named only {len(counts)} {name} in {LISTS_SAMPLED} answers, and {FEWEST} are "
            "needed, some of them for testing. Read them from files (gatt.values=lists), or tune the policy first."
        )
    log.info("%d %s named by the policy", len(counts), name)
    return [spelling[entry] for entry, _ in counts.most_common()]


def _fault(value: str, chat_format: ChatFormat) -> str | None:
    """Why the value cannot be used in an instruction, or None."""
    try:
        chat_format.check_text((Message("system", value),))
    except DialogError as error:
        return error.reason
    return None
