"""Export: the oracles are plain transformers and PEFT, the 4-bit layers of transformers, and sums in float64."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, pipeline

from llamachat.chat_format import ChatFormat
from llamachat.errors import ArtifactError, UsageError
from llamachat.models.loading import SEVEN_PROJECTIONS, load_policy
from llamachat.runs.artifacts import read_artifact
from llamachat.runs.atomic import StorageError
from pipelines.cli.main import main
from serving.chat import chat_once
from serving.export import GREEDY, ExportError, Request, answers_of, compare, export_policy, tolerance
from serving.merging import read_adapter
from tests.serving.exporting import full_policy, lora_policy, note_of, plain, weights_of
from tests.tiny_llama import publish_policy, scripted_llama, tiny_llama

DTYPES = [torch.float32, torch.bfloat16]


# -- merged


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_transformers_says_with_the_merged_model_what_chat_says(
    dtype: torch.dtype, tmp_path: Path, tiny_format: ChatFormat, capsys: pytest.CaptureFixture[str]
):
    artifact, out = lora_policy(tmp_path, tiny_format, dtype=dtype), tmp_path / "out"
    assert main(["export", str(artifact.path), "--out", str(out)]) == 0
    assert "largest difference in a token's log-probability 0.0" in capsys.readouterr().out
    model, tokenizer = plain(out, dtype="auto"), AutoTokenizer.from_pretrained(out)
    assert model.dtype == dtype
    policy = load_policy(artifact.path)
    for question in ("Hello", "What is the capital of France?", "the cat"):
        said = chat_once(policy, question, system=None, sampling=GREEDY, write=lambda text: None)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        start = prompt["input_ids"].shape[1]
        row = model.generate(**prompt, max_new_tokens=GREEDY.max_new_tokens)
        if dtype == torch.float32:
            assert policy.chat_format.decode_answer(row[0, start:].tolist()) == said
        with torch.no_grad():  # in bf16 the likeliest of random tokens may change by rounding, and only so
            logits = policy.model(input_ids=row).logits[0, start - 1 : -1].float()
        behind = logits.amax(-1) - logits.gather(1, row[0, start:].unsqueeze(1)).squeeze(1)
        assert behind.max() <= tolerance(dtype)
    note = note_of(out)
    assert note["max_logprob_difference"] <= tolerance(dtype) == note["tolerance"]
    assert note["equal_prompts"] == 5
    assert note["equal_greedy_answers"] == 5 or dtype == torch.bfloat16
    assert (note["method"], note["format"], note["onto"]) == ("lora", "merged", None)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_weight_is_the_sum_rounded_once_and_all_others_are_the_bases(
    dtype: torch.dtype, tmp_path: Path, tiny_format: ChatFormat
):
    artifact, out = lora_policy(tmp_path, tiny_format, dtype=dtype), tmp_path / "out"
    export_policy(Request(artifact, out))
    base, got, adapter = (
        weights_of(tmp_path / "base"),
        weights_of(out),
        load_file(artifact.path / "adapter_model.safetensors"),
    )
    assert got.keys() == base.keys()
    for name, weight in base.items():
        assert got[name].dtype == dtype
        if name.split(".")[-2] not in SEVEN_PROJECTIONS:
            assert torch.equal(got[name], weight), name
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = adapter[f"{stem}.lora_A.weight"].double(), adapter[f"{stem}.lora_B.weight"].double()
        exact = weight.double() + 8 / 4 * b @ a
        assert not torch.equal(got[name], weight)
        torch.testing.assert_close(got[name], exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    if dtype == torch.float32:
        by_peft: Any = (
            PeftModel.from_pretrained(plain(tmp_path / "base"), str(artifact.path)).merge_and_unload().state_dict()
        )
        for name, weight in got.items():
            torch.testing.assert_close(weight, by_peft[name], rtol=0, atol=1e-6)


def test_weights_are_written_in_files_of_the_requested_size(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    artifact, out, most = lora_policy(tmp_path, tiny_format), tmp_path / "out", 120_000
    first = next((tmp_path / "base").glob("*.safetensors"))
    old = {**load_file(first), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as Llama-2-7b-hf has
    save_file(old, first, metadata={"format": "pt"})
    in_memory: list[int] = []

    def save(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        in_memory.append(sum(weight.nbytes for weight in tensors.values()))
        save_file(tensors, *args, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    export_policy(Request(artifact, out, shard_gb=most / 1e9))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == len(in_memory) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(in_memory) <= most
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weight_map = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            weight_map |= dict.fromkeys(weights.keys(), file.name)
    assert index["weight_map"] == weight_map
    assert weight_map.keys() == tiny_llama().state_dict().keys()
    assert index["metadata"]["total_size"] == sum(in_memory) == 4 * sum(p.numel() for p in tiny_llama().parameters())


def test_a_fully_tuned_policy_is_copied(tmp_path: Path, tiny_format: ChatFormat):
    artifact, out = full_policy(tmp_path, tiny_format), tmp_path / "out"
    agreement = export_policy(Request(artifact, out))
    assert agreement.max_logprob_difference == 0.0
    got, was = weights_of(out), weights_of(artifact.path)
    assert all(torch.equal(got[name], weight) for name, weight in was.items()) and got.keys() == was.keys()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


# -- adapter


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_goes_with_plain_peft_on_the_base_that_it_names(
    dtype: torch.dtype, tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    artifact, out = lora_policy(tmp_path, tiny_format, dtype=dtype), tmp_path / "out"
    agreement = export_policy(Request(artifact, out, format="adapter"))
    assert agreement.max_logprob_difference <= tolerance(dtype)
    named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "base").resolve())
    monkeypatch.chdir("/")
    model = PeftModel.from_pretrained(plain(named, dtype=dtype), str(out), autocast_adapter_dtype=False)
    ids = torch.tensor([[1, 5, 9, 200, 33]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load_policy(artifact.path).model(input_ids=ids).logits)
    assert not list(out.glob("model*.safetensors"))


# -- compared with the policy


def test_the_difference_is_that_of_the_log_probabilities(tmp_path: Path, tiny_format: ChatFormat):
    full_policy(tmp_path, tiny_format)
    artifact = read_artifact(tmp_path / "runs/one/sft")
    policy, tokenizer = load_policy(artifact.path), AutoTokenizer.from_pretrained(artifact.path)
    answers = answers_of(policy)
    same = compare(policy.model, tokenizer, answers)
    assert (same.max_logprob_difference, same.equal_prompts, same.equal_greedy_answers) == (0.0, 5, 5)
    other = tiny_llama(seed=1, max_position_embeddings=256)
    differences = []
    for answer in answers:
        for ids in (answer.greedy_ids, answer.builtin_ids):
            row, start = torch.tensor([[*answer.prompt_ids, *ids]]), len(answer.prompt_ids)
            losses = []
            for model in (policy.model, other):
                with torch.no_grad():
                    logits = model(input_ids=row).logits[0, start - 1 : -1]
                losses.append(torch.nn.functional.cross_entropy(logits, row[0, start:], reduction="none"))
            differences += (losses[0] - losses[1]).abs().tolist()
    agreement = compare(other, tokenizer, answers)
    assert agreement.tokens == len(differences)
    assert agreement.max_logprob_difference == pytest.approx(max(differences), abs=1e-4)
    assert agreement.mean_logprob_difference == pytest.approx(sum(differences) / len(differences), abs=1e-4)
    assert agreement.equal_greedy_answers == 0


def unmerged(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    return weight


def test_a_model_that_says_something_else_is_an_error_unless_allowed(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    artifact, out = lora_policy(tmp_path, tiny_format), tmp_path / "out"
    monkeypatch.setattr("serving.merging.merged", unmerged)
    with pytest.raises(ExportError, match=r"log-probability differs by .* and 0\.001 is allowed.*--allow-difference"):
        export_policy(Request(artifact, out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "runs"]
    export_policy(Request(artifact, out, may_differ=True))
    assert note_of(out)["max_logprob_difference"] > 0.1
    assert "log-probability differs by" in caplog.text
    assert "the rest of a greedy answer then differs" in caplog.text
    monkeypatch.setattr("serving.merging.merged", lambda weight, a, b, scale: weight * float("nan"))
    with pytest.raises(ExportError, match="differs by inf"):
        export_policy(Request(artifact, tmp_path / "none", may_differ=True))


def test_one_token_may_move_further_where_the_mean_is_small(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    artifact = lora_policy(tmp_path, tiny_format)
    for mean, is_refused in ((0.0004, False), (0.0006, True)):
        moved = {"max_logprob_difference": 1.4, "mean_logprob_difference": mean}
        monkeypatch.setattr(
            "serving.export.compare", lambda *arguments, moved=moved: replace(compare(*arguments), **moved)
        )
        with pytest.raises(ExportError, match=r"the mean is 0\.001") if is_refused else nullcontext():
            export_policy(Request(artifact, tmp_path / f"{mean}"))
        assert (tmp_path / f"{mean}").exists() != is_refused
    assert "few tokens differ by more than 0.001 nats" in caplog.text


def test_a_chat_template_with_other_ids_is_an_error(tmp_path: Path, tiny_format: ChatFormat):
    artifact = full_policy(tmp_path, tiny_format)
    file = artifact.path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("[INST]", "[ASK!]"))
    with pytest.raises(ExportError, match="5 prompts have other token ids"):
        export_policy(Request(artifact, tmp_path / "out"))


def test_an_answer_in_whole_characters_has_one_text_in_chat_and_in_transformers(
    tmp_path: Path, tiny_format: ChatFormat
):
    last, ids = tiny_format.tokenizer.encode("[/INST]"), tiny_format.tokenizer.encode("[/INST] Hello there!\U0001f600")
    model = scripted_llama([last[-1], *ids[len(last) :], 2])
    artifact = publish_policy(tmp_path / "runs/one/sft", model, tiny_format, base="assets/base")
    export_policy(Request(artifact, tmp_path / "out"))
    said = chat_once(load_policy(artifact.path), "Hi", system=None, sampling=GREEDY, write=lambda text: None)
    model, tokenizer = plain(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == said == "Hello there!\U0001f600"
    chat: Any = pipeline("text-generation", str(tmp_path / "out"))
    assert (
        chat([{"role": "user", "content": "Hi"}], max_new_tokens=20)[0]["generated_text"][-1]["content"].strip() == said
    )
    assert (tmp_path / "out/chat_template.jinja").read_text() == chat.tokenizer.chat_template


def test_a_policy_that_can_read_none_of_the_questions_is_refused(tmp_path: Path, tiny_format: ChatFormat):
    artifact = full_policy(tmp_path, tiny_format, max_tokens=16, system="Be brief, and then be brief again.")
    with pytest.raises(ArtifactError, match="none of the built-in questions fits into the 16 tokens"):
        export_policy(Request(artifact, tmp_path / "out"))


# -- refusals


def test_what_does_not_go_together_is_refused(tmp_path: Path, tiny_format: ChatFormat):
    full = full_policy(tmp_path, tiny_format)
    with pytest.raises(UsageError, match="tuned in all its weights"):
        Request(full, tmp_path / "out", format="adapter")
    with pytest.raises(UsageError, match=r"--onto original: .* this is a 'full' policy in the format 'merged'"):
        Request(full, tmp_path / "out", onto="original")
    with pytest.raises(UsageError, match="--shard-gb: 0 is no size"):
        Request(full, tmp_path / "out", shard_gb=0)


def test_only_an_earlier_export_is_replaced_and_only_on_request(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    artifact, out = full_policy(tmp_path, tiny_format), tmp_path / "out"
    export_policy(Request(artifact, out))
    (out / "mark").touch()
    with pytest.raises(UsageError, match=r"already exists.*--overwrite"):
        Request(artifact, out)
    export_policy(Request(artifact, out, should_overwrite=True))
    assert not (out / "mark").exists() and (out / "export.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    (artifact.path / "export.json").touch()
    (out / "recipe.yaml").touch()
    monkeypatch.chdir(out)
    for name in (".", "..", "/", str(out)):
        assert main(["export", str(artifact.path), "--out", name, "--overwrite"]) == 2
        assert "--out: " in capsys.readouterr().err and (out / "export.json").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--config", str(out / "recipe.yaml"), "--out", str(out), "--overwrite"]) == 2
    assert "contains the input" in capsys.readouterr().err
    for mine, reason in (
        (artifact.path, "is an input"),
        (tmp_path, "contains the input"),
        (tmp_path / "mine", "was not written by"),
    ):
        with pytest.raises(UsageError, match=reason):
            Request(artifact, mine, should_overwrite=True)


def test_a_full_disk_is_reported_before_anything_is_written(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    artifact = full_policy(tmp_path, tiny_format)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match=r"the merged weights take 0\.\d GB, and 0\.0 GB are free"):
        export_policy(Request(artifact, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_more_than_plain_lora_is_not_merged(tmp_path: Path, tiny_format: ChatFormat):
    artifact = lora_policy(tmp_path, tiny_format)
    config = artifact.path / "adapter_config.json"
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"use_rslora": True}))
    with pytest.raises(ArtifactError, match=r"more than plain LoRA \(use_rslora\).*--format adapter"):
        read_adapter(artifact.path)
    config.write_text(json.dumps(plain))
    weights = artifact.path / "adapter_model.safetensors"
    adapter = load_file(weights)
    save_file({**adapter, "base_model.model.model.norm.weight": torch.ones(64)}, weights)
    with pytest.raises(ArtifactError, match="other weights than A and B"):
        read_adapter(artifact.path)


def test_an_adapter_on_weights_that_the_base_lacks_is_refused(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    from serving.merging import write_weights

    artifact = lora_policy(tmp_path, tiny_format)
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ArtifactError, match=r"sits on 7 weights that are not there \(model\.layers\.1"):
        write_weights(
            tmp_path / "smaller",
            tmp_path,
            adapter=read_adapter(artifact.path),
            dtype=torch.float32,
            is_nf4=False,
            shard_bytes=10**9,
        )


def test_one_policy_is_exported_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", "one", "two", "--out", str(tmp_path / "out")]) == 2
    assert "export: found one two. It takes one artifact" in capsys.readouterr().err
