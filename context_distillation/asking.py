"""Prompts as they are asked: plainly, under a generic preprompt, and under the answer template of their category."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from context_distillation.config import Config
from context_distillation.preprompts import category_of, category_preprompt
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import ConfigError

Way = Literal["original", "generic", "template"]
WAYS: tuple[Way, ...] = ("original", "generic", "template")


@dataclass(frozen=True, slots=True)
class Asked:
    """One adversarial prompt; its preprompted forms are read by the policy alone, and never learnt or scored."""

    original: EncodedPrompt
    generic: EncodedPrompt
    template: EncodedPrompt | None = None  # None where the category is not known, or its template leaves no room
    category: str | None = None

    def way(self, way: Way) -> EncodedPrompt | None:
        """The prompt as it is asked this way."""
        return {"original": self.original, "generic": self.generic, "template": self.template}[way]


def check_preprompts(config: Config, chat_format: ChatFormat) -> None:
    """ConfigError for a preprompt that the chat format cannot hold."""
    texts = {f"preprompts[{place}]": text for place, text in enumerate(config.preprompts)}
    texts |= {f"categories: {name!r}": category_preprompt(name) for name in config.categories}
    for key, text in texts.items():
        try:
            chat_format.check_text((Message("system", text),), field="system")
        except DialogError as error:
            raise ConfigError(
                f"context_distillation.{key} {error.reason} A preprompt stands where a system text stands. Write it otherwise."
            ) from error


def asked_prompts(
    prompts: Sequence[EncodedPrompt], config: Config, chat_format: ChatFormat, *, max_tokens: int, dropped: Counter[str]
) -> list[Asked]:
    """The prompts with their preprompts, the generic ones in turn; those that these leave no room for are counted."""
    found = []
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
        found.append(Asked(prompt, generic, template, category))
    return found


def _under(preprompt: str, prompt: EncodedPrompt, chat_format: ChatFormat, max_tokens: int) -> EncodedPrompt | None:
    """The prompt with the preprompt as its system text, before its own where it has one; None where it gets too long."""
    first, *rest = prompt.messages
    if first.role == "system":
        messages = (Message("system", f"{preprompt}\n\n{first.content}"), *rest)
    else:
        messages = (Message("system", preprompt), *prompt.messages)
    ids = tuple(chat_format.encode_prompt(messages))
    return replace(prompt, messages=messages, ids=ids) if len(ids) <= max_tokens else None
