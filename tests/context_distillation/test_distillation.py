"""Context distillation on toy policies: what is sampled, kept, published, trained on, reported and refused."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from context_distillation.choosing import REASONS
from context_distillation.prompts import FORMS, category_preprompt
from context_distillation.train import dialog_step, make_dialogs
from llamachat.answers import groups as groups_module
from llamachat.answers.scorer import Scorer
from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.models.loading import load_policy
from llamachat.rollout.decoder import LlamaEngine
from llamachat.runs.artifacts import StepFolder, read_artifact
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.tracking.metrics import check_names
from pipelines.planning.plan import make_plan
from pipelines.recipe.recipe import load
from sft.examples import load_examples
from tests.context_distillation.tiny_distilling import PREPROMPTS, prompt, write_recipe
from tests.fakes import reference_dialog
from tests.recipes import run_command
from tests.tiny_steps import inputs_of, read_lines, sampled_in, step_of, summary_of

pytestmark = pytest.mark.usefixtures("no_curves")


class Calls:
    """What the policy was asked and what the reward model was asked of, in a run from outside of the stage."""

    def __init__(self, patch: pytest.MonkeyPatch, chat_format: ChatFormat) -> None:
        self.sampled: list[str] = []  # texts of the prompts, as the policy read them
        self.scored: list[Any] = []  # answers that were scored, with the prompts that they count for
        generate, score = LlamaEngine.generate, Scorer.score

        def generating(engine: Any, prompts: Any, **options: Any) -> Any:
            self.sampled += [chat_format.tokenizer.decode(ids) for ids in prompts]
            return generate(engine, prompts, **options)

        def scoring(scorer: Any, responses: Any, **options: Any) -> Any:
            self.scored += responses
            return score(scorer, responses, **options)

        patch.setattr(LlamaEngine, "generate", generating)
        patch.setattr(Scorer, "score", scoring)


@pytest.fixture(scope="module")
def first(
    base: Path, safety: Path, tiny_format: ChatFormat, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Calls]:
    folder = tmp_path_factory.mktemp("first")
    recipe = write_recipe(folder / "one.yaml", base, safety)
    with (folder / "prompts.jsonl").open("a") as stream:
        for number in range(10):  # marked among other prompts, with a system text of its own
            stream.write(prompt(f"Who are {number:o}?", f"marked-{number}", system="I am the mat"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            groups_module, "ANSWERS_PER_BATCH", 120
        )  # ten prompts, three ways and plainly once more, three answers
        calls = Calls(patch, tiny_format)
        run_command(load(recipe), "distill")
    return recipe, calls


def learnt(step: StepFolder, name: str = "dialogs") -> list[dict[str, Any]]:
    return read_lines(step.dialogs / f"{name}.jsonl")


# --- one step


def test_dialogs_come_only_from_adversarial_prompts_of_the_training_side(first: tuple[Path, Calls]) -> None:
    step = step_of(first[0])
    origins = [dialog["sampled"] for dialog in [*learnt(step), *learnt(step, "held_out")]]
    assert all(origin["is_safety"] and not origin["id"].startswith("good") for origin in origins)
    assert {"cat", "mat", "marked"} == {origin["id"].partition("-")[0] for origin in origins}
    texts = [{d["messages"][-2]["content"] for d in learnt(step, name)} for name in ("dialogs", "held_out")]
    assert not texts[0] & texts[1] and all(texts)
    harmless = [text for text in first[1].sampled if "Is that" in text]
    assert not harmless, "neither asked for dialogs nor tested"


def test_each_prompt_is_sampled_plainly_under_a_preprompt_and_under_its_categorys_template(
    first: tuple[Path, Calls],
) -> None:
    template = category_preprompt("the cat")
    plain, generic, by_category = set(), {}, set()
    for text in first[1].sampled:
        preprompt = next((one for one in PREPROMPTS if one in text), None)
        question = text.rpartition("\n<</SYS>>\n\n")[2] if "<<SYS>>" in text else text
        key = question.replace("[INST]", "").replace("[/INST]", "").strip()
        if preprompt is not None:
            generic[key] = preprompt
        elif template in text:
            by_category.add(key)
        else:
            plain.add(key)
    assert generic and generic.keys() <= plain and by_category < generic.keys()
    counts = [list(generic.values()).count(preprompt) for preprompt in PREPROMPTS]
    assert abs(counts[0] - counts[1]) <= 2, "in turn"
    answered = sampled_in(step_of(first[0]))
    assert sum("template" in groups for groups in answered) == len(by_category) > 5
    own_system = [text for text in first[1].sampled if "I am the mat" in text and PREPROMPTS[0] in text]
    assert own_system and all(f"<<SYS>>\n{PREPROMPTS[0]}\n\nI am the mat\n<</SYS>>" in text for text in own_system)


def test_answers_count_for_the_prompt_without_a_preprompt(first: tuple[Path, Calls], tiny_format: ChatFormat) -> None:
    unwanted = (*PREPROMPTS, category_preprompt("the cat"))
    assert len(first[1].scored) > 300
    for response in first[1].scored:
        text = tiny_format.tokenizer.decode(response.prompt.ids)
        assert not any(preprompt in text for preprompt in unwanted)
        assert list(response.prompt.ids) == tiny_format.encode_prompt(response.prompt.messages)


def test_what_is_kept_is_the_best_answer_where_it_is_safer_than_the_best_plain_one(first: tuple[Path, Calls]) -> None:
    """By a plain loop over what lies in sampling/."""
    step, expected = step_of(first[0]), []
    reasons: dict[str, int] = {}
    groups = sampled_in(step)
    count = int(summary_of(step)["distill/prompts"])
    for place, by_way in enumerate(groups):
        by_plain = by_way["original"]
        plain = max(
            (is_finished and bool(text.strip()) and "INST]" not in text and "SYS>>" not in text, score, text)
            for is_finished, score, text in zip(
                by_plain["finished"], by_plain["safety"], by_plain["texts"], strict=True
            )
        )[1:]
        assert len(by_plain["texts"]) == sum(len(by_way[way]["texts"]) for way in by_way if way != "original")
        best: tuple[float, str, str] | None = None
        is_cut = True
        for way in ("generic", "template"):
            group = by_way.get(way)
            if group is None:
                continue
            for score, text, is_finished in zip(group["safety"], group["texts"], group["finished"], strict=True):
                is_cut &= not is_finished
                is_good = bool(text.strip()) and "INST]" not in text and "SYS>>" not in text
                if is_finished and is_good and (best is None or score > best[0]):
                    best = (score, text, way)
        if best is not None and best[0] > plain[0] and best[1] != plain[1]:
            expected.append((best[1], best[2], round(best[0], 6), round(plain[0], 6)))
        elif place < count:
            equal = best is not None and (best[0] == plain[0] or best[1] == plain[1])
            reason = ("unfinished" if is_cut else "empty") if best is None else "equal" if equal else "not_better"
            reasons[reason] = reasons.get(reason, 0) + 1
    dialogs = [*learnt(step), *learnt(step, "held_out")]
    keys = ("way", "score", "original_score")
    assert [(d["messages"][-1]["content"], *(d["sampled"][key] for key in keys)) for d in dialogs] == expected
    figures = summary_of(step)
    assert {reason: figures[f"distill/refused/{reason}"] for reason in REASONS} == {
        reason: reasons.get(reason, 0) for reason in REASONS
    }
    assert figures["distill/kept"] == len(learnt(step)) == count - sum(reasons.values())
    assert reasons["not_better"] > 5 and {"generic", "template"} == {way for _, way, _, _ in expected}


def test_dialogs_are_stored_without_a_preprompt_and_train_the_answer_alone(
    first: tuple[Path, Calls], tiny_format: ChatFormat, tiny_sentencepiece: bytes
) -> None:
    """Ids and mask by Meta's reference algorithm on SentencePiece alone."""
    step = step_of(first[0])
    dialogs = learnt(step)
    text = (step.dialogs / "dialogs.jsonl").read_text() + (step.dialogs / "held_out.jsonl").read_text()
    assert not any(json.dumps(preprompt)[1:-1] in text for preprompt in (*PREPROMPTS, category_preprompt("the cat")))
    examples = load_examples(
        load(first[0]).data,
        tiny_format,
        system=None,
        train_on=TrainOn.EVERY_ANSWER,
        max_tokens=640,
        num_prompts=0,
        seed=0,
        step_dialogs=step.dialogs,
    )
    assert len(examples.train) == len(dialogs) > 10
    has_earlier = 0
    for example, dialog in zip(examples.train, dialogs, strict=True):
        ids, mask = reference_dialog(tiny_sentencepiece, dialog["messages"])
        first_answer = ids.index(2)  # the end of the first pair: earlier answers are read, not learnt
        if sum(message["role"] == "assistant" for message in dialog["messages"]) > 1:
            has_earlier += 1
            mask[: first_answer + 1] = [0] * (first_answer + 1)
        assert list(example.input_ids) == ids
        assert [int(is_trained) for is_trained in example.loss_mask] == mask
    assert has_earlier > 0


