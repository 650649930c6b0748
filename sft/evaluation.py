"""How well a policy predicts held-out answers, and what it says to the same prompts as training goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamachat.batching import collate_packed, pack
from llamachat.chat_format import ChatFormat, TokenizedExample
from llamachat.dialog import Message
from llamachat.rollout.engine import RolloutEngine, Sampling

TOKENS_PER_CHUNK = 2048  # logits of so many tokens at once: [2048, 32000] fp32 is a quarter of a GiB


@torch.no_grad()
def answer_loss(
    model: nn.Module, examples: Sequence[TokenizedExample], *, max_tokens: int, device: torch.device
) -> float:
    """Mean negative log-likelihood of the answer tokens (EOS included), in nats a token, over all `examples`."""
    assert examples, "the caller has held-out dialogs"
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for row in pack([len(example.input_ids) for example in examples], max_tokens):
        batch = collate_packed([examples[index] for index in row])
        losses = _token_losses(model, {name: tensor.to(device) for name, tensor in batch.items()})
        total += float(losses.sum(dtype=torch.float64))
        count += losses.numel()
    model.train(was_training)
    return total / count


def _token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Losses of the tokens in the loss, [number of them]."""
    labels_T = batch["labels"][0, 1:]
    kept_T = labels_T != -100
    hidden_TD = model.get_decoder()(  # type: ignore[operator]  # transformers' name for the trunk without its head
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()  # type: ignore[operator]
    losses = [
        nn.functional.cross_entropy(head(hidden).float(), labels, reduction="none")
        for hidden, labels in zip(
            hidden_TD[kept_T].split(TOKENS_PER_CHUNK), labels_T[kept_T].split(TOKENS_PER_CHUNK), strict=True
        )
    ]
    return torch.cat(losses) if losses else labels_T.new_zeros(0, dtype=torch.float32)


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
