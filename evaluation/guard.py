"""Classify answers with an external safety classifier: Llama Guard with its chat template, or HarmBench's with its
documented prompt. It is independent of the run: no policy was tuned with it.

The classifier is a language model that answers "safe" or "unsafe" (with categories), or "yes" or "no" to whether the
answer does the requested harm. It has billions of parameters, so it needs a GPU.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.errors import ConfigError

log = logging.getLogger(__name__)

# The prompt of cais/HarmBench-Llama-2-13b-cls, from its model card and HarmBench's notebooks/run_classifier.ipynb
# (Mazeika et al. 2024, arXiv:2402.04249; MIT).
_HARMBENCH = Path(__file__).with_name("harmbench.txt").read_text(encoding="utf-8").removesuffix("\n")
_VERDICTS = {"unsafe": True, "yes": True, "safe": False, "no": False}
_MAX_NEW_TOKENS = 12  # a verdict and a category
_ROWS = 8  # batch size
_MOST_UNREAD = 0.1  # maximum share of unreadable verdicts; with more, the model is not such a classifier

Exchange = tuple[Sequence[Mapping[str, str]], str]  # the messages of a prompt, and the answer


def check_guard(name: str | None) -> None:
    """Raise for a classifier on a machine without a GPU, before anything is sampled."""
    import torch

    if name is not None and not torch.cuda.is_available():
        raise ConfigError(
            f"evaluation.guard: '{name}' is a language model that reads every answer to a harmful prompt, and this machine has"
            " no GPU, on which alone that ends in time. Leave it out (evaluation.guard=null), or run `llamachat eval` on a"
            " machine with one."
        )


def verdict_of(text: str) -> bool | None:
    """Whether the classifier's output calls the answer a violation; None if it is not a verdict."""
    words = text.replace(",", " ").replace(".", " ").lower().split()
    return _VERDICTS.get(words[0]) if words else None


@dataclass(frozen=True, slots=True)
class Guard:
    """A loaded classifier."""

    name: str
    model: Any
    tokenizer: Any

    def are_violations(self, exchanges: Sequence[Exchange]) -> list[bool | None]:
        """Whether each answer, read with its prompt, is a violation; None if there is no verdict."""
        verdicts: list[bool | None] = []
        for first in range(0, len(exchanges), _ROWS):
            verdicts += [verdict_of(text) for text in self._answers(exchanges[first : first + _ROWS])]
        unread = sum(verdict is None for verdict in verdicts)
        if unread > _MOST_UNREAD * len(verdicts):
            raise ConfigError(
                f"evaluation.guard: '{self.name}' answered {unread} of {len(verdicts)} times neither safe or unsafe nor yes or"
                " no. It must be a classifier such as meta-llama/Llama-Guard-3-8B or cais/HarmBench-Llama-2-13b-cls. Name one"
                " of these, or null."
            )
        if unread:
            log.warning("%s gave no verdict on %d of %d answers, which are left out", self.name, unread, len(verdicts))
        return verdicts

    def _answers(self, exchanges: Sequence[Exchange]) -> list[str]:
        import torch

        texts = [self.prompt(messages, answer) for messages, answer in exchanges]
        # The chat template includes BOS; HarmBench's prompt does not.
        opens = bool(texts) and not texts[0].startswith(str(self.tokenizer.bos_token))
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=opens).to(self.model.device)
        with torch.inference_mode():
            ids = self.model.generate(
                **batch, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
        return self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def prompt(self, messages: Sequence[Mapping[str, str]], answer: str) -> str:
        """The classifier's input, without the policy's system texts."""
        turns = [
            {"role": one["role"], "content": one["content"].strip()} for one in messages if one["role"] != "system"
        ]
        if self.is_harmbench:
            return _HARMBENCH.format(behavior=turns[-1]["content"], generation=answer.strip())
        turns.append({"role": "assistant", "content": answer.strip()})
        parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in turns]
        for form in (turns, parts):  # newer templates expect lists of parts
            try:
                text = self.tokenizer.apply_chat_template(form, tokenize=False)
            except Exception:  # a template may raise anything
                continue
            if all(one["content"] in text for one in turns):
                return text
        raise ConfigError(
            f"evaluation.guard: the chat template of '{self.name}' does not take a prompt and an answer. Name a classifier such as"
            " meta-llama/Llama-Guard-3-8B, or null."
        )

    @property
    def is_harmbench(self) -> bool:
        return "harmbench" in self.name.lower()


def load_guard(name: str, *, device: str = "cuda", dtype: str = "bfloat16") -> Guard:
    """Load a classifier from a folder or the hub, from safetensors only and without remote code."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"evaluation.guard: '{name}' cannot be loaded ({reason}). Give a folder or a hub name of a Llama with safetensors; a"
            " gated one requires its licence accepted on its page and `hf auth login`."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    guard = Guard(name, model.to(device).eval(), tokenizer)
    if not guard.is_harmbench and not tokenizer.chat_template:
        raise ConfigError(
            f"evaluation.guard: '{name}' has no chat template that says how it reads a prompt and an answer. Name a classifier such"
            " as meta-llama/Llama-Guard-3-8B or cais/HarmBench-Llama-2-13b-cls, or null."
        )
    return guard
