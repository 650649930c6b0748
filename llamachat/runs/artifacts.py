"""The folder of a step (`<run.dir>/<step>/...`, whose file names other tools rely on) and the artifact that it
publishes.

An artifact is a folder with weights or dialogs, and a `manifest.json` that describes it completely. It is written to a
side folder and finally renamed: a reader sees all of it or nothing. Weights are safetensors; formats that may run code
when they are opened (pickles) are refused for reading and writing. The digest of dialogs is computed from the current
files, since a user may read and edit them; the digest of weights comes from the manifest.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from pydantic import Field, ValidationError

from llamachat import distributed
from llamachat.config.section import Section
from llamachat.errors import ArtifactError, first_line
from llamachat.runs.atomic import flush, incoming_folder, storage_errors, write_json
from llamachat.runs.fingerprints import digest_of_file, fingerprint
from llamachat.runs.hub_commits import commits_in


class _In:
    """The place of a file or folder within a step's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "StepFolder", _: object = None) -> Path:
        return folder.path / self.name


@dataclass(frozen=True, slots=True)
class StepFolder:
    """The folder of one step. Nothing here touches the disk."""

    path: Path
    config = _In("config.yaml")  # the resolved recipe, written before anything is loaded
    # Fingerprint and identity of the work begun here, so that a change can be reported key by key.
    identity = _In("identity.json")
    metrics = _In("metrics.jsonl")  # every metric, one JSON object per line
    samples = _In("samples.jsonl")  # prompts and answers during training, one JSON object per line
    summary = _In("summary.json")  # the final figures, flat
    cost = _In("cost.json")  # seconds, peak memory and starts of the work on the step, over all commands
    curves = _In("curves.png")  # the curves of `metrics.jsonl` as a picture
    # The plots of the final figures (for a reward model: calibration, scores, accuracy by rating).
    figures = _In("figures")
    checkpoints = _In("checkpoints")
    artifact = _In("artifact")  # what the step publishes: complete or absent
    dialogs = _In("dialogs")  # the dialogs that rs, gatt and distill publish before they are trained on
    sampling = _In("sampling")  # what rs, gatt and distill have sampled so far, so that nothing is sampled twice
    # A policy tuned on the step's dialogs, until it has been compared with the one before and becomes `artifact`.
    tuned = _In("tuned")
    page = _In("report.html")  # the report on the run as one HTML file
    page_markdown = _In("report.md")  # the same as Markdown, next to its plots
    lock = _In("lock")  # locked by the process that runs the step; the file itself stays
    benchmark = _In("benchmark")  # the answers and figures of `llamachat benchmark` for the step's policy
    tensorboard = _In("tensorboard")
    wandb = _In("wandb.json")  # the ids of the step's wandb runs, so that a resumed step continues them

    def names(self) -> set[str]:
        """The file and folder names above: what a step's folder may contain before the step begins."""
        return {place.name for place in vars(StepFolder).values() if isinstance(place, _In)}


Kind = Literal["policy", "reward_model", "dialogs", "evaluation", "report"]
MANIFEST = "manifest.json"
# Files of an artifact of dialogs: the training dialogs, and the validation dialogs if there are any.
DIALOGS = "dialogs.jsonl"
HELD_OUT_DIALOGS = "held_out.jsonl"
# Files of an artifact of an evaluation: its figures, and a folder with each policy's answers and their scores.
EVALUATION = "evaluation.json"
ANSWERS = "answers"
ITERATIONS_DONE = "iterations_done"  # in the details of a PPO's manifest

_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
_LIBRARIES = (
    "llamachat",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
)
# Folders in a run that are not steps.
NOT_STEPS = {"checkpoints", "artifact", "dialogs", "tensorboard", "sampling", "tuned", "benchmark"}


