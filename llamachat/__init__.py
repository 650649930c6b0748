"""Llama 2 base model to chat model, by the recipe of the Llama 2 paper (arXiv:2307.09288): the library that the stages
share.

The programming interface, whose names are imported when they are first used:

    >>> from llamachat import load_policy, load_recipe, read_records
    >>> from llamachat.data.records import Prompt
    >>> prompts = read_records("data/prompts/general.jsonl.gz", Prompt)  # the other kinds: Dialog and Preference
    >>> prompts[2].messages[0].content
    "You see 'Guardians of the Galaxy Vol. 2' yet?"
    >>> policy = load_policy("assets/base")  # a run, step, artifact or model folder, or a hub name
    >>> policy.max_tokens, policy.chat_format.encode_prompt(prompts[2].messages)[0]
    (1024, 1)
    >>> recipe = load_recipe("configs/tiny.yaml", ["sft.epochs=1"])
    >>> [step.name for step in recipe.steps][:3]
    ['sft', 'rm/helpfulness', 'rm/safety']

`run(recipe)` runs or resumes all steps and returns their artifacts; `run(recipe, "sft")` those of one command.
`load_reward_model("runs/tiny/rm/safety").score(dialogs)` scores the last answer of each dialog.
`examples/ppo_by_hand.py` is a training loop that uses them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# `run` and `load_recipe` are above the library, which imports them only when they are used.
_HOMES = {
    "load_policy": ("llamachat.models.loading", "load_policy"),
    "load_reward_model": ("llamachat.models.reward_model", "load_reward_model"),
    "read_records": ("llamachat.data.loading", "read_records"),
    "load_recipe": ("pipelines.recipe.recipe", "load"),
    "run": ("pipelines.execution.run", "run"),
}


def __getattr__(name: str) -> Any:
    """Import a function of the interface when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llamachat' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
