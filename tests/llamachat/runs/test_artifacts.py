"""What a step publishes: whole or absent, explained by its manifest, and distinguished by kind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llamachat.errors import ArtifactError
from llamachat.runs.artifacts import (
    Artifact,
    Kind,
    Manifest,
    StepFolder,
    check_content,
    is_published,
    publish,
    read_artifact,
)
from tests.killing import killed_at

ROOT = Path(__file__).resolve().parents[3]


def manifest(kind: Kind = "policy", step: str = "sft") -> Manifest:
    return Manifest(
        kind=kind,
        step=step,
        fingerprint="f" * 64,
        identity={"step": step, "sft": {"learning_rate": 0.001}},
        inputs={"base": "assets/base"},
        seed=7,
        dropped_records={"too long": 3},
        details={"method": "lora"},
    )


def write_weights(side: Path) -> None:
    (side / "adapter").mkdir()
    (side / "model.safetensors").write_bytes(b"weights")
    (side / "adapter" / "config.json").write_text("{}")


def make(path: Path, kind: Kind = "policy", step: str = "sft", content: str = "weights") -> Artifact:
    name = "dialogs.jsonl" if kind == "dialogs" else "model.safetensors"
    return publish(StepFolder(path), manifest(kind, step), lambda side: (side / name).write_text(content))


def test_the_manifest_explains_the_artifact_alone(tmp_path: Path) -> None:
    publish(StepFolder(tmp_path / "sft"), manifest(), write_weights)
    written = json.loads((tmp_path / "sft" / "artifact" / "manifest.json").read_text())
    expected = manifest().model_dump(mode="json", exclude_unset=True)
    assert {"kind", "step", "seed", "inputs", "dropped_records", "details", "identity"} <= set(expected)
    assert {key: written[key] for key in expected} == expected
    # `printf weights | sha256sum`, `printf {} | sha256sum`
    assert written["files"] == {
        "model.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
        "adapter/config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert written["sizes"] == {"model.safetensors": 7, "adapter/config.json": 2}
    assert written["created"].endswith("+00:00")


def test_versions_are_read_without_importing_the_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.llamachat.runs.test_artifacts import make\n"
        "versions = make(Path(sys.argv[1])).manifest.versions\n"
        "heavy = {'torch', 'transformers', 'trl', 'wandb', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import importlib.util, re\n"
        "path = Path(importlib.util.find_spec('torch').origin).with_name('version.py')\n"
        "assert re.search(r\"__version__ = '([^']+)'\", path.read_text())[1] == versions['torch'], versions\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sft"), str(ROOT)], check=True)


def test_the_commit_is_that_of_the_clone_or_null_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ROOT / ".git" / "HEAD"
    if head.is_file():
        commit = make(tmp_path / "a").manifest.git_commit
        assert commit is not None
        assert len(commit) == 40
    monkeypatch.setenv("PATH", "")  # no git program
    assert make(tmp_path / "b").manifest.git_commit is None


def test_at_every_file_operation_a_kill_leaves_all_of_it_or_none(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "sft")
    outcomes: set[bool] = set()
    operation, was_killed = 0, True
    while not folder.artifact.exists():
        was_killed = killed_at(operation, lambda: publish(folder, manifest(), write_weights))
        outcomes.add(is_published(folder))
        operation += 1
    assert outcomes == {False, True}
    assert operation > 10
    assert was_killed, "the last kill fell between the rename and the flush of the folder"
    assert read_artifact(folder.path).manifest.sizes == {"model.safetensors": 7, "adapter/config.json": 2}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "state.pt", "data.pkl"])
def test_files_that_run_code_are_refused_on_both_sides(tmp_path: Path, name: str) -> None:
    folder = StepFolder(tmp_path / "sft")
    with pytest.raises(ArtifactError, match=rf"{name} may run code.*safetensors only"):
        publish(folder, manifest(), lambda side: (side / name).write_text("x"))
    assert not folder.artifact.exists()
    make(folder.path)
    (folder.artifact / name).write_text("slipped in")
    with pytest.raises(ArtifactError, match=rf"{name} may run code"):
        read_artifact(folder.path)


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path / "rs-1", "dialogs", "rs-1")
    with pytest.raises(ArtifactError, match=r"'rs-1' is a 'dialogs', but ppo needs a 'policy'\."):
        read_artifact(tmp_path / "rs-1", "policy", reader="ppo")
    make(tmp_path / "sft")
    with pytest.raises(ArtifactError, match=r"'sft' is a 'policy', but eval needs a 'reward_model'.*make rm"):
        read_artifact(tmp_path / "sft" / "artifact", "reward_model", reader="eval")


def test_missing_short_and_unreadable_parts_are_refused(tmp_path: Path) -> None:
    for name, break_it, words in (
        ("a", lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        ("b", lambda path: (path / "model.safetensors").write_text("wei"), "has 3 bytes of 7"),
        ("c", lambda path: (path / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        ("d", lambda path: (path / "manifest.json").write_text("{}"), "manifest.json: cannot be read"),
        ("e", lambda path: (path / "manifest.json").write_text(manifest().model_dump_json()), "lists no files"),
    ):
        make(tmp_path / name)
        break_it(tmp_path / name / "artifact")
        with pytest.raises(ArtifactError, match=words):
            read_artifact(tmp_path / name)


def test_bytes_that_are_not_those_published_are_refused_where_content_is_read(tmp_path: Path) -> None:
    artifact, dialogs = make(tmp_path / "sft"), make(tmp_path / "rs-1", "dialogs", "rs-1")
    check_content(artifact)
    (artifact.path / "model.safetensors").write_text("weightz")
    (dialogs.path / "dialogs.jsonl").write_text("edited by hand")
    with pytest.raises(ArtifactError, match=r"sft/artifact: model\.safetensors has changed since it was published"):
        check_content(read_artifact(artifact.path))
    check_content(dialogs)


def test_a_run_folder_stands_for_its_last_policy(tmp_path: Path) -> None:
    make(tmp_path / "sft")
    make(tmp_path / "rm" / "safety", "reward_model", "rm/safety")
    make(tmp_path / "rs-1", "dialogs", "rs-1")
    last = make(tmp_path / "rs-1", "policy", "rs-1")
    assert read_artifact(tmp_path) == last
    assert read_artifact(tmp_path, "reward_model").manifest.step == "rm/safety"
    assert read_artifact(tmp_path / "rs-1").manifest.kind == "policy"
    assert read_artifact(tmp_path / "rs-1", "dialogs").path == tmp_path / "rs-1" / "dialogs"
    (last.path / "model.safetensors").unlink()
    assert read_artifact(tmp_path).manifest.step == "sft"


def test_what_is_not_there_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere: no such folder.*`make sft` makes a 'policy'"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"no published 'reward_model' here.*`make rm`"):
        read_artifact(tmp_path, "reward_model")
    step = tmp_path / "rm" / "safety"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text("")
    (step / "identity.json").write_text('{"step": "rm/safety", "fingerprint": "0", "identity": {}}')
    with pytest.raises(
        ArtifactError, match=r"'rm/safety' is not finished.*`llamachat rm/safety --config .*config.yaml`"
    ):
        read_artifact(step)


def test_the_digest_tells_content_not_time_and_follows_an_edit_of_dialogs(tmp_path: Path) -> None:
    one, two, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", content="other")
    assert one.manifest.created != two.manifest.created or one.path != two.path
    assert one.digest == two.digest != other.digest
    make(tmp_path / "rs-1", "dialogs", "rs-1", content="one winner\n")
    before = read_artifact(tmp_path / "rs-1").digest
    (tmp_path / "rs-1" / "dialogs" / "dialogs.jsonl").write_text("another winner, edited by hand\n")
    assert read_artifact(tmp_path / "rs-1").digest != before
