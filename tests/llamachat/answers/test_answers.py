"""Groups of answers, the batches they come in, and the cache that keeps them: what can win, in which order, and kills."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamachat.answers.cache import StepCache
from llamachat.answers.evaluation import (
    Evaluation,
    comparison,
    comparison_table,
    evaluation_of,
    rankings,
    superiority_over,
)
from llamachat.answers.groups import ANSWERS_PER_BATCH, Group, batches_of, is_allowed, scored_groups
from llamachat.answers.responses import Response, sample
from llamachat.answers.scorer import Scored, Scorer
from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Scoring
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import Completion, Sampling
from llamachat.scoring.combining import llama2_gate
from llamachat.scoring.scores import Combined, Scores
from llamachat.scoring.standardising import Constants, Scale
from tests.killing import killed_at

THRESHOLD = 0.15
CONSTANTS = Constants(helpfulness=Scale(1.0, 2.0), safety=Scale(0.0, 4.0), combined=Scale(0.0, 1.0))


def question(name: str) -> EncodedPrompt:
    return EncodedPrompt((Message("user", name),), (1, 2), is_safety=False, name=name)


def answered(name: str, text: str, *, is_finished: bool = True, tokens: int = 3) -> Response:
    return Response(
        prompt=question(name), ids=(5,) * tokens, logprobs=(-1.0,) * tokens, is_finished=is_finished, text=text
    )


def session_of(chat_format: ChatFormat, helpfulness: list[float], safety: list[float]) -> Any:
    """Scores as they are given here, through the gate."""
    scores = Scores(helpfulness_B=torch.tensor(helpfulness), safety_B=torch.tensor(safety))

    def score(responses: list[Response], **_: Any) -> Scored:
        is_safety_B = torch.tensor([response.prompt.is_safety for response in responses])
        combined = llama2_gate(scores, is_safety_prompt_B=is_safety_B, safety_threshold=THRESHOLD)
        return Scored(scores=scores, combined=combined, judge_B=None)

    return SimpleNamespace(scorer=SimpleNamespace(score=score), chat_format=chat_format)


def group(**changes: Any) -> Group:
    values: dict[str, Any] = {
        "texts": ["a", "b", "c", "d"],
        "tokens": [2, 2, 2, 2],
        "finished": [True] * 4,
        "allowed": [True] * 4,
        "helpfulness": None,
        "safety": None,
        "combined": [1.0, 4.0, 3.0, 2.0],
        "standardised": [0.0, 1.5, 1.0, 0.5],
        "order": [1, 2, 3, 0],
    }
    return Group(**(values | changes))


# --- what can win


@pytest.mark.parametrize(
    ("changes", "candidates"),
    [
        ({}, [1, 2, 3, 0]),
        ({"finished": [True, False, True, True]}, [2, 3, 0]),
        ({"allowed": [True, True, False, True]}, [1, 3, 0]),
        ({"texts": ["b", "b", "c", "c"]}, [1, 2]),
        # The better one of two equal texts was cut: the other one is still there to win.
        ({"texts": ["b", "b", "c", "c"], "finished": [True, False, True, True]}, [2, 0]),
        ({"finished": [False] * 4}, []),
    ],
)
def test_an_answer_can_win_if_it_ended_says_something_and_stands_there_once(
    changes: dict[str, Any], candidates: list[int]
) -> None:
    assert group(**changes).candidates == candidates


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Paris", True), ("", False), (" \n\t", False), ("go [/INST] on", False), ("<<SYS>> x", False)],
)
def test_nothing_and_tags_of_the_chat_format_are_not_allowed(
    text: str, expected: bool, tiny_format: ChatFormat
) -> None:
    assert is_allowed(tiny_format, text) is expected


# --- order


def test_groups_are_ranked_prompt_by_prompt_and_unsafe_answers_come_last(tiny_format: ChatFormat) -> None:
    # The logit of 0.15 is -1.73: under it an answer is unsafe, whatever the other model says.
    helpfulness, safety = [5.0, 1.0, 2.0, 9.0, 8.0, 7.0], [-2.0, 0.0, 0.0, -3.0, -1.8, 2.0]
    responses = [
        [answered("one", "x"), answered("one", "y", tokens=5), answered("one", "z", is_finished=False)],
        [answered("two", "[INST]"), answered("two", "v"), answered("two", "w")],
    ]
    one, two = scored_groups(session_of(tiny_format, helpfulness, safety), responses, CONSTANTS)
    assert (one.order, two.order) == ([2, 1, 0], [2, 1, 0])
    assert one.candidates == [1, 0] and two.candidates == [2, 1]
    assert one.combined == [-2.0, 1.0, 2.0] and two.combined == pytest.approx([-3.0, -1.8, 7.0])
    assert one.standardised == [-0.5, 0.0, 0.5], "each on the scale of the model that decided"
    assert (one.tokens, one.finished, two.allowed) == ([3, 5, 3], [True, True, False], [False, True, True])
    assert two.helpfulness == [9.0, 8.0, 7.0] and one.safety == [-2.0, 0.0, 0.0]
    assert Group(**json.loads(json.dumps(asdict(two)))) == two


def evaluated(
    chat_format: ChatFormat, answers: list[tuple[float, float, bool]], shaping: Literal["whiten_logit", "none"]
) -> Evaluation:
    """An evaluation of one answer to each prompt, of (helpfulness, safety, whether it ended)."""
    helpfulness, safety, finished = (list(values) for values in zip(*answers, strict=True))
    responses = [
        answered(str(place), f"{score:.1f}", is_finished=done)
        for place, (score, done) in enumerate(zip(helpfulness, finished, strict=True))
    ]
    scored = session_of(chat_format, helpfulness, safety).scorer.score(responses)
    scoring = Scoring(unfinished_score=-1.0, shaping=shaping)
    return evaluation_of(responses, scored, CONSTANTS, scoring=scoring)[0]


def test_an_unsafe_answer_never_ranks_above_a_safe_one_and_a_cut_one_counts_as_in_training(
    tiny_format: ChatFormat,
) -> None:
    """The gate's scores of different models lie side by side: -1.8 (safety, unsafe) against -2.5 (helpfulness, safe)."""
    start = evaluated(tiny_format, [(-2.5, 0.0, True), (1.0, 0.0, True)], "whiten_logit")
    final = evaluated(tiny_format, [(9.0, -1.8, True), (9.0, 0.0, False)], "whiten_logit")
    assert final.combined[0] > start.combined[0] and final.standardised[0] > start.standardised[0]
    # On the scale of the start the safe ones have -1.75 and 0, and the cut one has -1, although its text has 4.
    assert start.standardised == [-1.75, 0.0] and final.standardised[1] == 4.0
    assert rankings(final, start) == ([0, 2], [1, 3])
    # Of the four pairs the cut one wins one, against -1.75.
    assert superiority_over(start, final).value == 0.25 and superiority_over(final, start).value == 0.75
    assert superiority_over(start, start).value == 0.5
    figures = comparison("rs", start, final)
    assert figures["rs/test/difference/score"] > 0 and figures["rs/test/superiority"] == 0.25
    assert "ranks above the start's" in comparison_table("rs", figures)


