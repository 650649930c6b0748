"""Direct preference optimisation of a policy on packed rows of pairs, relative to the policy it started from.

The reference is the starting policy. Its log-probabilities are computed once, before the first step, and saved next to
the checkpoints, so training needs neither a second model nor a second adapter, whatever `tuning.method` is. A policy
that starts as an adapter is compared with that adapter, not with its base.

Loss and gradients equal those of TRL's `DPOTrainer` (`tests/dpo/test_dpo.py`). It is not the base class because it
supports only padding, averages each micro-batch separately, and adds an fp32 reference adapter to every adapter, which
is copied from the trained weights when the trainer is rebuilt with smaller micro-batches.
Shapes: P pairs, B pairs in a row, N answer tokens in a row, D hidden; 2 answers of a pair, the chosen one first.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import DPOConfig

from dpo.config import CPU_ROW_TOKENS, Config
from dpo.loss import dpo_losses
from dpo.pairs import Examples, collate, pair_tokens
from llamachat import distributed
from llamachat.chat_format import ChatFormat
from llamachat.data.packing import StepPlan, pack, plan_steps
from llamachat.data.pairs import PairExample
from llamachat.errors import first_line
from llamachat.maths.logprobs import token_logprobs
from llamachat.models.final_states import final_states
from llamachat.models.sequence_attention import attends_by_sequence
from llamachat.runs.atomic import incoming_file, storage_errors
from llamachat.runs.inputs import StepInputs
from llamachat.tracking.tracker import Tracker
from llamachat.training.out_of_memory import warn_of_halving
from llamachat.training.samples import record_samples
from llamachat.training.session import Evaluated
from llamachat.training.trainer import AtomicCheckpoints, make_optimizer

log = logging.getLogger(__name__)

LEAST_ROW_TOKENS = 16
_COUNTED = ("pairs", "accuracy", "reward_chosen", "reward_rejected")  # the first is the count, the others are sums


class PairTrainer(AtomicCheckpoints):
    """Train on packed rows of pairs with the loss of Rafailov et al. 2023."""

    args: DPOConfig
    # Our losses are already divided by the number of pairs of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(self, *, model: Any, processing_class: Any, **kwargs: Any) -> None:
        # As in TRL's trainers; otherwise `train` does this and logs it at every start.
        model.config.pad_token_id = model.generation_config.pad_token_id = processing_class.pad_token_id
        super().__init__(model=model, processing_class=processing_class, **kwargs)
        self._sums: Tensor | None = None  # sums of _COUNTED since the last log, fp32

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This row's part of the step's mean loss over pairs."""
        assert not return_outputs, "evaluations are ours"
        if len(inputs["reference"]) == 0 and not distributed.is_sharded(model):  # an empty row pads its step
            return 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
        logprobs_B2 = answer_logprobs(model, inputs)
        beta, reference_B2 = self.args.beta, inputs["reference"]
        losses_B = pair_losses(logprobs_B2, reference_B2, beta=beta, label_smoothing=self.args.label_smoothing)
        rewards_B2 = beta * (logprobs_B2.detach() - reference_B2)
        sums = torch.stack([torch.tensor(float(len(rewards_B2)), device=rewards_B2.device), *_sums(rewards_B2)])
        self._sums = sums if self._sums is None else self._sums + sums
        # Gradients are averaged over processes, but these losses are parts of a sum.
        return losses_B.sum() / inputs["pairs_of_step"] * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A process with only empty rows has no sums.
        mine = torch.zeros(len(_COUNTED), device=self.args.device) if self._sums is None else self._sums
        count, *sums = distributed.all_reduce_sum(mine).tolist()
        if count:
            logs |= {name: total / count for name, total in zip(_COUNTED[1:], sums, strict=True)}
        self._sums = None
        super().log(logs, start_time)


