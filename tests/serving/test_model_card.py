"""The model card: its code is run, and its statements are compared with the artifacts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import RopeScaling
from llamachat.models.loading import load_policy
from llamachat.runs.artifacts import DIALOGS, Artifact, Manifest, StepFolder, publish, read_artifact
from llamachat.runs.atomic import write_json
from llamachat.runs.fingerprints import digest_of_file
from llamachat.runs.reader import Benchmark, Measure, benchmark_folder
from serving import provenance
from serving.export import Request, export_policy
from serving.model_card import Facts, model_index
from tests.serving.exporting import full_policy, lora_policy
from tests.tiny_llama import publish_policy, tiny_llama

BUNDLED = Path(__file__).resolve().parents[2] / "data"


def change_manifest(artifact: Artifact, **changes: Any) -> Artifact:
    write_json(artifact.path / "manifest.json", {**artifact.manifest.model_dump(mode="json"), **changes})
    return read_artifact(artifact.path)


def card_of(artifact: Artifact, folder: Path) -> str:
    """The card of the exported policy."""
    export_policy(Request(artifact, folder / "out"))
    return (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(("form", "scaling"), [("merged", "linear"), ("adapter", None), ("adapter", "linear")])
def test_the_cards_own_lines_load_the_model_and_ask_it(
    form: Any, scaling: Any, tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    changes: dict[str, Any] = {} if scaling is None else {"rope_scaling": RopeScaling(type=scaling, factor=2.0)}
    artifact, out = lora_policy(tmp_path, tiny_format, **changes), tmp_path / "out"
    export_policy(Request(artifact, out, format=form))
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, who are you?"},
    ]
    policy: Any = load_policy(artifact.path)
    ids = torch.tensor([[1, 5, 9, 200, 33]])
    with torch.no_grad():
        got, due = (model(input_ids=ids).logits for model in (names["model"], policy.model))
    torch.testing.assert_close(got, due, rtol=0, atol=1e-3)


def test_the_card_says_how_the_model_was_trained_and_not_where_files_lay(tmp_path: Path, tiny_format: ChatFormat):
    artifact = full_policy(tmp_path, tiny_format, system="Say ``` often.")
    step = artifact.path.parent
    write_json(step / "summary.json", {"sft/eval_loss": 1.25, "sft/trained_tokens": 7889.0})
    sources = "[{path: /home/me/logs.jsonl, weight: 0.5, limit: 200}, {path: data/sft/chat.jsonl.gz}]"
    (step / "config.yaml").write_text(f"data: {{sft: {sources}}}\n")
    artifact = change_manifest(
        artifact,
        details={**artifact.manifest.details, "base": "meta-llama/Llama-2-7b-hf"},
        dropped_records={"too long": 3},
        identity={"command": "sft", "sft": {"epochs": 2}, "tuning": {"method": "full"}},
    )
    card = card_of(artifact, tmp_path)
    assert card.startswith("---\nlibrary_name: transformers\n")
    for phrase in (
        "license: llama2",
        "base_model: meta-llama/Llama-2-7b-hf",
        "| epochs | 2 |",
        "| sft/eval_loss | 1.25 |",
        "- `logs.jsonl`, at most 200 of them, weight 0.5",
        "- `data/sft/chat.jsonl.gz`",
        "Records left out or shortened, by step:\n\n- `sft`: left out: too long (3)\n",
        "````\nSay ``` often.\n````",
        "log-probabilities differ from those of the trained policy by at most 0.0000 nats",
    ):
        assert phrase in card
    assert "/home/me" not in card


def run_of_two(folder: Path, tiny_format: ChatFormat) -> Artifact:
    """A run: sft on a hub base, then rs, which read a bundled file under another name, a user's, and a set of the hub."""
    first = full_policy(folder, tiny_format)
    details = {**first.manifest.details, "base": "TinyLlama/TinyLlama-1.1B", "base_is_folder": False}
    first = change_manifest(
        first, details=details, inputs={"base": "TinyLlama/TinyLlama-1.1B"}, identity={"command": "sft"}
    )
    step = folder / "runs/one/rs"
    model = tiny_llama(seed=1, max_position_embeddings=256)
    last = publish_policy(step, model, tiny_format, base="runs/one/sft/artifact")
    paths = ["/home/me/oasst.jsonl.gz", "/home/me/xstest.jsonl.gz", "me/chats"]
    digests = [digest_of_file(BUNDLED / "helpfulness" / "oasst.jsonl.gz"), "0" * 64, "me/chats"]
    (step / "config.yaml").write_text(yaml.safe_dump({"data": {"helpfulness": [{"path": path} for path in paths]}}))
    data = {"helpfulness": [{"path": digest} for digest in digests], "split": {"test": 0.2}}
    return change_manifest(
        last,
        # Where it lay when it was written, relative to the working directory then.
        inputs={"policy": "runs/one/sft/artifact", "reward_model/safety": "runs/one/rm/safety/artifact"},
        identity={"command": "rs", "data": data, "inputs": {"policy": first.digest}},
    )


