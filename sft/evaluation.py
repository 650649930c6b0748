"""How well a policy predicts held-out answers, and what it says to the same prompts as training goes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llamachat import distributed
from llamachat.chat_format import ChatFormat, TokenizedExample
from llamachat.chat_format.dialog import Message
from llamachat.data.packing import collate_packed, pack
from llamachat.errors import DivergedError
from llamachat.rollout.engine import RolloutEngine, Sampling
from sft.loss import SHAPE_MULTIPLE, answer_token_losses


@torch.no_grad()
def answer_loss(
    model: nn.Module, examples: Sequence[TokenizedExample], *, row_tokens: int, device: torch.device
) -> float:
    """Mean negative log-likelihood of the answer tokens (EOS included), in nats a token, over all `examples`."""
    assert examples, "the caller has held-out dialogs"

    def row_sums(row: Sequence[int]) -> tuple[float, int]:
        batch = collate_packed([examples[index] for index in row], multiple_of=SHAPE_MULTIPLE)
        losses = answer_token_losses(model, {name: tensor.to(device) for name, tensor in batch.items()})
        return float(losses.sum(dtype=torch.float64)), losses.numel()

    was_training = model.training
    model.eval()
    rows = pack([len(example.input_ids) for example in examples], row_tokens)
    sums = distributed.scatter_map(rows, lambda part: list(map(row_sums, part)), model=model)
    model.train(was_training)
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def check_finite(loss: float, what: str) -> None:
    """A model whose loss is no number is neither saved nor published."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"{what} is {loss}. Its weights cannot be mended by more steps, and a policy made of them says nothing. Set"
            " a lower sft.learning_rate or a longer sft.warmup_fraction, and start the step again with `--overwrite`."
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer."""

    prompt: str
    answer: str
    tokens: int
    is_finished: bool


def sample_answers(
    engine: RolloutEngine, chat_format: ChatFormat, prompts: Sequence[Sequence[Message]], *, sampling: Sampling
) -> list[Sample]:
    """One answer to each prompt, with the same seed each time, so that two samples differ by training alone."""
    encoded = [chat_format.encode_prompt(messages) for messages in prompts]
    groups = engine.generate(encoded, samples_per_prompt=1, sampling=sampling)
    return [
        Sample(
            prompt="\n".join(f"{message.role}: {message.content}" for message in messages),
            answer=chat_format.decode_answer(group[0].token_ids),
            tokens=len(group[0].token_ids),
            is_finished=group[0].is_finished,
        )
        for messages, group in zip(prompts, groups, strict=True)
    ]
