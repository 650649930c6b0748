"""Consistency by turn against numbers worked out by hand, attention against a second computation, and whole steps."""

import json
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from gatt.attention import binned, strongest_attention, to_instruction
from gatt.figures import consistency_figures, consistency_table
from gatt.session import GattSession, open_gatt
from gatt.train import dialog_step, make_dialogs
from llamachat.answers.consistency import Outcome, Trial, differences, rates, run_trials
from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.constraints.instruction import Instruction, constrain
from llamachat.constraints.values import side_of
from llamachat.models.loading import load_policy
from llamachat.runs.artifacts import read_artifact
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.tracking.metrics import check_names
from pipelines.planning.plan import make_plan
from pipelines.recipe.recipe import load
from tests.gatt.tiny_gatt import ALL, HOBBIES, ScriptedEngine, sampling, write_recipe, write_roomy_base
from tests.ppo.tiny_ppo import write_function
from tests.recipes import run_command
from tests.tiny_llama import tiny_llama
from tests.tiny_steps import inputs_of, read_lines, step_of, summary_of

pytestmark = pytest.mark.usefixtures("no_curves")

TURNS = ("Hello?", "And now?", "Thanks!")


def trial(family: str, value: str = "", turns: tuple[str, ...] = TURNS) -> Trial:
    one = constrain(ALL[family], value)
    return Trial(turns, Instruction((one,), one.short, is_shortened=True))


# --- by turn

QUESTIONS = ("What is your favorite hobby?", "What do you enjoy most?", "What do you like to do in your free time?")
TRIALS = [trial("no_questions"), trial("quoted"), trial("hobby", "chess")]


def measured(
    chat_format: ChatFormat,
    trials: list[Trial],
    script: list[list[str]],
    turns: tuple[int, ...],
    *,
    max_tokens: int = 1000,
    has_instruction: bool = True,
) -> tuple[Outcome, ScriptedEngine]:
    engine = ScriptedEngine(chat_format, [[[answer] for answer in call] for call in script])
    sizes = {"base": SimpleNamespace(max_tokens=max_tokens + 1), "rollout": SimpleNamespace(max_new_tokens=0)}
    session: Any = SimpleNamespace(
        engine=engine, chat_format=chat_format, inputs=SimpleNamespace(**sizes), sampling=lambda at, **_: sampling(at)
    )
    outcome = run_trials(session, trials, turns=turns, has_instruction=has_instruction)
    assert len(engine.prompts) == len(script)
    return outcome, engine


def test_every_turn_is_judged_with_the_instruction_in_the_first_alone(tiny_format: ChatFormat) -> None:
    script = [
        ["a cat", '"a mat"', "I like golf"],  # turn 1
        ["chess"],  # says nothing but the word
        ["so?", "[INST] a", "the cat"],  # turn 2 is not measured
        ["a mat", "no", "a model"],  # turn 3
        ["I love chess"],
    ]
    outcome, engine = measured(tiny_format, TRIALS, script, (1, 3))
    assert outcome.kept[1][:2] == [True, True] and outcome.kept[3] == [True, False, True]
    assert outcome.answers == {1: ["a cat", '"a mat"', "chess"], 3: ["a mat", "no", "I love chess"]}
    opened, question_prompts, second, third, later_prompts = engine.prompts
    assert opened[0] == "[INST] <<SYS>>\nWithout questions.\n<</SYS>>\n\nHello? [/INST]"
    begun = "[INST] <<SYS>>\nHobby: chess.\n<</SYS>>\n\n"
    assert question_prompts[0] in [f"{begun}{question} [/INST]" for question in QUESTIONS]
    # The dialog continues without the question, and a tag that was said stands as dots.
    assert second[2] == f"{begun}Hello? [/INST] I like golf </s>[INST] And now? [/INST]"
    assert third[1].endswith('Hello? [/INST] "a mat" </s>[INST] And now? [/INST] ... </s>[INST] Thanks! [/INST]')
    before = f"{begun}Hello? [/INST] I like golf </s>[INST] And now? [/INST] the cat </s>[INST] "
    assert third[2] == f"{before}Thanks! [/INST]"
    assert later_prompts[0] in [f"{before}{question} [/INST]" for question in QUESTIONS]
    assert all(prompt.count("<<SYS>>") == 1 for call in engine.prompts for prompt in call)
    assert Outcome.from_plain(json.loads(json.dumps(asdict(outcome)))) == outcome
    assert measured(tiny_format, TRIALS, script, (1, 3))[0] == outcome


