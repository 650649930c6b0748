"""The model card: its own lines of code are run, and what it tells is held against what was made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import RopeScaling
from llamachat.models.loading import load_policy
from llamachat.runs.artifacts import read_artifact
from serving.export import Request, export_policy
from tests.exporting import full_policy, lora_policy


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(("form", "scaling"), [("merged", None), ("adapter", None), ("adapter", "linear")])
def test_the_cards_own_lines_load_the_model_and_ask_it(
    form: Any, scaling: Any, tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    changes: dict[str, Any] = {} if scaling is None else {"rope_scaling": RopeScaling(type=scaling, factor=2.0)}
    artifact, out = lora_policy(tmp_path, tiny_format, **changes), tmp_path / "out"
    export_policy(Request(artifact, out, format=form))
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code_of((out / "README.md").read_text()), names)
    assert names["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, who are you?"},
    ]
    policy: Any = load_policy(artifact.path)
    ids = torch.tensor([[1, 5, 9, 200, 33]])
    with torch.no_grad():
        got, due = (model(input_ids=ids).logits for model in (names["model"], policy.model))
    torch.testing.assert_close(got, due, rtol=0, atol=1e-3)


def test_the_card_tells_what_made_the_model_and_not_where_files_lay(tmp_path: Path, tiny_format: ChatFormat):
    artifact = full_policy(tmp_path, tiny_format, system="Say ``` often.")
    step = artifact.path.parent
    (step / "summary.json").write_text(json.dumps({"sft/eval_loss": 1.25, "sft/trained_tokens": 7889.0}))
    sources = "[{path: /home/me/logs.jsonl, weight: 0.5, limit: 200}, {path: data/sft/chat.jsonl.gz}]"
    (step / "config.yaml").write_text(f"data: {{sft: {sources}}}\n")
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["details"]["base"] = "meta-llama/Llama-2-7b-hf"
    manifest["dropped_records"] = {"too long": 3}
    manifest["identity"] = {"command": "sft", "sft": {"epochs": 2}, "tuning": {"method": "full"}}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    export_policy(Request(read_artifact(artifact.path), tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for told in (
        "license: llama2",
        "base_model: meta-llama/Llama-2-7b-hf",
        "| epochs | 2 |",
        "| sft/eval_loss | 1.25 |",
        "| sft/trained_tokens | 7889 |",
        "- `logs.jsonl`, at most 200 of them, weight 0.5",
        "- `data/sft/chat.jsonl.gz`",
        "Records left out: 3 (too long: 3).",
        "````\nSay ``` often.\n````",
        "Llama 2 Community License",
        "log-probabilities differ from those of the trained policy by at most 0.0000 nats",
    ):
        assert told in card
    assert "/home/me" not in card


def test_licence_files_of_the_base_go_with_the_merged_model(tmp_path: Path, tiny_format: ChatFormat):
    artifact = lora_policy(tmp_path, tiny_format)
    (tmp_path / "base" / "LICENSE.txt").write_text("the terms")
    export_policy(Request(artifact, tmp_path / "out"))
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "the terms"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"derives from `{tmp_path / 'base'}`" in card
    assert "Its licence files (LICENSE.txt) are copied here." in card
