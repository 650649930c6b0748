"""Whether a step is new, to be resumed, or done; its cost; reuse by reference; and the index of a run.

A step is bound to its fingerprint from the moment it begins: with another one it is refused, never overwritten. The
`lineage.json` of a run is an index for people and pages: it is rebuilt from the manifests, and no stage reads it.

`cost.json` records seconds, peak memory and starts over all the commands that worked on a step. It is written when the
work begins, every ten seconds and when it ends, so a killed command loses at most ten seconds; it is not part of the
artifact. A process's peak of resident memory never falls, so it is reset through /proc/self/clear_refs when a step
begins. Where that is impossible (not Linux, or not permitted), the peak of a later step of a command is at least that
of the earlier steps.
"""

import json
import logging
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import Any

from llamachat.distributed import imported_torch
from llamachat.errors import ArtifactError, ChangedError, UsageError, first_line
from llamachat.runs.artifacts import StepFolder, is_published, published_steps, read_artifact
from llamachat.runs.atomic import (
    INCOMING,
    StorageError,
    flush,
    incoming_file,
    make_folder,
    remove_dead_side_files,
    remove_tree,
    storage_errors,
    write_json,
    write_text,
)
from llamachat.runs.checkpoints import Checkpoint, newest, pass_over_damaged
from llamachat.runs.fingerprints import changed_keys, changed_values, is_digest
from llamachat.runs.locks import hold, is_held_by_us
from llamachat.runs.record import MetricsRecord

log = logging.getLogger(__name__)

FAILED = "failed_functions"  # in a step's binding: versions of its reward function that failed


class StepState(Enum):
    """What there is to do in a step folder."""

    NEW = "new"
    RESUME = "resume"
    DONE = "done"


def step_state(folder: StepFolder, fingerprint: str, identity: Mapping[str, Any]) -> StepState:
    """The state of the step if its folder belongs to `fingerprint` or to nothing; raises ChangedError if it is other
    work.

    Only reads, and needs no lock: a finished step never changes.
    """
    if folder.path.is_symlink() and not is_published(folder):
        raise ArtifactError(
            f"{folder.path}: this is a reference to {folder.path.parent / folder.path.readlink()}, which does not exist or is not finished. The run reuses that step"
            " instead of running its own. Finish or restore it, or add `--overwrite` to run the step here (only the"
            " reference is removed)."
        )
    if is_published(folder):
        manifest = read_artifact(folder.artifact).manifest
        if manifest.fingerprint != fingerprint:
            raise ChangedError(_changed_text(folder, "is finished and", manifest.identity, identity))
        return StepState.DONE
    begun = _read_identity(folder)
    if begun is None:
        _refuse_foreign_files(folder)
        return StepState.NEW
    if begun.get("fingerprint") != fingerprint and not _is_corrected(begun, identity):
        raise ChangedError(_changed_text(folder, "is half done and", begun.get("identity") or {}, identity))
    return StepState.RESUME


def begin(
    folder: StepFolder,
    step: str,
    *,
    fingerprint: str,
    identity: Mapping[str, Any],
    resolved: str,
    keeps_sampling: bool = False,
    code: Mapping[str, str] | None = None,
) -> None:
    """Bind a NEW or RESUME folder to its work and write the resolved recipe, before anything is loaded.

    `keeps_sampling` as in `renew`; `code` are the digests of the code that begins it (`llamachat.runs.code`).
    """
    assert is_held_by_us(folder), "the step's lock is held"
    begun = _read_identity(folder)
    if begun is None:
        _refuse_foreign_files(folder)
        _clear(folder, keeps_sampling=keeps_sampling)  # checkpoints of unknown origin are never resumed
    if begun is not None and begun["fingerprint"] != fingerprint:
        log.info(
            "%s: resuming with the corrected reward function; answers scored by the earlier version keep their scores",
            step,
        )
    failed = {} if begun is None or FAILED not in begun else {FAILED: begun[FAILED]}
    write_text(folder.config, resolved)
    # A step that resumes keeps the record of the code that began it, which made part of it.
    own_code = dict(code or {}) if begun is None else begun.get("code", {})
    bound = {"step": step, "fingerprint": fingerprint, "identity": dict(identity), "code": own_code, **failed}
    write_json(folder.identity, bound)


