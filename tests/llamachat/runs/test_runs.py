"""Run folders: locks between real processes, fingerprints, and what may be done in a step folder."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamachat.errors import ArtifactError, BusyError, ChangedError, DataError, UsageError
from llamachat.runs import fingerprints, locks
from llamachat.runs.artifacts import Manifest, StepFolder, publish
from llamachat.runs.atomic import INCOMING, StorageError
from llamachat.runs.checkpoints import newest, writing
from llamachat.runs.fingerprints import (
    changed_keys,
    digest_of_file,
    digest_of_folder,
    digest_of_program,
    digest_of_weights,
    fingerprint,
)
from llamachat.runs.locks import hold, is_held_by_us, living_owner
from llamachat.runs.state import (
    StepState,
    begin,
    find_state,
    lineage,
    may_correct_function,
    overwrite,
    reference,
    step_state,
    unbind,
    with_failed_functions,
)
from tests.killing import killed_at_each

ROOT = Path(__file__).resolve().parents[3]
IDENTITY: dict[str, Any] = {"step": "sft", "sft": {"learning_rate": 0.001, "epochs": 2}, "inputs": {"data": "a" * 64}}
CHANGED: dict[str, Any] = {**IDENTITY, "sft": {"learning_rate": 0.002, "epochs": 2}}

HOLDER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.locks import hold
with hold(StepFolder(Path(sys.argv[1]))):
    child = os.fork()
    print(child or "", end="\\n" if child else "", flush=True)
    time.sleep(60)
"""


def start(folder: StepFolder, identity: dict[str, Any] = IDENTITY) -> StepState:
    """What a command does before it trains."""
    state = step_state(folder, fingerprint(identity), identity)
    if state is not StepState.DONE:
        with hold(folder):
            begin(folder, "sft", fingerprint=fingerprint(identity), identity=identity, resolved="sft: {}\n")
    return state


def finish(folder: StepFolder, identity: dict[str, Any] = IDENTITY, content: str = "weights") -> None:
    manifest = Manifest(kind="policy", step="sft", fingerprint=fingerprint(identity), identity=identity, seed=0)
    publish(folder, manifest, lambda side: (side / "model.safetensors").write_text(content))


