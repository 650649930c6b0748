"""Uploads, with the hub's client faked: what goes up, and what each refusal says."""

import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from llamachat.chat_format import ChatFormat
from llamachat.errors import UsageError
from pipelines.cli.main import main
from serving.hub import Destination, HubError
from tests.serving.exporting import full_policy, lora_policy

CARD = "---\nlicense: {licence}\n---\n# A model\n"


class FakeApi:
    """Remembers what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.repositories: dict[str, bool] = {}  # repositories that are there: whether they are private

    def whoami(self) -> dict[str, str]:
        if self.error is not None:
            raise self.error
        return {"name": "me"}

    def repo_info(self, name: str) -> Any:
        if name not in self.repositories:
            raise refusal(404, RepositoryNotFoundError)
        return type("Info", (), {"private": self.repositories[name]})()

    def create_repo(self, name: str, **options: Any) -> None:
        self.calls.append(("create", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", options))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    return fake


def exported(folder: Path, licence: str | None, *others: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(CARD.format(licence=licence))
    for name in ("model.safetensors", "config.json", *others):
        (folder / name).touch()
    return folder


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response = type("Response", (), {"status_code": status, "headers": {}, "request": None})()
    return kind(f"{status} Error", response=response)  # type: ignore[arg-type]  # as much of one as is read


def test_the_command_exports_and_then_uploads_the_exports_files_alone(
    api: FakeApi, tmp_path: Path, tiny_format: ChatFormat, capsys: pytest.CaptureFixture[str]
):
    artifact, out = full_policy(tmp_path, tiny_format), tmp_path / "out"
    (artifact.path.parent / "samples.jsonl").write_text("private")
    assert main(["export", str(artifact.path), "--out", str(out), "--push-to-hub", "me/chat"]) == 0
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/chat\n")
    (_, repository), (_, upload) = api.calls
    assert repository == {"name": "me/chat", "private": True, "exist_ok": True}
    assert (upload["repo_id"], upload["folder_path"]) == ("me/chat", out)
    assert upload["allow_patterns"] == sorted(path.name for path in out.iterdir())
    assert not any("samples" in name or "manifest" in name for name in upload["allow_patterns"])


@pytest.mark.parametrize(
    ("name", "token", "error", "kind", "words"),
    [
        *((name, "x", None, UsageError, "is no name of a") for name in ("chat", "me/my/chat", "me/a chat", "-/x--y")),
        ("me/chat", "x", refusal(401), HubError, r"refuses this machine's token \(HTTP 401\)"),
        ("me/chat", "x", refusal(503), HubError, r"cannot be reached \(503 Error\)"),
        ("me/chat", "x", ConnectionError("no route"), HubError, r"reached \(no route\)\. Nothing was exported"),
        ("me/chat", None, None, UsageError, r"no token is on this machine.*hf auth login"),
    ],
)
def test_without_name_token_access_or_network_nothing_is_begun(
    name: str, token: str | None, error: Any, kind: Any, words: str, api: FakeApi, monkeypatch: pytest.MonkeyPatch
):
    api.error = error
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(kind, match=words):
        Destination.checked(name, is_private=True)


def test_a_failed_upload_names_the_whole_export_and_a_foreign_file_does_not_go_up(api: FakeApi, tmp_path: Path):
    api.error = ConnectionError("reset")
    with pytest.raises(HubError, match=r"failed \(reset\)\. The export in .*out is complete.*me/chat .*out --private`"):
        Destination("me/chat", True).push(exported(tmp_path / "out", "other"))
    with pytest.raises(HubError, match=r"samples\.jsonl: no export writes such a file"):
        Destination("me/chat", True).push(exported(tmp_path / "more", "other", "samples.jsonl"))


def test_what_is_private_does_not_go_into_a_public_repository(api: FakeApi):
    api.repositories = {"me/open": False, "me/closed": True}
    with pytest.raises(UsageError, match=r"me/open: this repository is there, and public.*--no-private"):
        Destination.checked("me/open", is_private=True)
    assert Destination.checked("me/closed", is_private=True).is_private
    assert not Destination.checked("me/open", is_private=False).is_private


def test_a_public_copy_of_a_derived_llama_2_brings_its_licence(
    api: FakeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = exported(tmp_path / "out", "llama2")
    with pytest.raises(UsageError, match=r"has no licence file.*LICENSE\.txt and USE_POLICY\.md"):
        Destination("me/chat", False).push(folder)
    assert not api.calls
    Destination("me/chat", True).push(folder)
    (folder / "LICENSE.txt").touch()
    with caplog.at_level(logging.WARNING):
        Destination("me/chat", False).push(folder)
    assert "becomes public: read in its README.md under what licences" in caplog.text
    assert [options.get("private") for kind, options in api.calls if kind == "create"] == [True, False]


def test_an_adapter_on_a_folder_of_this_machine_is_not_pushed(
    api: FakeApi, tmp_path: Path, tiny_format: ChatFormat, capsys: pytest.CaptureFixture[str]
):
    artifact = lora_policy(tmp_path, tiny_format)
    words = ["export", str(artifact.path), "--out", str(tmp_path / "out"), "--format", "adapter"]
    assert main([*words, "--push-to-hub", "me/chat"]) == 2
    assert "the adapter's base is a local folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not api.calls
