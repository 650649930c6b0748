"""Whether an exported folder, loaded by plain transformers, says what the policy says.

Both are asked the same built-in questions. Compared are the log-probabilities (nats) of each token of the policy's own
greedy answers and of built-in answers, the greedy answers themselves, and the ids of the prompts. One thing surprises:
answers are compared as ids, since of bytes that make no character the two tokenizers show different marks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamachat.chat_format.dialog import Message, as_dicts, with_system
from llamachat.errors import ArtifactError
from llamachat.models.loading import Policy
from llamachat.rollout.engine import Sampling
from serving.context import fit, longest_dialog, open_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = (
    ("Hello, who are you?", "I am a language model, and I answer questions."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name three things that one can see in a forest.", "Trees, birds and mushrooms."),
    ("How do I boil an egg?", "Put it into boiling water and take it out after eight minutes."),
    ("Write one sentence about the sea.", "The sea was grey that morning, and nobody was on the beach."),
)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=32, seed=0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy says to one question: ids and log-probabilities of its greedy answer, then of the built-in."""

    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    given_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the exported model is from the policy."""

    max_logprob_difference: float  # of a token's log-probability, in nats
    mean_logprob_difference: float
    tokens: int
    questions: int
    equal_prompts: int  # questions whose prompt ids come out the same through the exported chat template
    equal_greedy_answers: int  # questions whose greedy answer is the same


def answers_of(policy: Policy) -> list[Answer]:
    """What the policy says to each built-in question, asked as `llamachat chat` asks it at temperature 0."""
    engine = open_engine(policy)
    limit = longest_dialog(policy, engine)
    answers = []
    for question, given in QUESTIONS:
        messages = with_system([Message("user", question)], policy.system)
        if fit(policy, messages, limit=limit, max_new_tokens=GREEDY.max_new_tokens) is None:
            continue
        prompt_ids = tuple(policy.chat_format.encode_prompt(messages))
        ((completion,),) = engine.generate([prompt_ids], samples_per_prompt=1, sampling=GREEDY)
        given_ids = _answer_ids(policy, messages, given)[: max(1, limit - len(prompt_ids))]
        logprobs = [_logprobs(policy.model, prompt_ids, ids) for ids in (completion.token_ids, given_ids)]
        answers.append(Answer(messages, prompt_ids, completion.token_ids, given_ids, (*logprobs[0], *logprobs[1])))
    if not answers:
        raise ArtifactError(
            f"{policy.name}: none of the built-in questions fits into the {limit} tokens that it reads. An exported "
            "model is held against the policy on them. Train with a larger base.max_tokens or a shorter base.system."
        )
    return answers


def compare(model: Any, tokenizer: "PreTrainedTokenizerBase", answers: Sequence[Answer]) -> Agreement:
    """Hold what a transformers model says, and the prompts that its tokenizer makes, against the policy's answers."""
    differences: list[float] = []
    equal_prompts = equal_greedy_answers = 0
    for answer in answers:
        logprobs = [
            value for ids in (answer.greedy_ids, answer.given_ids) for value in _logprobs(model, answer.prompt_ids, ids)
        ]
        differences += [abs(ours - theirs) for ours, theirs in zip(answer.logprobs, logprobs, strict=True)]
        prompt: Any = tokenizer.apply_chat_template(
            as_dicts(answer.messages),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        equal_prompts += tuple(prompt["input_ids"][0].tolist()) == answer.prompt_ids
        equal_greedy_answers += _greedy_ids(model, prompt, len(answer.greedy_ids)) == answer.greedy_ids
    # As one that is not a number says nothing, so nothing is hidden by `max`.
    found = torch.tensor(differences, dtype=torch.float64).nan_to_num(nan=float("inf"))
    return Agreement(
        max_logprob_difference=float(found.max()),
        mean_logprob_difference=float(found.mean()),
        tokens=len(differences),
        questions=len(answers),
        equal_prompts=equal_prompts,
        equal_greedy_answers=equal_greedy_answers,
    )


def _answer_ids(policy: Policy, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
    from llamachat.chat_format import TrainOn

    dialog = [*messages, Message("assistant", answer)]
    example = policy.chat_format.encode_dialog(dialog, train_on=TrainOn.LAST_ANSWER)
    return tuple(token for token, is_learnt in zip(example.input_ids, example.loss_mask, strict=True) if is_learnt)


@torch.no_grad()
def _logprobs(model: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> list[float]:
    """Log-probability (nats) of each token of the answer after the prompt."""
    ids_1T = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    logits_TV: Tensor = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False).logits[0]
    logprobs_RV = torch.log_softmax(logits_TV[len(prompt_ids) - 1 : -1].float(), dim=-1)
    return logprobs_RV.gather(1, torch.tensor(answer_ids, device=model.device).unsqueeze(1)).squeeze(1).tolist()


def _greedy_ids(model: Any, prompt: Mapping[str, Any], length: int) -> tuple[int, ...]:
    """An answer of at most `length` tokens, generated as a user of transformers does it."""
    ids = {name: value.to(model.device) for name, value in prompt.items() if name in ("input_ids", "attention_mask")}
    generated = model.generate(**ids, do_sample=False, max_new_tokens=length)
    return tuple(generated[0, ids["input_ids"].shape[1] :].tolist())
