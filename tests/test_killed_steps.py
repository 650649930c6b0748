"""Steps that sample, under kills: the same command continues, samples nothing twice that was written down, and ends with
the very files of a step that nobody killed.
"""

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from llamachat.chat_format import ChatFormat
from tests.context_distillation import tiny_distilling
from tests.gatt import tiny_gatt
from tests.killed_steps import open_commands, results
from tests.llamachat.models.tiny_roles import FULL, World
from tests.ppo.tiny_ppo import write_stopping_base
from tests.rejection_sampling import tiny_rounds
from tests.tiny_steps import read_lines, step_of

SEED = 1_000_003  # of the first call: what the tests below call a seed's number is counted from here
VALUES, MEASURED, TURNS = 800_000, 900_000, 3  # of Ghost Attention
# Two turns, in each of which answers and then recall questions.
MEASURING = (MEASURED, MEASURED, MEASURED + 1, MEASURED + 1)
OWN = crc32(b"distill")  # from which a step of distillation counts its seeds
# Drawing takes longer than all else.
NO_CURVES = {"llamachat.tracking.curves": {"panels_of": None}}

# A kill at each of these moments, and what it costs: the seeds' numbers of the calls of the engine whose answers were not
# written down.
Moments = Mapping[str, tuple[str, tuple[int, ...]]]
ROUNDS: Moments = {
    "before anything is sampled": (r"; open .*/rs/metrics\.jsonl", ()),
    "the test prompts are answered": (r"; os.rename .*test-first", (0,)),
    "in the sweep": (r"; os.rename .*curve-base-1\.2", (500_000,)),
    "a batch is answered": (r"; os.rename .*batch-00002", (2,)),
    "a batch is written down": (r"^os.rename .*batch-00003.*; ", ()),
    "the held-out batch is answered": (r"; os.rename .*batch-00005", (5,)),
    "before the dialogs are published": (r"; os.rename .*/rs/dialogs$", ()),
    "after the dialogs are published": (r"^os.rename .*/rs/dialogs; ", ()),
    "in the tuning": (r"; os.rename .*/\.incoming-step-", ()),
    "the tuned policy is compared": (r"; os.rename .*test-final", (0,)),
    "before the round ends": (r"; os.rename .*/rs/artifact$", ()),
    "a batch of the second round is answered": (r"; os.rename .*/rs-2/.*batch-00001", (10**9 + 1,)),
    "before the second pool is published": (r"; os.rename .*/rs-2/dialogs$", ()),
}
ATTENTION: Moments = {
    "values are named": (r"; os.rename .*/values\.json", (VALUES,)),
    "the first policy is measured": (r"; os.rename .*consistency-start", MEASURING),
    "a batch is answered": (r"; os.rename .*batch-00002", (2 * TURNS, 2 * TURNS + 1, 2 * TURNS + 2)),
    "a batch is written down": (r"^os.rename .*batch-00003.*; ", ()),
    "the held-out batch is answered": (r"; os.rename .*batch-00005", (5 * TURNS, 5 * TURNS + 1, 5 * TURNS + 2)),
    "before the summary": (r"; os.rename .*summary\.json", ()),
    "before the dialogs are published": (r"; os.rename .*/gatt/dialogs$", ()),
    "after the dialogs are published": (r"^os.rename .*/gatt/dialogs; ", ()),
    "in the tuning": (r"; os.rename .*/\.incoming-step-", ()),
    "the tuned policy is measured": (r"; os.rename .*consistency-final", MEASURING),
    "the chance rate is measured": (r"; os.rename .*consistency-chance", MEASURING),
    "before the step ends": (r"; os.rename .*/gatt/artifact$", ()),
}
DISTILLATION: Moments = {
    "before anything of it is there": (r"; os.rename .*test-first", (0,)),
    # Plainly once for prompts with a known category and once for the others, then in the two other forms.
    "a batch is answered in all forms": (r"; os.rename .*batch-00002", (OWN + 8, OWN + 9, OWN + 10, OWN + 11)),
    "before the dialogs are published": (r"; os.rename .*/dialogs$", ()),
    "in the tuning": (r"; os.rename .*/\.incoming-step-", ()),
    "the tuned policy is compared": (r"; os.rename .*borderline-final", (0,)),
    "before the summary": (r"; os.rename .*summary\.json", ()),
    "before the step ends": (r"; os.rename .*/artifact$", ()),
}


@dataclass(frozen=True)
class Step:
    """A command that samples, and how it is killed."""

    modules: Mapping[str, Mapping[str, Any]]  # other values in them: small batches, no pictures
    moments: Moments
    folders: tuple[str, ...]
    write_recipe: Callable[[Path], Path]
    check: Callable[[Path], None] = lambda _: None  # of the recipe that was killed, when it is done