def find_state(folder: StepFolder) -> str:
    """Where a started step resumes, as text; damaged checkpoints are reported and skipped."""
    assert is_held_by_us(folder), "the step's lock is held"
    damaged = pass_over_damaged(folder.checkpoints)
    for path, fault in damaged.items():
        log.warning("warning: %s: skipped: the checkpoint is damaged: %s", path, fault)
    checkpoint = newest(folder.checkpoints)
    if checkpoint is not None:
        _restore_record(folder, checkpoint)
        return f"step {checkpoint.step}"
    if any(folder.sampling.glob("*.json")):
        return "the answers sampled so far"
    return f"its start: {'no checkpoint is complete' if damaged else 'it stopped before its first checkpoint'}"


def _restore_record(folder: StepFolder, checkpoint: Checkpoint) -> None:
    """Restore the metrics up to the checkpoint if those of the step's folder are damaged."""
    kept = checkpoint.path / folder.metrics.name
    if kept.is_file() and MetricsRecord(folder.metrics).is_damaged() and not MetricsRecord(kept).is_damaged():
        log.warning(
            "warning: %s: lines are lost; those up to step %d were restored from the checkpoint",
            folder.metrics,
            checkpoint.step,
        )
        with incoming_file(folder.metrics) as side:
            shutil.copyfile(kept, side)


def unbind(folder: StepFolder) -> None:
    """Make a begun folder NEW again if no optimizer step was saved in it: its work was refused, and may change.

    A folder whose reward function has failed stays bound: a correction is recognised, and what was sampled is kept for
    it.
    """
    assert is_held_by_us(folder), "the step's lock is held"
    is_saved = newest(folder.checkpoints) is not None or is_published(folder) or folder.dialogs.exists()
    if not is_saved and FAILED not in (_read_identity(folder) or {}):
        _clear(folder)


def may_correct_function(folder: StepFolder) -> None:
    """Let the step resume with another version of its reward function, since this one has failed."""
    assert is_held_by_us(folder), "the step's lock is held"
    begun = _read_identity(folder)
    assert begun is not None, "the step has begun"
    function = begun["identity"]["scoring"]["combine"]
    write_json(folder.identity, begun | {FAILED: [*dict.fromkeys([*begun.get(FAILED, []), function])]})


