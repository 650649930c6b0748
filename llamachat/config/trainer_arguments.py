"""A mark for `trainer:` fields, which pass further arguments to a TRL trainer: names are checked, ours are refused.

A value's type is left to TRL.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llamachat.config.section import nearest

_OURS_ALONE = "llamachat sets it itself"
_SHARED = {
    "output_dir": "run.dir",
    "run_name": "run.dir",
    "project": "tracking.project",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "full_determinism": "run.seed",
    "bf16": "base.dtype",
    "fp16": "base.dtype",
    "bf16_full_eval": "base.dtype",
    "fp16_full_eval": "base.dtype",
    "max_length": "base.max_tokens",
    "logging_strategy": "tracking.log_every",
    "logging_steps": "tracking.log_every",
    "logging_first_step": "tracking.log_every",
    "eval_strategy": "tracking.eval_every",
    "eval_steps": "tracking.eval_every",
    "eval_on_start": "tracking.eval_every",
    "do_eval": "tracking.eval_every",
    "save_strategy": "tracking.save_every",
    "save_steps": "tracking.save_every",
    "report_to": "tracking.mode",
}
_SHARED_OURS_ALONE = (
    "resume_from_checkpoint",
    "save_total_limit",
    "save_only_model",
    "load_best_model_at_end",
    "ignore_data_skip",
    "push_to_hub",
    "trust_remote_code",
    "remove_unused_columns",
    "disable_tqdm",
    "do_train",
    "do_predict",
    "auto_find_batch_size",
)


@dataclass(frozen=True, slots=True)
class TrainerArguments:
    """The field holds further arguments of a TRL configuration class such as SFTConfig.

    `owned` maps an argument to the key of ours that sets it, or to None where nothing but our code does.
    """

    class_name: str
    owned: Mapping[str, str | None]

    def problems(self, value: object) -> Iterator[tuple[tuple[str, ...], str]]:
        if not isinstance(value, Mapping):
            return
        owned = {**_SHARED, **dict.fromkeys(_SHARED_OURS_ALONE), **self.owned}
        known = argument_names(self.class_name) if value else frozenset[str]()
        for name in value:
            key = owned.get(name)
            if key is not None:
                yield (
                    (name,),
                    f"this argument of TRL has a key of ours, and one thing is set in one place. Set '{key}'.",
                )
            elif name in owned:
                yield (name,), f"this argument of TRL cannot be chosen: {_OURS_ALONE}. Remove it."
            elif name not in known:
                near = nearest(name, known)
                near = (owned.get(near) or near) if near else None
                advice = f"Did you mean '{near}'?" if near else "Its names are those of the installed TRL."
                yield (name,), f"TRL's {self.class_name} has no argument of this name. {advice}"


def argument_names(class_name: str) -> frozenset[str]:
    """Names that TRL's class takes; imports TRL, which takes seconds, so this is for recipes that set `trainer` alone."""
    import trl

    return frozenset(field.name for field in dataclasses.fields(getattr(trl, class_name)) if field.init)
