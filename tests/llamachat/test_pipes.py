"""What comes through a pipe is read whole: as much as from a file with the same content."""

import gzip
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from llamachat.data.files import read_rows
from llamachat.errors import UsageError
from llamachat.pipes import regular_file
from pipelines.cli.main import main

# Lines of 128 bytes: more of them than the 64 KiB that a pipe holds, and no line on that border.
ROWS = [
    {"messages": [{"role": "user", "content": f"{index:04d}"}, {"role": "assistant", "content": "Yes."}]}
    for index in range(2000)
]
LINES = b"".join(json.dumps(row).encode().ljust(127) + b"\n" for row in ROWS)


@pytest.fixture
def fed(tmp_path: Path) -> Callable[[bytes], Path]:
    """A FIFO into which something is written once."""

    def make(content: bytes) -> Path:
        path = tmp_path / f"fifo{len(list(tmp_path.iterdir()))}"
        os.mkfifo(path)

        def write() -> None:
            with suppress(BrokenPipeError):  # the reader may give up
                path.write_bytes(content)

        threading.Thread(target=write, daemon=True).start()
        return path

    return make


def parquet(rows: list[dict[str, Any]], path: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


@pytest.mark.parametrize("form", ["lines", "gzip", "parquet"])
def test_every_row_comes_through(form: str, tmp_path: Path, fed: Callable[[bytes], Path]) -> None:
    contents = {"lines": LINES, "gzip": gzip.compress(LINES), "parquet": parquet(ROWS, tmp_path / "a.parquet")}
    assert [row.value for row in read_rows(str(fed(contents[form])))] == ROWS


@pytest.mark.parametrize("form", ["lines", "array"])
def test_commands_read_a_pipe_whole(
    form: str, tmp_path: Path, fed: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    content = LINES if form == "lines" else json.dumps(ROWS).encode()
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(fed(content)), str(out)]) == 0
    assert [json.loads(line) for line in out.read_bytes().splitlines()] == ROWS
    assert (
        main(["tokens", "--tokenizer", "assets/base", "--in", str(fed(LINES)), "--out", f"{tmp_path}/ids.jsonl"]) == 0
    )
    assert len((tmp_path / "ids.jsonl").read_bytes().splitlines()) == len(ROWS)
    capsys.readouterr()
    assert main(["data", "check", str(fed(LINES))]) == 0
    assert "2000 good dialogs, 0 bad lines" in capsys.readouterr().out


def test_an_empty_pipe_is_no_success(fed: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(fed(b""))]) == 2
    assert "is empty" in capsys.readouterr().out


def test_standard_input_is_read_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "data", "check", "/dev/stdin"]
    with Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        said, noise = process.communicate(LINES)
    assert process.returncode == 0 and b"2000 good dialogs" in said, noise


def test_a_recipe_may_come_through_a_pipe(fed: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("configs/tiny.yaml").read_bytes() + b"\n# " + b"x" * (1 << 17) + b"\n"
    assert main(["sft", "--dry-run", "--config", str(fed(recipe))]) == 0
    whole = capsys.readouterr().out
    assert main(["sft", "--dry-run", "--config", "configs/tiny.yaml"]) == 0
    assert whole == capsys.readouterr().out


def test_a_recipe_may_name_a_pipe_of_dialogs(fed: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "configs/smoke.yaml", f"data.sft=[{{path: {fed(LINES)}}}]"]) == 0
    assert "sft" in capsys.readouterr().out


def test_a_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["data", "check", "/dev/zero"], ["plan", "--config", "/dev/zero"]):
        assert main(command) == 2
        assert "/dev/zero: is a device" in capsys.readouterr().err


def test_a_pipe_without_a_writer_is_refused_and_a_slow_writer_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llamachat.pipes._PATIENCE", 0.05)
    os.mkfifo(tmp_path / "a.jsonl")
    for command in (["data", "check"], ["plan", "--config"]):
        assert main([*command, str(tmp_path / "a.jsonl")]) == 2
        assert "to which no program wrote" in capsys.readouterr().err
    os.mkfifo(tmp_path / "b.jsonl")
    slow = Popen(["sh", "-c", f"(sleep 1; printf '{{\"a\":'; sleep 0.2; echo 1}}) > {tmp_path}/b.jsonl"])
    monkeypatch.setattr("llamachat.pipes._PATIENCE", 0.5)  # the writer comes at once, and says nothing for a second
    assert [row.value for row in read_rows(str(tmp_path / "b.jsonl"))] == [{"a": 1}]
    assert slow.wait() == 0


def test_a_pipe_that_cannot_be_copied_is_reported(
    fed: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*streams: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UsageError, match=r"cannot be read to its end \(No space left on device\).*TMPDIR"):
        regular_file(fed(LINES))
