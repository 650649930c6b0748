"""Figures, baselines, pictures and tables of reward models, from scores made up here."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamachat.chat_format.dialog import Message
from llamachat.data.files import source_names
from llamachat.data.records import Preference
from llamachat.maths.intervals import wilson
from llamachat.tracking.metrics import check_names
from reward.evaluation import (
    LENGTH_TITLES,
    Domain,
    ScoredPair,
    ScoredResponse,
    calibration_error,
    evaluate,
    sigmoid,
    tfidf_differences,
)
from reward.presentation import draw_figures, markdown


def pair(chosen: float, rejected: float, *, prompt: str = "", domain: Domain = "helpfulness") -> ScoredPair:
    return ScoredPair(
        domain=domain,
        source=f"data/{domain}/one.jsonl.gz",
        prompt=prompt or f"{chosen} {rejected}",
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=5,
        rejected_tokens=3,
    )


def response(score: float, *, is_safe: bool, prompt: str = "") -> ScoredResponse:
    prompt = prompt or f"{score} {is_safe}"
    return ScoredResponse(score=score, is_safe=is_safe, source="data/labels/one.jsonl.gz", prompt=prompt)


def test_more_answers_to_the_same_prompts_make_no_interval_narrower() -> None:
    """Five equal answers to each of 40 prompts tell as much as one each."""
    rng = np.random.default_rng(2)
    once = [
        response(float(rng.normal(is_safe)), is_safe=is_safe, prompt=f"{place}")
        for place, is_safe in enumerate([True, False] * 20)
    ]
    alone, copied = (evaluate("safety", [], answers).figures for answers in (once, once * 5))
    for name in ("auroc", "balanced_accuracy"):
        for end in ("", "_low", "_high"):
            assert copied[f"rm/safety/{name}{end}"] == pytest.approx(alone[f"rm/safety/{name}{end}"], abs=1e-12)
    assert alone["rm/safety/auroc_high"] - alone["rm/safety/auroc_low"] > 0.2


def test_a_tie_is_half_right() -> None:
    figures = evaluate("helpfulness", [pair(2, 1), pair(1, 1), pair(0, 3), pair(4, 1)], []).figures
    assert figures["rm/helpfulness/test/helpfulness/accuracy"] == 2.5 / 4
    assert figures["rm/helpfulness/test/helpfulness/pairs"] == 4
    low, high = wilson(2.5, 4)
    assert figures["rm/helpfulness/test/helpfulness/accuracy_low"] == pytest.approx(low)
    assert figures["rm/helpfulness/test/helpfulness/accuracy_high"] == pytest.approx(high)


def test_a_constant_score_is_a_coin() -> None:
    pairs = [pair(0, 0, prompt=str(index)) for index in range(6)]
    figures = evaluate("judge", pairs, [response(0, is_safe=index < 2) for index in range(6)]).figures
    assert figures["rm/judge/test/helpfulness/accuracy"] == 0.5
    assert figures["rm/judge/auroc"] == figures["rm/judge/balanced_accuracy"] == 0.5
    assert figures["rm/judge/unsafe_recall"] == 0  # sigmoid(0) is not under 0.5
    assert figures["rm/judge/test/helpfulness/calibration_error"] == pytest.approx(0)


def test_accuracy_by_rating_file_and_kind() -> None:
    right, wrong = pair(1, 0, domain="safety"), pair(0, 1, domain="safety")
    pairs = [
        replace(right, rating="better"),
        replace(wrong, rating="better"),
        replace(right, rating="negligibly_better", source="other.jsonl"),
        replace(right, chosen_is_safe=True, rejected_is_safe=False, source="other.jsonl"),
        replace(wrong, chosen_is_safe=True, rejected_is_safe=True, source="other.jsonl"),
        replace(right, chosen_is_safe=False, rejected_is_safe=False, source="other.jsonl"),
        replace(right, chosen_is_safe=True, rejected_is_safe=None),
    ]
    figures = evaluate("safety", pairs, []).figures
    place = "rm/safety/test/safety"
    wanted = {"better": 0.5, "negligibly_better": 1, "safe_unsafe": 1, "both_safe": 0, "both_unsafe": 1}
    assert {part: figures[f"{place}/accuracy_{part}"] for part in wanted} == wanted
    assert [figures[f"{place}/pairs_{part}"] for part in wanted] == [2, 1, 1, 1, 1]
    assert figures[f"{place}/one/accuracy"] == pytest.approx(2 / 3)
    assert figures[f"{place}/other/accuracy"] == 3 / 4
    assert f"{place}/accuracy_slightly_better" not in figures, "there is no such pair"
    assert not any("test/helpfulness" in name for name in figures)
    check_names(figures)


def test_pairs_of_one_prompt_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.3, 1, 40)
    apart = [pair(gap, 0, prompt=f"{index}") for index, gap in enumerate(np.repeat(gaps, 5))]
    together = [replace(one, prompt=str(index // 5)) for index, one in enumerate(apart)]
    name = "rm/judge/test/helpfulness/accuracy"
    narrow, wide = evaluate("judge", apart, []).figures, evaluate("judge", together, []).figures
    assert narrow[name] == wide[name]
    ratio = (wide[f"{name}_high"] - wide[f"{name}_low"]) / (narrow[f"{name}_high"] - narrow[f"{name}_low"])
    assert ratio == pytest.approx(math.sqrt(5), rel=0.1)


def test_labelled_answers_by_hand() -> None:
    # sigmoid(-3) = 0.047 and sigmoid(-2) = 0.119 lie under the gate of 0.15, sigmoid(-1) = 0.27 only under 0.5.
    unsafe, safe = [-3.0, -1.0, 2.0], [-2.0, 1.0, 1.5, 3.0]
    responses = [response(s, is_safe=False) for s in unsafe] + [response(s, is_safe=True) for s in safe]
    figures = evaluate("safety", [], responses).figures
    wanted = {
        "unsafe_recall": 2 / 3,
        "unsafe_precision": 2 / 3,
        "safe_recall": 3 / 4,
        "balanced_accuracy": (2 / 3 + 3 / 4) / 2,
        "unsafe_recall_at_gate": 1 / 3,
        "unsafe_precision_at_gate": 1 / 2,
        # Safe above unsafe: -2 beats 1 of 3, 1.0 and 1.5 beat 2 each, 3.0 beats 3: 8 of 12.
        "auroc": 8 / 12,
        "test/safe_answers": 4,
        "test/unsafe_answers": 3,
    }
    assert {name: figures[f"rm/safety/{name}"] for name in wanted} == pytest.approx(wanted)
    assert figures["rm/safety/auroc_low"] < 8 / 12 < figures["rm/safety/auroc_high"]
    check_names(figures)


def test_what_one_class_cannot_tell_is_left_out() -> None:
    figures = evaluate("safety", [], [response(1, is_safe=True), response(2, is_safe=True)]).figures
    assert figures["rm/safety/safe_recall"] == 1
    assert not {name for name in figures if "auroc" in name or "balanced" in name or "unsafe_recall" in name}
    assert evaluate("safety", [], []).figures == {}


def test_scores_far_out_are_no_trouble() -> None:
    assert sigmoid([-1e4, 0.0, 1e4]).tolist() == [0.0, 0.5, 1.0]
    figures = evaluate("judge", [pair(1e4, -1e4)], [response(-1e4, is_safe=False), response(1e4, is_safe=True)]).figures
    assert all(map(math.isfinite, figures.values()))
    assert figures["rm/judge/label_calibration_error"] == pytest.approx(0)


def test_calibration_error_by_hand() -> None:
    # Bin 0.6: two of four happen, gap 0.15; bin 0.9 and the full 1.0: both happen, gap 0.05. (4*0.15 + 2*0.05) / 6.
    chances = np.array([0.65, 0.65, 0.65, 0.65, 0.9, 1.0])
    happened = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    assert calibration_error(chances, happened) == pytest.approx(0.7 / 6)


def test_longer_wins_counts_answer_tokens() -> None:
    longer = pair(0, 0, domain="safety")
    shorter = replace(longer, chosen_tokens=3, rejected_tokens=5, prompt="b")
    equal = replace(longer, chosen_tokens=4, rejected_tokens=4, prompt="c")
    figures = evaluate("safety", [longer, longer, shorter, equal], []).figures
    assert figures["rm/safety/test/safety/longer_wins"] == 2.5 / 4
    assert figures["rm/safety/test/safety/one/longer_wins"] == 2.5 / 4


def test_the_difference_to_tfidf_is_taken_pair_by_pair() -> None:
    pairs = [pair(1, 0, prompt=str(index)) for index in range(80)] + [pair(0, 1, prompt=f"w{i}") for i in range(20)]
    pairs += [replace(one, domain="safety") for one in pairs[:10]]
    # The baseline is right where the model is, but for ten pairs; on the safety pairs it is always wrong.
    differences = [1.0] * 70 + [-1.0] * 30 + [-0.5] * 10
    figures = evaluate("helpfulness", pairs, [], baseline=differences).figures
    place = "rm/helpfulness/test/helpfulness"
    assert (figures[f"{place}/tfidf"], figures[f"{place}/tfidf_difference"]) == pytest.approx((0.7, 0.1))
    assert figures["rm/helpfulness/test/safety/tfidf"] == 0
    # Ten of a hundred gaps are 1, the rest 0: standard error 0.03.
    low, high = figures[f"{place}/tfidf_difference_low"], figures[f"{place}/tfidf_difference_high"]
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.03, 0.1 + 1.96 * 0.03), abs=0.015)
    check_names(figures)


def test_names_of_files() -> None:
    names = source_names(["a/pairs.jsonl", "b/pairs.jsonl.gz", "hh rlhf.parquet", "org/set-1", "a/pairs.jsonl"])
    assert names == {
        "a/pairs.jsonl": "a-pairs",
        "b/pairs.jsonl.gz": "b-pairs",
        "hh rlhf.parquet": "hh-rlhf",
        "org/set-1": "set-1",
    }
    same = source_names(["x/a/pairs.jsonl", "y/a/pairs.jsonl", "z/a/pairs.csv"])
    assert sorted(same.values()) == ["a-pairs", "a-pairs~2", "a-pairs~3"]
    nameless = source_names([".hidden", ""])
    assert len(set(nameless.values())) == 2
    check_names(
        f"rm/judge/test/safety/{name}/accuracy_low" for each in (names, same, nameless) for name in each.values()
    )


def preference(chosen: str, rejected: str) -> Preference:
    prompt = (Message("user", "What now?"),)
    return Preference(prompt=prompt, chosen=Message("assistant", chosen), rejected=Message("assistant", rejected))


def test_tfidf_learns_which_words_win_and_is_antisymmetric() -> None:
    train = [preference(f"Sorry, I cannot help with {thing}.", f"Sure, take {thing}!") for thing in ("a", "bb", "cc")]
    tested = [
        preference("I cannot say.", "Sure, here!"),
        preference("Sure, here!", "I cannot say."),
        preference("zzz", "yyy"),
    ]
    first, swapped, unseen = tfidf_differences(train, tested) or []
    assert first > 0.1
    assert swapped == pytest.approx(-first)
    assert unseen == 0.0, "words never seen: a tie"
    assert tfidf_differences(train, []) == []


def test_without_words_there_is_no_baseline() -> None:
    assert tfidf_differences([], []) is None
    assert tfidf_differences([preference("alpha", "beta")], []) is None, "no word is in two answers"


def some_pairs() -> list[ScoredPair]:
    rng = np.random.default_rng(0)
    pairs = [pair(*rng.normal((0.4, 0), 1), prompt=f"{index // 2}") for index in range(90)]
    rated = [replace(one, rating="better" if index % 2 else "significantly_better") for index, one in enumerate(pairs)]
    return rated + [replace(one, domain="safety", rating=None) for one in pairs[:30]]


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    responses = [response(index % 7 - 3, is_safe=index % 3 > 0) for index in range(60)]
    pairs = some_pairs()
    differences = [one.chosen for one in pairs]
    written = draw_figures(evaluate("safety", pairs, responses, baseline=differences), tmp_path / "figures")
    assert [path.name for path in written] == ["accuracy.png", "calibration.png", "scores.png"]
    assert sorted((tmp_path / "figures").iterdir()) == written, "nothing is left beside them"
    for path in written:
        with Image.open(path) as image:
            assert image.width > 400
            assert len(image.convert("RGB").getcolors(1_000_000) or []) > 20, "something is drawn"
    only = draw_figures(evaluate("safety", [], responses), tmp_path / "labels")
    assert [path.name for path in only] == ["calibration.png", "scores.png"]
    assert draw_figures(evaluate("safety", [], []), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("error")
def test_a_single_pair_and_equal_scores_are_drawn_without_complaint(tmp_path: Path) -> None:
    assert len(draw_figures(evaluate("judge", [pair(0, 0)], [response(0, is_safe=True)]), tmp_path)) == 3


def cells(text: str, heading: str, row: str) -> list[str]:
    """The cells of one row of the table under the heading that begins so, by its first cell."""
    part = text[text.index(f"## {heading}") :].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return next(listed[1:] for listed in rows if listed[0] == row)


def test_tables_put_models_and_baselines_side_by_side() -> None:
    pairs = some_pairs()
    helpful = evaluate("helpfulness", pairs, [], baseline=[1.0] * len(pairs)).figures
    opposite = [replace(one, chosen=one.rejected, rejected=one.chosen) for one in pairs]
    safe = evaluate("safety", opposite, [response(1, is_safe=True), response(-1, is_safe=False)]).figures
    text = markdown({"safety": safe, "helpfulness": helpful})
    place = "rm/helpfulness/test/helpfulness/accuracy"
    share, low, high = (100 * helpful[f"{place}{end}"] for end in ("", "_low", "_high"))
    own = f"{share:.1f} [{low:.1f}, {high:.1f}]"
    by_file = "Helpfulness pairs by file"
    assert cells(text, by_file, "") == ["all", "one", "all, less TF-IDF"]
    assert cells(text, by_file, "pairs") == ["90", "90", ""]
    assert cells(text, by_file, "helpfulness")[:2] == [own, own]
    assert cells(text, by_file, "helpfulness")[2].startswith(f"{share - 100:+.1f} [")
    assert cells(text, by_file, "safety")[0].startswith(f"{100 - share:.1f} [")
    assert cells(text, by_file, "safety")[2] == "-", "no baseline was measured beside it"
    assert cells(text, by_file, "TF-IDF on the pairs of helpfulness")[1] == "100.0"
    assert cells(text, by_file, "longer wins")[1] == "100.0"
    assert cells(text, "Helpfulness pairs by rating", "") == ["significantly better", "better", "all pairs"]
    assert cells(text, "Helpfulness pairs by rating", "pairs") == ["45", "45", "90"]
    assert cells(text, "Answers labelled", "safety")[0] == "1 + 1"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.index("|", 1) for line in lines[:2]] == [lines[0].index("|", 1)] * 2
    assert text.index("| helpfulness ") < text.index("| safety "), "in one order, whatever order they come in"


def test_tables_leave_out_what_there_is_not() -> None:
    text = markdown({"judge": evaluate("judge", [pair(1, 0)], []).figures})
    assert text.count("## ") == 2  # by file, and by which answer is longer
    assert "Safety" not in text
    assert markdown({}).count("|") == 0


def test_accuracy_by_which_answer_is_longer() -> None:
    lengths = [(10, 9, 1.0), (10, 8, 1.0), (8, 10, -1.0), (30, 5, 0.0)]  # tokens chosen and rejected, score difference
    pairs = [replace(pair(gap, 0), chosen_tokens=chosen, rejected_tokens=rejected) for chosen, rejected, gap in lengths]
    figures = evaluate("judge", pairs, []).figures
    place = "rm/judge/test/helpfulness"
    by_length = {
        kind: (figures[f"{place}/pairs_{kind}"], figures[f"{place}/accuracy_{kind}"]) for kind in LENGTH_TITLES
    }
    assert by_length == {"similar_length": (1, 1.0), "chosen_longer": (2, 0.75), "chosen_shorter": (1, 0.0)}
