"""One policy at work: its answers to held-out prompts, how it keeps instructions, and what more answers are worth.

Each part is written down whole before the next is begun, under a name that holds what it was made of: a killed
evaluation goes on, and one of a run that has a policy more asks the others nothing again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evaluation.config import Config
from llamachat.answers.consistency import Outcome, Trial, held_out_trials, measure
from llamachat.answers.curves import Curve, measure_curve
from llamachat.answers.desk import Desk, open_desk
from llamachat.answers.evaluation import Evaluation, evaluation_of
from llamachat.answers.likelihood import answer_logprobs
from llamachat.answers.making import free_memory, setting_of
from llamachat.answers.packed import TokenSequence, sequence_of
from llamachat.answers.responses import sample
from llamachat.answers.scorer import longest_prompt
from llamachat.answers.sequences import held_out_sequences
from llamachat.answers.store import Store
from llamachat.chat_format import load_chat_format
from llamachat.chat_format.dialog import as_dicts
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.constraints import families
from llamachat.data.prompts import load_borderline
from llamachat.runs.artifacts import Artifact
from llamachat.runs.fingerprints import fingerprint
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.standardising import Constants
from llamachat.training.progress import StepProgress

log = logging.getLogger(__name__)

_TURN_SHARE = 8  # a user turn takes at most one in so many tokens of the context, as in Ghost Attention
_EVALUATION_SEED = 900_000  # of the turns, past those of other batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one policy was found to do."""

    policy: str  # the step that made it
    evaluation: Evaluation  # of the answers to test prompts, with KL to the reference
    is_safety: list[bool]  # of those prompts
    prompts: list[list[dict[str, str]]]  # those prompts as messages
    borderline_prompts: list[list[dict[str, str]]]
    borderline: list[str]  # answers to borderline prompts
    borderline_tokens: list[int]
    borderline_finished: list[bool]
    told: Outcome | None  # of dialogs with an instruction in the first turn
    chance: Outcome | None  # the same told nothing
    curves: list[Curve]