@dataclass(frozen=True)
class Tuning:
    """A model, pairs, and the rows they are packed into (a `llamachat.training.session.Training`)."""

    config: Config
    inputs: StepInputs
    model: Any  # a transformers language model, optionally with a PEFT adapter
    chat_format: ChatFormat
    examples: Examples
    reference_P2: Tensor  # the starting policy's log-probabilities of the training pairs' answers
    held_out_reference_P2: Tensor  # the same for the validation pairs
    plan: StepPlan

    @property
    def names(self) -> Mapping[str, str]:
        """Maps the trainer's figures to our metric names."""
        ours = {name: f"dpo/{name}" for name in ("loss", *_COUNTED[1:])}
        return ours | {"grad_norm": "optim/grad_norm", "learning_rate": "optim/learning_rate"}

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of one row of the plan, with its reference and the number of pairs in its step."""
        (number,) = numbers  # several packed rows in one forward pass would cost quadratic attention
        row = list(self.plan.rows[number])
        step = self.plan.step_rows(number // self.plan.rows_per_step)
        pairs = [self.examples.train[index] for index in row]
        return {
            **collate(pairs, branches=attends_by_sequence(self.model)),
            "reference": self.reference_P2[row],
            "pairs_of_step": torch.tensor(float(sum(map(len, step)))),
        }

    def trainer(self, arguments: dict[str, Any], **parts: Any) -> PairTrainer:
        """The trainer of the model."""
        config = self.config
        arguments |= {"beta": config.beta, "label_smoothing": config.label_smoothing}
        optimizers = make_optimizer(self.model, config, steps=self.plan.num_steps)
        return PairTrainer(model=self.model, args=DPOConfig(**arguments), optimizers=optimizers, **parts)

    def progress(self, step: int) -> dict[str, float]:
        """Epochs up to this step."""
        return {"dpo/epoch": self.config.epochs * step / self.plan.num_steps}

    def evaluate(self, step: int) -> Evaluated:
        """Loss without label smoothing, implicit rewards and accuracy on held-out pairs."""
        pairs = self.examples.validation
        logprobs_P2 = pair_logprobs(self.model, pairs, row_tokens=self._row_tokens)
        losses_P = pair_losses(logprobs_P2, self.held_out_reference_P2, beta=self.config.beta, label_smoothing=0.0)
        sums = _sums(self.config.beta * (logprobs_P2 - self.held_out_reference_P2))
        figures = {f"dpo/eval_{name}": float(x) / len(pairs) for name, x in zip(_COUNTED[1:], sums, strict=True)}
        loss, accuracy = float(losses_P.double().mean()), figures["dpo/eval_accuracy"]
        words = f"held-out pairs: {accuracy:.1%} of {len(pairs)} right, loss {loss:.4f}"
        return Evaluated(step, loss, {"dpo/eval_loss": loss, **figures}, words)

    def sample(self, tracker: Tracker, step: int) -> None:
        """Log sample answers to the same held-out prompts."""
        record_samples(self.model, self.chat_format, self.examples.prompts, tracker, step, prefix="dpo")

    def smaller(self) -> "Tuning | None":
        """The same optimizer steps in rows of half the length; None if the longest row is already a single pair."""
        longest = self._longest_row()
        if longest // 2 < LEAST_ROW_TOKENS:
            return None
        config = self.config.model_copy(update={"row_tokens": longest // 2})
        plan = plan_training(config, self.inputs, self.examples, model=self.model)
        smaller = replace(self, config=config, plan=plan)
        if smaller._longest_row() == longest:  # a long pair has a row to itself
            return None
        warn_of_halving(self.inputs.step, "dpo.row_tokens", longest, longest // 2, unit="pair")
        return smaller

    @property
    def _row_tokens(self) -> int:
        return row_tokens(self.config, self.inputs, self.model)

    def _longest_row(self) -> int:
        """Number of tokens in the longest row, without padding."""
        lengths = _lengths(self.examples.train, self.model)
        return max(sum(lengths[index] for index in row) for row in self.plan.rows)


def plan_training(config: Config, inputs: StepInputs, examples: Examples, *, model: nn.Module) -> StepPlan:
    """Assign pairs to optimizer steps."""
    return plan_steps(
        _lengths(examples.train, model),
        examples_per_step=config.pairs_per_step,
        epochs=config.epochs,
        seed=inputs.run.seed,
        capacity=row_tokens(config, inputs, model),
        packing=True,
        world_size=distributed.count(),
    )


def row_tokens(config: Config, inputs: StepInputs, model: nn.Module) -> int:
    """Length of a packed row."""
    auto = CPU_ROW_TOKENS if _device_of(model).type == "cpu" else 2 * inputs.base.max_tokens
    return auto if config.row_tokens == "auto" else config.row_tokens


def open_reference(path: Path, model: nn.Module, examples: Examples, *, row_tokens: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [P, 2] of the training and validation pairs by `model`, the starting policy.

    If the step was started before, they are read from `path`; all processes check for the file before one writes it.
    """
    reference = _read_reference(path)
    if reference is None:
        sides = {"train": examples.train, "validation": examples.validation}
        reference = {name: pair_logprobs(model, pairs, row_tokens=row_tokens) for name, pairs in sides.items()}
        if distributed.is_first():
            with incoming_file(path) as side:
                save_file(reference, side)
    return reference["train"], reference["validation"]


