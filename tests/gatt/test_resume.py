"""Ghost Attention under kills: the same command continues, samples nothing twice that was written down, and ends with an
uninterrupted step's very files."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gatt.tiny_gatt import read_lines, step_of, write_recipe, write_roomy_base
from tests.killed_steps import Commands, open_commands, results

PATCHED = {
    "gatt.batches": {"ANSWERS_PER_BATCH": 18},  # six dialogs
    "gatt.values": {"FEWEST": 2},
    "gatt.train": dict.fromkeys(("draw_curves", "draw_attention", "draw_consistency")),
    "sft.train": {"draw_curves": None},
}
VALUES, EVALUATION, TURNS = 800_000, 900_000, 3
# Two turns, in each of which answers and then recall questions.
MEASURING = (EVALUATION, EVALUATION, EVALUATION + 1, EVALUATION + 1)
# What a kill at each moment costs: the seeds' numbers of the calls whose answers were not written down.
MOMENTS: dict[str, tuple[str, tuple[int, ...]]] = {
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


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with open_commands(tmp_path_factory.mktemp("log"), "gatt", PATCHED) as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_roomy_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


def test_killed_at_many_moments_it_ends_like_an_uninterrupted_step(
    commands: Commands, base: Path, tmp_path: Path
) -> None:
    whole, killed = (
        write_recipe(tmp_path / f"{name}.yaml", base, gatt={"values": "policy"}) for name in ("whole", "killed")
    )
    assert commands.run(whole) == 0, commands.words()
    once = Counter(commands.sampled())
    assert all(seed >= 1_000_003 for seed, _, _ in once)
    step = step_of(killed)
    for moment, (operation, _) in MOMENTS.items():
        assert commands.run(killed, kill_on=operation) == -signal.SIGKILL, f"{moment}: {commands.words()}"
        assert not step.artifact.exists()
    assert commands.run(killed) == 0, commands.words()
    assert results(step) == results(step_of(whole))
    # Every dialog was asked for as often as without kills, but for what a kill found in the engine's hands.
    lost = sorted(seed - 1_000_003 for seed, _, _ in (Counter(commands.sampled()) - once).elements())
    assert lost == sorted(number for _, numbers in MOMENTS.values() for number in numbers)
    dialogs = read_lines(step.dialogs / "dialogs.jsonl")
    dropped = json.loads((step.dialogs / "manifest.json").read_text())["dropped_records"]
    assert len(dialogs) > 12 and len(dialogs) + sum(dropped.values()) == 24, "none is lost, none is there twice"
    assert commands.run(killed) == 0 and not commands.sampled()
    assert "nothing to do" in commands.words().splitlines()[-1]
