"""Near-duplicates: sketches against sets of word sequences in plain Python, the index against all pairs compared."""

import random

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.near_duplicates import LARGEST_SKETCH, SIMILARITY, NearIndex, similarity, sketch_of
from llamachat.data.records import Preference

WORDS = [f"word{index}" for index in range(40)]


def dialog(text: str) -> Dialog:
    return Dialog((Message("user", text), Message("assistant", "Yes.")))


def jaccard(one: str, other: str) -> float:
    """By the definition, on the words as they are written here (lower case, apart by blanks)."""
    sets = []
    for text in (one, other):
        words = [*text.split(), "yes"]
        sets.append({tuple(words[place : place + 3]) for place in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def random_texts(count: int, *, length: int, edits: int) -> list[str]:
    """Texts of a few templates, each with some of its words changed."""
    draw = random.Random(0)
    templates = [[draw.choice(WORDS) for _ in range(length)] for _ in range(count // 8)]
    texts = []
    for _ in range(count):
        words = list(draw.choice(templates))
        for _ in range(draw.randrange(edits)):
            words[draw.randrange(length)] = draw.choice(WORDS)
        texts.append(" ".join(words))
    return texts


def test_similarity_of_short_texts_is_the_jaccard_index_of_their_word_sequences():
    texts = random_texts(40, length=30, edits=6)
    sketches = [sketch_of(dialog(text)) for text in texts]
    pairs = [(a, b) for a in range(40) for b in range(a)]
    assert all(similarity(sketches[a], sketches[b]) == jaccard(texts[a], texts[b]) for a, b in pairs)


def test_similarity_of_long_texts_is_near_it_in_bounded_memory():
    texts = random_texts(16, length=600, edits=60)
    sketches = [sketch_of(dialog(text)) for text in texts]
    assert {len(sketch) for sketch in sketches} == {LARGEST_SKETCH}
    errors = [similarity(sketches[a], sketches[b]) - jaccard(texts[a], texts[b]) for a in range(16) for b in range(a)]
    # Standard error of a share of 128 draws: at most sqrt(1/4 / 128) = 0.044.
    assert max(map(abs, errors)) < 4 * 0.044 and abs(sum(errors) / len(errors)) < 0.05


def test_the_index_finds_what_comparing_all_pairs_finds():
    texts = random_texts(200, length=25, edits=5)
    sketches = [sketch_of(dialog(text)) for text in texts]
    index = NearIndex(sketches)
    has_near = []
    for number in range(200):
        has_near.append(index.find(number) is not None)
        index.add(number)
    expected = [any(jaccard(texts[a], texts[b]) >= SIMILARITY for b in range(a)) for a in range(200)]
    assert has_near == expected and 0 < sum(expected) < 200


def test_case_punctuation_and_system_text_do_not_count_and_rejected_answers_neither():
    plain = sketch_of(dialog("please tell me a joke"))
    loud = Dialog(
        (Message("system", "Be brief."), Message("user", "Please, tell me a JOKE!"), Message("assistant", "yes"))
    )
    assert similarity(plain, sketch_of(loud)) == 1.0
    pair = Preference(
        prompt=(Message("user", "please tell me a joke"),),
        chosen=Message("assistant", "Yes."),
        rejected=Message("assistant", "No, I would rather not do that at all."),
    )
    assert similarity(plain, sketch_of(pair)) == 1.0
    assert similarity(sketch_of(dialog("")), sketch_of(dialog(""))) == 1.0, "fewer words than a sequence has"