def test_a_second_command_is_refused_at_once_and_a_killed_owner_frees_the_step(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "sft")
    command = [sys.executable, "-c", HOLDER, str(folder.path), str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        try:
            started = time.monotonic()
            with pytest.raises(BusyError) as refusal, hold(folder):
                pass
            assert time.monotonic() - started < 1.0
            year = time.strftime("%Y")
            assert re.search(
                rf"process {owner.pid} on {re.escape(os.uname().nodename)} since {year}-.*Wait for it to end, stop it"
                rf" \(`kill {owner.pid}`.*run\.dir=NEW",
                str(refusal.value),
            )
            assert (living := living_owner(folder)) is not None and living.pid == owner.pid
            leftover = folder.checkpoints / f"{INCOMING}step-00000001"
            leftover.mkdir(parents=True)
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            os.kill(child, 0)  # its forked child lives on, and does not hold the lock
            assert living_owner(folder) is None
            inode = folder.lock.stat().st_ino
            with hold(folder):
                assert not leftover.exists()
                assert folder.lock.stat().st_ino == inode, "the file stays: others may wait on it"
        finally:
            owner.kill()
            os.kill(child, signal.SIGKILL)


def test_a_step_is_held_once_within_a_process_and_looking_does_not_drop_the_lock(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "rm" / "safety")
    probe = (
        "import fcntl, sys\nwith open(sys.argv[1], 'r+') as f:\n  try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "  except OSError: sys.exit(3)"
    )
    with hold(folder):
        assert (living := living_owner(folder)) is not None and living.pid == os.getpid()
        with pytest.raises(BusyError), hold(folder):
            pass
        assert is_held_by_us(folder)
        assert subprocess.run([sys.executable, "-c", probe, str(folder.lock)], check=False).returncode == 3
    assert not is_held_by_us(folder)
    assert subprocess.run([sys.executable, "-c", probe, str(folder.lock)], check=False).returncode == 0


def scored_by(version: str, **changes: Any) -> dict[str, Any]:
    return {"step": "rs", "scoring": {"combine": version, "shaping": "none"}} | changes


def test_only_a_reward_function_that_has_failed_may_change_in_a_step_that_is_half_done(tmp_path: Path) -> None:
    folder, (first, second, third) = StepFolder(tmp_path / "rs"), (f"{digit * 64}:score" for digit in "abc")
    assert start(folder, scored_by(first)) is StepState.NEW
    (folder.sampling).mkdir()
    (folder.sampling / "batch-00001.json").write_text("1")
    with pytest.raises(ChangedError, match=r"scoring\.combine: \"aaaa"):
        start(folder, with_failed_functions(folder, scored_by(second)))
    with hold(folder):
        may_correct_function(folder)
        unbind(folder)  # what was sampled is kept for the corrected function
    # The same version again is the same work; another one is work of both.
    assert with_failed_functions(folder, scored_by(first)) == scored_by(first)
    corrected = with_failed_functions(folder, scored_by(second))
    assert corrected == scored_by(second, failed_functions=[first])
    for other in (scored_by("single"), scored_by(second) | {"inputs": {"policy": "d" * 64}}):
        with pytest.raises(ChangedError):
            start(folder, with_failed_functions(folder, other))
    assert start(folder, corrected) is StepState.RESUME
    assert (folder.sampling / "batch-00001.json").exists()
    again = with_failed_functions(folder, scored_by(third))
    assert start(folder, again) is StepState.RESUME
    finish(folder, again)
    assert start(folder, with_failed_functions(folder, scored_by(third))) is StepState.DONE
    with pytest.raises(ChangedError):
        start(folder, with_failed_functions(folder, scored_by(second)))
    # A run whose step the third version scored from its beginning does not take this one.
    assert fingerprint(scored_by(third)) != fingerprint(again)


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    words = r"does not support locks \(No locks available\).*local disk with run\.dir"
    with pytest.raises(StorageError, match=words), hold(StepFolder(tmp_path / "sft")):
        pass


def test_a_lock_on_a_folder_that_became_a_reference_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, folder = StepFolder(tmp_path / "old" / "sft"), StepFolder(tmp_path / "new" / "sft")
    finish(parent)
    take = locks._try_lock

    def swap_then_take(descriptor: int, path: Path) -> bool:
        shutil.rmtree(folder.path)
        folder.path.symlink_to(parent.path)
        return take(descriptor, path)

    monkeypatch.setattr(locks, "_try_lock", swap_then_take)
    with pytest.raises(BusyError, match=r"replaced this step by a reference.*same command again"), hold(folder):
        pass
    assert not parent.lock.exists()


@pytest.mark.parametrize(("name", "is_finished"), [("sft", True), ("sft", False), ("rm/safety", False)])
def test_a_change_is_refused_with_old_and_new_value_and_both_ways_out(
    tmp_path: Path, name: str, is_finished: bool
) -> None:
    folder = StepFolder(tmp_path / "tiny" / name)
    old, new = {**IDENTITY, "step": name}, {**CHANGED, "step": name}
    start(folder, old)
    if is_finished:
        finish(folder, old)
    with pytest.raises(ChangedError) as refusal:
        step_state(folder, fingerprint(new), new)
    text = str(refusal.value)
    assert "sft.learning_rate: 0.001 -> 0.002" in text
    assert "epochs" not in text
    assert f"run.dir=NEW run.parent={tmp_path / 'tiny'}`" in text
    assert "--overwrite" in text
    assert ("is finished" in text, "restore the old values" in text) == (is_finished, not is_finished)
    with pytest.raises(ChangedError, match="the version of the stage"):
        step_state(folder, "0" * 64, old)
    assert start(folder, old) is (StepState.DONE if is_finished else StepState.RESUME), "the refusals changed nothing"


def test_overwrite_makes_the_step_new_and_keeps_the_lock_file(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "tiny" / "sft")
    start(folder)
    finish(folder)
    (folder.path / "figures").mkdir()
    (folder.path / "figures" / "a.png").write_text("")
    overwrite(folder)
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    assert start(folder, CHANGED) is StepState.NEW
    assert folder.config.read_text() == "sft: {}\n" and json.loads(folder.identity.read_text())["step"] == "sft"
    with hold(folder):
        overwrite(folder)  # by the holder itself
    assert not folder.identity.exists()
    overwrite(StepFolder(tmp_path / "never" / "made"))


def test_overwrite_killed_at_any_moment_never_lets_new_work_go_on_from_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def place(operation: int) -> StepFolder:
        return StepFolder(tmp_path / str(operation) / "sft")

    def prepare(operation: int) -> None:
        folder = place(operation)
        start(folder)
        finish(folder)
        (folder.checkpoints / "step-00000009").mkdir(parents=True)
        folder.metrics.write_text("{}\n")

    operation = 0
    for operation in killed_at_each(prepare, lambda at: overwrite(place(at))):
        folder = place(operation)
        is_old_work_left = folder.checkpoints.exists() or folder.metrics.exists() or folder.artifact.exists()
        try:
            is_new = step_state(folder, fingerprint(CHANGED), CHANGED) is StepState.NEW
        except ChangedError:
            is_new = False
        assert not (is_new and is_old_work_left)
        overwrite(folder)
        assert start(folder, CHANGED) is StepState.NEW
    assert operation > 10


def test_checkpoints_of_unknown_origin_are_never_continued(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "tiny" / "sft")
    (folder.checkpoints / "step-00000009").mkdir(parents=True)
    assert start(folder) is StepState.NEW
    assert not folder.checkpoints.exists()


def test_a_folder_of_the_users_is_neither_used_nor_cleared(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "sft")
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"contains thesis\.tex, which no step made.*run\.dir=DIR"):
        step_state(folder, fingerprint(IDENTITY), IDENTITY)
    with pytest.raises(UsageError, match="which no step made"):
        overwrite(folder)
    with pytest.raises(UsageError, match="which no step made"), hold(folder):
        begin(folder, "sft", fingerprint="0", identity=IDENTITY, resolved="")
    assert (folder.path / "thesis.tex").read_text() == "years of work"