class Examiner:
    """Measures the policies of a run, the reference first: its answers are the scale of all others."""

    def __init__(self, config: Config, inputs: StepInputs) -> None:
        self._config = config
        self._inputs = inputs
        self._store = Store(inputs.folder.sampling)
        self.reference = inputs.policies[0]

    def measure_all(self) -> tuple[list[Measured], list[Trial]]:
        """Every policy in the order of the run, and the trials of those that were told an instruction."""
        policies = self._inputs.policies
        names = [_name(policy) for policy in policies]
        log.info("%d policies on the same prompts: %s", len(policies), ", ".join(names))
        parts = 2 * len(policies)
        done = sum(self._store.has(self._place(policy, "answers")) for policy in policies)
        done += sum(self._store.has(self._place(policy, "kl")) for policy in policies)
        constants: Constants | None = None
        found: list[dict[str, Any]] = []
        with StepProgress(self._inputs.step, steps=parts, done=done) as progress:
            for policy in policies:
                is_new = not self._store.has(self._place(policy, "answers"))
                values = self._measure(policy, constants)
                constants = constants or Constants.from_plain(values["constants"])
                found.append(values)
                if is_new:
                    done += 1
                    score = Evaluation.from_plain(values["evaluation"]).score
                    progress.step(done, f"{_name(policy)}: combined {score:+.3f}")
            self._measure_kl(found, progress, done)
        return [self._measured(policy, values) for policy, values in zip(policies, found, strict=True)], self.trials

    @cached_property
    def trials(self) -> list[Trial]:
        """Held-out dialogs, each with an instruction of a held-out value; the same for every policy."""
        config = self._config
        if config.dialogs == 0:
            return []
        manifest = self.reference.manifest
        chat_format = load_chat_format(manifest.details["chat_format"], load_tokenizer(self.reference.path))
        dialogs = held_out_sequences(
            self._inputs.data,
            chat_format,
            turns=max(config.turns),
            most_tokens=self._inputs.base.max_tokens // _TURN_SHARE,
            seed=self._inputs.run.seed,
        )
        if not dialogs:
            log.info("data.sft gives no test dialogs of %d turns: consistency is not measured.", max(config.turns))
        return held_out_trials(
            families(config.families, lists={}), dialogs, count=config.dialogs, seed=self._inputs.run.seed
        )

    def _measure(self, policy: Artifact, constants: Constants | None) -> dict[str, Any]:
        """Everything but KL; the policy is loaded only where a part is not in the store."""
        desks: list[Desk] = []

        def desk() -> Desk:
            if not desks:
                desks.append(self._open(policy, scores=True))
            return desks[0]

        values = self._store.kept(self._place(policy, "answers"), lambda: self._answers(desk(), constants))
        scale = constants or Constants.from_plain(values["constants"])
        values["borderline"] = self._store.kept(self._place(policy, "borderline"), lambda: self._borderline(desk()))
        is_last = policy is self._inputs.policies[-1]
        for name, is_told in (("told", True), ("chance", False)):
            values[name] = None
            if self.trials and (is_told or is_last):
                values[name] = self._store.kept(
                    self._place(policy, name), lambda told=is_told: self._consistency(desk(), is_told=told).to_plain()
                )
        values["curves"] = []
        for temperature in self._temperatures(policy):

            def make(temperature: float = temperature) -> dict[str, Any]:
                return self._curve(desk(), _name(policy), temperature, scale).to_plain()

            values["curves"].append(self._store.kept(self._place(policy, f"curve-{temperature:g}"), make))
        desks.clear()
        free_memory()
        return values

    def _answers(self, desk: Desk, constants: Constants | None) -> dict[str, Any]:
        prompts = desk.prompts.test
        responses = sample(desk.engine, desk.bank.chat_format, prompts, desk.sampling(0))
        scored = desk.scorer.score(responses, with_judge=True)
        evaluation, scale = evaluation_of(responses, scored, constants)
        sequences = [sequence_of(response) for response in responses]
        return {
            "evaluation": evaluation.to_plain(),
            "constants": scale.to_plain(),
            "prompts": [as_dicts(prompt.messages) for prompt in prompts],
            "is_safety": [prompt.is_safety for prompt in prompts],
            "ids": [[list(one.prompt), list(one.response)] for one in sequences],
            "logprobs": self._logprobs(desk, sequences),
        }

    def _borderline(self, desk: Desk) -> dict[str, Any]:
        inputs = self._inputs
        prompts = load_borderline(
            inputs.data,
            desk.bank.chat_format,
            system=inputs.base.system,
            max_tokens=longest_prompt(inputs.base, inputs.rollout, desk.bank),
            count=self._config.borderline_prompts,
        )
        found = sample(desk.engine, desk.bank.chat_format, prompts, desk.sampling(0)) if prompts else []
        return {
            "prompts": [as_dicts(prompt.messages) for prompt in prompts],
            "texts": [one.text for one in found],
            "tokens": [len(one.ids) for one in found],
            "finished": [one.is_finished for one in found],
        }

    def _consistency(self, desk: Desk, *, is_told: bool) -> Outcome:
        turns = self._config.turns
        return measure(
            desk.engine,
            desk.bank.chat_format,
            self.trials,
            turns=turns,
            samplings=[desk.sampling(_EVALUATION_SEED + turn) for turn in range(max(turns))],
            max_tokens=self._inputs.base.max_tokens - self._inputs.rollout.max_new_tokens - 1,
            is_told=is_told,
        )

    def _temperatures(self, policy: Artifact) -> list[float]:
        """At which its curves are drawn: the recipe's own, and of the first and the last policy the others, too."""
        if not self._config.curve_prompts:
            return []
        own = self._inputs.rollout.temperature
        others = self._config.temperatures if policy in (self.reference, self._inputs.policies[-1]) else ()
        return sorted({temperature for temperature in (own, *others) if temperature > 0})

    def _curve(self, desk: Desk, name: str, temperature: float, constants: Constants) -> Curve:
        return measure_curve(
            desk,
            desk.prompts.test[: self._config.curve_prompts],
            policy=name,
            temperature=temperature,
            samples=self._config.curve_samples,
            constants=constants,
        )

    def _measure_kl(self, found: Sequence[dict[str, Any]], progress: StepProgress, done: int) -> None:
        """Put KL to the reference, nats a response, into each policy's evaluation: the reference reads all answers."""
        desks: list[Desk] = []

        def make(values: dict[str, Any]) -> list[float]:
            if not desks:
                desks.append(self._open(self.reference, scores=False))
            sequences = [TokenSequence(tuple(prompt), tuple(response)) for prompt, response in values["ids"]]
            reference = self._logprobs(desks[0], sequences)
            return [own - other for own, other in zip(values["logprobs"], reference, strict=True)]

        for policy, values in zip(self._inputs.policies, found, strict=True):
            place = self._place(policy, "kl")
            is_new = not self._store.has(place)
            if self._inputs.rollout.temperature > 0:  # at 0 nothing is drawn, and there is no KL
                values["evaluation"]["kl"] = self._store.kept(place, lambda of=values: make(of))
            if is_new:
                done += 1
                progress.step(done, f"{_name(policy)}: KL to {_name(self.reference)}")

    def _logprobs(self, desk: Desk, sequences: Sequence[TokenSequence]) -> list[float]:
        temperature = self._inputs.rollout.temperature
        return answer_logprobs(desk.bank, sequences, temperature=temperature) if temperature > 0 else []

    def _open(self, policy: Artifact, *, scores: bool) -> Desk:
        inputs = self._inputs
        return open_desk(
            setting_of(inputs),
            policy=policy,
            reward_models=inputs.reward_models,
            held_out=(1, self._config.test_prompts) if scores else None,
            scores=scores,
        )

    def _place(self, policy: Artifact, part: str) -> str:
        """The name of a part in the store; it tells whatever the part follows from."""
        identity = dict(self._inputs.identity)
        models = {name: digest for name, digest in identity.pop("inputs").items() if name.startswith("reward_model")}
        made_of = {**identity, "models": models, "policy": policy.digest, "reference": self.reference.digest}
        return f"{_name(policy)}-{fingerprint(made_of)[:12]}-{part}"

    def _measured(self, policy: Artifact, values: dict[str, Any]) -> Measured:
        borderline = values["borderline"]
        return Measured(
            policy=_name(policy),
            evaluation=Evaluation.from_plain(values["evaluation"]),
            is_safety=values["is_safety"],
            prompts=values["prompts"],
            borderline_prompts=borderline["prompts"],
            borderline=borderline["texts"],
            borderline_tokens=borderline["tokens"],
            borderline_finished=borderline["finished"],
            told=None if values["told"] is None else Outcome.from_plain(values["told"]),
            chance=None if values["chance"] is None else Outcome.from_plain(values["chance"]),
            curves=[Curve.from_plain(curve) for curve in values["curves"]],
        )


def _name(policy: Artifact) -> str:
    return policy.manifest.step
