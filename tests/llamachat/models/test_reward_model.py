"""Reward models: the oracles are plain transformers and PEFT, the policy's own files, and invariances."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.errors import ArtifactError
from llamachat.models import nf4, scoring_head, sequence_attention
from llamachat.models.reward_model import (
    RewardModel,
    load_reward_model,
    reward_trunk_digest,
)
from llamachat.models.scoring_head import last_token_scores, score_rows
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.models.weights import trunk_digest
from tests.reward.rewarding import (
    DIALOGS,
    base_of,
    dialog,
    move,
    policy_on,
    publish_reward_model,
    start_on,
    trained,
)
from tests.tiny_llama import nf4_by_transformers, tiny_llama

METHODS = ["full", "lora", "qlora"]


def rows_of(reward_model: RewardModel) -> list[tuple[int, ...]]:
    return [reward_model.encode(messages) for messages in DIALOGS]


def plain_model(artifact: Any, method: str, base: str) -> Any:
    """The artifact as transformers and PEFT alone load it, in fp32."""
    load: Any = AutoModelForSequenceClassification.from_pretrained
    if method == "full":
        return load(artifact.path, num_labels=1, dtype=torch.float32).eval()
    arguments = {}
    if method == "qlora":
        arguments["quantization_config"] = nf4_by_transformers(torch.float32)
    trunk = load(base, num_labels=1, dtype=torch.float32, **arguments)
    if method == "qlora":
        nf4.close_cpu_trap(trunk)
    return PeftModel.from_pretrained(trunk, str(artifact.path)).eval()


def packed(rows: list[tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
        "ends": torch.tensor([len(row) for row in rows]).cumsum(0) - 1,
    }


@pytest.mark.parametrize("method", METHODS)
def test_plain_transformers_gives_the_same_scores(method: str, tmp_path: Path, tiny_sentencepiece: bytes):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, method)
    loaded = load_reward_model(artifact.path.parent, dtype="float32")
    rows = rows_of(loaded)
    assert all(row[-1] == 2 for row in rows), "the score is read at EOS"
    scores = loaded.score(DIALOGS)
    assert max(scores) - min(scores) > 0.1
    plain = plain_model(artifact, method, str(tmp_path / "base"))
    with torch.no_grad():
        alone = [plain(torch.tensor([row])).logits.item() for row in rows]
        width = max(map(len, rows))
        plain.config.pad_token_id = 0
        padded = plain(
            torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        ).logits.squeeze(1)
    assert scores == pytest.approx(alone, abs=1e-5)
    assert scores == pytest.approx(padded.tolist(), abs=1e-5)
    assert loaded.name == "run/rm/safety"


@pytest.mark.parametrize("method", METHODS)
def test_before_training_every_score_is_zero_and_only_adapter_and_head_train(
    method: str, tmp_path: Path, tiny_sentencepiece: bytes
):
    start = start_on(base_of(tmp_path, tiny_sentencepiece, method), method)
    batch = packed([(1, 5, 9, 2), (1, 7, 2)])
    chosen, rejected = last_token_scores(start.model, batch)
    assert float(-torch.nn.functional.logsigmoid(chosen - rejected)) == pytest.approx(math.log(2))
    assert (chosen.item(), chosen.dtype) == (0.0, torch.float32)
    weights = dict(start.model.named_parameters())
    learnt = {name for name, weight in weights.items() if weight.requires_grad}
    if method == "full":
        assert learnt == weights.keys() and start.frozen_digest is None
    else:
        heads = {name for name in learnt if ".lora_" not in name}
        assert heads == {"base_model.model.score.modules_to_save.default.weight"} and len(learnt) == 1 + 2 * 2 * 7
        assert {weights[name].dtype for name in learnt} == {torch.bfloat16 if method == "qlora" else torch.float32}
        assert start.frozen_digest == reward_trunk_digest(start.model)


def test_order_padding_and_packing_do_not_move_a_score(tmp_path: Path, tiny_sentencepiece: bytes):
    artifact, start = trained(tmp_path, tiny_sentencepiece, "full")
    loaded = load_reward_model(artifact.path)
    rows = rows_of(loaded)
    scores = loaded.score_ids(rows)
    alone = torch.cat([loaded.score_ids([row]) for row in rows])
    with torch.no_grad():
        together = last_token_scores(start.model.eval(), packed(rows))
    for other in (alone, loaded.score_ids(rows[::-1]).flip(0), loaded.score_ids(rows, row_tokens=1), together):
        torch.testing.assert_close(other, scores, rtol=0, atol=1e-5)
    changed = [rows[0], (1, *([9] * len(rows[1])), 2), *rows[2:]]
    with torch.no_grad():
        moved = last_token_scores(start.model, packed(changed))
    assert abs(float(moved[1] - together[1])) > 1e-3
    torch.testing.assert_close(moved[[0, 2, 3]], together[[0, 2, 3]], rtol=0, atol=1e-5)
    assert loaded.score_ids([]).shape == (0,)


@pytest.mark.parametrize("row_tokens", [None, 60, 1])
def test_rows_that_begin_alike_are_scored_as_alone_and_their_beginning_once(
    row_tokens: int | None, tmp_path: Path, tiny_sentencepiece: bytes, monkeypatch: pytest.MonkeyPatch
):
    _, start = trained(tmp_path, tiny_sentencepiece, "lora")
    draw = Random(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 200) for _ in range(count))

    first, second = tokens(30), tokens(25)
    answers = [(*first, *tokens(count), 2) for count in (4, 9, 1, 6)]
    longer = [(*answers[1], *second, *tokens(count), 2) for count in (3, 5)]  # the next turn of a dialog
    rows = [
        *answers,
        (*second, 7, 2),
        *longer,
        answers[2],
        answers[0][:20],
        answers[0][:21],
        (1,),
        (*second, 8, 2),
        (1, 2),
    ]
    draw.shuffle(rows)
    alone = torch.cat([score_rows(start.model, [row]) for row in rows])
    computed: list[int] = []
    use_sequence_attention(start.model)
    score = scoring_head.last_token_scores

    def counted(model: Any, batch: Any) -> Tensor:
        computed.append(batch["input_ids"].numel())
        return score(model, batch)

    monkeypatch.setattr(scoring_head, "last_token_scores", counted)
    torch.testing.assert_close(score_rows(start.model, rows, row_tokens=row_tokens), alone, rtol=0, atol=1e-5)
    if row_tokens is None:  # 30 tokens that five rows share, 25 that two do, 66 that two do; up to 63 fill the row
        assert len(computed) == 1 and computed[0] < 240 < sum(map(len, rows))
    elif row_tokens == 60:
        assert max(computed) <= 128 and len(computed) > 2


def test_attention_by_sequence_multiplies_matrices_of_few_shapes(tmp_path: Path, tiny_sentencepiece: bytes):
    """In 16 bits a CPU library compiles a kernel for each shape, which takes longer than a small product."""
    _, start = trained(tmp_path, tiny_sentencepiece, "full")
    use_sequence_attention(start.model.bfloat16())
    shapes: set[tuple[int, ...]] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                query, key, *_ = args
                shapes.add((query.shape[2], key.shape[2]))
            return func(*args, **(kwargs or {}))

    prompt = tuple(range(3, 40))
    with Recorder():
        score_rows(start.model, [*((*prompt, *range(50, 50 + count)) for count in range(9, 41)), (7, 8)])
    assert shapes and all(size % 32 == 0 for shape in shapes for size in shape)
    assert len(shapes) <= 6


def test_attention_by_sequence_is_nearer_to_exact_than_eager_attention_and_the_same_with_gradients():
    """In bf16: a sequence of 50, one of 300, and a branch of 40 that sees the first 200 positions of the second one."""
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(50), torch.arange(300), torch.arange(200, 240)]).unsqueeze(0)
    total, width = positions.shape[1], 64
    query, key, value = (torch.randn(1, heads, total, width).bfloat16() for heads in (4, 2, 2))
    places = torch.arange(total)
    sequence = (places >= 50).long()
    seen = (sequence.unsqueeze(1) == sequence) & (places <= places.unsqueeze(1))
    seen[350:, 250:350] = False  # the branch does not see the rest of its trunk

    def eager(dtype: torch.dtype) -> torch.Tensor:
        q, k, v = (part.repeat_interleave(4 // part.shape[1], dim=1).to(dtype) for part in (query, key, value))
        scores = (q @ k.transpose(2, 3) / width**0.5).masked_fill(~seen, -torch.inf)
        wide = dtype if dtype == torch.float64 else torch.float32
        return (scores.softmax(-1, dtype=wide).to(dtype) @ v).transpose(1, 2).double()

    def ours() -> torch.Tensor:
        module = torch.nn.Module().eval()
        return sequence_attention._attention(module, query, key, value, None, width**-0.5, position_ids=positions)[0]

    exact = eager(torch.float64)
    with torch.no_grad():
        result = ours()
    assert float((result - exact).norm()) < float((eager(torch.bfloat16) - exact).norm())
    query.requires_grad_()
    assert torch.equal(ours(), result)


def test_gradients_of_a_packed_row_are_those_of_plain_transformers(tmp_path: Path, tiny_sentencepiece: bytes):
    artifact, start = trained(tmp_path, tiny_sentencepiece, "full")
    rows = rows_of(load_reward_model(artifact.path))
    last_token_scores(start.model, packed(rows)).square().sum().backward()
    plain = plain_model(artifact, "full", "")
    torch.stack([plain(torch.tensor([row])).logits.squeeze() for row in rows]).square().sum().backward()
    ours = {name: weight.grad for name, weight in start.model.named_parameters()}
    for name, weight in plain.named_parameters():
        assert float((ours[name] - weight.grad).norm() / weight.grad.norm()) < 1e-4, name


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_copy_of_the_policys_adapter_is_continued(
    method: str, tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat
):
    base = base_of(tmp_path, tiny_sentencepiece, method)
    policy = policy_on(base, method, tmp_path, tiny_format)
    start = start_on(base, method, policy)
    weights = dict(start.model.named_parameters())
    policy_weights = load_file(policy.path / "adapter_model.safetensors")
    for name, value in policy_weights.items():
        assert torch.equal(weights[name.replace(".weight", ".default.weight")], value), name
    assert start.trunk == base.model
    move(start.model)
    artifact = publish_reward_model(start, base, tmp_path / "run")
    assert artifact.manifest.details["trunk"] == policy.manifest.details["trunk"], "one base under both"
    again = load_reward_model(artifact.path)
    rows = rows_of(again)
    torch.testing.assert_close(again.score_ids(rows), score_rows(start.model, rows), rtol=0, atol=0)


def test_a_fully_tuned_policy_is_the_trunk(tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat):
    base = base_of(tmp_path, tiny_sentencepiece)
    policy = policy_on(base, "full", tmp_path, tiny_format)
    for method in ("full", "lora"):
        start = start_on(base, method, policy)
        assert start.trunk == str(policy.path)
        artifact = publish_reward_model(start, base, tmp_path / method)
        assert load_reward_model(artifact.path).score(DIALOGS) == [0.0] * 4


@pytest.mark.parametrize("is_loaded", [False, True])
def test_another_base_under_an_adapter_is_refused(
    is_loaded: bool, tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat
):
    base = base_of(tmp_path, tiny_sentencepiece)
    policy = policy_on(base, "lora", tmp_path, tiny_format)
    artifact = publish_reward_model(start_on(base, "lora", policy), base, tmp_path / "run")
    tiny_llama(seed=9, max_position_embeddings=256).save_pretrained(base.model)
    with pytest.raises(ArtifactError, match="has other weights than those that the adapter was trained on"):
        load_reward_model(artifact.path) if is_loaded else start_on(base, "lora", policy)


def test_scoring_leaves_the_model_in_its_mode(tmp_path: Path, tiny_sentencepiece: bytes):
    base = base_of(tmp_path, tiny_sentencepiece)
    model: Any = tiny_llama(max_position_embeddings=256, initializer_range=0.05)
    assert trunk_digest(Path(base.model), dtype=torch.bfloat16) == trunk_digest(model.to(torch.bfloat16))
    start = start_on(base, "lora")
    for is_training in (True, False):
        start.model.train(is_training)
        assert not score_rows(start.model, [(1, 5, 2)]).requires_grad
        assert start.model.training is is_training


def test_both_answers_are_read_after_the_same_turns(tmp_path: Path, tiny_sentencepiece: bytes):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "full", max_tokens=60, system="Be brief.")
    loaded = load_reward_model(artifact.path)
    system = Message("system", "Be brief.")
    turns = dialog("the cat sat on the mat", "the other cat", "What is the capital of France?")
    short, long = Message("assistant", "Paris"), Message("assistant", "the capital of France is Paris")
    encode: Any = loaded.chat_format.encode_dialog
    last = (system, turns[-1])
    expected = [encode([*last, answer], train_on="last_answer").input_ids for answer in (short, long)]
    whole = encode([system, *turns, short], train_on="last_answer").input_ids
    assert len(whole) <= 60 < len(encode([system, *turns, long], train_on="last_answer").input_ids)
    assert loaded.encode([*turns, short]) == whole
    assert loaded.encode_answers(turns, [short, long]) == expected
    with pytest.raises(DialogError, match="longer than the 60 tokens that this reward model reads"):
        loaded.encode(dialog("Hello", "the cat " * 60))


def test_a_model_of_others_with_one_label_scores_and_one_with_two_is_refused(
    tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat
):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "full")
    plain = plain_model(artifact, "full", "")
    plain.save_pretrained(tmp_path / "plain")
    write_tokenizer(tiny_format.tokenizer, tmp_path / "plain", tiny_format.chat_template)
    loaded = load_reward_model(tmp_path / "plain")
    assert (loaded.max_tokens, loaded.name) == (256, "plain")
    assert loaded.score(DIALOGS) == pytest.approx(load_reward_model(artifact.path).score(DIALOGS), abs=1e-6)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="has 2 labels"):
        load_reward_model(tmp_path / "plain")
