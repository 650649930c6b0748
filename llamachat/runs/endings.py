"""What ended a step before its recipe did, and how far it had come: hours, patience or the guard of PPO's KL.

Reads the manifest; the passes of `sft` and `rm`, and the iterations of a PPO whose manifest does not say them, come from
the step's record, where that still lies around the artifact.
"""

from dataclasses import dataclass
from pathlib import Path

from llamachat.runs.artifacts import Artifact
from llamachat.runs.folder import StepFolder
from llamachat.tracking.record import MetricsRecord

ITERATIONS_DONE = "iterations_done"  # in the details of a PPO's manifest

# By command: the section of the recipe, its key that says how much was planned, and the figure that says how much is done.
_COUNTED = {
    "ppo": ("ppo", "iterations", "ppo/step"),
    "sft": ("sft", "epochs", "sft/epoch"),
    "rm": ("reward", "epochs", "{step}/epoch"),
}
_GUARDS = ("patience", "kl_guard")


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a step ended early; of steps that sample, no count is known."""

    by: str  # max_hours, run.max_hours, patience, kl_guard
    key: str | None = None  # iterations, epochs
    done: float | None = None
    planned: float | None = None

    @property
    def count(self) -> str:
        """'5 of 23, ended by max_hours'."""
        return self._told("")

    @property
    def in_words(self) -> str:
        """'5 of 23 iterations, ended by max_hours'."""
        return self._told(f" {self.key}")

    def _told(self, unit: str) -> str:
        by = f"ended by {self.by}"
        if self.planned is None:
            return by
        done = "at most" if self.done is None else f"{self.done:.4g} of"
        return f"{done} {self.planned:g}{unit}, {by}"


def ending(artifact: Artifact) -> Ending | None:
    """What ended the step; None where it came to the end that its recipe says."""
    manifest = artifact.manifest
    end = manifest.details.get("end")
    by = manifest.details.get("ended_by") or (end if end in _GUARDS else None)
    if by is None:
        return None
    command = str(manifest.identity.get("command", manifest.step.partition("/")[0]))
    if command not in _COUNTED:
        return Ending(by)
    section, key, figure = _COUNTED[command]
    done = manifest.details.get(ITERATIONS_DONE)
    if done is None:
        done = _last(StepFolder(artifact.path.parent).metrics, figure.format(step=manifest.step))
    return Ending(by, key, done, manifest.identity.get(section, {}).get(key))


def _last(metrics: Path, figure: str) -> float | None:
    return next((row[figure] for row in reversed(MetricsRecord(metrics).read()) if figure in row), None)
