"""Pairs for people to rate: who answers, what is drawn again, what is written, and the way back into training."""

import gc
import json
import shutil
import subprocess
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import DataSource, Split
from llamachat.data.loading import load_mixture
from llamachat.data.records import Preference
from llamachat.errors import DataError, UsageError
from llamachat.models.loading import Policy
from llamachat.rollout.engine import Completion, Sampling
from pipelines.cli.main import main
from serving.pairs import Paired, Pairing, Request, Speaker, Variant, deal_pairings, pair_file
from tests.serving.scripted import Recording, answering, policy_of, read_lines, write_lines
from tests.tiny_llama import publish_policy

BLANK = {"choice": None, "rating": None, "a_is_safe": None, "b_is_safe": None}
NO_SPLIT = Split(test=0, validation=0, judge=0)


def variant(name: str, chat_format: ChatFormat, *texts: str, **changes: Any) -> Variant:
    settings: dict[str, Any] = {"max_tokens": 128, "system": None} | changes

    def load() -> Policy:
        return policy_of(answering(chat_format, *texts), chat_format, name=name, **settings)

    return Variant(name=name, chat_format=chat_format, load=load, **settings)


def request(**changes: Any) -> Request:
    return Request(**({"temperatures": (1.0,), "top_p": 1.0, "max_new_tokens": 8, "seed": 0} | changes))


def question(text: str, **more: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **more}


QUESTIONS = [question(f"the cat {number}") for number in range(40)]


# -- who answers which prompt


def test_policies_temperatures_and_sides_are_dealt_evenly() -> None:
    keys = [f"prompt {number}" for number in range(96)]
    pairings = deal_pairings(keys, num_policies=3, temperatures=(0.7, 1.0), seed=5)
    ordered = Counter((pairing.a.policy, pairing.b.policy) for pairing in pairings)
    # 3 pairs of policies get 32 prompts each, and each of two policies stands first in 16.
    assert ordered == {(a, b): 16 for a in range(3) for b in range(3) if a != b}
    low_first = [sorted((pairing.a, pairing.b), key=lambda speaker: speaker.policy) for pairing in pairings]
    mixes = Counter((x.policy, y.policy, x.temperature, y.temperature) for x, y in low_first)
    assert set(mixes.values()) == {8} and len(mixes) == 12
    uneven = deal_pairings(keys[:7], num_policies=2, temperatures=(0.7, 1.0, 1.3), seed=5)
    assert sorted(Counter(pairing.a.policy for pairing in uneven).values()) == [3, 4]


def test_one_policy_answers_at_two_temperatures_or_in_two_draws() -> None:
    pairings = deal_pairings([str(n) for n in range(60)], num_policies=1, temperatures=(0.5, 0.7, 1.0), seed=0)
    shown = Counter((pairing.a.temperature, pairing.b.temperature) for pairing in pairings)
    assert shown == {(a, b): 10 for a in (0.5, 0.7, 1.0) for b in (0.5, 0.7, 1.0) if a != b}
    speaker = Speaker(0, 1.0)
    assert deal_pairings(["x"], num_policies=1, temperatures=(1.0,), seed=0) == [Pairing(speaker, speaker)]


def test_the_deal_hangs_on_prompts_and_seed_and_not_on_order() -> None:
    keys = [f"prompt {number}" for number in range(50)]

    def dealt(order: Sequence[str], seed: int) -> dict[str, Pairing]:
        pairings = deal_pairings(order, num_policies=2, temperatures=(0.7, 1.0), seed=seed)
        return dict(zip(order, pairings, strict=True))

    assert dealt(keys, 1) == dealt(keys[::-1], 1) != dealt(keys, 2)


# -- what is written


