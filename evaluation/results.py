"""Evaluate one policy at a time: answers to held-out prompts, instructions kept, and reward by number of answers.

Each part is cached before the next begins, under a name with a fingerprint of its inputs: a killed evaluation resumes,
and adding a policy to a run does not sample the others again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

from evaluation.config import Config
from evaluation.guard import load_guard
from llamachat import distributed
from llamachat.answers.best_of_n import measure_curve
from llamachat.answers.cache import StepCache
from llamachat.answers.consistency import Outcome, Trial, held_out_trials, load_sequences, run_trials
from llamachat.answers.evaluation import Evaluation, evaluation_of
from llamachat.answers.packed import TokenSequence, answer_logprobs, sequence_of
from llamachat.answers.session import AnswerSession, free_memory, open_session
from llamachat.chat_format import load_chat_format
from llamachat.chat_format.dialog import as_dicts
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.constraints.families import families
from llamachat.runs.artifacts import Artifact
from llamachat.runs.fingerprints import fingerprint
from llamachat.runs.inputs import StepInputs
from llamachat.runs.reader import Curve
from llamachat.scoring.standardising import Constants
from llamachat.tables import plural
from llamachat.training.progress import StepProgress

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy's answers with scores, instructions kept, and curves."""

    policy: str  # the step that produced it
    evaluation: Evaluation  # of the answers to test prompts, with KL to the reference
    is_safety: list[bool]  # of those prompts
    prompts: list[list[dict[str, str]]]  # those prompts as messages
    borderline_prompts: list[list[dict[str, str]]]
    borderline: list[str]  # answers to borderline prompts
    borderline_files: list[str]  # files of these prompts, by their names in figures
    borderline_tokens: list[int]
    borderline_finished: list[bool]
    instructed: Outcome | None  # dialogs with an instruction in the first turn
    chance: Outcome | None  # the same without the instruction
    curves: list[Curve]
    guarded: list[bool | None] | None = None  # violations among the answers to is_safety prompts, by evaluation.guard


@contextmanager
def _each_message_once() -> Iterator[None]:
    """Log each message once within the block: every policy is opened with the same reward models and prompts."""
    texts = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (text in texts or texts.add(text))

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


