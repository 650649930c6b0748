"""Answers from a vLLM server, against a fake that is written from vLLM's documentation: not run on a real one.

Oracles: our own engine on the same tiny model, the documented form of requests, and numbers worked out by hand.
"""

import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Rollout, Tuning
from llamachat.errors import ConfigError, DataError, LlamachatError, ServerError
from llamachat.models.loading import attach_adapter, load_base
from llamachat.rollout import open_engine
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, Sampling, scatter_generate
from llamachat.rollout.vllm import Server, VllmEngine
from tests.llamachat.models.tiny_roles import World
from tests.llamachat.rollout.fake_vllm import BASE, FakeVllm, Refusal
from tests.several import run_several
from tests.tiny_llama import LORA, move_adapter, tiny_llama

PROMPTS = [[1, 17, 300, 42], [1, 8], [1, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99], [1, 8]]
STOPS = tuple(range(3, 23))  # of 420 ids, the EOS of the model not among them
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
RANDOM = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=12, seed=7)


def policy(**changes: Any) -> Any:
    """A fully tuned policy that nobody trains."""
    return tiny_llama(**changes).requires_grad_(False)


def adapted(tuning: Tuning = LORA) -> Any:
    model = attach_adapter(tiny_llama(), tuning, seed=0)
    move_adapter(model)
    return model


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    server = FakeVllm(tiny_llama())
    yield server
    server.close()


def engine_on(fake: FakeVllm, model: Any = None, **options: Any) -> VllmEngine:
    server = Server(fake.address, waits_s=(0.0, 0.0), answer_s=options.pop("answer_s", 20.0))
    return VllmEngine(policy() if model is None else model, STOPS, server, **options)


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def assert_same(groups: list[list[Completion]], expected: list[list[Completion]]) -> None:
    assert ids_of(groups) == ids_of(expected)
    for group, expected_group in zip(groups, expected, strict=True):
        for completion, other in zip(group, expected_group, strict=True):
            assert completion.is_finished == other.is_finished
            assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_greedy_answers_are_those_of_our_engine(fake: FakeVllm) -> None:
    expected = LlamaEngine(policy(), STOPS).generate(PROMPTS, samples_per_prompt=2, sampling=GREEDY)
    assert {group[0].is_finished for group in expected} == {True, False}
    assert_same(engine_on(fake).generate(PROMPTS, samples_per_prompt=2, sampling=GREEDY), expected)


def test_an_adapter_is_handed_over_again_at_each_refresh_under_a_new_name(fake: FakeVllm) -> None:
    model = adapted()
    engine = engine_on(fake, model)
    names = [*fake.adapters]
    expected = LlamaEngine(model, STOPS).generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    assert_same(engine.generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY), expected)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.mul_(-1.2)
    assert_same(engine.generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY), expected)
    model.train()
    engine.refresh(model)
    assert model.training
    later = LlamaEngine(model, STOPS).generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    assert ids_of(later) != ids_of(expected)
    assert_same(engine.generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY), later)
    names += fake.adapters
    loads = [body for path, body in fake.seen if path == "/v1/load_lora_adapter"]
    assert [body["lora_name"] for body in loads] == names and len(set(names)) == 2
    assert [Path(body["lora_path"]).exists() for body in loads] == [False, True]
    assert all(re.fullmatch(r"llamachat-[0-9a-f]{8}-[12]", name) for name in names)
    other = engine_on(fake, model)
    assert len(fake.adapters) == 2, "two runs on one server do not meet"
    fake.adapters.clear()
    other.refresh(model)
    assert len(fake.adapters) == 1, "a server that has dropped the adapter gets it again"
    del engine, other
    assert not Path(loads[1]["lora_path"]).exists()


