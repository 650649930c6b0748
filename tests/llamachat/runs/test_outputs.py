"""No command writes over what it reads, nor over a file that exists, unless that is asked for."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamachat.errors import UsageError
from llamachat.runs.outputs import check_output, written_beside
from pipelines.cli.main import main

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}\n'
LINKS: dict[str, Callable[[Path, Path], object]] = {
    "the file itself": lambda link, file: None,
    "another spelling": lambda link, file: None,
    "a symbolic link": lambda link, file: link.symlink_to(file),
    "a link to a link": lambda link, file: ((link.parent / "first").symlink_to(file), link.symlink_to("first")),
    "a hard link": lambda link, file: link.hardlink_to(file),
}
# Each command that writes a file, with the options after which the output and the inputs are named.
COMMANDS = {
    "tokens": ["tokens", "--tokenizer", "assets/base", "--in", "IN", "--out", "OUT", "--overwrite"],
    "convert": ["data", "convert", "IN", "OUT", "--overwrite"],
    "sample": ["sample", "--policy", "POLICY", "--in", "IN", "--out", "OUT", "--overwrite"],
    "score": ["score", "MODEL", "IN", "--out", "OUT", "--overwrite"],
    "pairs": ["pairs", "--policy", "POLICY", "--in", "IN", "--out", "OUT", "--overwrite"],
    "pairs, key": ["pairs", "--policy", "POLICY", "--in", "IN", "--out", "new.jsonl", "--key", "OUT", "--overwrite"],
    "init": ["init", "--base", "assets/base", "--sft", "IN", "--out", "OUT", "--overwrite"],
}


@pytest.mark.parametrize("way", LINKS)
def test_an_input_is_never_replaced(way: str, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(GOOD)
    LINKS[way](out, file)
    if not out.exists():
        out = file if way == "the file itself" else tmp_path / "folder" / ".." / "in.jsonl"
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is an input of this command"):
            check_output(out, [tmp_path / "other", file], overwrite=overwrite)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", ["the file itself", "a symbolic link", "a hard link"])
def test_no_command_replaces_what_it_reads(
    command: str, way: str, tmp_path: Path, artifacts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = "yaml" if command == "init" else "jsonl"
    file, out = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    file.write_text(GOOD)
    LINKS[way](out, file)
    words = {"IN": str(file), "OUT": str(out if out.exists() else file), **artifacts}
    assert main([words.get(word, word) for word in COMMANDS[command]]) == 2
    assert "is an input of this command" in capsys.readouterr().err
    assert file.read_text() == GOOD and not list(tmp_path.glob(".incoming*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_replaces_a_file_unasked(
    command: str, tmp_path: Path, artifacts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / f"out.{'yaml' if command == 'init' else 'jsonl'}"
    file.write_text(GOOD)
    out.write_text("mine")
    words = {"IN": str(file), "OUT": str(out), **artifacts}
    assert main([words.get(word, word) for word in COMMANDS[command] if word != "--overwrite"]) == 2
    assert "already exists" in capsys.readouterr().err and out.read_text() == "mine"


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A policy and a reward model that cannot be loaded: the output is refused before."""

    class Named:
        path = tmp_path / "policy"

    monkeypatch.setattr("llamachat.runs.artifacts.read_artifact", lambda *args, **kwargs: Named)
    return {"POLICY": str(Named.path), "MODEL": str(tmp_path / "model")}


def test_what_is_no_place_for_a_file(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("weights")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    cases = {
        tmp_path: "is a folder",
        tmp_path / "pipe": "is not a regular file",
        Path("/dev/null"): "is not a regular file",
        model / "weights": "belongs to the input",
        tmp_path / ("n" * 300): "cannot be written .*too long",
    }
    for out, reason in cases.items():
        with pytest.raises(UsageError, match=reason):
            check_output(out, [model], overwrite=True)
    with pytest.raises(UsageError, match="already exists"):
        check_output(tmp_path / "dangling", [])
    check_output(model / "new", [model])


def test_a_folder_is_replaced_only_where_the_command_wrote_it(tmp_path: Path) -> None:
    for name in ("mine", "earlier", "empty"):
        (tmp_path / name).mkdir()
    for name in ("mine/thesis.tex", "earlier/note.json", "earlier/base/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    check_output(tmp_path / "empty", [], marker="note.json")
    check_output(tmp_path / "earlier", [], marker="note.json", overwrite=True)
    for name, inputs, reason in (
        ("mine", [], "was not written by"),
        ("earlier", [tmp_path / "earlier"], "is an input of this command"),
        ("earlier", [tmp_path / "earlier" / "base"], "would be deleted"),
    ):
        with pytest.raises(UsageError, match=reason):
            check_output(tmp_path / name, inputs, marker="note.json", overwrite=True)
    with pytest.raises(UsageError, match="already exists"):
        check_output(tmp_path / "earlier", [], marker="note.json")


@pytest.mark.parametrize(
    "out", [".", "./", "", "..", "/", "a/..", "../a/..", "HERE", "ABOVE", "LINK", "../../earlier/."]
)
def test_a_folder_without_a_name_of_its_own_is_never_replaced(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "earlier" / "here"
    (here / "a").mkdir(parents=True)
    for folder in (here.parent, here):
        (folder / "note.json").write_text("")
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    place = Path({"HERE": str(here), "ABOVE": str(here.parent), "LINK": "../../link"}.get(out, out))
    with pytest.raises(UsageError, match="is the working directory, a folder above it or without a name"):
        check_output(place, [], marker="note.json", overwrite=True)
    (here / "note.json").unlink()
    (here / "a").rmdir()  # an empty one is replaced no more than one with an export in it
    with pytest.raises(UsageError):
        check_output(place, [], marker="note.json")


def test_a_mounted_disk_is_no_folder_to_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(UsageError, match="a disk is mounted there"):
        check_output(tmp_path / "disk", [], marker="note.json", overwrite=True)
    check_output(tmp_path / "disk" / "new", [], marker="note.json")


def test_a_file_is_written_through_its_link_under_the_longest_name(tmp_path: Path) -> None:
    target, link = tmp_path / ("\u00e9" * 127), tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with written_beside(link) as stream:
        stream.write(b"new")
    assert link.is_symlink() and target.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_a_killed_command_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    code = (
        "import os, signal, pathlib\nfrom llamachat.runs.outputs import written_beside\n"
        f"with written_beside(pathlib.Path({str(out)!r})) as stream:\n"
        "    stream.write(b'half')\n    stream.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert out.read_text() == "old"
    assert all(re.match(r"out|\.incoming-\d+-out", path.name) for path in tmp_path.iterdir())
