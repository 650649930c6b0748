"""Supervised fine-tuning with TRL's `SFTTrainer`: rows of dialogs as token ids, held-out loss and samples.

The data set contains row numbers and our collator makes the tensors, because a packed row needs `position_ids` and no
attention mask to separate its dialogs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from llamachat import distributed
from llamachat.chat_format import ChatFormat, TokenizedExample
from llamachat.data.packing import StepPlan, collate_packed, collate_padded, pack, plan_steps
from llamachat.runs.inputs import StepInputs
from llamachat.tracking.tracker import Tracker
from llamachat.training.out_of_memory import warn_of_halving
from llamachat.training.samples import record_samples
from llamachat.training.session import Evaluated
from llamachat.training.trainer import AtomicCheckpoints, make_optimizer
from sft.config import CPU_ROW_TOKENS, Config
from sft.examples import Examples
from sft.loss import SHAPE_MULTIPLE, answer_token_losses

NAMES = {"loss": "sft/loss", "grad_norm": "optim/grad_norm", "learning_rate": "optim/learning_rate"}


class AnswerTrainer(AtomicCheckpoints, SFTTrainer):
    """`SFTTrainer` that computes logits only for answer tokens on a CPU."""

    args: SFTConfig

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The summed loss of the answer tokens, divided by their number in the whole optimizer step.

        On a GPU TRL's fused head only scores answer tokens. On a CPU it scores every position, which takes 1.5 times
        as long, so the same loss is computed here from the answer positions.
        """
        is_plain = self.args.loss_type == "nll" and self.args.label_smoothing_factor == 0 and not return_outputs
        if not is_plain or inputs["input_ids"].is_cuda:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = answer_token_losses(model, inputs)
        total = losses.numel() if num_items_in_batch is None else num_items_in_batch
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() * scale / torch.as_tensor(total).clamp(min=1)


@dataclass(frozen=True)
class Tuning:
    """A model, dialogs, and the rows they are packed into (a `llamachat.training.session.Training`)."""

    config: Config
    inputs: StepInputs
    model: Any  # a transformers language model, optionally with a PEFT adapter
    chat_format: ChatFormat
    examples: Examples
    plan: StepPlan

    @property
    def names(self) -> Mapping[str, str]:
        """Maps the trainer's figures to our metric names."""
        return NAMES

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of rows of the plan: one packed row, or several padded dialogs."""
        rows = [[self.examples.train[index] for index in self.plan.rows[number]] for number in numbers]
        if self.config.packing:
            (row,) = rows  # several packed rows in one forward pass would cost quadratic attention
            return collate_packed(row, multiple_of=SHAPE_MULTIPLE)
        return collate_padded([example for row in rows for example in row], rows=len(rows), multiple_of=SHAPE_MULTIPLE)

    def trainer(self, arguments: dict[str, Any], **parts: Any) -> AnswerTrainer:
        """TRL's trainer of the model."""
        return AnswerTrainer(
            model=self.model,
            args=SFTConfig(**{"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, **arguments}),
            optimizers=make_optimizer(self.model, self.config, steps=self.plan.num_steps),
            **parts,
        )

    def progress(self, step: int) -> dict[str, float]:
        """Epochs and answer tokens in the loss up to this step."""
        epochs = step * self.config.examples_per_step / len(self.examples.train)
        return {
            "sft/epoch": min(epochs, self.config.epochs),
            "sft/trained_tokens": float(self._trained_tokens[step - 1]),
        }

    @cached_property
    def _trained_tokens(self) -> list[int]:
        """Cumulative number of answer tokens in the loss, for each step."""
        sizes = [sum(example.loss_mask) for example in self.examples.train]
        steps = map(self.plan.step_rows, range(self.plan.num_steps))
        return list(accumulate(sum(sizes[index] for row in rows for index in row) for rows in steps))

    def evaluate(self, step: int) -> Evaluated:
        """Loss on held-out answers; before the first step it is the loss of the base."""
        row_tokens = CPU_ROW_TOKENS if self.device.type == "cpu" else _row_tokens(self.config, self.inputs, self.device)
        loss = answer_loss(self.model, self.examples.validation, row_tokens=row_tokens, device=self.device)
        figures = {"sft/eval_loss": loss}
        if step == 0:
            figures = {"sft/eval_loss_base": loss, **figures}
        return Evaluated(step, loss, figures, f"held-out answers {loss:.4f} nats per token")

    def sample(self, tracker: Tracker, step: int) -> None:
        """Log sample answers to the same held-out prompts at every evaluation."""
        record_samples(self.model, self.chat_format, self.examples.prompts, tracker, step, prefix="sft")

    def smaller(self) -> "Tuning | None":
        """The same optimizer steps in micro-batches of half the size; None if each is already a single dialog."""
        longest = self._longest_row()
        if self.config.packing:
            key, before, least = "row_tokens", longest, 16
        else:
            key, before, least = "rows_per_microbatch", self.plan.rows_per_microbatch, 1
        after = before // 2
        if after < least:
            return None
        config = self.config.model_copy(update={key: after})
        smaller = replace(
            self, config=config, plan=plan_training(config, self.inputs, self.examples, device=self.device)
        )
        if self.config.packing and smaller._longest_row() == longest:  # a long dialog has a row to itself
            return None
        warn_of_halving(self.inputs.step, f"sft.{key}", before, after, unit="dialog")
        return smaller

    def _longest_row(self) -> int:
        """Number of tokens in the longest row, without padding."""
        return max(sum(len(self.examples.train[index].input_ids) for index in row) for row in self.plan.rows)


def plan_training(config: Config, inputs: StepInputs, examples: Examples, *, device: torch.device) -> StepPlan:
    """Assign dialogs to optimizer steps."""
    return plan_steps(
        [len(example.input_ids) for example in examples.train],
        examples_per_step=config.examples_per_step,
        epochs=config.epochs,
        seed=inputs.run.seed,
        capacity=_row_tokens(config, inputs, device),
        packing=config.packing,
        rows_per_microbatch=1 if config.packing else config.rows_per_microbatch,
        world_size=distributed.count(),
    )


def _row_tokens(config: Config, inputs: StepInputs, device: torch.device) -> int:
    """Length of a packed row."""
    if device.type == "cpu":
        return CPU_ROW_TOKENS if config.row_tokens == "auto" else config.row_tokens
    return inputs.base.max_tokens if config.row_tokens == "auto" else min(config.row_tokens, inputs.base.max_tokens)


@torch.no_grad()
def answer_loss(
    model: nn.Module, examples: Sequence[TokenizedExample], *, row_tokens: int, device: torch.device
) -> float:
    """Mean negative log-likelihood of the answer tokens of `examples`, including EOS, in nats per token."""
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