class Manifest(Section):
    """What an artifact is, and what it was made from."""

    kind: Kind
    step: str = Field(description="The step that made it: 'sft', 'rm/helpfulness', 'rs-1', ...")
    fingerprint: str = Field(description="SHA-256 of `identity`.")
    identity: dict[str, Any] = Field(description="Identity configuration, digests of inputs, data and trunk.")
    inputs: dict[str, str] = Field(default_factory=dict, description="What was read: role -> path or name.")
    seed: int
    dropped_records: dict[str, int] = Field(default_factory=dict, description="Reason -> records left out of training.")
    details: dict[str, Any] = Field(default_factory=dict, description="What loads it: method, base, chat format, ...")
    versions: dict[str, str] = Field(default_factory=dict, description="Library -> version.")
    code: dict[str, str] = Field(
        default_factory=dict, description="File of this code -> digests of it as the step began; see runs/code.py."
    )
    revisions: dict[str, str] = Field(
        default_factory=dict, description="Model or data set of the hub -> commit that was read."
    )
    git_commit: str | None = Field(default=None, description="Commit of this code, null outside a git clone.")
    git_is_edited: bool = Field(default=False, description="Whether tracked files differed from that commit.")
    created: str = Field(default="", description="Time of publication, UTC.")
    files: dict[str, str] = Field(default_factory=dict, description="File -> SHA-256 when published.")
    sizes: dict[str, int] = Field(default_factory=dict, description="File -> bytes when published.")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the content: equal for equal files and details, whenever and wherever they were made."""
        files = self.manifest.files
        if self.manifest.kind == "dialogs":
            files = {name: digest_of_file(self.path / name) for name in files}
        return fingerprint({"kind": self.manifest.kind, "files": files, "details": self.manifest.details})


def publish(
    folder: StepFolder, manifest: Manifest, write: Callable[[Path], object], *, ends_step: bool = True
) -> Artifact:
    """Let `write` fill a side folder, add the completed manifest, and rename it into place.

    `manifest` comes without versions, code, commits, time and files. Kind 'dialogs' goes to `dialogs/`, others to
    `artifact/`, or where they do not end the step to `tuned/`, until `end_step`. Of several processes the first one
    writes.
    """
    place = folder.dialogs if manifest.kind == "dialogs" else folder.artifact
    final = place if ends_step else folder.tuned
    if distributed.is_first():
        _fill(final, manifest.model_copy(update={"code": begun_code(folder)}), write)
    distributed.wait()
    return Artifact(final, read_manifest(final))


def _fill(final: Path, manifest: Manifest, write: Callable[[Path], object]) -> None:
    with incoming_folder(final) as side:
        write(side)
        names = sorted(path.relative_to(side).as_posix() for path in side.rglob("*") if path.is_file())
        assert names, f"nothing was written for {final}"
        assert MANIFEST not in names, "the manifest is written here, not by the stage"
        _refuse_pickles(final, names)
        completed = manifest.model_copy(
            update={
                "versions": library_versions(),
                "revisions": commits_in(manifest.identity),
                **_git_state(),
                "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "files": {name: digest_of_file(side / name) for name in names},
                "sizes": {name: (side / name).stat().st_size for name in names},
            }
        )
        write_json(side / MANIFEST, completed.model_dump(mode="json"))


def begun_code(folder: StepFolder) -> dict[str, str]:
    """The digests of the code that a step was begun with; none where they were not recorded."""
    try:
        return dict(json.loads(folder.identity.read_text(encoding="utf-8")).get("code", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def end_step(folder: StepFolder) -> Artifact:
    """Make the policy in `tuned/` the step's artifact."""
    if distributed.is_first():
        with storage_errors(folder.artifact):
            folder.tuned.rename(folder.artifact)
            flush(folder.path)
    distributed.wait()
    return Artifact(folder.artifact, read_manifest(folder.artifact))


def read_artifact(path: Path, kind: Kind | None = None, *, reader: str = "this command") -> Artifact:
    """The artifact at a step folder, its `artifact/` or `dialogs/`, or a run folder (then its last policy).

    `reader` names the caller ('ppo') for the error text.
    """
    where = _find(path, kind)
    manifest = read_manifest(where)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{where}: '{manifest.step}' is a '{manifest.kind}', but {reader} needs a '{kind}'."
            f" Name a step that publishes one{_suggest(kind)}."
        )
    _check_complete(where, manifest)
    return Artifact(where, manifest)


def check_content(artifact: Artifact) -> None:
    """Refuse an artifact whose files changed after publication; reads them completely. A user may edit dialogs."""
    files = {} if artifact.manifest.kind == "dialogs" else artifact.manifest.files
    for name, digest in files.items():
        if digest_of_file(artifact.path / name) != digest:
            raise ArtifactError(
                f"{artifact.path}: {name} has changed since it was published, so the artifact would silently be another model."
                " Copy the folder again, or rerun the step with `--overwrite`."
            )


