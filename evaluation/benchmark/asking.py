"""Ask a policy questions: its greedy answers over one or two turns, or the log-probabilities of given answers."""

from collections.abc import Sequence
from typing import Any

from evaluation.benchmark.sets import Answer, BenchmarkSet, Question, choices
from llamachat.answers.packed import TokenSequence, response_logprobs
from llamachat.chat_format import TrainOn
from llamachat.chat_format.dialog import DialogError, Message, with_system
from llamachat.chat_format.format import fit
from llamachat.config.sections import Rollout
from llamachat.models.final_states import final_states
from llamachat.models.loading import Policy
from llamachat.rollout import open_engine
from llamachat.rollout.engine import Sampling

Texts = list[tuple[str, bool] | None]  # per prompt, the answer and whether it finished; None if it does not fit


class Respondent:
    """A policy that answers at temperature 0."""

    def __init__(self, policy: Policy, *, max_new_tokens: int) -> None:
        self._policy = policy
        self._engine = open_engine(policy.model, policy.chat_format, Rollout())
        self._longest = min(policy.max_tokens, self._engine.context)
        self._sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=max_new_tokens, seed=0)

    def answers(self, of_set: BenchmarkSet, questions: Sequence[Question]) -> list[Answer | None]:
        """The policy's answer to each question; None if question and answer do not fit into its context."""
        if of_set.asks == "choices":
            return self._choices(questions)
        first = self._texts([(Message("user", question.text),) for question in questions])
        turns = [[one] for one in first]
        if of_set.asks == "two turns":
            follow_ups = [Message("user", question.measured["follow_up"]) for question in questions]
            dialogs = [
                None if one is None else (Message("user", question.text), Message("assistant", one[0]), follow_up)
                for question, one, follow_up in zip(questions, first, follow_ups, strict=True)
            ]
            second = self._texts([dialog if dialog and dialog[1].content else () for dialog in dialogs])
            # No turn can follow an empty answer, so the second turn also counts as unanswered.
            turns = [
                [one, ("", True) if one is not None and not one[0] else then]
                for one, then in zip(first, second, strict=True)
            ]
        return [_kept(of_one) for of_one in turns]

    def _texts(self, dialogs: Sequence[tuple[Message, ...]]) -> Texts:
        encoded = {place: ids for place, dialog in enumerate(dialogs) if dialog and (ids := self._encoded(dialog))}
        completions = self._engine.generate(list(encoded.values()), samples_per_prompt=1, sampling=self._sampling)
        texts: Texts = [None] * len(dialogs)
        for place, (completion,) in zip(encoded, completions, strict=True):
            texts[place] = (self._policy.chat_format.decode_answer(completion.token_ids), completion.is_finished)
        return texts

    def _encoded(self, dialog: tuple[Message, ...]) -> list[int] | None:
        """Ids of a dialog, without its first pair if it is too long; None if it does not fit or contains a tag."""
        chat_format, sampling = self._policy.chat_format, self._sampling
        try:
            messages = with_system(dialog, self._policy.system)
            fitting = fit(chat_format, messages, limit=self._longest, max_new_tokens=sampling.max_new_tokens)
            return None if fitting is None else chat_format.encode_prompt(fitting)
        except DialogError:  # the policy's first answer may contain a tag of the format
            return None

    def _choices(self, questions: Sequence[Question]) -> list[Answer | None]:
        sequences = [[self._choice(question, text) for text in choices(question)] for question in questions]
        fitting = [all(len(one.ids) <= self._longest for one in of_one) for of_one in sequences]
        encoded_choices = [one for of_one, fits in zip(sequences, fitting, strict=True) if fits for one in of_one]
        model: Any = self._policy.model
        logprobs = iter(
            response_logprobs(
                encoded_choices,
                states=lambda batch, places: final_states(model.get_decoder(), places, **batch),
                head=model.get_output_embeddings(),
                device=model.device,
                temperature=1.0,
            )
        )
        return [
            {"logprobs": [next(logprobs) for _ in of_one]} if fits else None
            for of_one, fits in zip(sequences, fitting, strict=True)
        ]

    def _choice(self, question: Question, text: str) -> TokenSequence:
        """Ids of an answer as in training, after the prompt: with the leading space, without the stop tokens."""
        chat_format = self._policy.chat_format
        messages = with_system((Message("user", question.text), Message("assistant", text)), self._policy.system)
        example = chat_format.encode_dialog(messages, train_on=TrainOn.LAST_ANSWER)
        begin, end = example.loss_mask.index(True), len(example.input_ids) - len(chat_format.closing_ids)
        return TokenSequence(example.input_ids[:begin], example.input_ids[begin:end])


def _kept(turns: Texts) -> Answer | None:
    """The answers of all turns in the stored form; None if one turn was not asked."""
    answers = [one for one in turns if one is not None]
    if len(answers) < len(turns):
        return None
    return {"texts": [text for text, _ in answers], "finished": [is_finished for _, is_finished in answers]}