def test_a_reference_reuses_a_step_and_is_never_written_through(tmp_path: Path) -> None:
    parent, folder = StepFolder(tmp_path / "old" / "rm" / "safety"), StepFolder(tmp_path / "new" / "rm" / "safety")
    start(parent)
    finish(parent)
    before = _content(parent.path)
    with hold(folder):
        pass  # a start that went no further leaves a folder with a lock in it
    reference(folder, parent)
    assert folder.path.readlink() == Path("../../old/rm/safety")
    assert start(folder) is StepState.DONE
    reference(folder, parent)
    grandchild = StepFolder(tmp_path / "newest" / "rm" / "safety")
    reference(grandchild, folder)
    assert grandchild.path.readlink() == Path("../../old/rm/safety"), "straight to the files, not by the run between"
    with pytest.raises(ChangedError):
        start(folder, CHANGED)
    overwrite(folder)
    assert not folder.path.exists()
    assert start(folder, CHANGED) is StepState.NEW
    assert _content(parent.path) == before


def test_a_reference_to_a_missing_or_unfinished_step_is_reported(tmp_path: Path) -> None:
    parent, folder = StepFolder(tmp_path / "old" / "sft"), StepFolder(tmp_path / "new" / "sft")
    finish(parent)
    reference(folder, parent)
    shutil.rmtree(parent.artifact)
    with pytest.raises(
        ArtifactError, match=r"is a reference to .*old/sft, which does not exist or is not finished.*--overwrite"
    ):
        step_state(folder, fingerprint(IDENTITY), IDENTITY)
    shutil.rmtree(parent.path)
    with pytest.raises(ArtifactError, match="does not exist or is not finished"):
        step_state(folder, fingerprint(IDENTITY), IDENTITY)
    overwrite(folder)
    assert step_state(folder, fingerprint(IDENTITY), IDENTITY) is StepState.NEW