def with_failed_functions(folder: StepFolder, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of this folder's step, including the other versions of its reward function that scored a part of it.

    They are part of the identity: the current version alone need not give the same result.
    """
    begun = _read_identity(folder, is_damage_fatal=False) or {}
    others = [function for function in begun.get(FAILED, []) if function != identity["scoring"]["combine"]]
    return {**identity, FAILED: others} if others else dict(identity)


def _is_corrected(begun: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether the step differs from what was begun only in its reward function, whose earlier version failed."""
    if FAILED not in begun:
        return False
    before, now = ({key: value for key, value in one.items() if key != FAILED} for one in (begun["identity"], identity))
    changed = [key for key, _, _ in changed_values(before, now)]
    return changed == ["scoring.combine"] and is_digest(now["scoring"]["combine"].partition(":")[0])


def overwrite(folder: StepFolder) -> None:
    """Make the folder NEW. Of a reference only the link is removed; the files of the other run are not touched."""
    if folder.path.is_symlink():
        with storage_errors(folder.path):
            folder.path.unlink()
            flush(folder.path.parent)
        return
    if not folder.path.is_dir():
        return
    if _read_identity(folder, is_damage_fatal=False) is None and not is_published(folder):
        _refuse_foreign_files(folder)
    if is_held_by_us(folder):
        _clear(folder)
    else:
        with hold(folder):
            _clear(folder)


def renew(folder: StepFolder) -> None:
    """Make the folder NEW, but keep what was sampled: a step whose file names identify their inputs reuses those that
    are still valid."""
    if folder.path.is_symlink():
        overwrite(folder)
        return
    with hold(folder):
        _clear(folder, keeps_sampling=True)


def reference(folder: StepFolder, parent_folder: StepFolder) -> None:
    """Reuse a finished step of another run: `folder` becomes a relative link to it, which is never written through."""
    assert is_published(parent_folder), f"{parent_folder.path} is not finished"
    target = parent_folder.path.resolve()
    if folder.path.is_symlink() and folder.path.resolve() == target:
        return
    with storage_errors(folder.path):
        make_folder(folder.path.parent)
        link = os.path.relpath(target, folder.path.parent.resolve())
        side = folder.path.with_name(f"{INCOMING}{os.getpid()}-{folder.path.name}")
        side.unlink(missing_ok=True)
        side.symlink_to(link, target_is_directory=True)
        if folder.path.is_dir() and not folder.path.is_symlink():
            with hold(folder):
                # A refused or crashed start leaves only the lock; a step's work is never removed here.
                names = {path.name for path in folder.path.iterdir()}
                assert names <= {folder.lock.name}, f"{folder.path} contains its own work"
                remove_tree(folder.path)
                side.replace(folder.path)
        else:
            side.replace(folder.path)
        flush(folder.path.parent)


def lineage(run_dir: Path) -> dict[str, Any]:
    """Rebuild `<run_dir>/lineage.json` from the manifests, and return its content."""
    steps = []
    for artifact in published_steps(run_dir):
        place, manifest = artifact.path, artifact.manifest
        link = place.parent
        steps.append(
            {
                "step": manifest.step,
                "kind": manifest.kind,
                "path": place.relative_to(run_dir).as_posix(),
                "reference_to": link.readlink().as_posix() if link.is_symlink() else None,
                "fingerprint": manifest.fingerprint,
                "digest": artifact.digest,
                "inputs": manifest.inputs,
                "seed": manifest.seed,
                "git_commit": manifest.git_commit,
                "created": manifest.created,
            }
        )
    index = {"run": run_dir.resolve().name, "steps": steps}
    remove_dead_side_files(run_dir)
    write_json(run_dir / "lineage.json", index)
    return index


def _read_identity(folder: StepFolder, *, is_damage_fatal: bool = True) -> dict[str, Any] | None:
    """The work that the folder is bound to; if its file is lost or damaged, as recorded in the newest checkpoint."""
    begun, fault = _read_binding(folder.identity)
    if begun is not None:
        return begun
    saved = newest(folder.checkpoints)
    begun, _ = _read_binding(saved.path / folder.identity.name) if saved else (None, "")
    if begun is not None:
        return begun
    if fault and is_damage_fatal:
        raise ArtifactError(
            f"{folder.identity}: cannot be read ({fault}). It identifies the state in this folder, which must not"
            " be overwritten unidentified. Copy the file back, or discard the step with `--overwrite`."
        )
    return None


def _read_binding(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The fingerprint and identity in a file, or what is wrong with it; nothing if it does not exist."""
    try:
        with storage_errors(path):
            begun = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except ValueError as error:
        return None, first_line(error)
    is_binding = isinstance(begun, dict) and isinstance(begun.get("fingerprint"), str)
    return (begun, "") if is_binding else (None, "it has no fingerprint")


def _changed_text(folder: StepFolder, condition: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changes = changed_keys(old, new) or ["the version of the stage or of one of its inputs"]
    listed = "".join(f"\n    {change}" for change in changes)
    name = str(new.get("step") or old.get("step") or folder.path.name)
    # As many levels up as the step's name has parts, if it is the name; otherwise one.
    parts = Path(name).parts
    run_dir = folder.path.parents[len(parts) - 1 if folder.path.parts[-len(parts) :] == parts else 0]
    back = "" if condition.startswith("is finished") else ", or restore the old values to resume it"
    return (
        f"{folder.path}: '{name}' {condition} was made with another configuration or other inputs:{listed}\n"
        "A finished or begun step is never overwritten silently, since later steps and figures depend on it."
        f" Start a new run that reuses every unchanged step with `run.dir=NEW {quote(f'run.parent={run_dir}')}`,"
        f" or discard this step with `--overwrite`{back}."
    )


def _clear(folder: StepFolder, *, keeps_sampling: bool = False) -> None:
    """Remove everything but the lock. The identity goes last: the folder stays bound to it while anything old is
    left."""
    with storage_errors(folder.path):
        first = [folder.checkpoints, folder.artifact, folder.tuned, folder.dialogs]
        kept = {*first, folder.lock, folder.identity, *([folder.sampling] if keeps_sampling else [])}
        rest = [path for path in folder.path.iterdir() if path not in kept]
        for path in [*first, *rest, folder.identity]:
            remove_tree(path)
        flush(folder.path)


def _refuse_foreign_files(folder: StepFolder) -> None:
    """Refuse to write to or clear a user's folder in which no step was started."""
    if not folder.path.is_dir():
        return
    with storage_errors(folder.path):
        names = {path.name for path in folder.path.iterdir() if not path.name.startswith(INCOMING)}
    foreign = sorted(names - folder.names())
    if foreign:
        raise UsageError(
            f"{folder.path}: contains {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}, which no step made."
            " A step needs its folder for itself. Choose another folder with run.dir=DIR, or move those files away."
        )


# -- cost


EVERY_S = 10.0

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # see proc(5): the peak of resident memory becomes the current size


@dataclass(frozen=True, slots=True)
class Cost:
    """What the work on one step has cost."""

    seconds: float = 0.0  # of wall time, over all starts
    peak_gib: float = 0.0  # the largest of all starts: of the GPU if there is one, else resident memory
    starts: int = 0  # number of commands that worked on it


def read_cost(folder: StepFolder) -> Cost | None:
    """The cost as last written; None if no command has worked on the step since costs are recorded, or the
    file is damaged."""
    if not folder.cost.is_file():
        return None
    with storage_errors(folder.cost):
        try:
            values = json.loads(folder.cost.read_text(encoding="utf-8"))
            return Cost(float(values["seconds"]), float(values["peak_gib"]), int(values["starts"]))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be read (%s): the step's cost is counted from now on", folder.cost, error)
            return None


@contextmanager
def counted(folder: StepFolder) -> Iterator[None]:
    """Count the block as one more start of the step."""
    before, began = read_cost(folder) or Cost(), time.monotonic()
    reset_peak()
    ended = threading.Event()

    def write() -> None:
        now = Cost(
            seconds=round(before.seconds + time.monotonic() - began, 3),
            peak_gib=round(max(before.peak_gib, peak_memory()), 4),
            starts=before.starts + 1,
        )
        write_json(folder.cost, asdict(now))

    def refresh() -> None:
        while not ended.wait(EVERY_S):
            # The work itself reports a full disk; it needs the space more.
            with suppress(StorageError):
                write()

    write()
    watch = threading.Thread(target=refresh, name="cost", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()
        with suppress(StorageError):
            write()


def reset_peak() -> None:
    """Reset the peak to the current use, as far as the system allows."""
    torch = _torch_on_gpu()
    if torch is not None:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)


def peak_memory() -> float:
    """Peak memory of the process since `reset_peak`, in GiB: of the GPU's allocator if there is a GPU, else resident
    memory."""
    torch = _torch_on_gpu()
    if torch is not None:
        return torch.cuda.max_memory_reserved() / 2**30
    with suppress(OSError, ValueError, IndexError):
        return int(_STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _torch_on_gpu() -> Any:
    """PyTorch if it already uses a GPU; nothing is loaded to find out."""
    torch = imported_torch()
    return torch if torch is not None and torch.cuda.is_initialized() else None