def test_the_manifest_says_what_was_read_and_left_out(first: tuple[Path, Calls], safety: Path) -> None:
    step = step_of(first[0])
    manifest = read_artifact(step.path, "dialogs").manifest
    figures = summary_of(step)
    for reason, words in REASONS.items():
        assert (
            manifest.dropped_records.get(f"distilled answers left out: {words}", 0)
            == figures[f"distill/refused/{reason}"]
        )
    assert manifest.inputs["reward_model/safety"] == str(safety)
    assert manifest.details == {"dialogs": len(learnt(step)), "preprompts": list(PREPROMPTS)}
    policy = read_artifact(step.path, "policy").manifest
    assert policy.inputs["dialogs"] == str(step.dialogs) and policy.fingerprint == manifest.fingerprint
    load_policy(step.artifact)


def test_figures_are_those_of_the_answers(first: tuple[Path, Calls]) -> None:
    step = step_of(first[0])
    figures = summary_of(step)
    check_names(figures)
    training = sampled_in(step)[: int(figures["distill/prompts"])]
    for way in FORMS:
        scores = [score for groups in training if way in groups for score in groups[way]["safety"]]
        assert figures[f"distill/safety/{way}"] == pytest.approx(sum(scores) / len(scores))
    gaps = [fmean(g["generic"]["safety"]) - fmean(g["original"]["safety"]) for g in training]
    assert figures["distill/effect/generic"] == pytest.approx(sum(gaps) / len(gaps))
    assert (
        figures["distill/effect/generic_low"]
        < figures["distill/effect/generic"]
        < figures["distill/effect/generic_high"]
    )
    origins = [dialog["sampled"] for dialog in learnt(step)]
    assert figures["distill/safety/kept"] == pytest.approx(sum(o["score"] for o in origins) / len(origins), abs=1e-5)
    assert figures["distill/safety/kept"] > figures["distill/safety/replaced"]
    assert figures["distill/false_refusal/prompts"] == 9 and figures["distill/test/prompts"] == 8
    assert {f"distill/test/difference/reward_safety{bound}" for bound in ("", "_low", "_high")} <= figures.keys()
    rows = [
        row for row in MetricsRecord(step.metrics).read() if "distill/step" in row and "distill/kept_fraction" in row
    ]
    assert [row["distill/step"] for row in rows] == list(range(1, -(-len(training) // 10) + 1))
    shown = SamplesRecord(step.samples).read()
    assert {"original", "distilled", "safety_original", "safety_distilled", "way"} <= shown[0].keys()
    for name in ("safety_scores", "test_scores"):
        assert (step.figures / f"{name}.png").stat().st_size > 10_000


def test_a_finished_step_is_done_and_its_settings_are_in_its_identity(first: tuple[Path, Calls]) -> None:
    assert [step.verdict for step in make_plan(load(first[0]))] == ["done"]
    changes = ("context_distillation.margin=0.5", "context_distillation.uses_categories=false", "sft.epochs=2")
    for change in changes:
        assert [step.verdict for step in make_plan(load(first[0], [change]))] == ["changed"], change
    assert [step.verdict for step in make_plan(load(first[0], ["tracking.log_every=9"]))] == ["done"]


# --- other settings


def test_a_second_step_continues_the_first_with_draws_of_its_own(base: Path, safety: Path, tmp_path: Path) -> None:
    steps = ["distill", {"distill": {"name": "distill-2", "keep": "all", "uses_categories": False}}]
    sft = {"learning_rate": 1e-5}  # at a rate that learns something, few answers of a policy of this size still end
    recipe = write_recipe(tmp_path / "two.yaml", base, safety, steps=steps, prompts=40, sft=sft)
    run_command(load(recipe), "distill")
    one, two = step_of(recipe), step_of(recipe, "distill-2")
    assert read_artifact(two.path, "policy").manifest.inputs["policy"] == str(one.artifact)
    assert summary_of(two)["distill/kept"] > summary_of(one)["distill/kept"]
    assert summary_of(two)["distill/refused/not_better"] == summary_of(two)["distill/refused/equal"] == 0
    assert not any("template" in groups for groups in sampled_in(two))
    assert "distill/safety/template" in summary_of(one) and "distill/safety/template" not in summary_of(two)
    config, inputs = inputs_of(recipe, "distill-2")
    object.__setattr__(inputs, "policy", None)  # the base again, as in the first step
    object.__setattr__(inputs, "folder", StepFolder(tmp_path / "again"))
    make_dialogs(config, dialog_step(config, inputs))
    again = sampled_in(StepFolder(tmp_path / "again"))[0]["original"]["texts"]
    assert again != sampled_in(one)[0]["original"]["texts"]


def test_prompts_that_a_preprompt_leaves_no_room_for_are_counted(base: Path, safety: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "long.yaml",
        base,
        safety,
        base={"max_tokens": 96},
        context_distillation={"preprompts": ["cat " * 80, "mat"]},
    )
    config, inputs = inputs_of(recipe)
    dropped = make_dialogs(config, dialog_step(config, inputs)).manifest.dropped_records
    assert dropped["prompts left out: longer than 83 tokens with a preprompt"] > 3
    assert dropped["templates left out: prompts longer than 83 tokens with it"] > 3
    answered = sampled_in(step_of(recipe))
    assert answered and not any("template" in groups for groups in answered)


def test_the_policy_becomes_safer(base: Path, safety: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "learning.yaml",
        base,
        safety,
        prompts=300,
        context_distillation={
            "samples_per_prompt": 16,
            "uses_categories": False,
            "test_prompts": 60,
            "sft": {"epochs": 2},
        },
        rollout={"max_new_tokens": 16},
        sft={"learning_rate": 2e-3},
        data={"borderline": []},
    )
    run_command(load(recipe), "distill")
    summary = summary_of(step_of(recipe))
    assert summary["distill/test/difference/reward_safety_low"] > 0.0
    assert summary["distill/safety/kept"] > summary["distill/safety/original"]
    assert (
        "distill/false_refusal/start" not in summary
        and summary["distill/refusal/prompts"] == summary["distill/test/prompts"] > 40
    )
