"""What is told of several steps together, once they are done: the tables of a run's reward models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamachat.runs.artifacts import is_published
from llamachat.runs.atomic import write_text
from llamachat.runs.reader import read_summary
from pipelines.recipe.recipe import Recipe, Step


def write_reports(recipe: Recipe, chosen: Sequence[Step]) -> str:
    """Write `<run.dir>/rm/tables.md` where reward models are among the chosen steps, and return its text.

    It shows every finished model beside which the chosen ones stand, those of `--only` and the others.
    """
    texts = []
    for folder in dict.fromkeys(_folder(step) for step in chosen if step.product.makes.kind == "reward_model"):
        from reward.presentation import markdown

        places = {step.product.makes.which: recipe.folder(step) for step in recipe.steps if _folder(step) == folder}
        summaries: dict[Any, dict[str, float]] = {
            which: read_summary(place) for which, place in places.items() if is_published(place)
        }
        texts.append(markdown(summaries))
        write_text(Path(recipe.run.dir) / folder / "tables.md", texts[-1])
    return "\n".join(texts)


def _folder(step: Step) -> str:
    return step.name.rpartition("/")[0]