def test_without_the_instruction_the_dialog_is_its_own(tiny_format: ChatFormat) -> None:
    script = [["so?", "a mat", "a cat"], ["It is chess"], ["a cat", '"no"', "the mat"], ["so what"]]
    outcome, engine = measured(tiny_format, TRIALS, script, (1, 2), has_instruction=False)
    assert engine.prompts[0] == ["[INST] Hello? [/INST]"] * 3
    assert engine.prompts[2] == [f"[INST] Hello? [/INST] {said} </s>[INST] And now? [/INST]" for said in script[0]]
    assert outcome.kept == {1: [False, False, True], 2: [True, True, False]}


def test_past_the_context_nothing_is_said_and_nothing_counted(tiny_format: ChatFormat) -> None:
    trials = [trial("no_questions", turns=("Hi", "cat " * 140, "Hi")), trial("no_questions"), trial("hobby", "chess")]
    script = [["a cat", "a mat", "a cat"], ["so"], ["no", "so"], ["chess it is"], ["no?", "so"], ["chess it is"]]
    outcome, engine = measured(tiny_format, trials, script, (1, 2, 3), max_tokens=150)
    assert [len(call) for call in engine.prompts] == [3, 1, 2, 1, 2, 1]
    assert outcome.kept == {1: [True, True, False], 2: [None, True, True], 3: [None, False, True]}
    assert outcome.answers[2][0] == outcome.answers[3][0] == ""
    by_turn = rates(outcome, trials, kind="consistency")
    assert [(by_turn[turn].value, by_turn[turn].trials) for turn in (1, 2, 3)] == [(1.0, 2), (1.0, 1), (0.0, 1)]


def test_a_recall_question_past_the_context_is_not_counted_and_the_dialog_continues(tiny_format: ChatFormat) -> None:
    trials = [trial("hobby", "chess", turns=("Hi", "Hi"))]
    opening = [
        Message("system", trials[0].instruction.text),
        Message("user", "Hi"),
        Message("assistant", "a cat sat on it"),
    ]
    first, second = (
        [len(tiny_format.encode_prompt([*said, Message("user", question)])) for question in QUESTIONS]
        for said in (opening[:1], opening)
    )
    assert max(first) < min(second)
    script = [["a cat sat on it"], ["I like chess"], ["a mat"]]
    outcome, _ = measured(tiny_format, trials, script, (1, 2), max_tokens=max(first))
    assert outcome.kept == {1: [True], 2: [None]} and rates(outcome, trials, kind="recall").keys() == {1}
    outcome, engine = measured(tiny_format, trials, [], (1, 2), max_tokens=3)
    assert outcome.kept == {1: [None], 2: [None]} and not engine.prompts


# --- rates

KINDS = [trial("no_questions")] * 4 + [trial("quoted")] * 6 + [trial("hobby", "chess")] * 2
MANY = [replace(one, turns=(f"dialog {number}", "more")) for number, one in enumerate(KINDS)]
BEFORE: list[bool | None] = [True, False, False, None, *[False] * 5, True, False, False]
AFTER: list[bool | None] = [True, True, False, True, *[True] * 3, None, False, True, True, False]


