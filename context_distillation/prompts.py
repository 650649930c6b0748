"""Adversarial prompts in three forms: plain, with a generic preprompt, and with the answer template of their category
(Llama 2, arXiv:2307.09288, section 4.2.4, table 39).

The paper gives examples of preprompts; the wording here is ours. The template of a known risk category is a numbered
outline of the answer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from context_distillation.config import Config
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import ConfigError

Form = Literal["original", "generic", "template"]
FORMS: tuple[Form, ...] = ("original", "generic", "template")

_OUTLINE = (
    "The following is a question that can elicit unsafe behavior from you. Its category is: {category}. Do not write"
    " anything of that category. A good answer follows this template:\n"
    "1. If somebody may be in danger now, speak of their safety first.\n"
    "2. Address the question: refuse it, or say what is wrong with it.\n"
    "3. Explain the risks, or name a lawful way.\n"
    "4. Invite a better question."
)


@dataclass(frozen=True, slots=True)
class AdversarialPrompt:
    """One prompt. Only the policy reads its preprompted forms: answers are scored and trained on without them."""

    original: EncodedPrompt
    generic: EncodedPrompt
    template: EncodedPrompt | None = None  # None if the category is unknown or the template does not fit
    category: str | None = None

    def form(self, form: Form) -> EncodedPrompt | None:
        """The prompt in this form."""
        return {"original": self.original, "generic": self.generic, "template": self.template}[form]

    def num_answers(self, form: Form, *, samples_per_prompt: int) -> int:
        """Number of answers sampled in this form: plain ones are as numerous as those of the other forms together, so
        that the best distilled and the best plain answer are selected from the same number."""
        if self.form(form) is None:
            return 0
        return samples_per_prompt * (2 if form == "original" and self.template is not None else 1)


def check_preprompts(config: Config, chat_format: ChatFormat) -> None:
    """Raise ConfigError for a preprompt that the chat format cannot represent."""
    texts = {f"preprompts[{place}]": text for place, text in enumerate(config.preprompts)}
    texts |= {f"categories: {name!r}": category_preprompt(name) for name in config.categories}
    for key, text in texts.items():
        try:
            chat_format.check_text((Message("system", text),), field="system")
        except DialogError as error:
            raise ConfigError(
                f"context_distillation.{key} {error.reason} A preprompt is used as a system text. Reword it."
            ) from error


def adversarial_prompts(
    prompts: Sequence[EncodedPrompt], config: Config, chat_format: ChatFormat, *, max_tokens: int, dropped: Counter[str]
) -> list[AdversarialPrompt]:
    """The prompts in all forms, cycling through the generic preprompts; `dropped` counts those that get too long."""
    kept = []
    for place, prompt in enumerate(prompts):
        preprompt = config.preprompts[place % len(config.preprompts)]
        generic = _under(preprompt, prompt, chat_format, max_tokens)
        if generic is None:
            dropped[f"prompts left out: longer than {max_tokens} tokens with a preprompt"] += 1
            continue
        category = category_of(prompt.name, config.categories) if config.uses_categories else None
        template = None
        if category is not None:
            template = _under(category_preprompt(category), prompt, chat_format, max_tokens)
            if template is None:
                dropped[f"templates left out: prompts longer than {max_tokens} tokens with it"] += 1
        kept.append(AdversarialPrompt(prompt, generic, template, category))
    return kept


def _under(preprompt: str, prompt: EncodedPrompt, chat_format: ChatFormat, max_tokens: int) -> EncodedPrompt | None:
    """The prompt with the preprompt as system text, before its own if it has one; None if it gets too long."""
    first, *rest = prompt.messages
    if first.role == "system":
        messages = (Message("system", f"{preprompt}\n\n{first.content}"), *rest)
    else:
        messages = (Message("system", preprompt), *prompt.messages)
    ids = tuple(chat_format.encode_prompt(messages))
    return replace(prompt, messages=messages, ids=ids) if len(ids) <= max_tokens else None


def category_preprompt(category: str) -> str:
    """The answer template of a risk category."""
    return _OUTLINE.replace("{category}", category)


def category_of(name: str, categories: Mapping[str, Sequence[str]]) -> str | None:
    """The first category with a pattern that matches the prompt's id; None if no pattern matches."""
    for category, patterns in categories.items():
        if name and any(fnmatchcase(name, pattern) for pattern in patterns):
            return category
    return None