def rounds(folder: Path, sentencepiece: bytes, _: ChatFormat) -> Step:
    base = write_stopping_base(folder / "base", sentencepiece)
    steps = ["rs", {"rs": {"name": "rs-2", "sweep_prompts": 0}}]
    return Step(
        # Ten prompts a batch.
        {
            "llamachat.answers.groups": {"ANSWERS_PER_BATCH": 60},
            "llamachat.answers.dialog_step": {"draw_comparison": None},
            "rejection_sampling.sweep": {"draw_best_of_n": None, "draw_temperatures": None},
        },
        ROUNDS,
        ("rs", "rs-2"),
        lambda path: tiny_rounds.write_recipe(path, base, steps=steps),
        assert_pooled,
    )


def ghost_attention(folder: Path, sentencepiece: bytes, _: ChatFormat) -> Step:
    base = tiny_gatt.write_roomy_base(folder / "base", sentencepiece)
    return Step(
        # Six dialogs a batch.
        {
            "gatt.session": {"FEWEST": 2},
            "gatt.train": {"ANSWERS_PER_BATCH": 18, "draw_attention": None, "draw_consistency": None},
        },
        ATTENTION,
        ("gatt",),
        lambda path: tiny_gatt.write_recipe(path, base, gatt={"values": "policy"}),
        assert_no_dialog_is_lost,
    )


def distillation(folder: Path, sentencepiece: bytes, chat_format: ChatFormat) -> Step:
    roles = folder / "roles"
    roles.mkdir()
    world = World(roles, chat_format, sentencepiece, tiny_distilling.write_roomy_base)
    base, safety = Path(world.base.model), world.reward_model("safety", FULL, FULL).path
    return Step(
        {
            "llamachat.answers.groups": {"ANSWERS_PER_BATCH": 63},
            "llamachat.answers.dialog_step": {"draw_comparison": None},
            "context_distillation.train": {"draw_scores": None},
        },
        DISTILLATION,
        ("distill",),
        lambda path: tiny_distilling.write_recipe(path, base, safety),
    )


def assert_pooled(recipe: Path) -> None:
    """Each prompt has one dialog; the second round's file holds winners of both."""
    first, second = (read_lines(step_of(recipe, name).dialogs / "dialogs.jsonl") for name in ("rs", "rs-2"))
    prompts = [[json.dumps(dialog["messages"][:-1]) for dialog in dialogs] for dialogs in (first, second)]
    assert len(set(prompts[0])) == len(prompts[0]) <= len(set(prompts[1])) == len(prompts[1])
    assert set(prompts[0]) <= set(prompts[1])
    assert {dialog["sampled"]["round"] for dialog in second} == {"rs", "rs-2"}
    for dialog in second:
        groups = tiny_rounds.groups_of(step_of(recipe, dialog["sampled"]["round"]))
        assert dialog["messages"][-1]["content"] in {text for group in groups for text in group.texts}


def assert_no_dialog_is_lost(recipe: Path) -> None:
    dialogs = read_lines(step_of(recipe, "gatt").dialogs / "dialogs.jsonl")
    manifest = json.loads((step_of(recipe, "gatt").dialogs / "manifest.json").read_text())
    dropped = manifest["dropped_records"]
    assert len(dialogs) > 12 and len(dialogs) + sum(dropped.values()) == 24, "none is lost, none is there twice"


@pytest.mark.parametrize(
    ("command", "open_step"), [("rs", rounds), ("gatt", ghost_attention), ("distill", distillation)]
)
def test_killed_at_many_moments_it_ends_like_an_uninterrupted_step(
    command: str, open_step: Any, tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat
) -> None:
    step: Step = open_step(tmp_path, tiny_sentencepiece, tiny_format)
    whole, killed = (step.write_recipe(tmp_path / f"{name}.yaml") for name in ("whole", "killed"))
    with open_commands(tmp_path, command, {**step.modules, **NO_CURVES}) as commands:
        assert commands.run(whole) == 0, commands.words()
        once = commands.sampled()
        assert all(seed >= SEED for seed, _, _ in once)
        for moment, (operation, _) in step.moments.items():
            assert commands.run(killed, kill_on=operation) == -signal.SIGKILL, f"{moment}: {commands.words()}"
            assert not step_of(killed, step.folders[-1]).artifact.exists()
        assert commands.run(killed) == 0, commands.words()
        sampled = commands.sampled()
        for name in step.folders:
            assert results(step_of(killed, name)) == results(step_of(whole, name))
        # Every prompt was answered as often as without kills, but for what a kill found in the engine's hands.
        lost = sorted(seed - SEED for seed, _, _ in (sampled - once).elements())
        assert sampled.keys() == once.keys()
        assert lost == sorted(number for _, numbers in step.moments.values() for number in numbers)
        step.check(killed)
        assert commands.run(killed) == 0 and not commands.sampled()
        assert "nothing to do" in commands.words()