def by_hand(kept: int, of: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson interval, as the textbook has it."""
    share, more = kept / of, z * z / of
    half = z * sqrt(share * (1 - share) / of + more / (4 * of))
    return (share + more / 2 - half) / (1 + more), (share + more / 2 + half) / (1 + more)


def test_rates_and_differences_are_those_worked_out_by_hand() -> None:
    before, after = (Outcome(kept={2: kept}, answers={2: [""] * 12}) for kept in (BEFORE, AFTER))
    rate = rates(after, MANY, kind="consistency")[2]
    assert (rate.value, rate.trials) == (7 / 9, 9) and (rate.low, rate.high) == pytest.approx(by_hand(7, 9))
    assert rates(after, MANY, kind="consistency", family="no_questions")[2].value == 3 / 4
    assert rates(after, MANY, kind="consistency", family="quoted")[2].value == 4 / 5
    assert rates(before, MANY, kind="consistency", family="quoted")[2].trials == 6
    recalled = rates(after, MANY, kind="recall")[2]
    assert (recalled.value, recalled.trials) == (0.5, 2)
    gap = differences(after, before, MANY, kind="consistency")[2]
    # Where both were measured: of three 2 - 1 are kept, of five 4 - 1.
    assert gap.value == pytest.approx((2 - 1 + 4 - 1) / 8) and gap.trials == 8
    assert 0 <= gap.low < gap.value < gap.high <= 1
    figures = consistency_figures({"start": before, "final": after, "chance": before}, MANY)
    check_names(figures)
    assert figures["gatt/consistency/final/turn_2"] == 7 / 9 and figures["gatt/consistency/start/turn_2"] == 2 / 9
    assert figures["gatt/family/quoted/final/turn_2"] == 0.8 and figures["gatt/family/hobby/start/turn_2"] == 0.0
    assert figures["gatt/consistency/over_chance/turn_2"] == pytest.approx(0.5)
    assert figures["gatt/recall/over_start/turn_2"] == 0.5
    table = consistency_table({"start": before, "chance": before, "final": after}, MANY).splitlines()
    (line,) = (line for line in table[:4] if "after" in line)
    assert "78% [45%, 94%]" in line
    assert any("no_questions" in line and line.split()[-3:] == ["33%", "33%", "75%"] for line in table)


def test_trials_of_one_dialog_are_no_new_evidence() -> None:
    """Each of eight dialogs twice, with the same outcome: the intervals are those of eight trials."""
    eight = [replace(trial("quoted"), turns=(f"dialog {number}",)) for number in range(8)]
    kept: list[bool | None] = [True, False, False, True, True, False, True, True]
    start: list[bool | None] = [False, False, False, True, False, False, True, False]
    twice = [Outcome(kept={2: values * 2}, answers={2: [""] * 16}) for values in (kept, start)]
    rate = rates(twice[0], eight * 2, kind="consistency")[2]
    assert rate.trials == 16 and (rate.low, rate.high) == pytest.approx(by_hand(5, 8), abs=0.03)
    once = [Outcome(kept={2: values}, answers={2: [""] * 8}) for values in (kept, start)]
    gaps = [
        differences(final, first, trials, kind="consistency")[2]
        for (final, first), trials in ((twice, eight * 2), (once, eight))
    ]
    assert (gaps[0].low, gaps[0].high) == pytest.approx((gaps[1].low, gaps[1].high), abs=1e-9)


# --- attention


def test_attention_is_the_largest_of_all_layers_and_heads(tiny_format: ChatFormat) -> None:
    """Against queries and keys taken by hooks, turned, masked and put through a softmax in plain loops."""
    model = tiny_llama(attn_implementation="eager")
    ids = tiny_format.encode_prompt([Message("system", "the cat"), Message("user", "Hello, who are you?")])
    taken: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda _m, _i, out, name=name: taken.__setitem__(name, out[0].detach()))
    attention_TT = strongest_attention(model, ids)
    size, length = 16, len(ids)
    place_T = torch.arange(length, dtype=torch.float32)
    angle_TD = torch.outer(place_T, 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)

    def turned(x_TD: torch.Tensor) -> torch.Tensor:
        rotated = torch.cat([-x_TD[:, size // 2 :], x_TD[:, : size // 2]], dim=1)
        return x_TD * angle_TD.cos() + rotated * angle_TD.sin()

    expected_TT = torch.zeros(length, length)
    for layer in range(2):
        query, key = (taken[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qk")
        for head in range(4):
            query_TD = turned(query[:, head * size : (head + 1) * size])
            key_TD = turned(key[:, head // 2 * size : (head // 2 + 1) * size])  # two heads share a key
            for t in range(length):
                weights = torch.softmax(query_TD[t] @ key_TD[: t + 1].T / sqrt(size), dim=0)
                expected_TT[t, : t + 1] = torch.maximum(expected_TT[t, : t + 1], weights)
    assert torch.allclose(attention_TT, expected_TT, atol=1e-5)
    assert not attention_TT.triu(1).any()
    assert torch.equal(binned(attention_TT, 1), attention_TT.max().reshape(1, 1)) and binned(attention_TT, 99).equal(
        attention_TT
    )
    whole = functional.max_pool2d(attention_TT[None, : length // 2 * 2, : length // 2 * 2], 2)[0]
    assert binned(attention_TT[: length // 2 * 2, : length // 2 * 2], length // 2).equal(whole)


def test_attention_to_the_instruction_is_that_of_each_answers_tokens_to_the_system_text(
    tiny_format: ChatFormat,
) -> None:
    messages = [
        Message("system", "the cat sat"), Message("user", "Hello"), Message("assistant", "I like that."),
        Message("user", "Thanks!"), Message("assistant", "Paris"),
    ]  # fmt: skip
    ids = tiny_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER).input_ids
    # The system text and the answers are found by what the tokens before say, not by counting.
    said = [
        tiny_format.tokenizer.decode([token for token in ids[:place] if token > 2]) for place in range(len(ids) + 1)
    ]
    last_of_system = next(place for place, text in enumerate(said) if text.endswith("\nthe cat sat")) - 1
    ends = [place + 1 for place, token in enumerate(ids) if token == 2]
    starts = [place for place, text in enumerate(said) if text.endswith("[/INST]")]
    assert len(ends) == len(starts) == 2
    attention_TT = torch.zeros(len(ids), len(ids))
    # The first token is attended to by all, whatever it holds, and the mark of a turn is no instruction.
    attention_TT[:, :2] = 0.9
    attention_TT[:, last_of_system] = 0.7
    for weight, start, end in zip((0.25, 0.5), starts, ends, strict=True):
        attention_TT[start:end, last_of_system] = weight
    assert to_instruction(attention_TT, tiny_format, messages) == [0.25, 0.5]


# --- whole steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_roomy_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


@pytest.fixture(scope="module")
def twice(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one recipe: the first from the base, the second from the first."""
    folder = tmp_path_factory.mktemp("twice")
    steps = ["gatt", {"gatt": {"name": "gatt-2", "ranks_by_reward": True, "sft_share": 0.5}}]
    scoring = {"combine": write_function(folder / "letter.py")}
    recipe = write_recipe(folder / "one.yaml", base, steps=steps, scoring=scoring)
    run_command(load(recipe), "gatt")
    return recipe


def test_a_recipe_may_place_the_step_more_than_once(twice: Path) -> None:
    for name, came_from in (("gatt", "base"), ("gatt-2", "policy")):
        step = step_of(twice, name)
        dialogs = read_artifact(step.path, "dialogs").manifest
        assert dialogs.step == name and came_from in dialogs.inputs
        assert dialogs.details["dialogs"] == len(read_lines(step.dialogs / "dialogs.jsonl")) > 6
        assert all(line["sampled"]["step"] == name for line in read_lines(step.dialogs / "dialogs.jsonl"))
        for picture in ("consistency", "attention"):
            assert (step.figures / f"{picture}.png").stat().st_size > 10_000
        tuned = read_artifact(step.path, "policy").manifest
        assert tuned.inputs["dialogs"] == str(step.dialogs) and tuned.fingerprint == dialogs.fingerprint
        assert load_policy(step.artifact).chat_format.name == "llama2"
    assert [planned.verdict for planned in make_plan(load(twice))] == ["done", "done"]
    before = step_of(twice).summary.read_bytes()
    run_command(load(twice), "gatt")
    assert step_of(twice).summary.read_bytes() == before
    changed = load(twice, ["gatt.turns=2"])
    assert next(planned.verdict for planned in make_plan(changed)) == "changed"


def test_figures_of_a_step_are_those_of_its_outcomes(twice: Path) -> None:
    step = step_of(twice)
    summary = summary_of(step)
    check_names(summary)
    trials = 6
    kept = {
        moment: json.loads((step.sampling / f"consistency-{moment}.json").read_text())["kept"]
        for moment in ("start", "final", "chance")
    }
    # Families in turns, by name: hobby (asked for), no_questions, quoted.
    for moment, by_turn in kept.items():
        for turn, values in by_turn.items():
            assert len(values) == trials
            checked = [values[place] for place in (1, 2, 4, 5)]
            assert summary[f"gatt/consistency/{moment}/turn_{turn}"] == sum(checked) / 4
            assert summary[f"gatt/recall/{moment}/turn_{turn}"] == (values[0] + values[3]) / 2
            assert summary[f"gatt/family/quoted/{moment}/turn_{turn}"] == (values[2] + values[5]) / 2
    assert summary["gatt/dialogs"] == len(read_lines(step.dialogs / "dialogs.jsonl"))
    assert summary["sft/epoch"] == 1.0 and summary["gatt/turns"] > 2
    rows = MetricsRecord(step.metrics).read()
    check_names(name for row in rows for name in row if name not in ("step", "time"))
    assert [row["gatt/step"] for row in rows if "gatt/step" in row] == [1]
    shown = [row for row in SamplesRecord(step.samples).read() if "instruction" in row]
    assert len(shown) == 4 and all(len(row["turns"]) == len(row["answers"]) for row in shown)
    assert any(row["instruction"] for row in shown)


def test_trials_hold_dialogs_and_values_that_no_training_saw(
    twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[GattSession] = []

    def opened(*arguments: Any) -> GattSession:
        sessions.append(open_gatt(*arguments))
        return sessions[-1]

    monkeypatch.setattr("gatt.train.open_gatt", opened)
    config, inputs = inputs_of(twice, "gatt", f"run.dir={tmp_path}/other")
    dialogs = make_dialogs(config, dialog_step(config, inputs))
    (session,) = sessions
    trials = session.trials()
    assert [one.family for one in trials] == ["hobby", "no_questions", "quoted"] * 2
    assert all(side_of("hobby", one.instruction.constraints[0].value) == "held_out" for one in trials[::3])
    learnt = [line["messages"] for line in read_lines(dialogs.path / "dialogs.jsonl")]
    said = {message["content"] for messages in learnt for message in messages if message["role"] == "user"}
    assert not said & {turn for one in trials for turn in one.turns}
    instructions = {messages[0]["content"] for messages in learnt}
    assert not instructions & {one.instruction.text for one in trials[::3]}


def test_before_and_after_are_measured_with_the_values_that_the_first_policy_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[str] = []

    def named(name: str, *_: object) -> list[str]:
        requested.append(name)
        return [*HOBBIES] if len(requested) == 1 else [hobby.upper() for hobby in HOBBIES]

    monkeypatch.setattr("gatt.session._from_policy", named)
    measured_with: list[list[str]] = []
    measure_now = GattSession.measure

    def measure(self: GattSession, *, has_instruction: bool) -> Outcome:
        measured_with.append([one.instruction.text for one in self.trials()])
        return measure_now(self, has_instruction=has_instruction)

    monkeypatch.setattr(GattSession, "measure", measure)
    section = {"values": "policy", "families": ["hobby"], "dialogs": 8, "evaluation_turns": [1]}
    recipe = write_recipe(tmp_path / "named.yaml", base, gatt=section)
    run_command(load(recipe), "gatt")
    assert requested == ["hobbies"] and len(measured_with) == 3
    assert measured_with[0] == measured_with[1] == measured_with[2]


def test_without_a_family_that_can_be_measured_the_step_still_ends(base: Path, tmp_path: Path) -> None:
    section = {"families": ["language"], "dialogs": 8}
    recipe = write_recipe(tmp_path / "language.yaml", base, gatt=section)
    run_command(load(recipe), "gatt")
    summary = summary_of(step_of(recipe))
    assert not any(name.startswith("gatt/consistency") for name in summary) and summary["gatt/dialogs"] > 2
    assert not step_of(recipe).figures.exists()


def test_the_policy_learns_what_its_last_answers_keep(base: Path, tmp_path: Path) -> None:
    """Small letters alone, which a random base writes now and then: every last answer that it learns is in them.

    Chance is not checked: a policy that learned a single instruction also keeps it without being given it.
    """
    section = {"families": ["small_letters"], "dialogs": 240, "turns": 2, "samples_per_turn": 4}
    recipe = write_recipe(
        tmp_path / "learning.yaml",
        base,
        gatt={**section, "evaluation_dialogs": 80, "evaluation_turns": [1, 2], "sft": {"epochs": 2}},
        sft={"learning_rate": 3e-3},
    )
    run_command(load(recipe), "gatt")
    summary = summary_of(step_of(recipe))
    for turn in (1, 2):
        assert summary[f"gatt/consistency/over_start/turn_{turn}_low"] > 0
    assert summary["gatt/repaired_fraction"] > 0.05 and summary["sft/eval_loss"] < summary["sft/eval_loss_base"]
