"""A reward function of the user's: its arguments, what it may return, and how its errors are reported."""

import hashlib
import os
import random
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import tensor

import reward
from llamachat.config.sections import FunctionName
from llamachat.errors import ConfigError, RewardFunctionError
from llamachat.scoring.combining import combiner
from llamachat.scoring.scores import Scores
from llamachat.scoring.user_function import load_user_function
from tests.llamachat.scoring.tiny_scoring import answers, scoring


def write(folder: Path, text: str, name: str = "rewards.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return f"{path}:score"


TEN_LINES = """
    from dataclasses import dataclass

    @dataclass
    class Limit:
        words: int

    def score(prompts, completions, scores, **columns):
        brief = [len(text) <= Limit(9).words for text in completions]
        ends_with_one = [messages[-1]["content"].endswith("1") for messages in prompts]
        return [h + b + 10 * a + 100 * s for h, b, a, s in zip(scores["helpfulness"], brief, ends_with_one, columns["is_safety"])]
"""


def test_a_function_of_ten_lines_scores_the_answers(tmp_path: Path) -> None:
    combine = combiner(scoring(combine=write(tmp_path, TEN_LINES)))
    combined = combine(
        Scores(helpfulness_B=tensor([0.5, 0.5, 0.5, 0.5]), safety_B=None),
        answers(4, is_safety=[False, False, False, True]),
    )
    # texts of 7, 8, 9, 10 characters; the second question ends with 1; the last prompt is on safety
    assert combined.scores_B.tolist() == [1.5, 11.5, 1.5, 100.5]
    assert combined.scores_B.dtype == torch.float32 and not combined.is_gated_B.any()
    function = load_user_function(FunctionName(tmp_path / "rewards.py", "score"))
    assert function.digest == hashlib.sha256((tmp_path / "rewards.py").read_bytes()).hexdigest()


def test_a_function_may_need_no_model_and_may_give_a_tensor_or_booleans(tmp_path: Path) -> None:
    none = Scores(helpfulness_B=None, safety_B=None)
    for body, expected in (("tensor(columns['words'])", [3, 4]), ("[True for _ in scores or completions]", [1, 1])):
        text = f"from torch import tensor\ndef score(prompts, completions, scores, **columns):\n    return {body}"
        combined = combiner(scoring(combine=write(tmp_path, text)))(none, answers(2, words=[3.0, 4.0]))
        assert combined.scores_B.tolist() == expected


def test_a_function_cannot_change_what_the_next_one_sees(tmp_path: Path) -> None:
    text = "def score(prompts, completions, scores, **columns):\n    prompts.clear(), scores.clear()\n    return [0.0] * len(completions)"
    combine = combiner(scoring(combine=write(tmp_path, text)))
    batch, scores = answers(2), Scores(helpfulness_B=tensor([1.0, 2.0]), safety_B=None)
    combine(scores, batch)
    assert len(batch.prompts) == 2 and scores.by_model()["helpfulness"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "line", "expected"),
    [  # a wrong result is that of the function, which is defined in line 2
        ("[1.0]", 2, "returned 1 values for 2 completions"),
        ("[1.0, float('nan')]", 2, "returned nan for completion 1, but a finite number is required"),
        ("[float('inf'), 1.0]", 2, "returned inf for completion 0"),
        ("[1.0, None]", 2, "returned nothing (null) for completion 1"),
        ("['good', 'bad']", 2, "returned the text 'good' for completion 0"),
        ("1.0", 2, "returned the number 1.0, but a list with one number for each completion is required"),
        ("scores['safty']", 3, "raised KeyError: 'safty'"),
        ("torch.ones(2, device='meta')", 2, "raised "),
        ("torch.ones(2) + torch.ones(3)", 3, "raised RuntimeError: "),
        ("exec('class Odd(Exception):\\n    __str__ = None\\nraise Odd')", 3, "raised Odd"),
    ],
)
def test_errors_of_a_function_are_reported_with_its_file_and_line(
    tmp_path: Path, body: str, line: int, expected: str
) -> None:
    name = write(tmp_path, f"import torch\ndef score(prompts, completions, scores, **columns):\n    return {body}")
    with pytest.raises(RewardFunctionError) as caught:
        combiner(scoring(combine=name))(Scores(helpfulness_B=tensor([1.0, 2.0]), safety_B=None), answers(2))
    assert str(caught.value).startswith(f"{tmp_path}/rewards.py:{line}: 'score' {expected}")


