"""A mark for `trainer:` fields, which pass further arguments to a TRL trainer: names are checked, ours are refused.

The names are read from the installed source with `ast`, since importing TRL takes seconds and a configuration is read
by commands that train nothing. A value's type is left to TRL.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llamachat.config.problems import nearest

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
        known = argument_names(self.class_name)
        for name in value:
            key = owned.get(name)
            if key is not None:
                yield (
                    (name,),
                    f"this argument of TRL has a key of ours, and one thing is set in one place. Set '{key}'.",
                )
            elif name in owned:
                yield (name,), f"this argument of TRL cannot be chosen: {_OURS_ALONE}. Remove it."
            elif known and name not in known:
                near = nearest(name, known)
                near = (owned.get(near) or near) if near else None
                advice = f"Did you mean '{near}'?" if near else "Its names are those of the installed TRL."
                yield (name,), f"TRL's {self.class_name} has no argument of this name. {advice}"


@cache
def argument_names(class_name: str) -> frozenset[str]:
    """Names that the installed TRL's class takes, inherited ones included; empty when TRL is not installed."""
    for path in _trl_configurations():
        if f"class {class_name}(" in path.read_text(encoding="utf-8"):
            return frozenset(_fields(path, class_name))
    return frozenset()


def _trl_configurations() -> Iterator[Path]:
    spec = find_spec("trl")  # of a top-level package: finds the folder, runs nothing
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted((Path(folder) / "trainer").glob("*_config.py"))


def _fields(path: Path, class_name: str) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if found is None:
        return
    for statement in found.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_argument(statement):
            yield statement.target.id
    for base in found.bases:
        if isinstance(base, ast.Name):
            home = _home_of(tree, base.id, path)
            if home is not None:
                yield from _fields(home, base.id)


def _is_argument(statement: ast.AnnAssign) -> bool:
    """Whether a line of a dataclass is an argument: no ClassVar, no `field(init=False)`."""
    if "ClassVar" in ast.unparse(statement.annotation):
        return False
    call = statement.value
    return not (
        isinstance(call, ast.Call)
        and any(k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in call.keywords)
    )


def _home_of(tree: ast.Module, name: str, path: Path) -> Path | None:
    """The file that defines a class which the file at `path` imports or holds."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path
        if not isinstance(node, ast.ImportFrom) or all(alias.name != name for alias in node.names):
            continue
        parts = (node.module or "").split(".")
        if node.level:
            module = path.parents[node.level - 1].joinpath(*parts).with_suffix(".py")
        else:
            spec = find_spec(parts[0])
            if spec is None or spec.origin is None:
                return None
            # `from transformers import TrainingArguments`: the package names no file, its source has one home.
            module = Path(spec.origin).parent.joinpath(*(parts[1:] or ["training_args"])).with_suffix(".py")
        return module if module.is_file() else None
    return None