class RunEvaluation:
    """Evaluates the policies of a run, starting with the reference, whose answers set the scale of all scores."""

    def __init__(self, config: Config, inputs: StepInputs) -> None:
        self._config = config
        self._inputs = inputs
        self._cache = StepCache(inputs.folder.sampling)
        self._policies = inputs.policies
        self.reference = self._policies[0]

    def results(self) -> tuple[list[PolicyResult], list[Trial]]:
        """Results of every policy in the order of the run, and the trials with an instruction."""
        policies, has = self._policies, self._cache.has
        log.info(
            "%s on the same prompts: %s",
            plural(len(policies), "policy", "policies"),
            ", ".join(one.manifest.step for one in policies),
        )
        done = sum(has(self._place(policy, "answers")) for policy in policies)
        constants: Constants | None = None
        results: list[dict[str, Any]] = []
        with StepProgress(self._inputs.step, steps=len(policies), done=done) as progress, _each_message_once():
            for policy in policies:
                is_new = not has(self._place(policy, "answers"))
                values = self._sample(policy, constants)
                constants = constants or Constants.from_plain(values["constants"])
                results.append(values)
                if is_new:
                    done += 1
                    score = Evaluation(**values["evaluation"]).score
                    progress.step(done, f"{policy.manifest.step}: combined {score:+.3f}")
        self._add_kl(results)
        self._add_guard(results)
        return [_result(policy, values) for policy, values in zip(policies, results, strict=True)], self.trials

    @cached_property
    def trials(self) -> list[Trial]:
        """Held-out dialogs, each with an instruction with a held-out value; the same for every policy."""
        config, inputs = self._config, self._inputs
        if config.dialogs == 0:
            return []
        manifest = self.reference.manifest
        chat_format = load_chat_format(manifest.details["chat_format"], load_tokenizer(self.reference.path))
        dialogs = load_sequences(
            inputs.data,
            chat_format,
            turns=max(config.turns),
            context=inputs.base.max_tokens,
            seed=inputs.run.seed,
            only_test=True,
        ).test
        if not dialogs:
            log.info("data.sft has no test dialogs of %d turns, so consistency is not measured.", max(config.turns))
        return held_out_trials(families(config.families, lists={}), dialogs, count=config.dialogs, seed=inputs.run.seed)

    def _sample(self, policy: Artifact, constants: Constants | None) -> dict[str, Any]:
        """Everything except KL; the policy is loaded only if a part is not cached."""
        config = self._config

        @cache
        def session() -> AnswerSession:
            return self._open(policy, scores=True)

        def part(name: str, make: Callable[[], Any]) -> Any:
            return self._cache.get_or_make(self._place(policy, name), make)

        values = part("answers", lambda: self._answers(session(), constants))
        scale = constants or Constants.from_plain(values["constants"])
        values["borderline"] = part("borderline", lambda: self._borderline(session()))
        is_last = policy is self._policies[-1]
        for name, has_instruction in (("instructed", True), ("chance", False)):
            values[name] = None
            if self.trials and (has_instruction or is_last):
                values[name] = part(
                    name,
                    lambda reads=has_instruction: asdict(
                        run_trials(session(), self.trials, turns=config.turns, has_instruction=reads)
                    ),
                )
        values["curves"] = [
            part(f"curve-{temperature:g}", lambda at=temperature: asdict(self._curve(session(), policy, at, scale)))
            for temperature in self._temperatures(policy)
        ]
        session.cache_clear()
        free_memory()
        return values

    def _answers(self, session: AnswerSession, constants: Constants | None) -> dict[str, Any]:
        prompts = session.prompts.test
        responses, scored = session.answer_held_out(prompts)
        evaluation, scale = evaluation_of(responses, scored, constants, scoring=self._inputs.scoring)
        sequences = [sequence_of(response) for response in responses]
        return {
            "evaluation": asdict(evaluation),
            "constants": asdict(scale),
            "prompts": [as_dicts(prompt.messages) for prompt in prompts],
            "is_safety": [prompt.is_safety for prompt in prompts],
            "ids": [[list(one.prompt), list(one.response)] for one in sequences],
            "logprobs": self._logprobs(session, sequences),
        }

    def _borderline(self, session: AnswerSession) -> dict[str, Any]:
        by_file = session.answer_borderline(self._config.borderline_prompts)
        responses = [response for of_file in by_file.values() for response in of_file]
        return {
            "files": [name for name, of_file in by_file.items() for _ in of_file],
            "prompts": [as_dicts(one.prompt.messages) for one in responses],
            "texts": [one.text for one in responses],
            "tokens": [len(one.ids) for one in responses],
            "finished": [one.is_finished for one in responses],
        }

    def _temperatures(self, policy: Artifact) -> list[float]:
        """The temperatures of its curves: the recipe's and, for the first and last policy, the others too."""
        if not self._config.curve_prompts:
            return []
        own = self._inputs.rollout.temperature
        others = self._config.temperatures if policy in (self.reference, self._policies[-1]) else ()
        return sorted({temperature for temperature in (own, *others) if temperature > 0})

    def _curve(self, session: AnswerSession, policy: Artifact, temperature: float, constants: Constants) -> Curve:
        return measure_curve(
            session,
            session.prompts.test[: self._config.curve_prompts],
            policy=policy.manifest.step,
            temperature=temperature,
            samples=self._config.curve_samples,
            constants=constants,
        )

    def _add_kl(self, results: Sequence[dict[str, Any]]) -> None:
        """Add the KL to the reference, in nats per response, to each evaluation; the reference scores all answers."""

        @cache
        def reference() -> AnswerSession:
            return self._open(self.reference, scores=False)

        def make(values: dict[str, Any]) -> list[float]:
            sequences = [TokenSequence(tuple(prompt), tuple(response)) for prompt, response in values["ids"]]
            logprobs = self._logprobs(reference(), sequences)
            return [own - other for own, other in zip(values["logprobs"], logprobs, strict=True)]

        for policy, values in zip(self._policies, results, strict=True):
            if self._has_kl:
                place = self._place(policy, "kl")
                values["evaluation"]["kl"] = self._cache.get_or_make(place, lambda of=values: make(of))

    @property
    def _has_kl(self) -> bool:
        """Whether answers are sampled from the policy's full distribution. Decoding at temperature 0 is deterministic;
        with top-p or top-k the reference may exclude a sampled token, which makes the KL infinite."""
        rollout = self._inputs.rollout
        return rollout.temperature > 0 and rollout.top_p == 1 and rollout.top_k is None

    def _add_guard(self, results: Sequence[dict[str, Any]]) -> None:
        """Add the safety classifier's verdicts on answers to is_safety prompts to each policy's values."""
        name = self._config.guard
        if name is None:
            return
        guard = cache(lambda: load_guard(name))
        for policy, values in zip(self._policies, results, strict=True):
            rows = zip(values["prompts"], values["evaluation"]["texts"], values["is_safety"], strict=True)
            exchanges = [(prompt, text) for prompt, text, is_safety in rows if is_safety]
            values["guarded"] = self._cache.get_or_make(
                self._place(policy, "guard"),
                lambda pairs=exchanges: distributed.scatter_map(pairs, lambda mine: guard().are_violations(mine)),
            )

    def _logprobs(self, session: AnswerSession, sequences: Sequence[TokenSequence]) -> list[float]:
        temperature = self._inputs.rollout.temperature
        return answer_logprobs(session.bank, sequences, temperature=temperature) if self._has_kl else []

    def _open(self, policy: Artifact, *, scores: bool) -> AnswerSession:
        held_out = (1, self._config.test_prompts) if scores else None
        return open_session(self._inputs, policy=policy, held_out=held_out, scores=scores)

    def _place(self, policy: Artifact, part: str) -> str:
        """The name of a part in the cache, with a fingerprint of all its inputs."""
        identity = dict(self._inputs.identity)
        models = {name: digest for name, digest in identity.pop("inputs").items() if name.startswith("reward_model")}
        inputs = {**identity, "models": models, "policy": policy.digest, "reference": self.reference.digest}
        return f"{policy.manifest.step}-{fingerprint(inputs)[:12]}-{part}"


def _result(policy: Artifact, values: dict[str, Any]) -> PolicyResult:
    borderline = values["borderline"]
    return PolicyResult(
        policy=policy.manifest.step,
        evaluation=Evaluation(**values["evaluation"]),
        is_safety=values["is_safety"],
        prompts=values["prompts"],
        borderline_prompts=borderline["prompts"],
        borderline=borderline["texts"],
        borderline_files=borderline["files"],
        borderline_tokens=borderline["tokens"],
        borderline_finished=borderline["finished"],
        instructed=None if values["instructed"] is None else Outcome.from_plain(values["instructed"]),
        chance=None if values["chance"] is None else Outcome.from_plain(values["chance"]),
        curves=[Curve(**curve) for curve in values["curves"]],
        guarded=values.get("guarded"),
    )
