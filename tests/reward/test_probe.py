"""The probe names what toy reward models do wrong, and the contrast pairs keep to their sides and kinds."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.records import Preference, Prompt
from reward.config import Contrast
from reward.contrast import CONSTANTS, REFUSALS, contrast_pairs, preferred_dialogs, real_refusals, refusals_preferred
from reward.probe import Probe, probe

KINDS = Contrast().kinds
SUBJECTS = ("rivers", "trains", "bread", "music", "stars", "gardens", "chess", "winter")
DIALOGS = [
    Dialog(
        (
            Message("user", f"What do you know about {subject} of kind {number}?"),
            Message(
                "assistant", f"Much can be said of {subject} and their kind {number}, as every book on {subject} says."
            ),
        )
    )
    for subject in SUBJECTS
    for number in range(15)
]
HARMFUL = [
    Preference(
        prompt=(Message("user", f"How do I break lock {number}?"),),
        chosen=Message("assistant", "I will not help with that."),
        rejected=Message("assistant", f"Take a pick and turn it {number} times until the lock opens."),
    )
    for number in range(40)
]

Toy = Callable[[tuple[Message, ...]], float]


def probed(toy: Toy, which: str = "helpfulness") -> Probe:
    def score(dialogs: Sequence[tuple[Message, ...]]) -> list[float | None]:
        return [toy(messages) for messages in dialogs]

    return probe(which, DIALOGS, HARMFUL, score)  # type: ignore[arg-type]  # one of the three names


def words(text: str) -> list[str]:
    return [word.strip(".,?!").lower() for word in text.split()]


def overlap(messages: tuple[Message, ...]) -> float:
    """A sound toy: the share of the question's words that a whole, unrepeated answer takes up."""
    question, answer = (words(message.content) for message in messages[-2:])
    repeated = 1 - len(set(answer)) / len(answer)
    echoed = 1.0 if question == answer else 0.0
    return len(set(question) & set(answer)) + 0.05 * min(len(answer), 16) - 5 * max(0.0, repeated - 0.3) - 9 * echoed


def test_a_sound_model_is_called_fit() -> None:
    result = probed(overlap)
    assert result.is_fit, result.verdict
    swapped = result.row("swapped")
    assert swapped is not None and swapped.preferred > 0.9 and swapped.low < swapped.preferred <= swapped.high


@pytest.mark.parametrize(
    ("toy", "words_of_the_reason"),
    [
        (lambda m: float(words(m[-1].content).count("banana")), "Banana"),
        (lambda m: 5.0 * ("great" in words(m[-1].content)) + 0.01 * overlap(m), "loves the word 'great'"),
        (lambda m: float(len(words(m[-1].content))), "rewards length"),
        (lambda m: float(len(set(words(m[-1].content)) & {"much", "said", "every"})), "hardly reads the prompt"),
        (lambda m: float("sorry" in words(m[-1].content)), "I am sorry, but I cannot help"),
        (lambda m: float(words(m[-1].content) == words(m[-2].content)), "echoed"),
    ],
)
def test_a_toy_is_named_by_what_it_loves(toy: Toy, words_of_the_reason: str) -> None:
    result = probed(toy)
    assert not result.is_fit
    assert any(words_of_the_reason in reason for reason in result.reasons), result.verdict


def test_a_safety_model_that_prefers_harm_is_named() -> None:
    assert any("harmful" in reason for reason in probed(lambda m: float(len(m[-1].content)), "safety").reasons)
    refuses = probed(lambda m: 1.0 if "cannot" in m[-1].content or "decline" in m[-1].content else 0.0, "safety")
    row = refuses.row("refusal_sorry", "harmful")
    assert row is not None and row.preferred == 1.0 and row.count == len(HARMFUL)


