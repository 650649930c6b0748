"""Rounds under kills: the same command continues, samples nothing twice that was written down, and ends with the very files
of rounds that nobody killed."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.killed_steps import Commands, open_commands, results
from tests.ppo.tiny_ppo import write_stopping_base
from tests.rejection_sampling.tiny_rounds import groups_of, read_lines, step_of, write_recipe

NO_PICTURES = ("draw_curves", "draw_comparison", "draw_best_of_n", "draw_temperatures")
PATCHED = {
    "llamachat.answers.groups": {"ANSWERS_PER_BATCH": 60},  # ten prompts
    "rejection_sampling.train": dict.fromkeys(NO_PICTURES),
    "sft.train": {"draw_curves": None},
}
# What a kill at each moment costs: the call of the engine, by the number of its seed, whose answers were not written down.
MOMENTS: dict[str, tuple[str, int | None]] = {
    "before anything is sampled": (r"; open .*/rs/metrics\.jsonl", None),
    "the test prompts are answered": (r"; os.rename .*test-first", 0),
    "in the sweep": (r"; os.rename .*curve-base-1\.2", 500_000),
    "a batch is answered": (r"; os.rename .*batch-00002", 2),
    "a batch is written down": (r"^os.rename .*batch-00003.*; ", None),
    "the held-out batch is answered": (r"; os.rename .*batch-00005", 5),
    "before the dialogs are published": (r"; os.rename .*/rs/dialogs$", None),
    "after the dialogs are published": (r"^os.rename .*/rs/dialogs; ", None),
    "in the tuning": (r"; os.rename .*/\.incoming-step-", None),
    "the tuned policy is compared": (r"; os.rename .*test-final", 0),
    "before the round ends": (r"; os.rename .*/rs/artifact$", None),
    "a batch of the second round is answered": (r"; os.rename .*/rs-2/.*batch-00001", 10**9 + 1),
    "before the second pool is published": (r"; os.rename .*/rs-2/dialogs$", None),
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with open_commands(tmp_path_factory.mktemp("log"), "rs", PATCHED) as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_stopping_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


def test_killed_at_many_moments_two_rounds_end_like_uninterrupted_ones(
    commands: Commands, base: Path, tmp_path: Path
) -> None:
    steps = ["rs", {"rs": {"name": "rs-2", "sweep_prompts": 0}}]
    whole, killed = (write_recipe(tmp_path / f"{name}.yaml", base, steps=steps) for name in ("whole", "killed"))
    assert commands.run(whole) == 0, commands.words()
    once = Counter(commands.sampled())
    for moment, (operation, _) in MOMENTS.items():
        assert commands.run(killed, kill_on=operation) == -signal.SIGKILL, f"{moment}: {commands.words()}"
    assert commands.run(killed) == 0, commands.words()
    for name in ("rs", "rs-2"):
        assert results(step_of(killed, name)) == results(step_of(whole, name))
    # Every prompt was answered as often as without kills, but for what a kill found in the engine's hands.
    lost = sorted(seed - 1_000_003 for seed, _, _ in (Counter(commands.sampled()) - once).elements())
    assert lost == sorted(number for _, number in MOMENTS.values() if number is not None)
    assert_pooled(killed)


def assert_pooled(recipe: Path) -> None:
    """Each prompt has one dialog; the second round's file holds winners of both."""
    first, second = (read_lines(step_of(recipe, name).dialogs / "dialogs.jsonl") for name in ("rs", "rs-2"))
    asked = [[json.dumps(dialog["messages"][:-1]) for dialog in dialogs] for dialogs in (first, second)]
    assert len(set(asked[0])) == len(asked[0]) <= len(set(asked[1])) == len(asked[1])
    assert set(asked[0]) <= set(asked[1])
    assert {dialog["sampled"]["round"] for dialog in second} == {"rs", "rs-2"}
    for dialog in second:
        texts = {text for group in groups_of(step_of(recipe, dialog["sampled"]["round"])) for text in group.texts}
        assert dialog["messages"][-1]["content"] in texts