def test_lineage_is_rebuilt_from_the_manifests(tmp_path: Path) -> None:
    run = tmp_path / "new"
    finish(StepFolder(tmp_path / "old" / "sft"))
    reference(StepFolder(run / "sft"), StepFolder(tmp_path / "old" / "sft"))
    finish(StepFolder(run / "ppo"), CHANGED)
    (run / f"{INCOMING}999999999-lineage.json").write_text("of a killed command")
    index = lineage(run)
    assert json.loads((run / "lineage.json").read_text()) == index
    assert index["run"] == "new"
    assert [(row["path"], row["reference_to"]) for row in index["steps"]] == [
        ("sft/artifact", "../old/sft"),
        ("ppo/artifact", None),
    ]
    assert not list(run.glob(f"{INCOMING}*"))


def test_the_fingerprint_is_the_digest_of_sorted_json() -> None:
    by_hand = hashlib.sha256(b'{"a":1,"b":{"c":null,"d":[1.5,"x"]}}').hexdigest()
    assert fingerprint({"b": {"d": [1.5, "x"], "c": None}, "a": 1}) == by_hand


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), _JSON, max_size=4), st.randoms())
@example({"": {"0": None}, "0": []}, Random(1))
@example({"a.b": 1, "a": {"b": 2}}, Random(1))
@example({"a[0]": 1, "a": [2]}, Random(1))
def test_the_order_of_keys_changes_nothing(identity: dict[str, Any], draw: Any) -> None:
    items = list(identity.items())
    draw.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(identity)
    assert changed_keys(dict(items), identity) == []


def test_changes_are_reported_key_by_key() -> None:
    old = {"data": {"sft": [{"path": "a.jsonl"}]}, "seed": 0, "system": None, "policy": "a" * 64, "flag": True}
    new = {"data": {"sft": [{"path": "b.jsonl"}, {"path": "c"}]}, "seed": 0, "policy": "b" * 64, "flag": 1}
    assert changed_keys(old, new) == [
        'data.sft[0].path: "a.jsonl" -> "b.jsonl"',
        'data.sft[1].path: absent -> "c"',
        "flag: true -> 1",
        "policy: aaaaaaaaaaaa... -> bbbbbbbbbbbb...",
        "system: null -> absent",
    ]


