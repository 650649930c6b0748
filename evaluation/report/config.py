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
    shows_curves: bool = Field(default=True, description="Whether the training curves of every step are on the page.")
    control: str | None = Field(
        default=None,
        description="A run whose rejection sampling drew at random (rejection_sampling.select=random), or a variant's folder of a study with such runs, to be named next to this run's; null for none. Ours.",
    )