def train_a_step(model: Any, learning_rate: float) -> None:
    """One step of AdamW on the adapter."""
    adapter = [weight for weight in model.parameters() if weight.requires_grad]
    ids = torch.tensor([PROMPTS[2]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(adapter, lr=learning_rate).step()
    model.zero_grad()


# A step of 1e-4 moves a log-probability by thousandths of a nat; noise is that of other kernels.
@pytest.mark.parametrize(("learning_rate", "noise"), [(1e-4, 0.0), (1e-3, 0.01)])
def test_an_adapter_that_is_one_step_old_is_refused(fake: FakeVllm, learning_rate: float, noise: float) -> None:
    fake.noise = noise
    model = adapted()
    engine = engine_on(fake, model)
    for _ in range(2):
        train_a_step(model, learning_rate)
        engine.refresh(model)
    fake.serves_adapter_before = True
    engine.refresh(model)  # the same weights again
    train_a_step(model, learning_rate)
    with pytest.raises(ServerError, match=r"answers with older weights than those of the adapter 'llamachat-\w+-5'"):
        engine.refresh(model)


def test_a_change_that_rounding_hides_is_not_refused(fake: FakeVllm) -> None:
    fake.noise = 0.1
    model = adapted()
    engine = engine_on(fake, model)
    for step in range(5):
        train_a_step(model, 1e-5)
        engine.refresh(model)
        (served,) = fake.adapters
        assert served.endswith(f"-{step + 2}"), "the new weights are served, and those before them are dropped"


def controls(fake: FakeVllm) -> list[str]:
    return [path for path, _ in fake.seen if path in ("/sleep?level=1", "/wake_up")]


def test_a_server_on_the_card_that_trains_sleeps_except_while_answers_are_sampled(fake: FakeVllm) -> None:
    fake.is_asleep = True  # as an earlier command left it
    model = adapted()
    engine = engine_on(fake, model, shares_card=True)
    expected = LlamaEngine(model, STOPS).generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    for _ in range(2):
        assert_same(scatter_generate(engine, PROMPTS, samples_per_prompt=1, sampling=GREEDY), expected)
        assert fake.is_asleep
    assert controls(fake) == ["/wake_up", "/sleep?level=1"] * 2
    train_a_step(model, 1e-3)
    engine.refresh(model)
    assert not fake.is_asleep
    expected = LlamaEngine(model, STOPS).generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    assert_same(scatter_generate(engine, PROMPTS, samples_per_prompt=1, sampling=GREEDY), expected)
    assert controls(fake) == ["/wake_up", "/sleep?level=1"] * 3
    (name,) = fake.adapters
    fake.adapters[name] = fake.model
    with pytest.raises(ServerError, match=rf"after sleeping, the server's .* nats per token \('{name}'\)"):
        scatter_generate(engine, PROMPTS, samples_per_prompt=1, sampling=GREEDY)


def test_a_server_on_another_card_is_left_awake(fake: FakeVllm) -> None:
    scatter_generate(engine_on(fake), PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    assert not {path for path, _ in fake.seen} & {"/is_sleeping", "/sleep?level=1", "/wake_up"}


def test_a_server_that_cannot_sleep_is_refused(fake: FakeVllm) -> None:
    fake.can_sleep = False
    with pytest.raises(ConfigError, match=r"server_gib: .*/is_sleeping is refused .*Not Found.*--enable-sleep-mode"):
        engine_on(fake, shares_card=True)
    fake.can_sleep = True
    engine = engine_on(fake, shares_card=True)
    fake.before = refuse("/sleep?level=1", 500, {"error": {"message": "Sleep mode is not enabled"}})
    with pytest.raises(ConfigError, match=r"/sleep\?level=1 is refused \(HTTP 500: Sleep mode is not enabled\)"):
        scatter_generate(engine, PROMPTS, samples_per_prompt=1, sampling=GREEDY)


def answers_of_several(address: str) -> list[list[Completion]]:
    model = adapted()
    engine = VllmEngine(model, STOPS, address, shares_card=True)
    engine.refresh(model)
    return scatter_generate(engine, PROMPTS, samples_per_prompt=3, sampling=RANDOM)


def test_several_processes_ask_for_one_adapter_and_share_the_prompts(fake: FakeVllm) -> None:
    alone = answers_of_several(fake.address)
    assert fake.is_asleep
    fake.seen.clear()
    first, second = run_several(2, answers_of_several, fake.address)
    assert first == second
    assert_same(first, alone)
    names = [body["lora_name"] for path, body in fake.seen if path == "/v1/load_lora_adapter"]
    assert len(names) == 2, "one for each refresh"
    assert controls(fake) == ["/wake_up", "/sleep?level=1"], "one for both"
    drawn = [body["seed"] for body in fake.completions if body["max_tokens"] == RANDOM.max_new_tokens]
    assert len(set(drawn)) == len(drawn) == 3 * len(PROMPTS)
    assert {body["model"] for body in fake.completions[-len(drawn) :]} == {names[-1]}


def test_what_is_sent_is_all_that_decides_the_answer(fake: FakeVllm) -> None:
    engine = engine_on(fake)
    engine.generate([[1, 8]], samples_per_prompt=1, sampling=Sampling(0.7, 0.9, 200, 3, top_k=5))
    sent = fake.completions[-1]
    assert 0 <= sent.pop("seed") < 2**63
    assert sent == {
        "model": BASE,
        "prompt": [1, 8],
        "n": 1,
        "max_tokens": 126,  # what 128 positions leave
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [*range(3, 23)],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


def test_a_seed_belongs_to_seed_prompt_and_sample_alone(fake: FakeVllm) -> None:
    engine = engine_on(fake)
    together = engine.generate(PROMPTS, samples_per_prompt=3, sampling=RANDOM)
    seeds = {body["seed"] for body in fake.completions[2:]}
    assert len(seeds) == 12
    fewer = engine_on(fake, connections=1).generate(PROMPTS[:2], samples_per_prompt=2, sampling=RANDOM)
    assert fewer == [group[:2] for group in together[:2]]
    assert ids_of(together)[1] != ids_of(together)[3], "the same prompt twice is drawn twice"
    other = engine.generate(PROMPTS, samples_per_prompt=3, sampling=Sampling(1.3, 0.9, 12, 8))
    assert not seeds & {body["seed"] for body in fake.completions[-12:]}
    assert ids_of(other) != ids_of(together)


def test_streaming_gives_the_same_answer_token_by_token_and_progress_counts_each(fake: FakeVllm) -> None:
    engine, seen, counted = engine_on(fake), list[int](), list[int]()
    streamed = engine.stream(PROMPTS[2], sampling=RANDOM, on_token=seen.append)
    assert [[streamed]] == engine.generate(PROMPTS[2:3], samples_per_prompt=1, sampling=RANDOM)
    assert tuple(seen) == streamed.token_ids
    engine.generate(PROMPTS, samples_per_prompt=3, sampling=GREEDY, advance=counted.append)
    assert sum(counted) == 12
    assert engine.generate([], samples_per_prompt=1, sampling=GREEDY) == []


def test_an_answer_fits_into_the_positions_of_model_and_server() -> None:
    for served, context in ((128, 128), (40, 40), (4096, 128)):
        fake = FakeVllm(tiny_llama(), context=served)
        engine = VllmEngine(policy(), (), Server(fake.address))
        assert engine.context == context
        (group,) = engine.generate([[1] * (context - 3)], samples_per_prompt=1, sampling=GREEDY)
        assert len(group[0].token_ids) == 3 and not group[0].is_finished
        with pytest.raises(DataError, match=rf"prompt 2: {context} tokens.* {context} positions.*Shorten"):
            engine.generate([[1, 8], [1] * context], samples_per_prompt=1, sampling=GREEDY)
        fake.close()


def test_a_connection_that_is_reset_is_retried_a_limited_number_of_times(fake: FakeVllm) -> None:
    engine = engine_on(fake, connections=1)
    expected = engine.generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    fake.resets = 2
    assert engine.generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY) == expected
    fake.resets = 100
    with pytest.raises(ServerError, match=r"/v1/completions: no answer \((ReadError|RemoteProtocolError).*its log"):
        engine.generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)


def test_a_server_that_is_not_there_or_something_else_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example ready\r\n\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(ServerError, match=rf"{address}/v1/models: no answer \(RemoteProtocolError"):
            VllmEngine(policy(), STOPS, address)
    with pytest.raises(ServerError, match=rf"{address}/v1/models: no answer \(ConnectError.*fix rollout\.server"):
        VllmEngine(policy(), STOPS, address)


def test_a_server_that_hangs_is_not_waited_for_for_ever(fake: FakeVllm) -> None:
    engine = engine_on(fake, answer_s=2.0)
    fake.pause_s = 4.0
    with pytest.raises(ServerError, match=r"no answer \(ReadTimeout"):
        engine.generate(PROMPTS[:1], samples_per_prompt=1, sampling=GREEDY)


def refuse(path: str, status: int, content: Any) -> Callable[[str, Any], None]:
    def before(requested: str, body: Any) -> None:
        del body
        if requested == path:
            raise Refusal(status, content)

    return before


def choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda answer: answer | {"choices": [answer["choices"][0] | changes]}


def logprobs(*values: float | None) -> dict[str, Any]:
    return {"token_logprobs": list(values)}


TWELVE = logprobs(*[-1.0] * 12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (choice(token_ids=None), r"no token ids .*0\.10\.2"),
        (choice(logprobs=None), "not a log-probability for each of"),
        (choice(logprobs=logprobs(-1.0, None)), "not a log-probability for each of"),
        (choice(token_ids=[30, 31], logprobs=logprobs(-1.0)), "not a log-probability for each of 2"),
        (choice(token_ids=[420], logprobs=logprobs(-1.0)), "the token id 420, but the model has 420"),
        (choice(prompt_token_ids=[1, 1, 8]), "the answer to another prompt"),
        (
            choice(token_ids=[30], logprobs=logprobs(-1.0), finish_reason="stop"),
            r"1 tokens that ends by 'stop' with \[30\]",
        ),
        (choice(token_ids=[30], logprobs=logprobs(-1.0), finish_reason="length"), "1 tokens that ends by 'length'"),
        (choice(token_ids=[5, 30, 5], logprobs=logprobs(-1, -1, -1), finish_reason="stop"), "3 tokens that ends by"),
        (choice(token_ids=[30] * 12, logprobs=TWELVE, finish_reason="abort"), "12 tokens that ends by 'abort'"),
        (choice(token_ids=[], logprobs=logprobs(), finish_reason="stop"), "0 tokens that ends by 'stop'"),
        (lambda answer: answer | {"choices": answer["choices"] * 2}, "not one answer where one was asked for"),
        (lambda answer: [answer], "not one answer where one was asked for"),
        (lambda answer: "<html>", r"/v1/completions: the answer is not JSON \(b'<html>'\)"),
    ],
)
def test_an_answer_that_is_not_whole_is_not_taken(
    fake: FakeVllm, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    engine = engine_on(fake)
    fake.change = change
    with pytest.raises(ServerError, match=reason):
        engine.generate([[1, 8]], samples_per_prompt=1, sampling=GREEDY)


@pytest.mark.parametrize("scores", [None, [None, {"5": {"logprob": -1.0}}], [None]])
def test_a_fixed_text_is_scored_whole_or_the_server_refused(fake: FakeVllm, scores: Any) -> None:
    def change(answer: dict[str, Any]) -> Any:
        has_scores = "prompt_logprobs" in answer["choices"][0]
        return choice(prompt_logprobs=scores)(answer) if has_scores else answer

    fake.change = change
    with pytest.raises(ServerError, match=r"not a log-probability for each token of a prompt \(`prompt_logprobs`"):
        engine_on(fake, adapted())


def test_a_refusal_of_the_server_is_quoted(fake: FakeVllm) -> None:
    engine = engine_on(fake, adapted())
    fake.context = 10
    with pytest.raises(ServerError, match=r"HTTP 400: This model's maximum context length is 10 tokens\."):
        engine.generate(PROMPTS[2:3], samples_per_prompt=1, sampling=GREEDY)
    fake.adapters.clear()
    with pytest.raises(
        ServerError, match=r"HTTP 404.*the server had the model 'llamachat-\w+-1'.*run the command again"
    ):
        engine.generate(PROMPTS[:1], samples_per_prompt=1, sampling=GREEDY)
    fake.before = refuse("/v1/completions", 500, "")
    with pytest.raises(ServerError, match=r"HTTP 500: no message"):
        engine.generate(PROMPTS[:1], samples_per_prompt=1, sampling=GREEDY)


ADAPTER = "/v1/load_lora_adapter"
NO_FOLDER = {"error": {"message": "No adapter found for /tmp/x", "type": "NotFoundError"}}


@pytest.mark.parametrize(
    ("wrong", "tuning", "kind", "message"),
    [
        ({"takes_adapters": False}, LORA, ConfigError, "takes no adapters at run time.*RUNTIME_LORA_UPDATING=True"),
        ({"before": refuse(ADAPTER, 404, NO_FOLDER)}, LORA, ConfigError, "not load .*HTTP 404: No adapter.*TMPDIR"),
        ({}, Tuning(method="lora", rank=32), ConfigError, "rank 32 is greater than max_lora_rank 16.*--max-lora-rank"),
        (
            {"is_processed": False},
            LORA,
            ConfigError,
            "before temperature and top-p .*--logprobs-mode processed_logprobs",
        ),
        ({"model": tiny_llama(seed=1)}, LORA, ConfigError, r"differ from the policy's by [0-9.]+ nats"),
        ({"before": refuse("/v1/models", 200, {"data": []})}, LORA, ServerError, "a list of models without a base"),
        (
            {"before": refuse("/v1/models", 404, {"detail": "Not Found"})},
            LORA,
            ServerError,
            r"no list of models at /v1/models \(HTTP 404: Not Found\)",
        ),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(
    fake: FakeVllm, wrong: dict[str, Any], tuning: Tuning, kind: type[LlamachatError], message: str
) -> None:
    for name, value in wrong.items():
        setattr(fake, name, value)
    with pytest.raises(kind, match=message):
        engine_on(fake, adapted(tuning))


def test_weights_that_are_all_tuned_are_refused(fake: FakeVllm) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine: vllm, but all weights .*lora or qlora"):
        engine_on(fake, tiny_llama())
    with pytest.raises(ConfigError, match="takes new weights only as LoRA adapters"):
        engine_on(fake).refresh(policy())


def test_the_policy_of_ppo_is_sampled_from_a_server(
    tmp_path: Path, tiny_format: ChatFormat, tiny_sentencepiece: bytes
) -> None:
    world = World(tmp_path, tiny_format, tiny_sentencepiece)
    bank = world.bank(LORA, LORA, critic="shared")
    fake = FakeVllm(load_base(world.base))
    engine = open_engine(bank.policy_model(), bank.chat_format, Rollout(engine="vllm", server=fake.address + "/"))
    frozen, questions = bank.frozen_digest(), [tiny_format.encode_prompt([Message("user", "Why?")])]
    answers = []
    for _ in range(2):
        own = open_engine(bank.policy_model(), bank.chat_format, Rollout(engine="llama"))
        answers.append(engine.generate(questions, samples_per_prompt=1, sampling=GREEDY))
        assert_same(answers[-1], own.generate(questions, samples_per_prompt=1, sampling=GREEDY))
        with torch.no_grad():
            for weight in bank.trainable()["policy"]:
                weight.mul_(-1.5)
        engine.refresh(bank.policy_model())
    assert ids_of(answers[0]) != ids_of(answers[1])
    assert bank.frozen_digest() == frozen
    assert sorted(tiny_format.stop_ids) in [body["stop_token_ids"] for body in fake.completions]
    fake.close()
