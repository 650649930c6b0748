"""Sample two answers to each prompt of a file, for people to compare (Llama 2, section 3.2.1), as JSON Lines.

Reads prompts, dialogs and preferences (their context up to the last user turn), in any format accepted for training.
Writes `id`, `prompt`, `answer_a`, `answer_b`, and `choice`, `rating`, `a_is_safe`, `b_is_safe` as null, to be filled in
by annotators. The policy and temperature of each answer are in the same record, or in a separate key file by `id`. An
HTML page for rating pairs can also be written. The format `rated_pairs` (`llamachat.data.sources`) reads the
rated file as preferences. One policy is in memory at a time. An answer that cannot be compared (truncated, empty,
identical to the other) is resampled. Prompts are sampled in the order of their hashes, so that a shuffled file gets the
same answers. In the paper, the two answers come from two variants of the model at varied temperatures; how they are
paired (`deal_pairings`) is ours.
"""

import gc
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message, as_dicts, with_system
from llamachat.chat_format.format import fit
from llamachat.data.problems import Problem
from llamachat.data.records import Prompt, Row
from llamachat.errors import UsageError
from llamachat.models.loading import Policy, checked_details, load_policy, reading_of
from llamachat.rollout.engine import Completion, LocalEngine, Sampling
from llamachat.runs.artifacts import Artifact
from llamachat.runs.outputs import check_output, written_beside
from serving.answer_files import progress, read_prompts, too_long
from serving.context import open_engine

log = logging.getLogger(__name__)

DRAWS = 4  # maximum draws of an answer before its prompt is dropped. Ours.
PAGE = Path(__file__).parent / "templates" / "rate.html"
RATED_BY_PEOPLE: dict[str, None] = dict.fromkeys(("choice", "rating", "a_is_safe", "b_is_safe"))


@dataclass(frozen=True, slots=True)
class Speaker:
    """The source of an answer: the index of a policy, and the sampling temperature."""

    policy: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Pairing:
    """The two speakers for one prompt, in the order in which their answers are shown."""

    a: Speaker
    b: Speaker


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy, and its properties before its weights are loaded."""

    name: str
    chat_format: ChatFormat
    max_tokens: int  # of prompt and answer together, as in training
    system: str | None
    load: Callable[[], Policy]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How pairs are sampled."""

    temperatures: tuple[float, ...]
    top_p: float
    max_new_tokens: int
    seed: int
    top_k: int | None = None
    limit: int | None = None  # number of prompts from the start of the file
    key: Path | None = None  # where to write the provenance, instead of in the pairs
    page: Path | None = None  # where to write the rating page
    overwrite: bool = False

    def sampling(self, temperature: float, seed: int) -> Sampling:
        """The sampling parameters of one draw."""
        return Sampling(temperature, self.top_p, self.max_new_tokens, seed, self.top_k)


