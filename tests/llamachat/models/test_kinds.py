"""Llama models of other kinds than Llama 2, random and small, through the whole path: SFT, roles of PPO, sampling, export.

The oracles are transformers and PEFT alone, and what the planner counts from config.json.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamachat.chat_format import TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message, as_dicts
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.data.packing import collate_packed, collate_padded
from llamachat.errors import TokenizerError
from llamachat.memory.estimates import Setup, read_shape
from llamachat.memory.role_bytes import Seating, role_bank_bytes
from llamachat.models.loading import attach_adapter, load_base, load_policy
from llamachat.models.reward_model import load_reward_model
from llamachat.models.start_checks import proved_start
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from serving.export import GREEDY, QUESTIONS, Request, export_policy, tolerance
from serving.reward_export import export_reward_model
from sft.loss import answer_token_losses
from tests.fakes import write_byte_level
from tests.llamachat.models.test_shapes import one_step
from tests.llamachat.models.tiny_roles import QLORA, World, weight_bytes
from tests.llamachat.rollout.test_graphs import RecordedStep, assert_alike
from tests.tiny_llama import LORA, tiny_llama

DIALOG = [Message("user", "What is the capital of France?"), Message("assistant", "Paris, of course.")]
KINDS: dict[str, dict[str, Any]] = {
    "like SmolLM2": {
        "tie_word_embeddings": True,
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "pad_token_id": 2,  # its EOS
    },
    "wide heads": {"head_dim": 32},
    "150,000 rows": {
        "vocab_size": 150_000,
        "hidden_size": 32,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
# Nearly greedy: among 150,000 tokens of like probability rounding would choose a neighbour.
COLD = Sampling(temperature=0.05, top_p=0.9, max_new_tokens=24, seed=1)


def world_of(folder: Path, changes: dict[str, Any]) -> World:
    """Policies and reward models on a base of this kind, whose tokenizer has control tokens of its own."""

    def write(base: Path, unused: bytes, *, dtype: torch.dtype = torch.float32) -> Path:
        shape = {"vocab_size": 600, "max_position_embeddings": 256} | changes
        tiny_llama(dtype=dtype, initializer_range=0.05, **shape).save_pretrained(base)
        return write_byte_level(base)

    write(folder / "first", b"")
    chat_format = load_chat_format("llama2", load_tokenizer(folder / "first"))
    world = World(folder, chat_format, b"", write)
    world.base, world.base16 = (
        base.model_copy(update={"allow_unproved_tokenizer": True}) for base in (world.base, world.base16)
    )
    return world


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_llama_model_is_trained_scored_sampled_and_exported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.export.QUESTIONS", QUESTIONS[:2])
    monkeypatch.setattr("serving.export.GREEDY", replace(GREEDY, max_new_tokens=6))
    world = world_of(tmp_path, KINDS[kind])
    chat_format = world.chat_format
    shape = read_shape(Path(world.base.model))
    assert shape is not None

    # SFT: every trained weight has a gradient, and so has the row of each token that is read, EOS called the pad too.
    example = chat_format.encode_dialog(DIALOG, train_on=TrainOn.EVERY_ANSWER)
    before, after = one_step(attach_adapter(load_base(world.base), LORA, seed=0), example)
    assert after < before
    model: Any = load_base(world.base)
    assert shape.weights == sum(weight.numel() for weight in model.parameters())
    two_turns = chat_format.encode_dialog([*DIALOG, *DIALOG], train_on=TrainOn.EVERY_ANSWER)
    answer_token_losses(model, collate_padded([two_turns], rows=1, multiple_of=64)).sum().backward()
    control = chat_format.tokenizer.control
    read = set(two_turns.input_ids[:-1])
    gradient = model.model.embed_tokens.weight.grad.norm(dim=1)
    assert {control.bos, control.eos} < read and bool((gradient[sorted(read)] > 0).all())

    # A policy is saved, loaded and sampled from; recorded steps say what plain ones say.
    policy = world.policy(LORA)
    loaded = load_policy(policy.path).model
    prompts = [chat_format.encode_prompt([Message("user", text)]) for text in ("Hi", "the cat sat on", "x = 12  34")]
    for sampling in (GREEDY, COLD):
        how: dict[str, Any] = {"samples_per_prompt": 3, "sampling": sampling}
        stops = (*chat_format.stop_ids, *range(20, 60))
        expected = HuggingFaceEngine(loaded, stops, control.pad).generate(prompts, **how)
        assert_alike(LlamaEngine(loaded, stops).generate(prompts, **how), expected)
        capture = RecordedStep()
        assert_alike(LlamaEngine(loaded, stops, capture=capture).generate(prompts, **how), expected)
        assert capture.repeated > 0

    # PPO: all roles are adapters on one trunk, of as many bytes as are planned.
    bank = world.bank(LORA, LORA)
    planned = role_bank_bytes(Setup(shape, world.base, LORA), Seating(True, 2, {}), critic="separate")
    assert weight_bytes(bank) == sum(planned.values())
    rows = [example.input_ids, two_turns.input_ids]
    reward_model = world.reward_model("safety", LORA, LORA)
    scores = load_reward_model(reward_model.path).score_ids(rows)
    torch.testing.assert_close(bank.scores("safety", rows), scores, atol=1e-5, rtol=1e-5)

    # Exports say what the artifacts say; transformers alone gives the ids and stops where we do.
    agreement = export_policy(Request(policy, tmp_path / "out"))
    assert agreement.max_logprob_difference <= tolerance(torch.float32)
    assert agreement.equal_greedy_answers == agreement.equal_prompts == agreement.questions == 2
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(as_dicts(DIALOG), return_dict=False) == list(example.input_ids)
    assert (plain.generation_config.eos_token_id, tokenizer.eos_token_id) == (control.eos, control.eos)
    with torch.no_grad():
        ids = torch.tensor([example.input_ids])
        torch.testing.assert_close(plain(ids).logits, loaded(input_ids=ids).logits, atol=2e-4, rtol=1e-4)
    for form in ("merged", "adapter"):
        request = Request(reward_model, tmp_path / form, format=form)
        assert export_reward_model(request).max_score_difference < 1e-4


def test_own_ids_are_said_once_of_the_base_and_compared_between_roles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = world_of(tmp_path, {})
    with pytest.raises(TokenizerError, match="allow_unproved_tokenizer"):
        proved_start(world.base.model_copy(update={"allow_unproved_tokenizer": False}), LORA, None)
    policy = world.policy(LORA)  # tuned from the base
    with caplog.at_level(logging.WARNING):
        proved_start(world.base, LORA, None)
        proved_start(world.base, LORA, policy)
    said = [record.getMessage() for record in caplog.records if "own" in record.getMessage()]
    assert len(said) == 1 and world.base.model in said[0]

    # A plain reward model, loaded beside; with another EOS its ids are not the policy's, and it gives no critic.
    plain = {role: tmp_path / role for role in ("helpfulness", "safety")}
    for role, folder in plain.items():
        export_reward_model(Request(world.reward_model(role, LORA, LORA), folder))
    names = plain["safety"] / "tokenizer_config.json"
    names.write_text(json.dumps(json.loads(names.read_text()) | {"eos_token": "<|other|>"}))
    with pytest.raises(TokenizerError, match="allow_unproved_tokenizer"):
        load_reward_model(plain["safety"])
    bank = world.bank(LORA, LORA, reward_models=plain)
    assert (bank.reads_policy_ids("helpfulness"), bank.reads_policy_ids("safety")) == (True, False)


def test_qlora_on_a_tied_base_is_scored_sampled_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.export.QUESTIONS", QUESTIONS[:2])
    monkeypatch.setattr("serving.export.GREEDY", replace(GREEDY, max_new_tokens=6))
    world = world_of(tmp_path, KINDS["like SmolLM2"])
    shape = read_shape(Path(world.base16.model))
    assert shape is not None
    bank = world.bank(QLORA, QLORA)
    planned = role_bank_bytes(Setup(shape, world.base16, QLORA), Seating(True, 2, {}), critic="separate")
    assert weight_bytes(bank) == pytest.approx(sum(planned.values()), rel=2e-3)
    policy = world.policy(QLORA)
    prompts = [world.chat_format.encode_prompt([Message("user", text)]) for text, _ in QUESTIONS[:2]]
    engine = LlamaEngine(load_policy(policy.path).model, world.chat_format.stop_ids)
    groups = engine.generate(prompts, samples_per_prompt=1, sampling=replace(GREEDY, max_new_tokens=6))
    agreement = export_policy(Request(policy, tmp_path / "out"))
    assert agreement.equal_greedy_answers == agreement.questions == 2
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        said = plain.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert said.tolist() == list(completion.token_ids)


def test_what_fills_a_row_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Losses, gradients and scores are those of any other filler, to the last bit: also where id 0 begins or ends texts."""
    world = world_of(tmp_path, {})
    texts = ("Paris, of course.", "No.", "x = 12  34")
    messages = [[DIALOG[0], Message("assistant", text)] for text in texts]
    examples = [world.chat_format.encode_dialog(dialog, train_on=TrainOn.EVERY_ANSWER) for dialog in messages]
    reward_model = load_reward_model(world.reward_model("safety", LORA, LORA).path)
    results: list[list[Any]] = []
    for filler in (0, 1, 2, 77):
        for module in ("llamachat.data.packing", "llamachat.models.scoring_head"):
            monkeypatch.setattr(f"{module}.FILLER_ID", filler)
        model: Any = load_base(world.base)
        losses = [
            answer_token_losses(model, collate(examples, multiple_of=64))
            for collate in (collate_padded, collate_packed)
        ]
        torch.stack([loss.sum() for loss in losses]).sum().backward()
        scores = reward_model.score_ids([example.input_ids for example in examples])
        results.append([*losses, scores, *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(one, other) for rest in results[1:] for one, other in zip(results[0], rest, strict=True))
