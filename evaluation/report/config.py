"""Configuration of `report`: its own section of the recipe, and the finished steps that it describes."""

from pydantic import Field

from llamachat.config.section import Section

# Part of the fingerprint: raised when the same steps would give a page with other content.
VERSION = 3


class Config(Section):
    """How much of a run the report shows."""

    samples: int = Field(
        default=12, ge=0, description="Number of prompts whose answers are shown side by side; 0: none. Ours."
    )
    shows_curves: bool = Field(default=True, description="Whether the page shows the training curves of every step.")
    control: str | None = Field(
        default=None,
        description="A run with random rejection sampling (rejection_sampling.select=random), or the folder of a study's variant with such runs, to show next to this run; null: none. Ours.",
    )