def _read_reference(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with storage_errors(path):
            return load_file(path)
    except SafetensorError as error:
        log.warning("warning: %s: computed again, since the file is damaged (%s)", path, first_line(error))
        return None


@torch.no_grad()
def pair_logprobs(model: nn.Module, pairs: Sequence[PairExample], *, row_tokens: int) -> Tensor:
    """log p(answer | prompt) of both answers of each pair, [P, 2] in nats, fp32 on the CPU, without dropout."""
    device, branches, was_training = _device_of(model), attends_by_sequence(model), model.training

    def of_row(row: Sequence[int]) -> list[list[float]]:
        batch = collate([pairs[index] for index in row], branches=branches)
        return answer_logprobs(model, {name: tensor.to(device) for name, tensor in batch.items()}).tolist()

    model.eval()
    rows = pack(_lengths(pairs, model), row_tokens)
    results = distributed.scatter_map(rows, lambda part: list(map(of_row, part)), model=model)
    model.train(was_training)
    logprobs_P2 = torch.empty(len(pairs), 2)
    for row, logprobs in zip(rows, results, strict=True):
        logprobs_P2[row] = torch.tensor(logprobs)
    return logprobs_P2


def answer_logprobs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """log p(answer | prompt) of both answers of each pair in a packed row, [B, 2] in nats, summed in fp32."""
    llama: Any = model  # methods of transformers and PEFT are reached through nn.Module.__getattr__
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    hidden_ND = final_states(llama.get_decoder(), batch["states_at"], **inputs)
    tokens_N, answers_N = batch["next_tokens"], batch["answers"]
    head = llama.get_output_embeddings()
    logprobs_N = token_logprobs(hidden_ND, tokens_N, head=head).logprobs
    count = int(answers_N[-1]) + 1 if len(answers_N) else 0
    return logprobs_N.new_zeros(count).index_add(0, answers_N, logprobs_N).view(-1, 2)


def pair_losses(logprobs_B2: Tensor, reference_B2: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Losses [B] of pairs, given the answers' log-probabilities under the policy and the reference."""
    policy_B, reference_B = (logprobs[:, 0] - logprobs[:, 1] for logprobs in (logprobs_B2, reference_B2))
    return dpo_losses(policy_B, reference_B, beta=beta, label_smoothing=label_smoothing)


def _sums(rewards_B2: Tensor) -> list[Tensor]:
    """Sums over pairs: correct order (a tie counts half), implicit rewards of chosen and of rejected answers."""
    chosen_B, rejected_B = rewards_B2.unbind(dim=1)
    is_right_B = (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()
    return [is_right_B.sum(), chosen_B.sum(), rejected_B.sum()]


def _lengths(pairs: Sequence[PairExample], model: nn.Module) -> list[int]:
    branches = attends_by_sequence(model)
    return [pair_tokens(pair, branches=branches) for pair in pairs]


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
