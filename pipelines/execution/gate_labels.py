"""Whether the gate of a recipe can work: the safety model that the recipe trains must learn from safety labels.

Without labels `llama2_gate` is refused (`llamachat.scoring.models`), but only once that model is there: what is told
here is told before the hours that making it takes. Files on this machine are looked into, up to their first labels.
"""

from itertools import islice
from pathlib import Path

from llamachat.config.sections import DataSource
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.records import Preference
from llamachat.errors import DataError
from pipelines.recipe.recipe import Recipe, Step
from pipelines.recipe.stages import Role
from reward.config import Config as RewardConfig

SAFETY = Role("reward_model", "safety")
MOST_ROWS = 5000  # looked into of each file: about a second


def lacks_labels(recipe: Recipe, step: Step) -> str | None:
    """What to say where this step's gate will be refused, since the safety model before it learns no labels."""
    maker = gate_model(recipe, step)
    if maker is None:
        return None
    assert isinstance(maker.config, RewardConfig)
    gate = f"scoring.combine: llama2_gate will be refused in '{step.name}': the safety model of '{maker.name}'"
    other = "or combine without a gate: scoring.combine=weighted or single."
    if maker.config.safety_auxiliary_weight == 0:
        return (
            f"{gate} learns from no safety labels, since reward.safety_auxiliary_weight is 0, and its score then says which"
            f" answer is safer, not whether one is safe. Raise the weight, {other}"
        )
    data = recipe.data
    if data.labels or not all(map(_is_unlabelled, (*data.safety, *data.helpfulness, *data.open))):
        return None
    return (
        f"{gate} finds no safety labels in its data (data.labels is empty, and so are chosen_is_safe and rejected_is_safe in"
        f" the first {MOST_ROWS} rows of each set of pairs), and its score then says which answer is safer, not whether one"
        f" is safe. Add labels, {other}"
    )


def gate_model(recipe: Recipe, step: Step) -> Step | None:
    """The step that trains the safety model which this step's gate reads; None where there is no gate or no such step."""
    if "scoring" not in step.stage.shared or recipe.scoring.combine != "llama2_gate" or recipe.scoring.safety:
        return None
    makers = recipe.makers(step).get(SAFETY)
    return makers[0] if makers else None


def _is_unlabelled(source: DataSource) -> bool:
    """Whether pairs were found in a file that is here, and no label; a set that is not here may have some."""
    if not Path(source.path).is_file():
        return False
    has_pairs = False
    rows = islice(read_rows(source.path), min(MOST_ROWS, source.limit or MOST_ROWS))
    try:
        for row in parse_rows(rows, path=source.path, kind="preference", format=source.format, columns=source.columns):
            if isinstance(row.record, Preference):
                has_pairs = True
                if (row.record.chosen_is_safe, row.record.rejected_is_safe) != (None, None):
                    return False
    except DataError:
        return False  # told where it is read
    return has_pairs
