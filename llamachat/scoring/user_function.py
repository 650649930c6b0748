"""A user's reward function: ten lines of Python in a separate file, named `path.py:function` in the recipe.

    def score(prompts, completions, scores, **columns):
        return [help - 0.01 * len(text) for help, text in zip(scores["helpfulness"], completions)]

`prompts` is a list of message lists ({"role": ..., "content": ...}), `completions` a list of texts, `scores` the raw
scores by available model ("helpfulness", "safety"), and `columns` more lists: `is_safety`, `finished`, and those of the
step (`id`, the prompt's own). It returns one finite number for each completion. The file runs as with `python path.py`
and may import files next to it. Its changes to the process (PyTorch's gradients, threads, default dtype and device,
random state, the working directory) are undone after each call.
"""

import importlib.util
import inspect
import os
import pickle
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from llamachat.chat_format.dialog import as_dicts
from llamachat.config.section import describe, nearest
from llamachat.config.sections import FunctionName, missing
from llamachat.errors import ConfigError, RewardFunctionError
from llamachat.runs.fingerprints import digest_of_program
from llamachat.scoring.scores import Answers, Scores

_SIGNATURE = "fn(prompts, completions, scores, **columns) -> list[float]"
_CORRECT = f"The finished part of the step is kept. Correct the function ({_SIGNATURE}), and run the same command again: it resumes."


@dataclass(frozen=True, slots=True)
class _Program:
    """The user's file while it runs, with the modules that it loaded from its folder."""

    path: Path
    modules: dict[str, ModuleType] = field(default_factory=dict)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the block in the state that `python path` would see; restore the process afterwards."""
        folder = self.path.absolute().parent
        names = _modules_beside(folder)
        shadowed = _remove_modules(names)
        before = list(sys.argv), list(sys.path), Path.cwd(), torch.get_num_threads(), torch.get_default_dtype()
        device, os_exit, process = torch.get_default_device(), os._exit, os.getpid()
        randomness = _randomness()

        def end(status: int) -> NoReturn:
            """Replaces `os._exit` in the user's file, which would end the command silently."""
            if os.getpid() == process:
                raise SystemExit(status)
            os_exit(status)

        sys.modules.update(self.modules)
        sys.argv[:], sys.path[:] = [str(self.path)], [str(folder), *sys.path]
        os._exit = end
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                yield
        finally:
            self.modules.update(_remove_modules(names))
            sys.modules.update(shadowed)
            sys.argv[:], sys.path[:], place, threads, dtype = before
            os._exit = os_exit
            os.chdir(place)
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(None)  # the default of a new process
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            _restore_randomness(randomness)


def _randomness() -> dict[str, Any]:
    """The states of the global random generators of Python, NumPy and PyTorch."""
    states = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state().numpy()}
    if torch.cuda.is_initialized():
        states["cuda"] = [state.numpy() for state in torch.cuda.get_rng_state_all()]
    return states


def _restore_randomness(states: dict[str, Any]) -> None:
    """Restore the changed generators and advance each by one draw, so that calls differ but do not depend on usage."""
    now = _randomness()
    changed = {name: state for name, state in states.items() if pickle.dumps(state) != pickle.dumps(now[name])}
    if "random" in changed:
        random.setstate(changed["random"])
        random.random()
    if "numpy" in changed:
        np.random.set_state(changed["numpy"])
        np.random.random()
    if "torch" in changed:
        torch.set_rng_state(torch.from_numpy(changed["torch"]))
        torch.empty((), device="cpu").uniform_()
    for index, state in enumerate(changed.get("cuda", ())):
        torch.cuda.set_rng_state(torch.from_numpy(state), index)
        torch.empty((), device=f"cuda:{index}").uniform_()


def _modules_beside(folder: Path) -> set[str]:
    """Names of the modules in a folder, except those of libraries that are already loaded and the folder's own."""
    files = {file.stem: file for file in folder.glob("*.py") if not file.stem.startswith("__")}
    files |= {file.parent.name: file for file in folder.glob("*/__init__.py")}
    loaded = files.keys() & sys.modules.keys()
    kept = {name for name in loaded if getattr(sys.modules[name], "__file__", None) == str(files[name])}
    if loaded - kept:
        # The user's file may share names with our own packages: `reward`, `tools`.
        makers = metadata.packages_distributions()
        kept |= {
            name for name in loaded if name in sys.stdlib_module_names or set(makers.get(name, ())) - {"llamachat"}
        }
    return files.keys() - kept


