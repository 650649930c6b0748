"""Where the files of one step lie: `<run.dir>/<step>/...`, the names that other tools read."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StepFolder:
    """The folder of one step. Nothing here touches the disk."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe, written before anything is loaded."""
        return self.path / "config.yaml"

    @property
    def identity(self) -> Path:
        """Fingerprint and identity keys of the work that was begun here, so that a change can be told key by key."""
        return self.path / "identity.json"

    @property
    def metrics(self) -> Path:
        """The record of every metric, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Prompts and answers as training went, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        """The final figures, flat."""
        return self.path / "summary.json"

    @property
    def cost(self) -> Path:
        """Seconds, peak memory and starts of the work on the step, over all commands."""
        return self.path / "cost.json"

    @property
    def curves(self) -> Path:
        """The curves of `metrics.jsonl` as a picture."""
        return self.path / "curves.png"

    @property
    def figures(self) -> Path:
        """The pictures of the final figures (of a reward model: calibration, scores, accuracy by rating)."""
        return self.path / "figures"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        """What the step publishes: there whole, or not there."""
        return self.path / "artifact"

    @property
    def dialogs(self) -> Path:
        """The dialogs that rs, gatt and distill publish before they are trained on."""
        return self.path / "dialogs"

    @property
    def sampling(self) -> Path:
        """What rs, gatt and distill have sampled so far, so that nothing is sampled twice."""
        return self.path / "sampling"

    @property
    def tuned(self) -> Path:
        """A policy tuned on the step's dialogs, until it has been compared with the one before and becomes `artifact`."""
        return self.path / "tuned"

    @property
    def page(self) -> Path:
        """The report on the run as one HTML file."""
        return self.path / "report.html"

    @property
    def page_markdown(self) -> Path:
        """The same as Markdown, beside the pictures."""
        return self.path / "report.md"

    @property
    def lock(self) -> Path:
        """Held by the living command that works on the step; the file itself stays for good."""
        return self.path / "lock"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The ids of the step's wandb runs, so that a resumed step continues them."""
        return self.path / "wandb.json"

    def names(self) -> set[str]:
        """The file and folder names above: what a step may leave here before it is bound to its work."""
        return {getattr(self, name).name for name, member in vars(StepFolder).items() if isinstance(member, property)}