def test_the_same_answer_ties_with_itself_whatever_the_last_bits_of_its_scores_are(tiny_format: ChatFormat) -> None:
    start = evaluated(tiny_format, [(1.0, 0.0, True), (2.0, 0.0, True)], "whiten_logit")
    again = evaluated(tiny_format, [(1.0 + 1e-6, 0.0, True), (2.0, 0.0, True)], "whiten_logit")
    assert again.ranked[0] > start.ranked[0] and again.texts == start.texts
    assert rankings(again, start) == ([0, 1], [0, 1])
    assert superiority_over(start, again).value == 0.5
    same = comparison_table("rs", comparison("rs", start, start))
    assert same == "on 2 test prompts the final policy gives the same answers as the starting one", (
        "no intervals of width 0"
    )
    # Without whitening the cut one has -1 in raw units, above -2.5 and below 1.
    raw = [evaluated(tiny_format, [(value, 0.0, done)], "none") for value, done in ((9.0, False), (-0.5, True))]
    assert rankings(*raw) == ([0], [1])


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=6, max_size=6))
def test_the_order_is_that_of_a_plain_sort(tiny_format: ChatFormat, pairs: list[tuple[int, int]]) -> None:
    helpfulness, safety = ([float(pair[which]) for pair in pairs] for which in (0, 1))
    responses = [[answered(str(prompt), str(place)) for place in range(3)] for prompt in range(2)]
    groups = scored_groups(session_of(tiny_format, helpfulness, safety), responses, CONSTANTS)

    def rank(place: int) -> tuple[bool, float, int]:
        is_unsafe = 1 / (1 + math.exp(-safety[place])) < THRESHOLD
        return is_unsafe, -(safety[place] if is_unsafe else helpfulness[place]), place

    for prompt in range(2):
        wanted = sorted(range(3 * prompt, 3 * prompt + 3), key=rank)
        assert [3 * prompt + place for place in groups[prompt].order] == wanted


# --- batches


