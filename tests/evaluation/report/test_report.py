"""The report's page: what it says equals what the evaluation wrote, and whatever a model said stays text."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evaluation.report.facts import read_facts
from llamachat.runs.artifacts import StepFolder, read_artifact
from tests.evaluation.report.tiny_report import EVALUATED, HOSTILE, STEPS, TinyRun

VOID = {"meta", "link", "img", "br"}
ENDS = {"p", "li", "td", "th", "tr", "table", "figure", "figcaption", "details", "summary", "section", "div", "script"}
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
# Line of the headline table -> metric, in percent or not, and the policies that are the best of it.
LINES: dict[str, tuple[str, bool, set[str]]] = {
    "helpfulness, raw score": ("reward_helpfulness", False, {"ppo"}),
    "safety, raw score": ("reward_safety", False, {"sft"}),
    "judge, raw score": ("judge", False, {"sft"}),
    "combined, in deviations of sft's answers": ("score", False, {"ppo"}),
    "ranks above sft's, share of pairs": ("superiority", True, {"rs"}),
    "wins against sft by the judge, ties removed": ("win_rate/judge", True, {"rs"}),
    "violations, by the safety model": ("violation", True, {"ppo"}),
    "harmful prompts refused, by the outside classifier": ("harmful/refused", True, {"ppo"}),
    "harmless prompts that look harmful answered": ("harmless/complied", True, {"sft"}),
    "instruction of turn 1 kept at turn 4": ("consistency/turn_4", True, {"ppo"}),
    "the same without instruction (chance) at turn 4": ("chance/turn_4", True, set()),
    "KL to sft, nats per response": ("kl_to_reference", False, set()),
    "tokens a response": ("response_tokens", False, set()),
    "answers that end by themselves": ("finished_fraction", True, {"ppo"}),
    "distinct word pairs (distinct-2)": ("distinct_2", False, set()),
}


class Reader(HTMLParser):
    """Tags that stand open, what the page loads, its pictures, and the cells of its tables by the table's id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        if tag == "figure" and "id" in values:
            self._table = values["id"].removeprefix("table-")
            self.tables[self._table] = []
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag in ("td", "th") and self._table:
            self.tables[self._table][-1].append("")
        if tag == "img":
            self.images.append(values)
        self.wrong += [f"{tag} {name}" for name in values if name.startswith("on") or name == "style"]
        if tag == "a":
            self.links.append(values["href"])
        else:
            self.loads += [values[name] for name in ("src", "href", "srcset", "action", "data") if name in values]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")
        if tag == "figure":
            self._table = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.wrong += re.findall(r"url\(|@import", data)
        self.texts.append(data)
        if self._table and {"td", "th"} & set(self.open):
            self.tables[self._table][-1][-1] += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, StepFolder]:
    """The report on a run that has every step."""
    run = TinyRun(tmp_path_factory.mktemp("runs") / "tiny").add(*STEPS)
    return run, run.report()


def read(folder: StepFolder) -> Reader:
    return Reader(folder.page.read_text(encoding="utf-8"))


def check_page(reader: Reader) -> None:
    """What holds of any page: closed tags, pictures inside, texts beside them, nothing loaded from anywhere."""
    assert reader.wrong == [] and reader.open == []
    assert [one for one in reader.loads if not one.startswith("data:")] == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    for image in reader.images:
        head, _, content = image["src"].partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
        assert len(image["alt"]) > 20


def by_label(rows: list[list[str]]) -> dict[str, list[str]]:
    return {label: [" ".join(cell.split()) for cell in cells] for label, *cells in rows}


def equals(cell: str, measure: dict[str, Any] | None, is_share: bool) -> bool:
    """Whether a cell shows the figure and its interval, each to within half of its last digit."""
    if measure is None:
        return cell.strip() == "-"
    expected = [value for value in (measure["value"], measure["low"], measure["high"]) if value is not None]
    shown = NUMBER.findall(cell.replace("best", ""))
    return (
        len(shown) == len(expected)
        and ("%" in cell) == is_share
        and all(
            abs(float(text) - value * (100 if is_share else 1)) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-9
            for text, value in zip(shown, expected, strict=True)
        )
    )