def _remove_modules(names: set[str]) -> dict[str, ModuleType]:
    """Remove the loaded modules of these packages from `sys.modules` and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A loaded user function and the digest of its file, which is part of the step's inputs."""

    name: FunctionName
    call: Callable[..., Any]
    digest: str
    program: _Program

    def scores(self, scores: Scores, answers: Answers) -> Tensor:
        """One score for each answer, [B] in fp32; raise RewardFunctionError for any other result."""
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
            with self.program.running():
                result = self.call(*arguments, **columns)
                result = result.tolist() if hasattr(result, "tolist") else result  # tensors and arrays
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # includes sys.exit(), which would end the command with success
            place = _place_of(error, self.name.path) or self._place
            raise RewardFunctionError(
                f"{place}: '{self.name.function}' raised {_words_of(error)}. The reward function must score every"
                f" batch. {_CORRECT}"
            ) from error
        device = next((scores_B.device for scores_B in scores.by_model().values()), answers.is_finished_B.device)
        return torch.tensor(self._numbers(result, len(answers.completions)), dtype=torch.float32, device=device)

    def _check_signature(self, arguments: tuple[Any, ...], columns: dict[str, Any]) -> None:
        try:
            inspect.signature(self.call).bind(*arguments, **columns)
        except TypeError as error:
            raise RewardFunctionError(
                f"{self._place}: '{self.name.function}' cannot be called with prompts, completions, scores and the"
                f" columns {', '.join(columns)}: {error}. Further columns may be added. {_CORRECT}"
            ) from error

    def _numbers(self, result: Any, count: int) -> list[float]:
        if not isinstance(result, list | tuple):
            raise RewardFunctionError(
                f"{self._place}: '{self.name.function}' returned {describe(result)}, but a list with one number for each"
                f" completion is required. {_CORRECT}"
            )
        if len(result) != count:
            raise RewardFunctionError(
                f"{self._place}: '{self.name.function}' returned {len(result)} values for {count} completions. The n-th"
                f" value is the score of the n-th completion, so the numbers must be equal. {_CORRECT}"
            )
        for index, value in enumerate(result):
            # bool is an int in Python and a valid score: passed or not.
            if not isinstance(value, int | float) or not abs(value) < 3e38:
                raise RewardFunctionError(
                    f"{self._place}: '{self.name.function}' returned"
                    f" {value if isinstance(value, float) else describe(value)} for completion {index}, but a finite"
                    " number is required, since whitening mixes all scores of the batch: a fixed low one where an"
                    f" answer cannot be judged. {_CORRECT}"
                )
        return [float(value) for value in result]

    @property
    def _place(self) -> str:
        """The file and line of the function's definition; only the file if it is not a Python function."""
        code = getattr(inspect.unwrap(self.call), "__code__", None)
        return str(self.name.path) if code is None else _place(code.co_filename, code.co_firstlineno, self.name.path)


def load_user_function(name: FunctionName) -> UserFunction:
    """Run the file and return its function; raise ConfigError if the file or the function does not exist."""
    path = name.path
    if not path.is_file():
        raise ConfigError(f"scoring.combine: {missing(str(path), what='the file of the reward function')}")
    digest, program = digest_of_program(path), _Program(path)
    module_name = f"llamachat_reward_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, "the name ends with .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look up their module there
    try:
        with program.running():
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"scoring.combine: {_place_of(error, path) or path}: the file cannot be run: {_words_of(error)}. The reward"
            f" function is loaded from it. Correct it; `python {path}` shows the whole error."
        ) from error
    function = getattr(module, name.function, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = nearest(name.function, names)
        hint = f"Did you mean '{path}:{near}'?" if near else f"Define it there: {_SIGNATURE}."
        content = "no function" if function is None else f"{describe(function)} and no function"
        raise ConfigError(
            f"scoring.combine: {path} has {content} under the name '{name.function}'. Every answer is scored by it. {hint}"
        )
    return UserFunction(name, function, digest, program)


def _words_of(error: BaseException) -> str:
    """The class and text of an exception in the user's code; its `__str__` may itself raise."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _place_of(error: BaseException, path: Path) -> str | None:
    """The file and line in the user's folder where an exception was raised; None if elsewhere."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    own = [place for place in places if Path(place[0]).parent == path.absolute().parent]
    return _place(*own[-1], path) if own else None


def _place(file: str, line: int | None, path: Path) -> str:
    """File and line; the user's own file is named as in the recipe."""
    return f"{path if Path(file) == path.absolute() else file}:{line}"