@dataclass(frozen=True, slots=True)
class Paired:
    """Counts of written and dropped pairs."""

    pairs: int
    prompts: int
    shortened: int  # prompts whose oldest turns were dropped to fit a policy
    redrawn: dict[str, int]  # answers that were resampled, by reason
    left_out: dict[str, int]  # prompts without a pair, by the last draw's reason


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt, and the part of it that each policy reads."""

    id: str
    prompt: Prompt
    key: str  # identifies the prompt
    messages_by_policy: tuple[tuple[Message, ...], ...]

    @property
    def is_shortened(self) -> bool:
        width = len(self.prompt.messages)
        return any(messages[-width:] != self.prompt.messages for messages in self.messages_by_policy)


def variant_of(artifact: Artifact, name: str) -> Variant:
    """The policy of an artifact, which is loaded onto the best device when needed."""
    reading = reading_of(artifact, checked_details(artifact))
    settings = {key: reading[key] for key in ("chat_format", "max_tokens", "system")}
    return Variant(name, **settings, load=lambda: load_policy(artifact.path, device="auto"))


def pair_file(variants: Sequence[Variant], prompts_in: Path, out: Path, request: Request) -> Paired:
    """Sample two answers to every prompt of a file and write them to another file, for people to compare."""
    _check_request(variants, prompts_in, out, request)
    questions = _read_questions(variants, prompts_in, request)
    keys = [question.key for question in questions]
    pairings = deal_pairings(keys, num_policies=len(variants), temperatures=request.temperatures, seed=request.seed)
    drawing = _Drawing(questions, request)
    order = ranked(range(len(questions)), keys, f"{request.seed} order")
    for policy, variant in enumerate(variants):
        pending: dict[tuple[float, int], list[int]] = {}  # by temperature and position
        for index in order:
            for place, speaker in enumerate((pairings[index].a, pairings[index].b)):
                if speaker.policy == policy:
                    pending.setdefault((speaker.temperature, place), []).append(index)
        drawing.ask(policy, variant, pending)
        gc.collect()  # models contain reference cycles, and the next one needs the memory
    done = Paired(
        pairs=len(questions) - len(drawing.left_out),
        prompts=len(questions),
        shortened=sum(question.is_shortened for question in questions),
        redrawn=dict(drawing.redrawn),
        left_out=dict(Counter(drawing.left_out.values())),
    )
    if not done.pairs:
        raise UsageError(
            f"{out}: no pair was drawn, so nothing is written. In {DRAWS} draws at most an answer was never one to compare "
            f"(prompts: {counted(done.left_out)}). Raise --max-new-tokens or --temperature, or name other policies."
        )
    complete = [index for index in range(len(questions)) if index not in drawing.left_out]
    pairs = [drawing.pair(index) for index in complete]
    origins = [_origin(questions[index].id, pairings[index], variants) for index in complete]
    if request.page is not None:
        _write_page(request.page, pairs, f"{out.name.partition('.')[0]}.rated.jsonl")
    if request.key is not None:
        _write(request.key, origins)
        _write(out, pairs)
    else:
        _write(out, [pair | origin for pair, origin in zip(pairs, origins, strict=True)])
    return done


def counted(counts: dict[str, int]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


def _check_request(variants: Sequence[Variant], prompts_in: Path, out: Path, request: Request) -> None:
    for temperature in request.temperatures:
        request.sampling(temperature, request.seed)  # raises on invalid values
    if len(variants) == 1 and request.temperatures == (0.0,):
        raise UsageError(
            "--temperature: one policy at temperature 0 gives the same answer twice. A pair has two different ones. Name a "
            "second --policy, or another --temperature."
        )
    targets = {"--out": out, "--key": request.key, "--page": request.page}
    options_by_path: dict[Path, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        check_output(path, [prompts_in], option=option, overwrite=request.overwrite)
        if path.resolve() in options_by_path:
            raise UsageError(
                f"{option}: '{path}' is the file of {options_by_path[path.resolve()]} itself. The pairs, the key that raters are not to see"
                " and the page are files of their own. Name another."
            )
        options_by_path[path.resolve()] = option


def _read_questions(variants: Sequence[Variant], path: Path, request: Request) -> list[_Question]:
    """Every prompt of the file, shortened to fit each policy."""
    used: set[str] = set()

    def make(row: Row, prompt: Prompt) -> _Question | Problem:
        messages_by_policy: list[tuple[Message, ...]] = []
        for variant in variants:
            messages, limit = with_system(prompt.messages, variant.system), variant.max_tokens
            fitting = fit(variant.chat_format, messages, limit=limit, max_new_tokens=request.max_new_tokens)
            if fitting is None:
                return too_long(row.line, limit=limit, policy=variant.name)
            messages_by_policy.append(fitting)
        key = json.dumps([[message.role, message.content] for message in prompt.messages])
        name = unique = prompt.id or digest("prompt", key)
        number = 1
        while unique in used:
            number += 1
            unique = f"{name}-{number}"
        used.add(unique)
        return _Question(unique, prompt, key, tuple(messages_by_policy))

    return read_prompts(path, forbidden=variants[0].chat_format.forbidden, make=make, limit=request.limit)


@dataclass(slots=True)
class _Drawing:
    """The answers drawn so far: texts by question and position (0 is shown first), and failures."""

    questions: Sequence[_Question]
    request: Request
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    redrawn: Counter[str] = field(default_factory=Counter)

    def ask(self, policy: int, variant: Variant, pending: Mapping[tuple[float, int], list[int]]) -> None:
        """Load a policy, draw all of its answers (by temperature and position), and unload it."""
        if self.left_out.keys() >= {index for indices in pending.values() for index in indices}:
            return
        log.info("loading %s", variant.name)
        engine = open_engine(variant.load())
        with progress(sum(map(len, pending.values())), "sampled", "answers") as advance:
            # Lowest temperature first, since the answer at temperature 0 cannot be resampled.
            for temperature, place in sorted(pending):
                waiting = [index for index in pending[temperature, place] if index not in self.left_out]
                advance(len(pending[temperature, place]) - len(waiting))
                self._draw(policy, variant.chat_format, engine, temperature, place, waiting, advance)

    def _draw(
        self,
        policy: int,
        chat_format: ChatFormat,
        engine: LocalEngine,
        temperature: float,
        place: int,
        waiting: list[int],
        advance: Callable[[int], None],
    ) -> None:
        """Draw these answers and resample unusable ones; a prompt is dropped when its draws are used up."""
        encoded = {
            index: chat_format.encode_prompt(self.questions[index].messages_by_policy[policy]) for index in waiting
        }
        draws = DRAWS if temperature > 0 else 1
        for draw in range(draws):
            if not waiting:
                return
            # Different random numbers for each answer, or the two answers would be similar.
            seed = int(digest(f"{self.request.seed} draw", f"{policy} {place} {draw}"), 16)
            groups = engine.generate(
                [encoded[index] for index in waiting],
                samples_per_prompt=1,
                sampling=self.request.sampling(temperature, seed),
                advance=advance if draw == 0 else None,
            )
            faults: dict[int, str] = {}
            for index, (completion,) in zip(waiting, groups, strict=True):
                text = chat_format.decode_answer(completion.token_ids)
                fault = _fault(chat_format, completion, text, self.texts.get((index, 1 - place)))
                if fault is None:
                    self.texts[index, place] = text
                else:
                    faults[index] = fault
            waiting = list(faults)
            if draw + 1 < draws:
                self.redrawn.update(faults.values())
            else:
                self.left_out.update(faults)

    def pair(self, index: int) -> dict[str, Any]:
        """The record for annotators to fill in."""
        question = self.questions[index]
        answers = {"answer_a": self.texts[index, 0], "answer_b": self.texts[index, 1]}
        return {"id": question.id, "prompt": as_dicts(question.prompt.messages), **answers, **RATED_BY_PEOPLE}


def _fault(chat_format: ChatFormat, completion: Completion, text: str, other: str | None) -> str | None:
    """Why this answer cannot be used in a pair, or None."""
    if not completion.is_finished:
        return "unfinished"
    if not text.strip():
        return "empty"
    try:
        chat_format.check_text([Message("assistant", text)])
    except DialogError:
        return "with a tag of the chat format"
    return "the same as the other answer" if other is not None and text.strip() == other.strip() else None


def _origin(name: str, pairing: Pairing, variants: Sequence[Variant]) -> dict[str, Any]:
    origin: dict[str, Any] = {"id": name}
    for side, speaker in (("a", pairing.a), ("b", pairing.b)):
        origin |= {f"policy_{side}": variants[speaker.policy].name, f"temperature_{side}": speaker.temperature}
    return origin


def _write(out: Path, records: Sequence[dict[str, Any]]) -> None:
    with written_beside(out) as stream:
        stream.writelines(f"{json.dumps(record, ensure_ascii=False)}\n".encode() for record in records)


def _write_page(page: Path, pairs: Sequence[dict[str, Any]], name: str) -> None:
    """Write the page for rating these pairs; it is self-contained and saves a file with this name.

    It does not reveal the source of an answer.
    """
    texts = json.dumps(pairs, ensure_ascii=False)
    # "<" would let a text close the enclosing script element.
    pairs_json = json.dumps({"name": name, "digest": digest("page", texts), "pairs": pairs}).replace("<", "\\u003c")
    with written_beside(page) as stream:
        stream.write(PAGE.read_text(encoding="utf-8").replace("PAIRS_AS_JSON", pairs_json).encode())


def deal_pairings(keys: Sequence[str], *, num_policies: int, temperatures: Sequence[float], seed: int) -> list[Pairing]:
    """A pairing for each prompt (identified by its key).

    Prompts are divided evenly (to within one) among pairs of policies, within those among pairs of temperatures, and
    within those between the two orders.
    """
    matches = list(combinations(range(num_policies), 2)) or [(0, 0)]
    if num_policies > 1:
        mixes = list(product(temperatures, repeat=2))
    else:
        mixes = list(combinations(temperatures, 2)) or [(temperatures[0], temperatures[0])]
    everyone = range(len(keys))
    match_of = _dealt(ranked(everyone, keys, f"{seed} policies"), len(matches))
    # Deal in an order sorted by the previous assignment, so that each of its groups is divided evenly.
    by_match = sorted(ranked(everyone, keys, f"{seed} temperatures"), key=lambda index: match_of[index])
    mix_of = _dealt(by_match, len(mixes))
    by_both = sorted(ranked(everyone, keys, f"{seed} sides"), key=lambda index: (match_of[index], mix_of[index]))
    side_of = _dealt(by_both, 2)
    pairings = []
    for index in everyone:
        first, second = map(Speaker, matches[match_of[index]], mixes[mix_of[index]])
        pairings.append(Pairing(first, second) if side_of[index] == 0 else Pairing(second, first))
    return pairings


def ranked(indices: Sequence[int], keys: Sequence[str], salt: str) -> list[int]:
    """The indices in an order that only depends on their keys; identical prompts keep their order."""
    return sorted(indices, key=lambda index: (digest(salt, keys[index]), index))


def digest(salt: str, text: str) -> str:
    """A hash in 16 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(f"{salt}\n{text}".encode(), digest_size=8).hexdigest()


def _dealt(order: Sequence[int], count: int) -> dict[int, int]:
    return {index: rank % count for rank, index in enumerate(order)}