def test_the_page_is_whole_and_loads_nothing(whole: tuple[TinyRun, StepFolder]) -> None:
    reader = read(whole[1])
    check_page(reader)
    assert len(reader.images) == 15
    text = whole[1].page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text and "<script" not in text


def test_the_headline_table_is_the_evaluation(whole: tuple[TinyRun, StepFolder]) -> None:
    figures = whole[0].evaluation["figures"]
    head, *rows = read(whole[1]).tables["headline"]
    assert [cell.strip() for cell in head] == ["", *EVALUATED]
    assert [cells[0] for cells in rows] == list(LINES)
    for label, *cells in rows:
        key, is_share, best = LINES[label]
        for policy, cell in zip(EVALUATED, cells, strict=True):
            assert equals(cell, figures[policy].get(key), is_share), (label, policy, cell)
        assert {policy for policy, cell in zip(EVALUATED, cells, strict=True) if "best" in cell} == best, label


def test_the_markdown_holds_the_same_tables(whole: tuple[TinyRun, StepFolder]) -> None:
    text = whole[1].page_markdown.read_text(encoding="utf-8")
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    normalised = [
        [" ".join(cell.replace("**", "").replace("(best)", "best").split()) for cell in line] for line in lines
    ]
    pages = read(whole[1]).tables
    assert {"headline", "differences", "7", "8-helpfulness", "29", "30", "deviations"} <= set(pages)
    for name, rows in pages.items():
        for cells in rows:
            assert [" ".join(cell.split()) for cell in cells] in normalised, name
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert len(pictures) == 15
    assert all((whole[1].path / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_what_a_model_said_stays_text(whole: tuple[TinyRun, StepFolder]) -> None:
    reader, markdown = read(whole[1]), whole[1].page_markdown.read_text(encoding="utf-8")
    assert reader.texts.count(HOSTILE) >= 2 * len(EVALUATED)  # as answers, letter by letter
    outside = re.sub(r"(?ms)^(`{4,})text\n.*?\n\1$", "", markdown)
    assert "<script" not in outside and "<img" not in outside and HOSTILE in markdown


def test_the_papers_numbers_stand_beside_ours(whole: tuple[TinyRun, StepFolder]) -> None:
    tables = read(whole[1]).tables
    by_rating = by_label(tables["8-helpfulness"])
    assert by_rating["paper: helpfulness"] == ["80.7", "67.5", "60.9", "54.7", "63.2"]
    ours = ["81.0 [77.0, 85.0]", "70.0 [66.0, 74.0]", "60.0 [56.0, 64.0]", "-", "56.2 [52.2, 60.2]"]
    assert by_rating["ours: judge"] == ours
    turns = by_label(tables["30"])
    assert turns["policy"] == ["turn 2", "turn 4"], "no column of which ours have nothing"
    assert turns["paper: without GAtt"] == ["100%", "10%"]
    assert turns["ours: rs"] == ["44.0% [39.0%, 49.0%] chance 5.0%", "38.0% [33.0%, 43.0%] chance 5.0%"]
    text = " ".join(read(whole[1]).texts)
    assert "turn 6: 0% without, 100% with it; turn 20: 0% without, 100% with it" in text
    differs = {cells[0]: cells[2] for cells in tables["deviations"]}
    assert differs["sft: epochs"] == "1.5" and differs["ppo: iterations"] == "40" and "rank 64" in differs["tuning"]
    assert not {"sft: batch", "rm/safety: epochs", "ppo: learning rate"} & set(differs), "the paper's own values"


def test_what_answers_do_stands_next_to_people_s_labels_of_llama_2(whole: tuple[TinyRun, StepFolder]) -> None:
    head, *rows = read(whole[1]).tables["outcomes"]
    assert len(rows) == 12 and [len(row) for row in rows] == [len(EVALUATED) + 3] * 12 and len(head) == 6
    by = by_label([head, *rows])
    # Of XSTest's 250 harmless prompts 176 were answered without a system text, 101 with Meta's first one.
    assert by["harmless prompts that look harmful: complied"][-2:] == ["70.4%", "40.4%"]
    assert by["harmless prompts that look harmful: partly refused"][-2:] == ["15.6%", "21.6%"]
    assert by["harmful prompts: refused"] == [
        "10.0% [8.0%, 12.0%]", "15.0% [13.0%, 17.0%]", "20.0% [18.0%, 22.0%]", "97.5%", "99.5%",
    ]  # fmt: skip
    assert by["of these, xstest_safe: complied"][3:] == ["-", "-"], "by file nothing is known of it"
    text = " ".join(" ".join(read(whole[1]).texts).split())
    assert "it is right in 89.5% [87.5%, 91.5%] (by label: refused, 93.1% [91.1%, 95.1%])" in text


def test_it_publishes_both_pages_and_its_figures(whole: tuple[TinyRun, StepFolder]) -> None:
    artifact = read_artifact(whole[1].path, "report")
    assert set(artifact.manifest.files) == {"report.html", "report.md"}
    assert (artifact.path / "report.html").read_bytes() == whole[1].page.read_bytes()
    assert artifact.manifest.inputs["eval"].endswith("eval/artifact")
    summary = json.loads(whole[1].summary.read_text(encoding="utf-8"))
    assert summary["report/figures"] == 15 and summary["report/missing"] == 1


@pytest.mark.parametrize("count", range(len(STEPS)))
def test_every_beginning_of_a_recipe_has_its_report(whole: tuple[TinyRun, StepFolder], count: int) -> None:
    folder = whole[0].report(count=count)
    reader = read(folder)
    check_page(reader)
    text = " ".join(" ".join(reader.texts).split())
    for name in STEPS[:count]:
        assert f"{name} is not finished" not in text
    for name in STEPS[count:]:
        command = {"rm/helpfulness": "rm", "rm/safety": "rm", "rm/judge": "rm"}.get(name, name)
        assert f"{name} is not finished: llamachat {command} --config {folder.config} makes it." in text
    assert "headline" not in reader.tables and "There is no evaluation of all policies" in text
    assert (HOSTILE in reader.texts) == (count > 0), "the last samples of a step stand in for the evaluation's"


def test_what_a_recipe_leaves_out_is_noted_at_the_end_without_reproach(tmp_path: Path) -> None:
    reader = read(TinyRun(tmp_path / "tiny", steps=("sft", "eval")).add("sft").report())
    text = " ".join(" ".join(reader.texts).split())
    assert "Steps that this recipe leaves out: rm/helpfulness (helpfulness scores)" in text and "rm/judge (" in text
    assert reader.ids[-1] == "missing" and reader.ids[0] == "results"
    assert "Reward models (section 3.2.2)" not in text and "rm/judge is not finished" not in text


def test_the_answer_that_each_model_prefers_is_marked(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny")
    answers = {
        policy: {**one, "scores": dict(one["scores"])}
        for policy, one in run.evaluation["samples"][0]["answers"].items()
    }
    run.evaluation["samples"][0]["answers"] = answers
    answers["rs"]["scores"] |= {"reward_helpfulness": 0.75, "judge": -1.0}
    answers["ppo"]["scores"] |= {"reward_safety": 1.0, "judge": -2.0}
    texts = read(run.add(*STEPS).report()).texts
    preferred = [text for text in texts if "preferred by" in text]
    assert [text.partition("preferred by: ")[2] for text in preferred] == ["helpfulness, judge", "safety"]


def test_a_policy_has_one_place_and_so_one_colour_in_all_pictures(whole: tuple[TinyRun, StepFolder]) -> None:
    facts = read_facts(whole[0].inputs(len(STEPS)))
    assert facts.places == {"sft": 0, "rs": 1, "ppo": 2, "gatt": 3, "distill": 4}


def test_reward_models_that_the_recipe_names_together_are_finished_with_their_own_names(tmp_path: Path) -> None:
    finished = [name for name in STEPS if name.startswith(("sft", "rm/"))]
    run = TinyRun(tmp_path / "tiny", steps=("sft", "rm", "rs", "eval")).add(*finished)
    text = " ".join(read(run.report()).texts)
    assert "rm is not finished" not in text and "rs is not finished" in text