def test_digests_follow_content_and_names_but_not_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "a.json").write_text("1")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert digest_of_file(tmp_path / "one" / "model.safetensors") == hashlib.sha256(b"weights").hexdigest()
    assert digest_of_folder(tmp_path / "one") == digest_of_folder(tmp_path / "two")
    assert digest_of_weights(tmp_path / "one") == digest_of_weights(tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("a card")
    assert digest_of_weights(tmp_path / "one") == digest_of_weights(tmp_path / "two"), "a card is not weights"
    assert digest_of_folder(tmp_path / "one") != digest_of_folder(tmp_path / "two")
    (tmp_path / "two" / "deep" / "a.json").rename(tmp_path / "two" / "deep" / "b.json")
    assert digest_of_weights(tmp_path / "one") != digest_of_weights(tmp_path / "two")


def test_big_weights_are_digested_by_header_size_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE_UP_TO_BYTES", 1000)
    monkeypatch.setattr(fingerprints, "_CHUNK", 10)
    path = tmp_path / "model.safetensors"
    content = bytearray((20).to_bytes(8, "little") + b'{"t": "header"}     ' + bytes(20_000))
    path.write_bytes(content)
    first = digest_of_weights(tmp_path)
    for place in (15, len(content) - 1):  # in the header; in the last block
        edited = bytearray(content)
        edited[place] ^= 1
        path.write_bytes(edited)
        assert digest_of_weights(tmp_path) != first
    path.write_bytes(content + b"\0")
    assert digest_of_weights(tmp_path) != first
    path.write_bytes(content)
    assert digest_of_weights(tmp_path) == first


def test_what_cannot_be_digested_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no such file.*Correct the path"):
        digest_of_file(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="model: no such folder"):
        digest_of_weights(tmp_path / "model")
    with pytest.raises(DataError, match="contains no files"):
        digest_of_weights(tmp_path)


def _content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("text", ["", "[1", '["list"]', "{}", None])
def test_a_lost_or_damaged_identity_is_read_from_the_newest_checkpoint(tmp_path: Path, text: str | None) -> None:
    folder = StepFolder(tmp_path / "sft")
    start(folder)
    with writing(folder.checkpoints, 5) as side:
        (side / "weights").write_text("five steps")
    if text is None:
        folder.identity.unlink()
    else:
        folder.identity.write_text(text)
    with pytest.raises(ChangedError, match="half done"):
        start(folder, CHANGED)
    assert start(folder) is StepState.RESUME
    assert (checkpoint := newest(folder.checkpoints)) is not None and checkpoint.step == 5
    assert json.loads(folder.identity.read_text())["fingerprint"] == fingerprint(IDENTITY)


def test_a_damaged_identity_without_a_checkpoint_is_named_with_the_fix(tmp_path: Path) -> None:
    folder = StepFolder(tmp_path / "sft")
    start(folder)
    (folder.sampling / "answers.json").parent.mkdir()
    (folder.sampling / "answers.json").write_text("[]")
    folder.identity.write_text('{"fing')
    with pytest.raises(ArtifactError, match=r"sft/identity\.json: cannot be read.*--overwrite"):
        start(folder)
    assert (folder.sampling / "answers.json").is_file()
    overwrite(folder)
    assert start(folder) is StepState.NEW


def test_lost_metrics_come_back_from_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = StepFolder(tmp_path / "sft")
    start(folder)
    folder.metrics.write_text('{"step": 1, "sft/loss": 2.0}\n')
    with writing(folder.checkpoints, 1) as side:
        (side / "weights").write_text("one step")
    for text, expected in ((None, 1), ("\0" * 300, 1), ('{"step": 1, "sft/loss": 2.0}\n{"step": 2}\n', 2)):
        folder.metrics.unlink()
        if text is not None:
            folder.metrics.write_text(text)
        caplog.clear()
        with hold(folder):
            assert find_state(folder) == "step 1"
        assert len(folder.metrics.read_text().splitlines()) == expected
        assert ("those up to step 1 were restored" in caplog.text) == (expected == 1)


def test_the_digest_of_a_program_follows_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    main, words, package = tmp_path / "main.py", tmp_path / "words.py", tmp_path / "lists" / "__init__.py"
    main.write_text("import json, torch\nfrom words import BAD\n")
    assert digest_of_program(main) == digest_of_file(main), "what is installed does not count"
    words.write_text("def f():\n    import lists.more\nBAD = 1")
    package.parent.mkdir()
    package.write_text("from . import more")
    (package.parent / "more.py").write_text("from .. import main\nLIST = []")
    (tmp_path / "other.py").write_text("")
    seen = {digest_of_program(main)}
    for path in (words, package, package.parent / "more.py"):
        path.write_text(path.read_text() + "\n# changed")
        seen.add(digest_of_program(main))
    assert len(seen) == 4
    (tmp_path / "other.py").write_text("changed")
    assert digest_of_program(main) in seen
    words.write_text("def (:")
    assert digest_of_program(main) not in seen
