"""Models in and out: the oracles are plain transformers and peft, and the weights themselves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import RopeScaling, Tuning
from llamachat.errors import ArtifactError, ConfigError, UsageError
from llamachat.models.loading import (
    SEVEN_PROJECTIONS,
    attach_adapter,
    context_length,
    device_of,
    find_model,
    load_adapter,
    load_base,
    load_policy,
    save_policy,
    trunk_digest,
)
from tests.tiny_llama import LORA, base_section, move_adapter, publish_policy, tiny_llama

DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.tensor([[1, 5, 9, 200, 33, 33, 7, 419]])


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fully_tuned_policy_loads_with_plain_transformers_to_the_same_logits(dtype: torch.dtype, tmp_path: Path):
    model = tiny_llama(dtype=dtype)
    model.config.use_cache = False  # as in training
    save_policy(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == dtype
    assert again.config.use_cache, "a published model generates with a cache"
    assert not model.config.use_cache, "training continues without one"
    assert torch.equal(logits(again), logits(model))
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_loads_with_plain_peft_to_the_same_logits(dtype: torch.dtype, base_folder: Path, tmp_path: Path):
    section = base_section(base_folder, dtype=str(dtype).removeprefix("torch."))
    model = attach_adapter(load_base(section), LORA, seed=0)
    before = logits(model)
    move_adapter(model)
    assert not torch.equal(logits(model), before)
    save_policy(model, tmp_path / "adapter")
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors"}
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base_folder)
    assert named["target_modules"] == sorted(SEVEN_PROJECTIONS)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    assert torch.equal(logits(again), logits(model))
    if dtype == torch.float32:  # in bf16 PEFT raises adapters to fp32 by default, and results differ by rounding
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
        by_default = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        assert torch.equal(logits(by_default), logits(model))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adapter_has_the_trunks_dtype_sits_on_seven_projections_and_adds_nothing_yet(
    dtype: torch.dtype, base_folder: Path
):
    base = load_base(base_section(base_folder), dtype=dtype)
    before, state = logits(base), torch.random.get_rng_state()
    model = attach_adapter(base, LORA, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state), "data order and dropout do not depend on the adapter"
    assert torch.equal(logits(model), before)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {dtype}
    assert len(trained) == 2 * 2 * 7, "two matrices for each of seven projections in two layers"
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == set(SEVEN_PROJECTIONS)
    assert {weight.shape[0] for name, weight in trained.items() if "lora_A" in name} == {LORA.rank}
    same = dict(attach_adapter(load_base(base_section(base_folder), dtype=dtype), LORA, seed=5).named_parameters())
    assert all(torch.equal(same[name], weight) for name, weight in trained.items())


def test_training_the_adapter_leaves_the_trunk_digest_and_one_changed_weight_does_not(
    base_folder: Path, tmp_path: Path
):
    base = load_base(base_section(base_folder, dtype="bfloat16"))
    whole, sampled = trunk_digest(base), trunk_digest(base, values_per_weight=64)
    assert whole == trunk_digest(base_folder)
    base.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert whole == trunk_digest(tmp_path / "shards")
    tied = tiny_llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert trunk_digest(tied) == trunk_digest(tmp_path / "tied")
    model = attach_adapter(base, LORA, seed=0)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert trunk_digest(model) == whole
    assert trunk_digest(model, values_per_weight=64) == sampled
    with torch.no_grad():
        base.get_parameter("model.layers.1.mlp.up_proj.base_layer.weight")[-1, -1] += 1.0
    assert trunk_digest(model) != whole
    assert trunk_digest(model, values_per_weight=64) == sampled, "one value of thousands is not among the sampled"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_published_policy_loads_as_it_was(method: str, base_folder: Path, tmp_path: Path, tiny_format: ChatFormat):
    base = load_base(base_section(base_folder, dtype="bfloat16"))
    model = base if method == "full" else attach_adapter(base, LORA, seed=0)
    if method == "lora":
        move_adapter(model)
    publish_policy(tmp_path / "runs/one/sft", model, tiny_format, base=str(base_folder), system="Be brief.")
    policy = load_policy(tmp_path / "runs/one/sft")
    assert torch.equal(logits(policy.model), logits(model))
    assert (policy.name, policy.max_tokens, policy.system) == ("one/sft", 96, "Be brief.")
    assert policy.chat_format.name == "llama2"
    assert policy.tokenizer.encode("Hello you") == tiny_format.tokenizer.encode("Hello you")
    assert not policy.model.training
    assert not any(weight.requires_grad for weight in policy.model.parameters())
    wide = load_policy(tmp_path / "runs/one/sft", dtype="float32")
    assert {weight.dtype for weight in wide.model.parameters()} == {torch.float32}
    trainable = load_policy(tmp_path / "runs/one/sft", is_trainable=True).model
    trained = [name for name, weight in trainable.named_parameters() if weight.requires_grad]
    assert trainable.training
    assert len(trained) == (len(list(base.parameters())) if method == "full" else 28)


def test_an_adapter_finds_its_base_from_its_own_project_and_says_where_it_looked(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    project = tmp_path / "project"
    tiny_llama().save_pretrained(project / "assets" / "base")
    monkeypatch.chdir(project)
    model = attach_adapter(load_base(base_section("assets/base")), LORA, seed=0)
    publish_policy(project / "runs/one/sft", model, tiny_format, base="assets/base")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert torch.equal(logits(load_policy(project / "runs/one/sft").model), logits(model))
    (project / "assets" / "base").rename(project / "assets" / "moved")
    with pytest.raises(ArtifactError, match=r"no folder 'assets/base' \(searched in .*elsewhere and in the folders"):
        load_policy(project / "runs/one/sft")


def test_an_adapter_is_refused_on_another_base(base_folder: Path, tmp_path: Path, tiny_format: ChatFormat):
    model = attach_adapter(load_base(base_section(base_folder)), LORA, seed=0)
    publish_policy(tmp_path / "runs/one/sft", model, tiny_format, base=str(base_folder))
    tiny_llama(seed=1, dtype=torch.bfloat16).save_pretrained(base_folder)
    with pytest.raises(ArtifactError, match="has other weights than those that the adapter was trained on"):
        load_policy(tmp_path / "runs/one/sft")
    smaller = tiny_llama(hidden_size=32)
    with pytest.raises(ArtifactError, match="the adapter does not fit the base"):
        load_adapter(smaller, tmp_path / "runs/one/sft/artifact", is_trainable=False)


def test_a_manifest_that_does_not_say_how_to_load_is_refused(
    base_folder: Path, tmp_path: Path, tiny_format: ChatFormat
):
    publish_policy(tmp_path / "runs/one/sft", tiny_llama(), tiny_format, base=str(base_folder))
    manifest = tmp_path / "runs/one/sft/artifact/manifest.json"
    content = json.loads(manifest.read_text())
    whole = content["details"]
    for details, words in (
        ({"method": "full"}, "lacks base, chat_format, max_tokens"),
        (whole | {"method": "merged"}, "the method 'merged'"),
    ):
        manifest.write_text(json.dumps(content | {"details": details}))
        with pytest.raises(ArtifactError, match=words):
            load_policy(tmp_path / "runs/one/sft")


def test_linear_scaling_reads_every_second_position_and_doubles_the_context(base_folder: Path):
    scaled = load_base(base_section(base_folder, max_tokens=256, rope_scaling=RopeScaling(type="linear", factor=2.0)))
    plain = load_base(base_section(base_folder))
    assert (context_length(plain.config), context_length(scaled.config)) == (128, 256)
    positions = torch.arange(IDS.shape[1]).unsqueeze(0)
    mask = torch.ones_like(IDS)  # without it, transformers takes a gap in the positions for a packed neighbour
    with torch.no_grad():
        stretched = scaled(input_ids=IDS, position_ids=2 * positions, attention_mask=mask).logits
        torch.testing.assert_close(stretched, plain(input_ids=IDS, position_ids=positions, attention_mask=mask).logits)


@pytest.mark.parametrize("factor", [1e8, 1e308])
def test_a_context_that_no_table_holds_is_refused(factor: float, base_folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"positions .*base.rope_scaling.factor"):
        load_base(base_section(base_folder, rope_scaling=RopeScaling(type="linear", factor=factor)))
    folder = shutil.copytree(base_folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    for positions in (2_000_000_000, 10**30, 0):
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
        with pytest.raises(ConfigError, match="max_position_embeddings"):
            load_base(base_section(folder, max_tokens=64))


def test_a_scaled_adapter_is_loaded_with_its_scaling(base_folder: Path, tmp_path: Path, tiny_format: ChatFormat):
    section = base_section(base_folder, max_tokens=256, rope_scaling=RopeScaling(type="dynamic", factor=2.0))
    model = attach_adapter(load_base(section), LORA, seed=0)
    publish_policy(tmp_path / "runs/one/sft", model, tiny_format, base=str(base_folder), max_tokens=256)
    assert context_length(load_policy(tmp_path / "runs/one/sft").model.config) == 256


def test_a_base_that_cannot_be_loaded_is_refused(tmp_path: Path, base_folder: Path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    good = base_section(base_folder)
    for base, words in (
        (base_section(tmp_path / "absent"), r"no folder '.*absent'"),
        (base_section(tmp_path), r"no readable config\.json.*hf auth login"),
        (base_section(tmp_path / "gpt2"), r"architecture 'gpt2'.*Bases that work: Llama-2 7B"),
        (base_section(base_folder, attention="flash_attention_2"), "flash_attention_2"),
        (base_section(base_folder, max_tokens=129), r"max_tokens: 129 tokens, but the model has 128 positions"),
        (good.model_copy(update={"dtype": "int3"}), "dtype: 'int3' is not one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_base(base)
    with pytest.raises(ConfigError, match=r"tuning\.targets: lm_head\."):
        attach_adapter(load_base(good), Tuning(method="lora", targets=("q_proj", "lm_head")), seed=0)


def test_a_checkpoint_with_lacking_or_pickled_weights_is_refused(base_folder: Path):
    weights = load_file(base_folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights .*lm_head\.weight"):
        load_base(base_section(base_folder))
    (base_folder / "model.safetensors").unlink()
    torch.save(weights, base_folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"Weights must be \*\.safetensors"):
        load_base(base_section(base_folder))
    with pytest.raises(ArtifactError, match=r"model\.safetensors: does not exist"):
        trunk_digest(base_folder)


def test_a_name_is_a_folder_before_it_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name", where="base.model") == "owner/name"
    (tmp_path / "owner").mkdir()
    with pytest.raises(ConfigError, match="no folder 'owner/name'"):
        find_model("owner/name", where="base.model")
    (tmp_path / "owner" / "name").mkdir()
    assert find_model("owner/name", where="base.model") == "owner/name"


@pytest.mark.parametrize("name", ["nan", "1e-5", "cuda:99", "meta", "", "cpu:x"])
def test_a_device_that_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="--device") as caught:
        device_of(name)
    assert f"'{name}'" in str(caught.value)