def test_an_error_is_reported_at_its_line_in_a_file_next_to_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_words.py").write_text("def count(text):\n    return 1 / 0\n")
    body = "return [count(text) for text in completions]"
    write(tmp_path, f"from my_words import count\ndef score(prompts, completions, scores, **columns):\n    {body}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardFunctionError, match=rf"^{tmp_path}/my_words\.py:2: 'score' raised ZeroDivisionError"):
        run("rewards.py:score")
    write(tmp_path, "def score(prompts, completions, scores, **columns):\n    return [0.0]")
    with pytest.raises(RewardFunctionError, match=r"^rewards\.py:1: 'score' returned 1 values for 2 completions"):
        run("rewards.py:score")


def test_missing_files_and_functions_are_reported(tmp_path: Path) -> None:
    name = write(tmp_path, "def scores(prompts, completions, scores, **columns):\n    return [0.0]\nlimit = 3")
    with pytest.raises(ConfigError, match=r"no function under the name 'score'.* Did you mean '.*rewards.py:scores'"):
        combiner(scoring(combine=name))
    with pytest.raises(ConfigError, match="has the number 3 and no function under the name 'limit'"):
        combiner(scoring(combine=name.replace(":score", ":limit")))
    with pytest.raises(ConfigError, match=r"does not exist\. Did you mean '.*rewards\.py'"):
        combiner(scoring(combine=name.replace("rewards.py", "reward.py")))
    name = write(tmp_path, "def score(prompts, completions):\n    return [0.0] * len(completions)", "narrow.py")
    with pytest.raises(
        RewardFunctionError,
        match=r"narrow\.py:1: 'score' cannot be called with .*fn\(prompts, completions, scores, \*",
    ):
        combiner(scoring(combine=name))(Scores(helpfulness_B=tensor([1.0]), safety_B=None), answers(1))
    for text, expected in {
        "1 +": "SyntaxError",
        "import nothing_at_all": "ModuleNotFoundError",
    }.items():
        with pytest.raises(
            ConfigError, match=rf"scoring\.combine: .*/broken\.py:1: the file cannot be run: {expected}"
        ):
            combiner(scoring(combine=write(tmp_path, text, "broken.py")))


def run(name: str, count: int = 2) -> list[float]:
    none = Scores(helpfulness_B=None, safety_B=None)
    return combiner(scoring(combine=name))(none, answers(count)).scores_B.tolist()


@pytest.mark.parametrize(
    "ending", ["sys.exit(0)", "sys.exit()", "raise GeneratorExit", "raise SystemExit('done')", "os._exit(0)"]
)
def test_a_file_that_ends_the_process_is_a_fault_of_the_function(tmp_path: Path, ending: str) -> None:
    body = f"import os, sys\ndef score(prompts, completions, scores, **columns):\n    {ending}"
    with pytest.raises(RewardFunctionError, match=r"rewards\.py:3: 'score' raised (SystemExit|GeneratorExit)"):
        run(write(tmp_path, body))
    with pytest.raises(ConfigError, match=r"at_once\.py:2: the file cannot be run: (SystemExit|GeneratorExit)"):
        run(write(tmp_path, f"import os, sys\n{ending}", "at_once.py"))


def test_processes_of_the_function_may_end_as_they_like(tmp_path: Path) -> None:
    text = """
        import os

        def score(prompts, completions, scores, **columns):
            child = os.fork()
            if child == 0:
                os._exit(3)
            return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * len(completions)
    """
    before = os._exit
    assert run(write(tmp_path, text)) == [3.0, 3.0] and os._exit is before


def test_an_interrupt_within_the_function_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(write(tmp_path, "def score(prompts, completions, scores, **columns):\n    raise KeyboardInterrupt"))


def test_a_file_may_import_its_neighbours_also_those_named_as_packages_of_ours(tmp_path: Path) -> None:
    (tmp_path / "my_words.py").write_text("BAD = 5.0")
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "__init__.py").write_text("from my_words import BAD\nGOOD = BAD + 1")
    (tmp_path / "torch.py").write_text("raise AssertionError('what is loaded already is not replaced')")
    text = """
        from dataclasses import dataclass
        import torch
        from my_words import BAD

        def score(prompts, completions, scores, **columns):
            from reward import GOOD
            return [BAD, float(torch.tensor(GOOD))]
    """
    name, before = write(tmp_path, text), reward
    assert run(name) == [5.0, 6.0]
    assert sys.modules["reward"] is before and "my_words" not in sys.modules and str(tmp_path) not in sys.path