def test_two_policies_answer_each_prompt_and_provenance_names_them(tmp_path: Path, tiny_format: ChatFormat) -> None:
    rows = [*QUESTIONS, question("twice", id="own"), question("twice", id="own")]
    source, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    variants = [variant("runs/one", tiny_format, "Hello"), variant("runs/two", tiny_format, "Paris")]
    done = pair_file(variants, source, out, request(temperatures=(0.7, 1.0)))
    assert done == Paired(pairs=42, prompts=42, shortened=0, redrawn={}, left_out={})
    written = read_lines(out)
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert all(row.items() >= BLANK.items() for row in written)
    assert len({row["id"] for row in written}) == 42
    assert [row["id"] for row in written[-2:]] == ["own", "own-2"]
    said = {"runs/one": "Hello", "runs/two": "Paris"}
    for row in written:
        assert [row["answer_a"], row["answer_b"]] == [said[row["policy_a"]], said[row["policy_b"]]]
        assert {row["temperature_a"], row["temperature_b"]} <= {0.7, 1.0}
    assert Counter(row["answer_a"] for row in written) == {"Hello": 21, "Paris": 21}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_key_file_takes_the_provenance_and_raters_see_none(tmp_path: Path, tiny_format: ChatFormat) -> None:
    variants = [variant("runs/one", tiny_format, "Hello"), variant("runs/two", tiny_format, "Paris")]
    source = write_lines(tmp_path / "in.jsonl", QUESTIONS)
    open_out, blind, key = (tmp_path / name for name in ("open.jsonl", "blind.jsonl", "key.jsonl"))
    pair_file(variants, source, open_out, request(limit=6))
    pair_file(variants, source, blind, request(key=key, limit=6))
    assert all(set(row) == {"id", "prompt", "answer_a", "answer_b", *BLANK} for row in read_lines(blind))
    names = {"id", "policy_a", "temperature_a", "policy_b", "temperature_b"}
    assert all(set(row) == names for row in read_lines(key))
    joined = [pair | origin for pair, origin in zip(read_lines(blind), read_lines(key), strict=True)]
    assert joined == read_lines(open_out)
    assert [row["prompt"] for row in joined] == [row["prompt"] for row in QUESTIONS[:6]]


