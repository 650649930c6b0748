"""A reward function of the user's: ten lines of Python in a file of their own, named `path.py:function` in the recipe.

    def score(prompts, completions, scores, **columns):
        return [help - 0.01 * len(text) for help, text in zip(scores["helpfulness"], completions)]

`prompts` is a list of message lists ({"role": ..., "content": ...}), `completions` a list of texts, `scores` the raw scores
by model ("helpfulness", "safety": those there are), and `columns` further lists: `is_safety`, `finished`, and what
the step adds. One finite number for each completion comes back. The file is run: it is the user's own.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamachat.chat_format.dialog import as_dicts
from llamachat.config.section import describe, nearest
from llamachat.config.sections import FunctionName, missing
from llamachat.errors import ConfigError, ScoringError
from llamachat.runs.fingerprints import digest_of_file
from llamachat.scoring.scores import Answers, Scores

_SIGNATURE = "fn(prompts, completions, scores, **columns) -> list[float]"


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A user's function, loaded, and the digest of its file, which is part of what a step is made from."""

    name: FunctionName
    call: Callable[..., Any]
    digest: str

    def scores(self, scores: Scores, answers: Answers) -> Tensor:
        """One score for each answer, [B] in fp32; ScoringError if what comes back is something else."""
        arguments = (
            [as_dicts(prompt) for prompt in answers.prompts],
            list(answers.completions),
            {model: scores_B.tolist() for model, scores_B in scores.by_model().items()},
        )
        columns = {
            "is_safety": answers.is_safety_prompt_B.tolist(),
            "finished": answers.is_finished_B.tolist(),
            **{name: list(values) for name, values in answers.columns.items()},
        }
        self._check_signature(arguments, columns)
        try:
            found = self.call(*arguments, **columns)
        except Exception as error:
            raise ScoringError(
                f"{self.name}: it raised {type(error).__name__}: {error} ({_line_of(error, self.name.path)}). The reward"
                f" function must score every batch. Correct it: {_SIGNATURE}."
            ) from error
        device = next((scores_B.device for scores_B in scores.by_model().values()), answers.is_finished_B.device)
        return torch.tensor(self._numbers(found, len(answers.completions)), dtype=torch.float32, device=device)

    def _check_signature(self, arguments: tuple[Any, ...], columns: dict[str, Any]) -> None:
        try:
            inspect.signature(self.call).bind(*arguments, **columns)
        except TypeError as error:
            raise ScoringError(
                f"{self.name}: it cannot be called with prompts, completions, scores and the columns"
                f" {', '.join(columns)}: {error}. Further columns may come. Write it as {_SIGNATURE}."
            ) from error

    def _numbers(self, found: Any, count: int) -> list[float]:
        found = found.tolist() if hasattr(found, "tolist") else found  # tensors and arrays
        if not isinstance(found, list | tuple):
            raise ScoringError(
                f"{self.name}: it gave back {describe(found)}, but a list with one number for each completion is"
                f" required. Correct it: {_SIGNATURE}."
            )
        if len(found) != count:
            raise ScoringError(
                f"{self.name}: it gave back {len(found)} values for {count} completions. The n-th value is the score of"
                " the n-th completion, so there must be as many. Return one number for each."
            )
        for index, value in enumerate(found):
            # bool is an int to Python, and a fair score: did it pass or not?
            if not isinstance(value, int | float) or not abs(value) < 3e38:
                raise ScoringError(
                    f"{self.name}: value {index} is {value if isinstance(value, float) else describe(value)}, but a"
                    " finite number is required, since whitening mixes all scores of the batch. Return a number, such"
                    " as a fixed low one where an answer cannot be judged."
                )
        return [float(value) for value in found]


def load_user_function(name: FunctionName) -> UserFunction:
    """Run the file and take the function from it; ConfigError where there is no such file or function."""
    path = name.path
    if not path.is_file():
        raise ConfigError(f"scoring.combine: {missing(str(path), what='the file of the reward function')}")
    digest = digest_of_file(path)
    module_name = f"llamachat_reward_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, "the name ends with .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"scoring.combine: {path} cannot be run: {type(error).__name__}: {error} ({_line_of(error, path)}). The reward"
            f" function is taken from it. Correct the file; `python {path}` shows the whole error."
        ) from error
    function = getattr(module, name.function, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = nearest(name.function, names)
        hint = f"Did you mean '{path}:{near}'?" if near else f"Define it there: {_SIGNATURE}."
        found = "no function" if function is None else f"{describe(function)} and no function"
        raise ConfigError(
            f"scoring.combine: {path} has {found} under the name '{name.function}'. Every answer is scored by it. {hint}"
        )
    return UserFunction(name, function, digest)


def _line_of(error: Exception, path: Path) -> str:
    """Where in the user's file an exception came from."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
    return f"line {frames[-1].lineno}" if frames else "its call"