def is_published(folder: StepFolder) -> bool:
    """Whether the step has its final artifact; dialogs alone are only a part of a step."""
    return (folder.artifact / MANIFEST).is_file()


def published_steps(run_dir: Path) -> list[Artifact]:
    """Every complete artifact of a run, in order of publication; incomplete copies are left out."""
    artifacts = []
    for pattern in ("*/artifact", "*/*/artifact", "*/dialogs", "*/*/dialogs"):
        for place in run_dir.glob(f"{pattern}/{MANIFEST}"):
            parts = place.relative_to(run_dir).parts[:-2]
            if any(part.startswith(".") or part in NOT_STEPS for part in parts):
                continue
            try:
                manifest = read_manifest(place.parent)
                _check_complete(place.parent, manifest)
            except ArtifactError:
                continue
            artifacts.append(Artifact(place.parent, manifest))
    return sorted(artifacts, key=lambda artifact: (artifact.manifest.created, artifact.path.as_posix()))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect the result, read from the installed packages without importing them."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> dict[str, Any]:
    """The commit of this code and whether it was edited; null outside a clone or without git."""
    root = Path(__file__).resolve().parents[2]
    # An installed copy may be inside another repository, whose commit says nothing about this code.
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    is_edited = bool(commit and _git(root, "status", "--porcelain", "--untracked-files=no"))
    return {"git_commit": commit, "git_is_edited": is_edited}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _refuse_pickles(path: Path, names: list[str]) -> None:
    pickled = [name for name in names if Path(name).suffix in _PICKLED]
    if pickled:
        raise ArtifactError(
            f"{path}: {', '.join(pickled)} may run code when it is opened. An artifact contains weights as safetensors"
            " only. Save with safe_serialization."
        )


def _find(path: Path, kind: Kind | None) -> Path:
    within = ("dialogs", "artifact") if kind == "dialogs" else ("artifact", "dialogs")
    for candidate in (path, *(path / name for name in within)):
        if (candidate / MANIFEST).is_file():
            return candidate
    if (path / "identity.json").is_file() or (path / "config.yaml").is_file():
        step = _step_name(path)
        raise ArtifactError(
            f"{path}: '{step}' is not finished, and unfinished steps cannot be read."
            f" Finish it with `llamachat {step} --config {quote(str(path / 'config.yaml'))}`."
        )
    wanted = kind or "policy"
    fitting = [artifact for artifact in published_steps(path) if artifact.manifest.kind == wanted]
    if fitting:
        return fitting[-1].path
    fault = "no such folder" if not path.is_dir() else f"no published '{wanted}' here"
    raise ArtifactError(
        f"{path}: {fault}. An artifact is a step folder, its 'artifact' folder, or a run folder."
        f" Make one{_suggest(wanted)}, or correct the path."
    )


def _step_name(path: Path) -> str:
    try:
        identity: Any = json.loads((path / "identity.json").read_text(encoding="utf-8"))
        return str(identity["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return path.name


def _suggest(kind: Kind) -> str:
    command = {"policy": "sft", "reward_model": "rm", "dialogs": "rs", "evaluation": "eval"}.get(kind, kind)
    return f" (`make {command}` makes a '{kind}')"


def read_manifest(where: Path) -> Manifest:
    """The manifest in an artifact's folder; raises an ArtifactError if it is missing or broken."""
    path = where / MANIFEST
    try:
        with storage_errors(path):
            return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({first_line(error)}). The manifest describes the artifact and what"
            " it was made from. Make the artifact again, or copy the whole folder."
        ) from error


def _check_complete(where: Path, manifest: Manifest) -> None:
    if not manifest.files:
        raise ArtifactError(f"{where}: its manifest lists no files. Make the artifact again, or copy the whole folder.")
    for name, size in manifest.sizes.items():
        path = where / name
        actual_size = path.stat().st_size if path.is_file() else None
        may_differ = manifest.kind == "dialogs" and actual_size is not None
        if actual_size != size and not may_differ:
            fault = "is missing" if actual_size is None else f"has {actual_size} bytes of {size}"
            raise ArtifactError(
                f"{where}: {name} {fault}. An incomplete artifact is refused, since it would silently load as"
                " another model. Copy the whole folder, or rerun the step with `--overwrite`."
            )
    _refuse_pickles(where, [path.name for path in where.iterdir() if path.is_file()])