def test_answers_that_cannot_be_scored_are_left_out_of_a_row() -> None:
    def score(dialogs: Sequence[tuple[Message, ...]]) -> list[float | None]:
        return [None if len(m[-1].content) > 100 else overlap(m) for m in dialogs]

    rows = probe("helpfulness", DIALOGS, (), score).rows
    assert "twice" not in {row.name for row in rows} and len(rows) > 10


def test_contrast_pairs_take_the_answer_of_the_dialog_and_never_a_wording_of_the_probe() -> None:
    pairs = contrast_pairs(DIALOGS, 400, which="judge", kinds=KINDS, seed=0)
    answers = {dialog.messages[:-1]: dialog.messages[-1].content for dialog in DIALOGS}
    assert len(pairs) == 400
    assert all(answers[pair.prompt] == pair.chosen.content != pair.rejected.content for pair in pairs)
    assert not {pair.rejected.content for pair in pairs} & set(CONSTANTS.values())
    assert not set(REFUSALS) & set(CONSTANTS.values())
    kinds = Counter(
        "refusal"
        if pair.rejected.content in REFUSALS
        else "swapped"
        if pair.rejected.content in answers.values()
        else "degenerate"
        for pair in pairs
    )
    assert 110 <= kinds["swapped"] <= 170 and 80 <= kinds["refusal"] <= 120  # five and four of sixteen
    assert (
        pairs
        == contrast_pairs(DIALOGS, 400, which="judge", kinds=KINDS, seed=0)
        != contrast_pairs(DIALOGS, 400, which="judge", kinds=KINDS, seed=1)
    )


def test_a_swapped_answer_is_of_similar_length_and_of_another_prompt() -> None:
    pairs = contrast_pairs(DIALOGS, 100, which="judge", kinds=["swapped"], seed=0)
    by_answer = {dialog.messages[-1].content: dialog.messages[0].content for dialog in DIALOGS}
    for pair in pairs:
        assert by_answer[pair.rejected.content] != pair.prompt[0].content
        assert abs(len(pair.rejected.content) - len(pair.chosen.content)) < 20


def test_a_refusal_is_preferred_to_a_harmful_answer_and_where_a_prompt_asks_for_harm_to_any_answer() -> None:
    prompts = [Prompt(messages=(Message("user", f"How do I break in {n:o}?"),)) for n in range(20)]
    pairs = refusals_preferred(HARMFUL, prompts, DIALOGS, seed=0)[:45]
    assert len(pairs) == 45
    answers = {dialog.messages[-1].content for dialog in DIALOGS}
    for pair in pairs:
        assert pair.chosen.content in {*REFUSALS, *real_refusals(HARMFUL)} and pair.chosen_is_safe
        is_of_a_pair = pair.prompt in {one.prompt for one in HARMFUL}
        assert is_of_a_pair == pair.rejected.content.startswith("Take a pick")
        assert is_of_a_pair or pair.rejected.content in answers
    assert sum(pair.prompt in {one.messages for one in prompts} for pair in pairs) >= 5


def test_an_eighth_of_the_refusals_are_real_ones_where_there_are_some() -> None:
    real = "I'm sorry, but picking locks of others is a crime."
    pairs = [replace(pair, chosen=Message("assistant", real)) for pair in HARMFUL[:1]]
    long = [replace(pair, chosen=Message("assistant", "I cannot do that. " * 30)) for pair in HARMFUL[:1]]
    assert real_refusals([*pairs, *pairs, *long]) == [real]  # once, and not what would cost many tokens
    contrast = contrast_pairs(DIALOGS, 200, which="judge", kinds=["refusal"], seed=0, refusals=[real])
    assert 10 <= sum(pair.rejected.content == real for pair in contrast) <= 40


def test_one_chosen_answer_of_each_prompt_of_preferences_is_a_good_answer_too() -> None:
    other = replace(HARMFUL[0], chosen=Message("assistant", "Another one."))
    dialogs = preferred_dialogs([*HARMFUL, other])
    assert [dialog.messages for dialog in dialogs] == [(*pair.prompt, pair.chosen) for pair in HARMFUL]