@given(st.integers(0, 3000), st.integers(1, 3 * ANSWERS_PER_BATCH))
def test_batches_hold_all_prompts_in_order_and_bounded_answers(count: int, samples: int) -> None:
    questions: Any = list(range(count))
    batches = batches_of(questions, samples)
    assert [one for batch in batches for one in batch] == questions
    assert all(len(batch) == 1 or len(batch) * samples <= ANSWERS_PER_BATCH for batch in batches)
    assert all((len(batch) + 1) * samples > ANSWERS_PER_BATCH for batch in batches[:-1]), "not smaller than need be"


# --- the cache


def test_a_value_is_computed_once_and_comes_back_as_from_json(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> Any:
        calls.append(1)
        return {"pair": (1, 0.1 + 0.2), "text": "caf\u00e9 \ud83d", 3: None}

    cache = StepCache(tmp_path / "sampling")
    assert not cache.has("batch-1")
    first, second = cache.get_or_make("batch-1", make), StepCache(tmp_path / "sampling").get_or_make("batch-1", make)
    assert first == second == {"pair": [1, 0.1 + 0.2], "text": "caf\u00e9 \ud83d", "3": None}
    assert len(calls) == 1 and cache.has("batch-1") and not cache.has("batch-2")


def test_killed_at_any_file_operation_a_value_is_there_whole_or_not(tmp_path: Path) -> None:
    values = {"texts": ["x" * 5000]}
    operation, was_killed, whole = 0, True, []
    while was_killed:
        folder = tmp_path / str(operation)
        was_killed = killed_at(operation, lambda folder=folder: StepCache(folder).get_or_make("one", lambda: values))
        whole.append(StepCache(folder).has("one"))
        assert StepCache(folder).get_or_make("one", lambda: values) == values
        operation += 1
    assert not whole[0] and whole[-1] and operation > 4


def test_a_number_that_is_none_is_our_bug_and_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        StepCache(tmp_path).get_or_make("one", lambda: [float("nan")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("added", ["", "\n", " \n\n"])
def test_every_answer_is_scored_where_answers_end_in_training(tiny_format: ChatFormat, added: str) -> None:
    """After the space and EOS that close every answer of a training dialog, whatever the policy ended it with."""
    messages, text = (Message("user", "What is the cat?"),), "It is the cat"
    dialog = tiny_format.encode_dialog((*messages, Message("assistant", text)), train_on=TrainOn.LAST_ANSWER).input_ids
    prompt = tuple(tiny_format.encode_prompt(messages))
    assert dialog[: len(prompt)] == prompt and dialog[-2:] == tiny_format.closing_ids
    answer, (space, stop) = dialog[len(prompt) : -2], tiny_format.closing_ids
    encode = tiny_format.tokenizer.encode
    answer = (*answer, *encode(f"a{added}")[len(encode("a")) :])
    sampled = {(*answer, space, stop): True, (*answer, stop): True, (*answer, space): False, answer: False}
    read: list[tuple[int, ...]] = []

    def scores(role: str, rows: list[tuple[int, ...]]) -> torch.Tensor:
        read.extend(rows)
        return torch.zeros(len(rows))

    bank: Any = SimpleNamespace(
        roles=("helpfulness",), reads_policy_ids=lambda role: True, scores=scores, chat_format=tiny_format
    )
    question = EncodedPrompt(messages, prompt, is_safety=False, name="cat")
    completions = [Completion(ids, (0.0,) * len(ids), is_finished=is_finished) for ids, is_finished in sampled.items()]
    engine: Any = SimpleNamespace(generate=lambda *_, **__: [completions])
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=9, seed=1)
    responses = sample(engine, tiny_format, [question], sampling, samples_per_prompt=4)
    assert [response.text for response in responses] == [text] * 4
    assert [response.is_closed for response in responses] == [True, False, True, True], "the second lacks the space"
    nothing_B = torch.zeros(4, dtype=torch.bool)
    combined = Combined(scores_B=torch.zeros(4), is_gated_B=nothing_B, is_unsafe_B=nothing_B, has_gate=False)
    Scorer(bank, lambda scores, answers: combined).score(responses, with_judge=False)
    assert read == [dialog] * 4


def test_a_value_without_a_digest_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    StepCache(tmp_path).get_or_make("one", lambda: [1])
    (tmp_path / "one.sha256").unlink()
    assert StepCache(tmp_path).get_or_make("one", lambda: [2]) == [1]


@pytest.mark.parametrize("damage", [b"", b'{"pair": [1', b"\xff\xfe\xff", b"{}", b"[2]\n", b"null", b"[[1]]\n", b"[1]"])
def test_a_damaged_value_is_recomputed(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache = StepCache(tmp_path)
    assert cache.get_or_make("one", lambda: [1]) == [1]
    (tmp_path / "one.json").write_bytes(damage)
    assert not cache.has("one") and cache.get_or_make("one", lambda: [2]) == [2] and cache.has("one")
    assert "one.json: cannot be read" in caplog.text