# What a browser has and the page uses; the keys of the command line are pressed, and what is saved is printed.
BROWSER = """
const fs = require("fs");
const html = fs.readFileSync(process.argv[2], "utf8");
const element = () => ({textContent: "", className: "", append() {}, replaceChildren() {}, addEventListener() {}, click() {}});
const elements = {};
const listeners = {};
global.document = {
  getElementById: (id) => (elements[id] ??= element()),
  createElement: element,
  addEventListener: (name, run) => { listeners[name] = run; },
};
const kept = {};
global.localStorage = {getItem: (key) => kept[key] ?? null, setItem: (key, value) => { kept[key] = value; }};
global.Blob = class { constructor(parts) { this.text = parts.join(""); } };
global.URL = {createObjectURL: (blob) => { process.stdout.write(blob.text); return ""; }, revokeObjectURL() {}};
document.getElementById("pairs").textContent = html.match(/<script type="application.json" id="pairs">([^]*?)<.script>/)[1];
const script = html.match(/<script>([^]*?)<.script>/)[1];
new Function(script)();
const press = (key) => listeners.keydown({key, preventDefault() {}});
for (const key of process.argv[3].split(" ")) press(key);
new Function(script)();  // the page is opened again, with what it kept
press("s");
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node, which runs the page's script")
def test_a_page_rates_pairs_by_keyboard_and_saves_what_rated_pairs_reads(
    tmp_path: Path, tiny_format: ChatFormat
) -> None:
    evil = "</script><b>&amp; </SCRIPT> \u2028"
    source = write_lines(tmp_path / "in.jsonl", [question(f"{evil} {number}") for number in range(4)])
    variants = [variant("runs/one", tiny_format, "Hello"), variant("runs/two", tiny_format, "Paris")]
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    pair_file(variants, source, out, request(page=page))
    text = page.read_text()
    assert "runs/one" not in text and "http" not in text, "blind, and without a network"
    program = tmp_path / "browser.js"
    program.write_text(BROWSER)
    # The first: A is labelled safe, B unsafe, A is much better. The second: B slightly better, undone. The third: B better.
    keys = "a b b 1 6 ArrowLeft u ArrowRight 7"
    done = subprocess.run(["node", str(program), str(page), keys], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "rated.jsonl").write_text(done.stdout)
    # Not by `splitlines`, for which U+2028 ends a line too.
    rated, written = ([json.loads(line) for line in text.split("\n")[:-1]] for text in (done.stdout, out.read_text()))
    origin = ("policy_", "temperature_")
    pairs = [{key: value for key, value in row.items() if not key.startswith(origin)} for row in written]
    ratings = [
        {"choice": "a", "rating": "significantly_better", "a_is_safe": True, "b_is_safe": False},
        {},
        {"choice": "b", "rating": "better"},
        {},
    ]
    assert rated == [pair | more for pair, more in zip(pairs, ratings, strict=True)]
    sources = [DataSource(path=str(tmp_path / "rated.jsonl"))]
    read = load_mixture(sources, NO_SPLIT, Preference, forbidden=tiny_format.forbidden, seed=0).train
    assert [(one.rating, one.chosen_is_safe, one.rejected_is_safe) for one in read] == [
        ("significantly_better", True, False),
        ("better", None, None),
    ]
    assert [one.chosen.content for one in read] == [rated[0]["answer_a"], rated[2]["answer_b"]]


def test_the_same_seed_gives_the_same_pairs_whatever_the_order_of_the_file(
    tmp_path: Path, tiny_format: ChatFormat
) -> None:
    coin = [variant("coin", tiny_format, "Hello", "Paris")]
    texts: dict[str, str] = {}
    for name, rows, seed in (
        ("one", QUESTIONS, 0),
        ("again", QUESTIONS, 0),
        ("shuffled", QUESTIONS[20:] + QUESTIONS[:20], 0),
        ("other", QUESTIONS, 1),
    ):
        out = tmp_path / f"{name}.jsonl"
        pair_file(coin, write_lines(tmp_path / "in.jsonl", rows), out, request(seed=seed))
        texts[name] = out.read_text()
    assert texts["one"] == texts["again"] != texts["other"]
    assert sorted(texts["one"].splitlines()) == sorted(texts["shuffled"].splitlines())


def test_each_policy_gets_its_own_system_text_and_what_fits_it(tmp_path: Path, tiny_format: ChatFormat) -> None:
    turns = [("user", "the cat sat on the mat"), ("assistant", "the other cat sat on the other mat"), ("user", "why?")]
    dialog = {"messages": [{"role": role, "content": content} for role, content in turns]}
    recording: Any = Recording(tiny_format)
    variants = [
        variant("short", recording, "Hello", max_tokens=40),
        variant("kind", recording, "Paris", system="Be kind."),
    ]
    done = pair_file(variants, write_lines(tmp_path / "in.jsonl", [dialog]), tmp_path / "out.jsonl", request())
    messages = tuple(Message(role, content) for role, content in turns)  # type: ignore[arg-type]  # words of the test
    assert recording.prompts == [messages[-1:], (Message("system", "Be kind."), *messages)]
    assert (done.pairs, done.shortened) == (1, 1)
    assert read_lines(tmp_path / "out.jsonl")[0]["prompt"] == dialog["messages"], "people see the whole conversation"


def test_one_policy_is_in_memory_at_a_time(tmp_path: Path, tiny_format: ChatFormat) -> None:
    models: list[weakref.ref[Any]] = []

    def watched(of: Variant) -> Callable[[], Policy]:
        def load() -> Policy:
            gc.collect()
            assert all(model() is None for model in models), "the one before is gone"
            policy = of.load()
            models.append(weakref.ref(policy.model))
            return policy

        return load

    plain = [variant(name, tiny_format, text) for name, text in (("one", "Hello"), ("two", "Paris"))]
    variants = [Variant(of.name, of.chat_format, of.max_tokens, of.system, watched(of)) for of in plain]
    pair_file(variants, write_lines(tmp_path / "in.jsonl", QUESTIONS[:4]), tmp_path / "out.jsonl", request())
    assert len(models) == 2


# -- what is drawn again


def test_equal_answers_are_drawn_again_and_then_left_out(tmp_path: Path, tiny_format: ChatFormat) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", QUESTIONS), tmp_path / "out.jsonl"
    done = pair_file([variant("coin", tiny_format, "Hello", "Paris")], source, out, request())
    written = read_lines(out)
    assert all({row["answer_a"], row["answer_b"]} == {"Hello", "Paris"} for row in written)
    # A second answer equals the first in half of the draws: 40 (1/2 + 1/4 + 1/8) are drawn again, 40/16 left out.
    assert 20 <= done.redrawn["the same as the other answer"] <= 50
    assert done.left_out.get("the same as the other answer", 0) == 40 - len(written) == 40 - done.pairs
    assert 40 - done.pairs <= 8


class Sayings:
    """An engine that says what a function of the sampling and the number of the call says."""

    def __init__(self, chat_format: ChatFormat, say: Callable[[Sampling, int], str]) -> None:
        self.seeds: list[int] = []
        self._tokenizer, self._say = chat_format.tokenizer, say

    def generate(self, prompts: Any, *, samples_per_prompt: int, sampling: Sampling, advance: Any) -> Any:
        assert samples_per_prompt == 1
        self.seeds.append(sampling.seed)
        text = self._say(sampling, len(self.seeds))
        ids = tuple(self._tokenizer.encode(text.rstrip("~")))
        if not text.endswith("~"):
            ids = (*ids, self._tokenizer.eos_id)
        return [[Completion(ids, (0.0,) * len(ids), is_finished=not text.endswith("~"))] for _ in prompts]


def run_with(
    say: Callable[[Sampling, int], str],
    tmp_path: Path,
    chat_format: ChatFormat,
    monkeypatch: pytest.MonkeyPatch,
    **changes: Any,
) -> tuple[Paired, Sayings]:
    engine = Sayings(chat_format, say)
    monkeypatch.setattr("serving.pairs.open_engine", lambda policy: engine)
    source = write_lines(tmp_path / "in.jsonl", QUESTIONS[:1])
    done = pair_file([variant("one", chat_format, "Hello")], source, tmp_path / "out.jsonl", request(**changes))
    return done, engine


@pytest.mark.parametrize(
    ("texts", "redrawn"),
    [
        (["one", "two"], {}),
        (["one~", "one", "", "two"], {"unfinished": 1, "empty": 1}),
        (
            ["say [INST]", "one", "one", " one", "two"],
            {"with a tag of the chat format": 1, "the same as the other answer": 2},
        ),
    ],
)
def test_what_no_pair_can_hold_is_drawn_again_by_other_numbers(
    texts: list[str],
    redrawn: dict[str, int],
    tmp_path: Path,
    tiny_format: ChatFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, engine = run_with(lambda sampling, call: texts[call - 1], tmp_path, tiny_format, monkeypatch)
    assert (done.pairs, done.redrawn, done.left_out) == (1, redrawn, {})
    assert len(set(engine.seeds)) == len(engine.seeds) == len(texts)
    (written,) = read_lines(tmp_path / "out.jsonl")
    assert [written["answer_a"], written["answer_b"]] == ["one", "two"]


def test_the_likeliest_answer_comes_first_and_is_drawn_once(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(sampling: Sampling, call: int) -> str:
        return "one" if sampling.temperature == 0 or call < 4 else "two"

    done, engine = run_with(say, tmp_path, tiny_format, monkeypatch, temperatures=(1.0, 0.0))
    assert (done.pairs, done.redrawn, len(engine.seeds)) == (1, {"the same as the other answer": 2}, 4)


def test_a_prompt_without_a_pair_costs_no_second_answer_and_nothing_is_written(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"no pair was drawn.*\(prompts: 1 unfinished\)\. Raise --max-new-tokens"):
        run_with(lambda sampling, call: "one~", tmp_path, tiny_format, monkeypatch)
    assert not (tmp_path / "out.jsonl").exists()
    engines: list[Sayings] = []

    def say(sampling: Sampling, call: int) -> str:
        return ""

    monkeypatch.setattr(
        "serving.pairs.open_engine", lambda policy: engines.append(Sayings(tiny_format, say)) or engines[-1]
    )
    with pytest.raises(UsageError, match="1 empty"):
        pair_file(
            [variant("one", tiny_format, "Hello"), variant("two", tiny_format, "Paris")],
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            request(temperatures=(0.0,)),
        )
    assert [len(engine.seeds) for engine in engines] == [1], "no other draw at temperature 0, and no second policy"


# -- what is refused


def test_a_request_that_cannot_be_met_is_refused_before_anything_is_loaded(
    tmp_path: Path, tiny_format: ChatFormat
) -> None:
    def load() -> Policy:
        raise AssertionError("it was loaded")

    source = write_lines(tmp_path / "in.jsonl", QUESTIONS)
    taken, out = write_lines(tmp_path / "taken.jsonl", []), tmp_path / "out.jsonl"
    one = Variant("one", tiny_format, 128, None, load)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (out, {"temperatures": (0.0,)}, "the same answer twice"),
        (out, {"temperatures": (1.0, -1.0)}, "temperature is -1.0"),
        (taken, {}, r"--out: .*taken.jsonl' already exists"),
        (source, {"overwrite": True}, "--out: .*is an input of this command"),
        (out, {"key": taken}, "--key: .*already exists"),
        (out, {"key": out}, "--key: .*is the file of --out itself"),
        (out, {"key": out.with_name("key"), "page": out.with_name("key")}, "--page: .*is the file of --key itself"),
    ]
    for target, changes, reason in cases:
        with pytest.raises(UsageError, match=reason):
            pair_file([one], source, target, request(**changes))


def test_a_prompt_must_fit_every_policy(tmp_path: Path, tiny_format: ChatFormat) -> None:
    variants = [variant(name, tiny_format, "Hello", max_tokens=most) for name, most in (("one", 400), ("two", 50))]
    source = write_lines(tmp_path / "in.jsonl", [QUESTIONS[0], question("cat " * 90)])
    with pytest.raises(DataError, match=r":2: prompt: is longer than 49 tokens .* two reads prompt and answer in 50"):
        pair_file(variants, source, tmp_path / "out.jsonl", request())


# -- the command


def test_from_the_command_to_reward_data(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, texts in (("one", ("Hello", "the cat")), ("two", ("Paris",))):
        publish_policy(tmp_path / name / "sft", answering(tiny_format, *texts), tiny_format, base="assets/base")
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "prompts.jsonl", QUESTIONS)
    options = ["pairs", "--policy", "one", "--policy", "two/sft", "--in", "prompts.jsonl", "--max-new-tokens", "8"]
    assert main([*options, "--out", "pairs.jsonl", "--temperature", "0.7", "1.0", "--seed", "3"]) == 0
    assert main([*options, "--out", "again.jsonl", "--temperature", "0.7", "--temperature", "1.0", "--seed", "3"]) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "pairs.jsonl").read_text()
    assert main([*options, "--policy", "one/sft", "--out", "other.jsonl"]) == 2
    assert "--policy: one two/sft one/sft contains the same policy twice" in capsys.readouterr().err
    rows = read_lines(tmp_path / "pairs.jsonl")
    assert {row["policy_a"] for row in rows} == {"one", "two/sft"}
    for row in rows[:30]:  # somebody who likes Paris
        row |= {"choice": "a" if row["answer_a"] == "Paris" else "b", "rating": "slightly_better"}
    write_lines(tmp_path / "pairs.jsonl", rows)
    assert main(["data", "check", "pairs.jsonl"]) == 0
    sources = [DataSource(path="pairs.jsonl", format="rated_pairs")]
    mixture = load_mixture(sources, NO_SPLIT, Preference, forbidden=tiny_format.forbidden, seed=0)
    assert len(mixture.train) == 30 and mixture.dropped == {"pairs.jsonl: row without a preference": 10}
    assert {pair.chosen.content for pair in mixture.train} == {"Paris"}
    assert {pair.rejected.content for pair in mixture.train} == {"Hello", "the cat"}
