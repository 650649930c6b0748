"""The report on a run: read the results of finished steps, draw plots, and write one page in two formats.

It covers the finished steps of a recipe and names each missing step with its command. Writes the step folder's
figures/, report.html, report.md, summary.json and, last, artifact/ with both pages. A killed report starts over.
"""

import logging
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from evaluation.report.account import account, costs, curves, deviations
from evaluation.report.benchmarks import benchmarks
from evaluation.report.config import Config
from evaluation.report.facts import Facts, left_out, missing, read_facts
from evaluation.report.headline import headline
from evaluation.report.page import Block, Page, Points, Section, Text, html, markdown
from evaluation.report.sections import answers, comparison, ghost_attention, rounds, safety, sampling
from evaluation.report.tuning import preferences, reward_models, supervised
from llamachat.runs.artifacts import Artifact
from llamachat.runs.atomic import remove_tree, write_text
from llamachat.runs.inputs import StepInputs
from llamachat.tracking.tracker import open_record
from llamachat.training.publishing import publish_step

log = logging.getLogger(__name__)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Read results, draw plots, write and publish the page."""
    folder = inputs.folder
    facts = read_facts(inputs)
    remove_tree(folder.figures)
    title = f"{facts.run_name}: a Llama 2 recipe from base to chat model"
    header = [
        ("run", inputs.run.dir),
        ("written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("steps", ", ".join(step.name for step in facts.steps) or "none finished"),
        ("base", facts.base),
        ("seed", str(inputs.run.seed)),
    ]
    page = Page(title, header, tuple(_sections(config, facts, folder.figures)))
    write_text(folder.page, html(page))
    write_text(folder.page_markdown, markdown(page, folder.path))
    lacking = missing(facts)
    for line in lacking:
        log.info("%s", line)
    # wandb gets the plots but no prompts or answers, which stay in the files.
    with open_record(inputs, "report", resume_step=None) as tracker:
        for picture in page.pictures:
            tracker.figure(picture.path.stem, picture.path)
        tracker.summary(
            {
                "report/figures": float(sum(1 for _ in folder.figures.rglob("*.png"))),
                "report/kib": folder.page.stat().st_size / 1024,
                "report/missing": float(len(lacking)),
            }
        )
    log.info("the report is %s", folder.page)

    def write(place: Path) -> None:
        for written in (folder.page, folder.page_markdown):
            shutil.copyfile(written, place / written.name)

    return publish_step(inputs, "report", write, read={one.manifest.step: one for one in inputs.surveyed})


def _sections(config: Config, facts: Facts, figures: Path) -> Iterator[Section]:
    """Sections in the paper's order, without empty ones; the last one says why they are left out."""
    sections = [
        headline(facts, figures, config.control),
        supervised(facts),
        reward_models(facts, figures),
        sampling(facts, figures),
        rounds(facts),
        preferences(facts),
        ghost_attention(facts, figures),
        comparison(facts, figures),
        safety(facts, figures),
        benchmarks(facts),
        answers(facts, config.samples),
        curves(facts, figures) if config.shows_curves else None,
        costs(facts),
        account(facts),
        deviations(facts),
    ]
    yield from (section for section in sections if section is not None)
    absent: list[Block] = [Points(lacking, tone="missing")] if (lacking := missing(facts)) else []
    if others := left_out(facts):
        absent = [*absent, Text(others)]
    if absent:
        yield Section("Not in this report", "missing", absent)