def write_evaluation(folder: Path, inputs: dict[str, str]) -> None:
    place = folder / "runs/one/eval/artifact"
    side = {"value": 0.25, "low": 0.2, "high": 0.31, "n": 200}
    judge = {"value": -0.5, "low": None, "high": None, "n": 9}
    figures = {"violation": side, "judge": judge, "difference/judge": side, "win_rate/judge": side}
    plain = {"reference": "sft", "policies": ["sft", "rs"], "figures": {"rs": figures, "sft": {}}}
    write_json(place / "evaluation.json", plain)
    manifest = Manifest(kind="evaluation", step="eval", fingerprint="0" * 64, identity={"inputs": inputs}, seed=0)
    write_json(place / "manifest.json", manifest.model_dump(mode="json"))


def test_the_card_shows_benchmarks_of_these_very_weights(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = full_policy(tmp_path, tiny_format)
    result = Benchmark(title="A set", figures={"refused": Measure(0.25, 0.2, 0.3, 98)}, notes=["3 are left out"])
    write_json(benchmark_folder(artifact) / "set.json", result.model_dump(mode="json"))
    card = card_of(artifact, tmp_path)
    assert "| A set | refused | 25.0% | 20.0% to 30.0% (of 98) |\n\n- A set: 3 are left out\n" in card
    other = change_manifest(artifact, details={**artifact.manifest.details, "system": "Be brief."})
    (tmp_path / "other").mkdir()
    assert "## Benchmarks" not in card_of(other, tmp_path / "other")


def test_the_hub_reads_the_front_matter(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = run_of_two(tmp_path, tiny_format)
    write_evaluation(tmp_path, {"policy/rs": artifact.digest})
    card = ModelCard(card_of(artifact, tmp_path))
    values = card.data
    assert isinstance(values, ModelCardData)
    assert (values.license, values.base_model) == ("apache-2.0", "TinyLlama/TinyLlama-1.1B")
    assert (values.library_name, values.pipeline_tag) == ("transformers", "text-generation")
    assert values.tags == ["llama", "llamachat"]
    assert values.datasets == ["OpenAssistant/oasst1", "me/chats"]
    assert values.language is None, "nobody knows the language of a user's data"
    assert values.eval_results is not None and values.model_name == "one/rs"
    assert [(one.metric_type, one.metric_name, one.metric_value) for one in values.eval_results] == [
        ("violation", "violation (95% interval 0.2 to 0.31)", 0.25),
        ("judge", "judge", -0.5),
        ("win_rate_judge", "win_rate/judge (95% interval 0.2 to 0.31)", 0.25),
    ]
    # The hub's own way of writing these results gives what stands in the card.
    written_index = yaml.safe_load(str(card).split("---\n")[1])["model-index"]
    assert eval_results_to_model_index("one/rs", values.eval_results) == written_index
    for text in (
        "with the reward models safety; seed 0\n",
        "- `oasst.jsonl.gz` (oasst-en-100: Apache-2.0)\n- `xstest.jsonl.gz`\n- `me/chats`\n",
        "| difference/judge | 0.25 | 0.2 to 0.31 (of 200) |",
        "- 25.0% (95% interval 20% to 31%) of its answers to prompts that ask for harm are violations",
    ):
        assert text in card.text
    assert "/home/me" not in str(card)


def test_an_evaluation_of_other_weights_is_not_this_policys(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = run_of_two(tmp_path, tiny_format)
    write_evaluation(tmp_path, {"policy/rs": "0" * 64, "reward_model/safety": artifact.digest})
    note = {"format": "merged"}
    assert Facts(artifact, "one/rs", tmp_path, note).evaluated == {}
    summary = {"rs/test/final/judge": -0.25, "rs/prompts": 400.0, "rs/test/difference/judge": 0.1}
    write_json(artifact.path.parent / "summary.json", summary)
    (index,) = model_index(Facts(artifact, "one/rs", tmp_path, note), "text-generation")
    assert index["results"][0]["metrics"] == [{"type": "judge", "value": -0.25, "name": "rs/test/final/judge"}]
    (artifact.path.parent / "summary.json").write_text("{")  # torn: no figures, and an export all the same
    assert model_index(Facts(artifact, "one/rs", tmp_path, note), "text-generation") == []


def test_the_chain_ends_where_a_policy_is_gone_or_another(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = run_of_two(tmp_path, tiny_format)
    assert [step.manifest.step for step in provenance.chain(artifact)] == ["sft", "rs"]
    other = {"command": "rs", "inputs": {"policy": "0" * 64}}
    alone = Facts(change_manifest(artifact, identity=other), "one/rs", tmp_path, {})
    assert [step.manifest.step for step in alone.steps] == ["rs"] and not alone.is_whole
    assert provenance.hub_name(alone.steps) is None, "a folder of the run is no name of the hub"


def test_records_left_out_and_shortened_are_listed_by_step(tmp_path: Path, tiny_format: ChatFormat) -> None:
    last = run_of_two(tmp_path, tiny_format)
    assert provenance.dropped_lines(provenance.chain(last)) == []
    first = read_artifact(tmp_path / "runs/one/sft", "policy")
    change_manifest(first, dropped_records={"shortened: to fit 9 tokens": 4, "left out: too long": 2})
    dialogs = Manifest(
        kind="dialogs", step="rs", fingerprint="0" * 64, identity={}, seed=0,
        dropped_records={"answers left out: empty": 1, "shortened: to fit 9 tokens": 3},
    )  # fmt: skip
    publish(StepFolder(last.path.parent), dialogs, lambda side: (side / DIALOGS).write_text(""))
    last = change_manifest(last, dropped_records={"row without a kind": 1})
    assert provenance.dropped_lines(provenance.chain(last)) == [
        "`sft`: shortened: to fit 9 tokens (4); left out: too long (2)",
        "`rs`: left out: row without a kind (1); answers left out: empty (1); shortened: to fit 9 tokens (3)",
    ]


def test_the_card_says_that_the_base_is_tiny(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = full_policy(tmp_path, tiny_format)
    (artifact.path.parent / "config.yaml").write_text("data: {sft: [{path: data/sft/role_play.jsonl.gz}]}\n")
    identity = {"data": {"sft": [{"path": digest_of_file(BUNDLED / "sft" / "role_play.jsonl.gz")}]}}
    card: Any = ModelCard(card_of(change_manifest(artifact, identity=identity), tmp_path))
    assert (card.data.license, card.data.license_name) == ("other", "licences-of-the-training-data")
    assert card.data.language == ["en"]
    assert "base_model" not in card.data.to_dict()
    assert "- `data/sft/role_play.jsonl.gz` (gpteacher: MIT)" in card.text
    assert "- system text: none added (`base.system` is null); dialogs and their sources may bring" in card.text
    assert "of 5 million parameters: it writes plausible English" in card.text


def test_a_step_that_hours_ended_says_how_far_it_came(tmp_path: Path, tiny_format: ChatFormat) -> None:
    artifact = full_policy(tmp_path, tiny_format)
    details = {**artifact.manifest.details, "end": "hours", "ended_by": "max_hours", "iterations_done": 5}
    identity = {"command": "ppo", "ppo": {"iterations": 23, "epochs": 1}}
    card = card_of(change_manifest(artifact, details=details, identity=identity), tmp_path)
    assert "| iterations | 5 of 23, ended by max_hours |\n| epochs | 1 |" in card
    assert "; seed 0; 5 of 23 iterations, ended by max_hours\n" in card


def test_every_bundled_file_has_origins_with_licences() -> None:
    files = sorted(BUNDLED.glob("*/*.jsonl.gz"))
    assert len(files) > 20
    for path in files:
        origins = provenance.origins_of(path, digest_of_file(path))
        assert origins, path
        assert all(licence and "(" not in licence for _, licence in origins)