def test_arguments_are_those_of_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llamachat", "ppo", "--config", "tiny.yaml"])
    text = """
        import argparse
        parser = argparse.ArgumentParser()
        parser.add_argument("--scale", type=float, default=2.0)
        scale = parser.parse_args().scale

        def score(prompts, completions, scores, **columns):
            return [scale] * len(completions)
    """
    assert run(write(tmp_path, text)) == [2.0, 2.0] and sys.argv[1] == "ppo"
    with pytest.raises(ConfigError, match="cannot be run: SystemExit: 2"):
        run(write(tmp_path, text.replace('"--scale"', '"scale"').replace("default=2.0", "nargs=1"), "needs.py"))


def test_random_numbers_of_the_function_change_none_of_the_run_and_differ_from_call_to_call(tmp_path: Path) -> None:
    text = """
        import random
        import numpy
        import torch

        def score(prompts, completions, scores, **columns):
            return [random.random(), numpy.random.random(), float(torch.rand(1))]
    """
    seeds = text.replace("return", "random.seed(7); numpy.random.seed(7); torch.manual_seed(7)\n            return")
    draws, seeded = write(tmp_path, text), write(tmp_path, seeds, "seeded.py")
    quiet = write(tmp_path, "def score(prompts, completions, scores, **columns):\n    return [0.0] * 3", "quiet.py")

    def numbers_after(*names: str) -> tuple[list[list[float]], list[float]]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        results = [run(name, 3) for name in names]
        return results, [random.random(), np.random.random(), float(torch.rand(1))]

    (_, untouched), ((first, second), after_two) = numbers_after(), numbers_after(draws, draws)
    assert numbers_after(quiet)[1] == untouched
    assert all(one != other for one, other in zip(first, second, strict=True))
    (alike, again), after_seeds = numbers_after(seeded, seeded)
    assert alike == again and after_seeds == after_two, "whatever it draws or seeds, the run's numbers are the same"


def test_what_the_function_switches_in_the_process_is_put_back(tmp_path: Path) -> None:
    text = """
        import os, torch

        def switch():
            torch.set_grad_enabled(False)
            torch.set_num_threads(torch.get_num_threads() + 1)
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            os.chdir("/")

        switch()

        def score(prompts, completions, scores, **columns):
            switch()
            return [0.0] * len(completions)
    """
    before = Path.cwd(), torch.get_num_threads(), torch.get_default_dtype()
    run(write(tmp_path, text))
    assert (Path.cwd(), torch.get_num_threads(), torch.get_default_dtype()) == before and torch.is_grad_enabled()
    assert torch.ones(1).device.type == "cpu"
    with torch.no_grad():
        run(write(tmp_path, text))
        assert not torch.is_grad_enabled()
