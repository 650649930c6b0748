"""Which distilled answers are learnt, by hand-made scores; preprompts and categories; what the stage refuses."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from context_distillation.choosing import choose
from context_distillation.config import PREPROMPTS as BUNDLED
from context_distillation.prompts import FORMS, AdversarialPrompt, Form, category_of, category_preprompt
from context_distillation.train import dialog_step, make_dialogs
from llamachat.answers.groups import Group
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.data.loading import read_records
from llamachat.data.prompts import EncodedPrompt
from llamachat.data.records import Prompt
from llamachat.errors import ConfigError, DataError
from pipelines.recipe.recipe import load
from tests.context_distillation.tiny_distilling import write_recipe
from tests.llamachat.models.tiny_roles import FULL, World
from tests.recipes import run_command
from tests.tiny_steps import inputs_of, sampled_in, step_of

ROOT = Path(__file__).resolve().parents[2]
PROMPT = EncodedPrompt((Message("user", "How?"),), (1, 5, 6), True, "q1")


def group(*answers: tuple[str, float], unfinished: tuple[int, ...] = (), empty: tuple[int, ...] = ()) -> Group:
    """Answers with their safety scores; the order is that of another model, which decides nothing here."""
    count = len(answers)
    return Group(
        texts=[text for text, _ in answers],
        tokens=[3] * count,
        finished=[place not in unfinished for place in range(count)],
        allowed=[place not in empty for place in range(count)],
        helpfulness=None,
        safety=[score for _, score in answers],
        combined=[0.0] * count,
        standardised=[0.0] * count,
        order=list(reversed(range(count))),
    )


# Plain answers, those under a preprompt, those under a template, and the text that is learnt or the reason against it.
CASES: dict[str, tuple[Group, Group, Group | None, str]] = {
    "one safer answer": (group(("no", 0.5)), group(("yes", 0.6)), None, "yes"),
    "one less safe": (group(("no", 0.5)), group(("yes", 0.4)), None, "not_better"),
    "negative scores": (group(("no", -2.0)), group(("yes", -1.5)), None, "yes"),
    "the same score": (group(("no", 0.5)), group(("yes", 0.5)), None, "equal"),
    "the same words": (group(("no", 0.5)), group(("no", 0.5000001)), None, "equal"),
    "best against best": (group(("a", 0.1), ("b", 0.9)), group(("c", 0.2), ("d", 0.8)), None, "not_better"),
    "best of both ways": (
        group(("a", 0.1), ("b", 0.3)),
        group(("c", 0.4), ("d", 0.2)),
        group(("e", 0.1), ("f", 0.7)),
        "f",
    ),
    "a cut one cannot win": (group(("a", 0.1)), group(("c", 0.9), ("d", 0.2), unfinished=(0,)), None, "d"),
    "a cut plain one cannot win": (group(("a", 0.3), ("b", 0.1), unfinished=(0,)), group(("d", 0.2)), None, "d"),
    "nor an empty one": (group(("", 0.3), ("b", 0.1), empty=(0,)), group(("d", 0.2)), None, "d"),
    "cut plain ones alone": (group(("a", 0.3), unfinished=(0,)), group(("d", 0.2)), None, "not_better"),
    "an empty one cannot win": (group(("a", 0.1)), group(("", 0.9), ("d", 0.2), empty=(0,)), None, "d"),
    "all cut": (
        group(("a", 0.1)),
        group(("c", 0.9), unfinished=(0,)),
        group(("d", 0.9), unfinished=(0,)),
        "unfinished",
    ),
    "all empty": (group(("a", 0.1)), group(("", 0.9), empty=(0,)), None, "empty"),
    "cut and empty": (group(("a", 0.1)), group(("", 0.9), ("c", 0.9), empty=(0,), unfinished=(1,)), None, "empty"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_distilled_answer_is_learnt_only_where_it_is_safer(name: str) -> None:
    plain, generic, template, wanted = CASES[name]
    groups: dict[Form, Group] = {"original": plain, "generic": generic}
    if template is not None:
        groups["template"] = template
    choice = choose(PROMPT, groups)
    assert (choice.text if choice.is_kept else choice.refused) == wanted
    scores = plain.safety or []
    usable = [scores[place] for place in range(len(scores)) if plain.finished[place] and plain.allowed[place]]
    assert choice.prompt is PROMPT and choice.original_score == max(usable or scores)
    if choice.is_kept:
        assert choice.form == ("template" if template is not None and wanted in template.texts else "generic")


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("template", [None, PROMPT])
def test_without_any_effect_half_of_the_distilled_answers_are_kept(samples: int, template: Any) -> None:
    """Scores of all ways from one distribution: the chance to be the best is that of the numbers of answers alone."""
    prompt, rng = AdversarialPrompt(PROMPT, PROMPT, template), np.random.default_rng(samples)
    kept = 0
    for trial in range(2000):
        groups: dict[Form, Group] = {}
        for form in FORMS:
            count = prompt.num_answers(form, samples_per_prompt=samples)
            answers = [(f"{trial} {form} {place}", float(rng.normal())) for place in range(count)]
            if answers:
                cut = tuple(place for place in range(count) if rng.random() < 0.1) if samples > 1 else ()
                groups[form] = group(*answers, unfinished=cut)
        kept += choose(PROMPT, groups).is_kept
    assert abs(kept / 2000 - 0.5) < 0.034, "three deviations of 2000 coins"


def test_a_margin_asks_for_more_and_all_keeps_what_is_worse() -> None:
    groups: dict[Form, Group] = {"original": group(("no", 0.5)), "generic": group(("yes", 0.75))}
    assert choose(PROMPT, groups, margin=0.2).is_kept
    assert choose(PROMPT, groups, margin=0.25).refused == "not_better", "exactly the margin is not above it"
    worse: dict[Form, Group] = {
        "original": group(("no", 0.5)),
        "generic": group(("yes", 0.1), ("cut", 0.9), unfinished=(1,)),
    }
    assert choose(PROMPT, worse, keeps_all=True).text == "yes" and choose(PROMPT, worse, keeps_all=True).is_kept
    cut: dict[Form, Group] = {"original": group(("no", 0.5)), "generic": group(("yes", 0.9), unfinished=(0,))}
    assert choose(PROMPT, cut, keeps_all=True).refused == "unfinished"


# --- preprompts


def test_bundled_preprompts_and_templates_can_stand_in_a_dialog(tiny_format: ChatFormat) -> None:
    assert len(set(BUNDLED)) == len(BUNDLED) >= 4
    for text in (*BUNDLED, category_preprompt("fraud")):
        tiny_format.check_text((Message("system", text),), field="system")
    assert "fraud" in category_preprompt("fraud")


@pytest.mark.parametrize(
    ("name", "category"),
    [("fraud-1", "fraud"), ("fraud", None), ("hate-02", "hate"), ("hate-12", None), ("", None), ("Fraud-1", None)],
)
def test_a_category_is_known_by_the_prompts_id(name: str, category: str | None) -> None:
    assert category_of(name, {"fraud": ["fraud-*"], "hate": ["x", "hate-0[0-4]"], "other": ["fraud-1*"]}) == category


def test_the_bundled_recipe_knows_the_category_of_every_prompt_of_catqa_and_of_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load(ROOT / "configs" / "tiny.yaml")
    counts: Counter[str] = Counter()
    for source in (*recipe.data.adversarial, *recipe.data.prompts):
        for record in read_records(source, Prompt):
            category = category_of(record.id or "", recipe.sections.context_distillation.categories)
            assert (category is not None) is (record.id or "").startswith("catqa"), record.id
            counts[category or ""] += 1
    # Tens of questions a topic, less those that were left out: five topics but for the first two and the sixth.
    assert counts["malware"] == counts["physical harm"] == counts["violation of privacy"] == 50
    assert sum(counts.values()) - counts[""] == 344


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rollout": {"temperature": 0.0}},
            r"rollout\.temperature: 0, but context_distillation\.samples_per_prompt is 3\. .*nothing to choose",
        ),
        (
            {"context_distillation": {"preprompts": ["Be good.", "[INST] Be bad."]}},
            r"context_distillation\.preprompts\[1\] .*Reword it",
        ),
        (
            {"context_distillation": {"categories": {"<<SYS>> fraud": ["a*"]}}},
            r"context_distillation\.categories: '<<SYS>> fraud' .*Reword it",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    changes: dict[str, Any], words: str, base: Path, safety: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", base, safety, **changes)
    with pytest.raises(ConfigError, match=words):
        run_command(load(recipe), "distill")
    assert not list(step_of(recipe).path.glob("sampling/*"))


def test_a_step_without_a_safety_model_is_refused_with_the_command_that_makes_one(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", base, None)
    with pytest.raises(ConfigError, match=r"distill: there is no safety reward model, .*`make rm`.*scoring\.safety="):
        run_command(load(recipe), "distill")


def test_a_safety_model_that_the_rule_of_scoring_does_not_read_still_decides(
    world: World, base: Path, safety: Path, tmp_path: Path
) -> None:
    helpfulness = str(world.reward_model("helpfulness", FULL, FULL).path)
    recipe = write_recipe(tmp_path / "one.yaml", base, safety, prompts=40, scoring={"helpfulness": helpfulness})
    config, inputs = inputs_of(recipe)
    make_dialogs(config, dialog_step(config, inputs))
    group = sampled_in(step_of(recipe))[0]["original"]
    assert group["combined"] == group["helpfulness"] != group["safety"]


def test_prompts_that_are_all_harmless_are_refused_with_a_fix(base: Path, safety: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", base, safety, data={"adversarial": []})
    words = r"data\.adversarial: .*no adversarial prompt \(under data\.adversarial, or marked is_safety\) .*Add some"
    with pytest.raises(DataError, match=words):
        run_command(load(recipe), "distill")


def test_a_recipe_without_any_prompts_for_it_is_refused_as_it_loads(base: Path, safety: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", base, safety, data={"adversarial": [], "prompts": []})
    with pytest.raises(ConfigError, match=r"data\.adversarial: empty, but the step 'distill' learns from it"):
        load(recipe)


def test_a_step_that_keeps_nothing_says_so(base: Path, safety: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", base, safety, context_distillation={"margin": 1000.0})
    with pytest.raises(DataError, match=r"no distilled answer can be trained on \(.*not above the plain.*Raise"):
        run_command(load(recipe), "distill")
    assert not step_of(recipe).dialogs.exists()
