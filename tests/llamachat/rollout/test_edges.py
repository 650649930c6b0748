"""Rollouts at their limits, in both engines: the oracles are scripted models, counts, and the other engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.errors import ConfigError, DataError
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, LocalEngine, Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from pipelines.cli.main import main
from serving import sample as sampled
from serving.sample import sample_file
from tests.serving.test_serving import RECORDS, answering, policy_of, write_lines
from tests.tiny_llama import publish_policy, scripted_llama, tiny_llama

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
Make = Callable[..., LocalEngine]


def ours(model: Any, stop_ids: tuple[int, ...], **options: Any) -> LocalEngine:
    return LlamaEngine(model, stop_ids, **options)


def theirs(model: Any, stop_ids: tuple[int, ...], **options: Any) -> LocalEngine:
    return HuggingFaceEngine(model, stop_ids, 0, **options)


both = pytest.mark.parametrize("make", [ours, theirs])


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@both
def test_no_prompts_no_answers(make: Make) -> None:
    assert make(tiny_llama(), ()).generate([], samples_per_prompt=3, sampling=GREEDY) == []


@both
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_all_rows_may_end_with_their_first_token(make: Make, rows: int) -> None:
    engine = make(scripted_llama([1, 5]), (5,), rows_per_batch=rows)
    groups = engine.generate([[1], [9, 1], [8, 9, 1]], samples_per_prompt=4, sampling=GREEDY)
    assert ids_of(groups) == [[(5,)] * 4] * 3
    assert all(completion.is_finished for group in groups for completion in group)


@both
@pytest.mark.parametrize("rows", [2, 64])
def test_all_rows_may_end_in_the_same_step(make: Make, rows: int) -> None:
    engine = make(scripted_llama([7, 8, 9, 2]), (2,), rows_per_batch=rows)
    groups = engine.generate([[7], [30, 7], [31, 7], [7]], samples_per_prompt=2, sampling=GREEDY)
    assert ids_of(groups) == [[(8, 9, 2)] * 2] * 4


@both
def test_one_token_is_drawn_where_one_is_asked_for(make: Make) -> None:
    engine = make(scripted_llama([7, 8, 9, 2]), (2,), rows_per_batch=3)
    groups = engine.generate([[7], [30, 8], [9]], samples_per_prompt=2, sampling=Sampling(0.0, 1.0, 1, 0))
    assert ids_of(groups) == [[(8,)] * 2, [(9,)] * 2, [(2,)] * 2]
    assert [group[0].is_finished for group in groups] == [False, False, True]


@both
def test_a_prompt_one_short_of_the_context_gets_one_token_and_a_longer_one_is_refused(make: Make) -> None:
    engine = make(tiny_llama(), ())
    assert engine.context == 128
    groups = engine.generate([[1] * 127, [1, 8]], samples_per_prompt=2, sampling=GREEDY)
    assert [[len(completion.token_ids) for completion in group] for group in groups] == [[1, 1], [12, 12]]
    for length in (128, 500):
        with pytest.raises(DataError, match=rf"prompt 3: {length} tokens, but .* 128 positions\. Shorten"):
            engine.generate([[1], [2], [1] * length], samples_per_prompt=1, sampling=GREEDY)


@both
def test_a_part_of_a_list_is_answered_as_in_the_whole_list(make: Make) -> None:
    drawn = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=12, seed=4)
    prompts = [[1, 8], [1, 8, 9], [1, 8], [1, 7], [1, 8]]
    engine = make(tiny_llama(), (), rows_per_batch=3)
    whole = ids_of(engine.generate(prompts, samples_per_prompt=2, sampling=drawn))
    assert whole[0] != whole[2] != whole[4]  # the place decides, not the prompt alone
    for places in ([1, 3], [4, 2, 0]):
        of = [prompts[place] for place in places]
        part = engine.generate(of, samples_per_prompt=2, sampling=drawn, numbers=places)
        assert ids_of(part) == [whole[place] for place in places]


def test_a_cache_smaller_than_one_prompt_is_refused() -> None:
    token = 2 * 2 * 2 * 16 * 8 / 2**30  # keys and values of 2 layers of 2 heads of 16 numbers of 8 bytes, in GiB
    engine = LlamaEngine(tiny_llama(), (), cache_gib=8.5 * token)
    with pytest.raises(
        ConfigError, match=r"rollout\.cache_gib: .* holds 8 tokens .* prompt 1 \(9 tokens\) .* up to 10"
    ):
        engine.generate([[1] * 9], samples_per_prompt=1, sampling=Sampling(0.0, 1.0, 1, 0))


def test_the_sample_command_writes_the_same_file_whatever_shares_a_batch(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(max_position_embeddings=256)
    long = {"prompt": [{"role": "user", "content": "the cat sat on the mat and the other cat sat on it"}]}
    source = write_lines(tmp_path / "in.jsonl", [*RECORDS, long])
    sampling, written = Sampling(1.0, 0.95, 40, 3, top_k=100), dict[str, list[Any]]()
    for make in (ours, theirs):
        for rows in (1, 64):
            monkeypatch.setattr(
                sampled, "open_engine", lambda policy, make=make, **given: make(model, tiny_format.stop_ids, **given)
            )
            out = tmp_path / f"{make.__name__}-{rows}.jsonl"
            policy = policy_of(model, tiny_format)
            sample_file(policy, source, out, samples_per_prompt=5, sampling=sampling, rows_per_batch=rows)
            written[out.stem] = [json.loads(line)["completions"] for line in out.read_text().splitlines()]
    assert written["ours-1"] == written["ours-64"]
    texts = {
        name: [[(answer["text"], answer["finished"]) for answer in answers] for answers in rows]
        for name, rows in written.items()
    }
    assert texts["theirs-1"] == texts["theirs-64"] == texts["ours-1"]
    assert len({text for answers in texts["ours-1"] for text, _ in answers}) == 20


def test_the_command_writes_the_same_bytes_whatever_the_batch_size(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = publish_policy(tmp_path / "policy", tiny_llama(max_position_embeddings=256), tiny_format, base="tiny")
    source, written = write_lines(tmp_path / "in.jsonl", RECORDS * 8), set[bytes]()
    for size in ("1", "7", "64"):
        out = tmp_path / f"{size}.jsonl"
        given = ["--policy", str(artifact.path), "--in", str(source), "--out", str(out), "-n", "3"]
        assert main(["sample", *given, "--max-new-tokens", "24", "--batch-size", size, "--dtype", "float32"]) == 0
        written.add(out.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], r"in\.jsonl: file: is empty"),
        (["", "  "], r"in\.jsonl: file: holds blank lines only"),
        ([{"prompt": []}], r"in\.jsonl:1: prompt"),
        ([RECORDS[0], {"prompt": [{"role": "user", "content": "  "}]}], r"in\.jsonl:2: prompt\[0\]\.content"),
    ],
)
def test_a_file_without_questions_is_refused(
    lines: list[Any], words: str, tmp_path: Path, tiny_format: ChatFormat
) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=words):
        sample_file(
            policy_of(answering(tiny_format, "Hi"), tiny_format), source, out, samples_per_prompt=1, sampling=GREEDY
        )
    assert not out.exists()
