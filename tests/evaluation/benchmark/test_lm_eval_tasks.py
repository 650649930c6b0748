"""The task files for lm-evaluation-harness: a choice is scored by the very ids that training has for such an answer."""

import ast
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from llamachat.chat_format import ChatFormat, TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.models.start_checks import fast_tokenizer

ROOT = Path(__file__).resolve().parents[3]
TASKS = ROOT / "evaluation" / "lm_eval_tasks"
# A row of each task's data set, in its form; choices that begin and end with white space, or hold a line break, among them.
ARC = {"question": "Which of these melts?", "choices": {"text": ["ice", " A rock "], "label": ["A", "B"]}}
DOCS: dict[str, dict[str, Any]] = {
    "arc_challenge": ARC | {"answerKey": "A"},
    "arc_easy": ARC | {"answerKey": "B"},
    "boolq": {"passage": "The moon is round.", "question": "is the moon round", "label": 1},
    "hellaswag": {
        "query": "Cooking: She takes a pan and",
        "choices": ["puts it on the stove.", "sings."],
        "label": "0",
    },
    "mmlu": {"question": " What is 2 + 2? ", "choices": ["1", "2", "3", "4"], "answer": 3},
    "openbookqa": {"question_stem": "The sun is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}}
    | {"answerKey": "A "},
    "piqa": {"goal": "Open a jar", "sol1": "Turn the lid.\nThen lift it.", "sol2": "'Sing' to \"it\"", "label": 0},
    "truthfulqa_mc1": {"question": "Is it so?", "mc1_targets": {"choices": ["Yes, it's so.", "No."], "labels": [1, 0]}},
    "truthfulqa_mc2": {
        "question": "Is it so?",
        "mc1_targets": {"choices": ["Yes", "No"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["Yes.", "It is", "No."], "labels": [1, 1, 0]},
    },
}
CHOICES = {"boolq": ["no", "yes"], "mmlu": ["A", "B", "C", "D"], "arc_easy": ["ice", "A rock"]}


class _Loader(yaml.SafeLoader):
    """YAML whose `!function` stays the name of the function."""


def _name(loader: _Loader, node: Any) -> Any:
    return loader.construct_scalar(node)


_Loader.add_constructor("!function", _name)


def task(name: str) -> dict[str, Any]:
    values = yaml.load((TASKS / name).read_text(encoding="utf-8"), Loader=_Loader)
    return (task(values.pop("include")) if "include" in values else {}) | values


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return load_chat_format("llama2", load_tokenizer(ROOT / "assets" / "base"))


def trained_ids(chat_format: ChatFormat, question: str, answer: str) -> tuple[list[int], list[int]]:
    """What training reads of this dialog, split where the loss begins; without the closing ids, which no choice has."""
    example = chat_format.encode_dialog(
        (Message("user", question), Message("assistant", answer)), train_on=TrainOn.LAST_ANSWER
    )
    ids, first = list(example.input_ids), example.loss_mask.index(True)
    closing = len(chat_format.closing_ids)
    assert tuple(ids[-closing:]) == tuple(chat_format.closing_ids)
    return ids[:first], ids[first:-closing]


def encode_pair(tokenizer: Any, context: str, choice: str) -> tuple[list[int], list[int]]:
    """As lm-evaluation-harness 0.4.13 does it (`TemplateLM._encode_pair`); the context has its BOS."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, choice = context[:-spaces], context[-spaces:] + choice
    whole, before = (tokenizer.encode(text, add_special_tokens=False) for text in (context + choice, context))
    return whole[: len(before)], whole[len(before) :]


def test_there_is_a_row_for_each_task() -> None:
    assert {path.stem for path in TASKS.glob("*.yaml")} == DOCS.keys()
    assert {task(f"{name}.yaml")["task"] for name in DOCS} == {f"llamachat_{name}" for name in DOCS}


@pytest.mark.parametrize("name", DOCS)
def test_the_ids_of_a_choice_are_those_of_training(name: str, chat_format: ChatFormat, tmp_path: Path) -> None:
    values, doc = task(f"{name}.yaml"), DOCS[name]
    text, choices = (
        value if isinstance(value, list) else doc.get(value) or jinja2.Template(value).render(**doc)
        for value in (values["doc_to_text"], values["doc_to_choice"])
    )
    choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
    assert [choice.strip() for choice in choices] == CHOICES.get(name, [choice.strip() for choice in choices])
    tokenizer = fast_tokenizer(chat_format, tmp_path)
    context = tokenizer.apply_chat_template(
        [{"role": "user", "content": str(text)}], tokenize=False, add_generation_prompt=True
    )
    for choice in choices:
        assert encode_pair(tokenizer, str(context), choice) == trained_ids(chat_format, str(text), choice)
        # What the harness's own tasks would score.
        assert (
            encode_pair(tokenizer, str(context), choice.lstrip())[1] != trained_ids(chat_format, str(text), choice)[1]
        )


@pytest.mark.parametrize("name", DOCS)
def test_lm_evaluation_harness_asks_for_these_ids(name: str, chat_format: ChatFormat, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]

    values = load_yaml(TASKS / f"{name}.yaml")
    split = values.get("test_split") or values["validation_split"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(DOCS[name]) + "\n")
    files = {"data_files": {split: str(tmp_path / "rows.jsonl")}}
    here = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, "training_split": None}
    if name == "hellaswag":
        del values["process_docs"]  # the row is as it leaves it
    task = ConfigurableTask(config=values | here | ({} if "test_split" in values else {"test_split": None}))
    tokenizer = fast_tokenizer(chat_format, tmp_path / "tokenizer")

    def template(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    task.build_all_requests(
        limit=1, rank=0, world_size=1, apply_chat_template=True, chat_template=template, tokenizer_name="ours"
    )
    assert len(task.instances) >= 2
    text = task.doc_to_text(task.eval_docs[0])
    for instance in task.instances:
        context, choice = instance.args
        assert encode_pair(tokenizer, context, choice) == trained_ids(chat_format, text, choice)
