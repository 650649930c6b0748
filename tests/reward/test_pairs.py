"""From preferences to examples, rows and steps: mixes by count, what is left out, what a packed row holds."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Data, DataSource, Split
from llamachat.data.loading import fraction, split_of
from llamachat.data.packing import pack_responses
from llamachat.data.pairs import UNSAFE_CHOSEN, PairExample
from llamachat.data.records import Preference
from llamachat.errors import DataError
from llamachat.runs.inputs import Which
from reward.batches import Batches, plan_batches
from reward.config import Config, Contrast
from reward.contrast import REFUSALS
from reward.pairs import Examples, LabelExample, load_examples
from tests.reward.tiny_reward import data_of, preference, toy_labels, toy_pairs, write

HALF = Split(test=0.2, validation=0.2, judge=0)


def load(
    chat_format: ChatFormat,
    data: Data,
    which: Which = "helpfulness",
    *,
    seed: int = 0,
    system: str | None = None,
    max_tokens: int = 96,
    trained_tokens: int | None = None,
    **config: Any,
) -> Examples:
    return load_examples(
        Config(max_tokens=trained_tokens, **config),
        data,
        chat_format,
        which=which,
        system=system,
        max_tokens=max_tokens,
        seed=seed,
    )


def domains(examples: list[PairExample]) -> Counter[str]:
    return Counter(example.domain for example in examples)


# --- mixes


@pytest.mark.parametrize(("share", "others"), [(0.0, 0), (0.2, 0.25), (0.5, 1.0)])
def test_helpfulness_has_all_of_its_own_and_a_share_of_others(
    share: float, others: float, tiny_format: ChatFormat, tmp_path: Path
):
    data = data_of(tmp_path, helpfulness=toy_pairs(20), safety=toy_pairs(60, "the moon"), open=toy_pairs(60, "the sun"))
    mixed = domains(load(tiny_format, data, other_share=share).train)
    own = sum(split_of(fraction(pair["prompt"][0]["content"]), HALF) == "train" for pair in toy_pairs(20))
    assert mixed["helpfulness"] == own
    assert mixed["safety"] + mixed["open"] == round(own * others)


def test_the_draw_is_uniform_without_repeats_and_hangs_on_the_seed(tiny_format: ChatFormat, tmp_path: Path):
    data = data_of(
        tmp_path, helpfulness=toy_pairs(40), safety=toy_pairs(100, "the moon"), open=toy_pairs(300, "the sun")
    )
    draws = [load(tiny_format, data, seed=seed).train for seed in (0, 0, 1, 2, 3, 4)]
    drawn = [[e.preference.prompt for e in examples if e.domain != "helpfulness"] for examples in draws]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]
    assert all(len(set(prompts)) == len(prompts) for prompts in drawn)
    mixed = sum((domains(examples) for examples in draws[1:]), Counter())
    assert 2.0 < mixed["open"] / mixed["safety"] < 4.5  # 3 to 1 in the pool


def test_safety_is_nine_to_one_and_has_the_labels(tiny_format: ChatFormat, tmp_path: Path):
    data = data_of(
        tmp_path, helpfulness=toy_pairs(30), safety=toy_pairs(60, "the moon"), labels=toy_labels(40), split=HALF
    )
    examples = load(tiny_format, data, "safety")
    mixed = domains(examples.train)
    assert mixed["helpfulness"] == round(mixed["safety"] / 9)
    labels = Counter(label.is_safe for label in examples.labels)
    assert labels[True] == labels[False] > 0  # a third of them are unsafe: repeated
    plain = Counter(label.is_safe for label in load(tiny_format, data, "safety", balance_labels=False).labels)
    assert plain[True] == labels[True] and plain[False] < plain[True]
    assert examples.test_labels and len(examples.test_labels) < 20
    assert not load(tiny_format, data, "safety", safety_auxiliary_weight=0).labels
    assert not load(tiny_format, data, "helpfulness").labels


def test_the_judge_sees_its_side_alone(tiny_format: ChatFormat, tmp_path: Path):
    split = Split(test=0.1, validation=0.2, judge=0.4)
    data = data_of(tmp_path, helpfulness=toy_pairs(40), safety=toy_pairs(40, "the moon"), split=split)
    sides: dict[str, set[str]] = {}
    for which in ("helpfulness", "safety", "judge"):
        examples = load(tiny_format, data, which)
        sides[which] = {split_of(fraction(e.preference.prompt[0].content), split) for e in examples.train}
        assert {split_of(fraction(e.preference.prompt[0].content), split) for e in examples.validation} == {
            "validation"
        }
        assert {split_of(fraction(e.preference.prompt[0].content), split) for e in examples.test} == {"test"}
        own = {"helpfulness", "safety"} if which == "judge" else {which}
        assert set(domains(examples.validation)) == own
        assert set(domains(examples.test)) == {"helpfulness", "safety"}
    assert sides == {"helpfulness": {"train"}, "safety": {"train"}, "judge": {"judge"}}


def test_contrast_pairs_are_a_share_of_the_mix_from_the_same_side(
    tiny_format: ChatFormat, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    split = Split(test=0.1, validation=0.2, judge=0.4)
    dialogs = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n:o} of it?"},
                {"role": "assistant", "content": f"yes {n:o}"},
            ]
        }
        for n in range(60)
    ]
    data = data_of(tmp_path, helpfulness=toy_pairs(40), safety=toy_pairs(40, "the moon"), sft=dialogs, split=split)
    harmful = [{"prompt": [{"role": "user", "content": f"Harm {n:o} of them"}], "is_safety": True} for n in range(60)]
    harmless = [{"prompt": [{"role": "user", "content": f"Harmless {n:o} of them"}]} for n in range(60)]
    sources = {
        "adversarial": write(tmp_path / "adversarial.jsonl", harmful[:30]),
        "prompts": write(tmp_path / "prompts.jsonl", harmful[30:] + harmless),
    }
    data = data.model_copy(update=sources)
    for which in ("helpfulness", "safety", "judge"):
        examples = load(tiny_format, data, which, contrast=Contrast(share=0.6), max_tokens=300)
        contrast = [e for e in examples.train if e.domain == "contrast"]
        assert len(contrast) / len(examples.train) == pytest.approx(0.6, abs=0.03)
        side = {"judge"} if which == "judge" else {"train"}
        assert {split_of(fraction(e.preference.prompt[0].content), split) for e in contrast} == side
        # Where answers to harmful prompts count too, a refusal is preferred to some of them, and to harmful prompts alone.
        refused = [e.preference.prompt[0].content for e in contrast if e.preference.chosen.content in REFUSALS]
        shares = {"helpfulness": 0, "safety": 0.5, "judge": 0.05}
        assert len(refused) == round(shares[which] * len(contrast))
        assert not any(prompt.startswith(("Question", "Harmless")) for prompt in refused)
        if which == "safety":
            assert {prompt.split()[0] for prompt in refused} == {"Harm", "What"}  # and of safety pairs
            longest = min(len(e.chosen) for e in contrast if e.preference.chosen.content in REFUSALS) + 10
            short = load(tiny_format, data, which, contrast=Contrast(share=0.6, max_tokens=longest), max_tokens=300)
            lengths = [
                max(len(e.chosen), len(e.rejected))
                for e in short.train
                if e.domain == "contrast" and e.preference.chosen.content in REFUSALS
            ]
            assert lengths and max(lengths) <= longest
        assert {e.domain for e in examples.validation} > {"contrast"} and "contrast" not in domains(examples.test)
    every = load(tiny_format, data, contrast=Contrast(share=0.6), max_tokens=300).train
    lengths = sorted(len(e.chosen) for e in every if e.domain == "contrast")
    longest = lengths[len(lengths) // 2]
    short = load(tiny_format, data, contrast=Contrast(share=0.6, max_tokens=longest), max_tokens=300).train
    assert lengths[-1] > longest >= max(len(e.chosen) for e in short if e.domain == "contrast")
    with caplog.at_level(logging.WARNING):
        load(tiny_format, data, contrast=Contrast(share=0.6, max_tokens=16), max_tokens=300)
    assert "reward.contrast.max_tokens" in caplog.text
    none = load(tiny_format, data, contrast=Contrast(share=0))
    assert "contrast" not in domains([*none.train, *none.validation])


def test_a_mix_that_lacks_others_is_reported_with_counts(
    tiny_format: ChatFormat, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    examples = load(tiny_format, data_of(tmp_path, helpfulness=toy_pairs(20)))
    assert set(domains(examples.train)) == {"helpfulness"}
    assert f"needs {len(examples.train)} pairs of data.safety and data.open, but there are 0" in caplog.text


@pytest.mark.parametrize("which", ["helpfulness", "safety", "judge"])
def test_a_model_without_pairs_is_refused(which: Which, tiny_format: ChatFormat, tmp_path: Path):
    if which == "helpfulness":
        data = data_of(tmp_path, safety=toy_pairs(20))
    else:
        data = data_of(tmp_path, helpfulness=toy_pairs(20))
    with pytest.raises(DataError, match=rf"rm/{which}: 0 training pairs.*Add pairs, .*data\.split"):
        load(tiny_format, data, which)


def test_bad_lines_of_all_sets_are_reported_together_with_file_and_line(tiny_format: ChatFormat, tmp_path: Path):
    bad = preference("Why?", "yes", "no", rating="much_nicer")
    data = data_of(tmp_path, helpfulness=[*toy_pairs(3), bad], safety=[bad])
    with pytest.raises(DataError) as caught:
        load(tiny_format, data)
    assert "helpfulness.jsonl:4" in str(caught.value) and "safety.jsonl:1" in str(caught.value)
    apart = tmp_path / "apart.jsonl"
    apart.write_text('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: c\\n\\nAssistant: d"}\n')
    with pytest.raises(DataError, match=r"apart\.jsonl:1"):
        load(tiny_format, Data(sft=(), helpfulness=(DataSource(path=str(apart)),)))


# --- single records


def test_margins_follow_ratings_and_a_missing_one_is_reported(
    tiny_format: ChatFormat, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    examples = load(tiny_format, data_of(tmp_path, helpfulness=toy_pairs(40)), margin="large", other_share=0).train
    wanted = {"significantly_better": 3, "better": 2, "slightly_better": 1, "negligibly_better": 0, None: 0}
    assert all(example.margin == wanted[example.preference.rating] for example in examples)
    unrated = sum(example.preference.rating is None for example in examples)
    assert f"{unrated} of {len(examples)} training pairs have no rating: their margin is 0" in caplog.text


def test_unsafe_chosen_over_safe_is_left_out_and_counted(tiny_format: ChatFormat, tmp_path: Path):
    kinds = [(False, True), (False, False), (True, False), (True, True), (None, True), (False, None)]
    pairs = [
        preference(f"Why {place} {number:o}?", "yes it is", "no", chosen_is_safe=chosen, rejected_is_safe=rejected)
        for place, (chosen, rejected) in zip("abcdef", kinds, strict=True)
        for number in range(6)
    ]
    examples = load(tiny_format, data_of(tmp_path, safety=pairs), "safety", helpfulness_share=0)
    kept = {
        (e.preference.chosen_is_safe, e.preference.rejected_is_safe)
        for e in (*examples.train, *examples.validation, *examples.test)
    }
    assert kept == set(kinds[1:]) and examples.dropped[UNSAFE_CHOSEN] == 6
    # Paper 3.2.1: in the safety annotation. The more helpful of two answers may be the unsafe one.
    examples = load(tiny_format, data_of(tmp_path, helpfulness=pairs), other_share=0)
    kept = {
        (e.preference.chosen_is_safe, e.preference.rejected_is_safe)
        for e in (*examples.train, *examples.validation, *examples.test)
    }
    assert kept == set(kinds) and UNSAFE_CHOSEN not in examples.dropped


def long_pair(number: int, *, turns: int, answer: str = "no") -> dict[str, Any]:
    pair = preference(f"the first question {number:o}", "yes and the other cat and the capital", answer)
    more: list[dict[str, str]] = []
    for turn in range(turns):
        more += [{"role": "assistant", "content": f"the answer {turn}"}, {"role": "user", "content": f"and {turn}?"}]
    pair["prompt"] += more
    return pair


def test_both_answers_lose_the_same_oldest_turns(tiny_format: ChatFormat, tmp_path: Path):
    data = data_of(tmp_path, helpfulness=[long_pair(number, turns=6) for number in range(12)])
    examples = load(tiny_format, data, other_share=0, system="the cat", max_tokens=96)
    everything = [*examples.train, *examples.validation, *examples.test]
    assert len(everything) == 12
    assert examples.dropped == {"shortened: oldest turns dropped to fit 96 tokens": 12}
    for example in everything:
        texts = [tiny_format.tokenizer.decode(list(ids)) for ids in (example.chosen, example.rejected)]
        prompts = [text.rpartition("[/INST]")[0] for text in texts]
        assert prompts[0] == prompts[1] and "the cat" in prompts[0] and "first question" not in prompts[0]
        assert max(len(example.chosen), len(example.rejected)) <= 96 and "and 5?" in prompts[0]
        assert {example.chosen[-1], example.rejected[-1]} == {tiny_format.tokenizer.eos_id}


def test_training_pairs_and_labels_may_be_shorter_than_test_pairs(tiny_format: ChatFormat, tmp_path: Path):
    label = {"messages": [*long_pair(0, turns=6)["prompt"], {"role": "assistant", "content": "yes"}], "is_safe": True}
    labels = [label | {"messages": [{"role": "user", "content": f"{n:o}?"}, *label["messages"][1:]]} for n in range(20)]
    data = data_of(
        tmp_path,
        safety=[long_pair(number, turns=6) for number in range(20)],
        labels=labels,
        split=Split(test=0.3, validation=0.3, judge=0),
    )
    examples = load(tiny_format, data, "safety", helpfulness_share=0, max_tokens=400, trained_tokens=60)
    for trained, tested in (
        ([len(e.chosen) for e in [*examples.train, *examples.validation]], [len(e.chosen) for e in examples.test]),
        ([len(e.ids) for e in examples.labels], [len(e.ids) for e in examples.test_labels]),
    ):
        assert max(trained) <= 60 < min(tested)
    same = load(tiny_format, data, "safety", helpfulness_share=0, max_tokens=60, trained_tokens=400)
    assert (same.train, same.labels) == (examples.train, examples.labels)


def test_what_cannot_fit_is_left_out_and_counted(tiny_format: ChatFormat, tmp_path: Path):
    pairs = toy_pairs(20) + [long_pair(number, turns=0, answer="the cat " * 60) for number in range(5)]
    examples = load(tiny_format, data_of(tmp_path, helpfulness=pairs), other_share=0)
    assert len(examples.train) + len(examples.validation) + len(examples.test) == 20
    assert list(examples.dropped.values()) == [5]
    (first,) = toy_labels(1)
    question, answer = first["messages"]
    long = first | {"messages": [question, answer | {"content": "the cat " * 60}]}
    labels = [*toy_labels(20), long, {"messages": first["messages"]}]
    split = Split(test=0, validation=0.2, judge=0)
    data = data_of(tmp_path / "labels", safety=toy_pairs(30), labels=labels, split=split)
    dropped = load(tiny_format, data, "safety", helpfulness_share=0).dropped
    assert dropped["labels left out: without is_safe"] == 1
    assert dropped["labels left out: the last turn pair alone is longer than 96 tokens"] == 1


def test_answers_of_equal_tokens_are_left_out(tiny_format: ChatFormat, tmp_path: Path):
    # SentencePiece writes a space as U+2581, so that the two texts have the same pieces.
    pairs = [preference(f"Why {number:o}?", "yes it is", "yes\u2581it is") for number in range(3)]
    examples = load(tiny_format, data_of(tmp_path, helpfulness=[*toy_pairs(20), *pairs]), other_share=0)
    assert examples.dropped == {"left out: both answers have the same tokens": 3}


# --- rows


def example(chosen: int, rejected: int, *, first: int = 3, **marks: Any) -> PairExample:
    answers = {name: Message("assistant", name) for name in ("chosen", "rejected")}
    return PairExample(
        chosen=tuple(range(first, first + chosen)),
        rejected=tuple(range(first, first + rejected)),
        margin=0.0,
        chosen_tokens=1,
        rejected_tokens=1,
        preference=Preference(prompt=(Message("user", "q"),), **answers, **marks),
        domain="safety",
        source="x",
    )


def test_a_row_by_hand():
    pairs = [example(3, 2, chosen_is_safe=True), example(2, 2, chosen_is_safe=False, rejected_is_safe=False)]
    labels = [LabelExample(ids=(9, 8, 7), is_safe=False, source="y", prompt="")]
    batches = plan_batches(pairs, labels, pairs_per_step=2, epochs=1, seed=0, row_tokens=64, has_pair_labels=True)
    (row,) = batches.plan.rows
    assert sorted(row) == [0, 1, 2]
    responses = batches.responses((0, 2, 1))
    assert responses.ids == [(3, 4, 5), (3, 4), (9, 8, 7), (3, 4), (3, 4)]
    assert (responses.chosen, responses.labelled, responses.is_safe) == (
        [0, 3],
        [0, 2, 3, 4],
        [True, False, False, False],
    )
    packed = pack_responses(responses.ids, multiple_of=8)
    assert packed["input_ids"].tolist() == [[3, 4, 5, 3, 4, 9, 8, 7, 3, 4, 3, 4, 0, 0, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1, 2, 3]]
    assert packed["ends"].tolist() == [2, 4, 7, 9, 11]
    batch = batches.collate([0])
    assert (batch["pairs_of_step"].item(), batch["labelled_of_step"].item()) == (2, 4)
    silent = plan_batches(pairs, [], pairs_per_step=2, epochs=1, seed=0, row_tokens=64, has_pair_labels=False)
    assert silent.collate([0])["labelled"].tolist() == []


def contents(batches: Batches) -> list[list[int]]:
    plan = batches.plan
    return [sorted(index for row in plan.step_rows(step) for index in row) for step in range(plan.num_steps)]


def test_steps_have_their_pairs_and_an_even_share_of_the_labels():
    pairs = [example(2 + number % 5, 3, first=number) for number in range(25)]
    labels = [LabelExample(ids=(4, 5), is_safe=True, source="y", prompt="")] * 11
    both, alone = (
        plan_batches(pairs, some, pairs_per_step=10, epochs=2, seed=1, row_tokens=32, has_pair_labels=False)
        for some in (labels, [])
    )
    assert [[index for index in step if index < 25] for step in contents(both)] == contents(alone)
    assert [count for count, _, _ in both.counts] == [10, 10, 10, 10, 10]
    singles = [sum(index >= 25 for index in step) for step in contents(both)]
    assert singles == [4, 4, 5, 4, 5] and [count for _, count, _ in both.counts] == singles  # 22 over 5 steps
    used = Counter(index for step in contents(both) for index in step)
    assert set(used.values()) == {2}
    for row in both.plan.rows:
        tokens = sum(len(ids) for ids in both.responses(row).ids)
        assert tokens <= 32 and both.collate([both.plan.rows.index(row)])["input_ids"].shape[1] % 64 == 0


def test_a_row_without_responses_is_pads_alone():
    pairs = [example(30, 30), example(3, 2), example(2, 2)]
    batches = plan_batches(pairs, [], pairs_per_step=2, epochs=1, seed=0, row_tokens=32, has_pair_labels=False)
    empty = batches.plan.rows.index(())
    batch = batches.collate([empty])
    assert batch["input_ids"].tolist() == [[0] * 64] and batch["ends"].numel() == batch["chosen"].numel() == 0
