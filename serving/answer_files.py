"""Files of records to answer or score: reading prompts, writing records, and a progress bar."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llamachat.chat_format.dialog import Dialog, as_dicts
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.problems import Problem, problem, report
from llamachat.data.records import Preference, Prompt, Record, Row, as_prompt, kind_of
from llamachat.errors import DataError
from llamachat.tables import plural

Item = TypeVar("Item")

log = logging.getLogger(__name__)


def read_prompts(
    path: Path, *, forbidden: Sequence[str], make: Callable[[Row, Prompt], Item | Problem], limit: int | None = None
) -> list[Item]:
    """Apply `make` to every prompt of the file, or the first `limit`; one error lists all bad lines."""
    problems: list[Problem] = []
    items: list[Item] = []
    without = 0
    for row in parse_rows(read_rows(str(path)), path=str(path), kind="prompt", forbidden=forbidden):
        problems += row.problems
        if row.record is None:
            without += not row.problems
            continue
        item = make(row, as_prompt(row.record))
        if isinstance(item, Problem):
            problems.append(item)
            continue
        items.append(item)
        if len(items) == limit:
            break
    if problems:
        raise DataError(report(problems, path))
    if not items:
        raise DataError(f"{path}: holds no prompt. There is nothing to answer. Give a file with prompts or dialogs.")
    if without:
        log.warning("%s: no prompt in %s", path, plural(without, "row"))
    return items


def too_long(line: int, *, limit: int, policy: str) -> Problem:
    """The problem of a prompt whose last question leaves no room for an answer."""
    return problem(
        line,
        "prompt",
        f"is longer than {limit - 1} tokens even without its earlier turns, and {policy} reads prompt and answer in "
        f"{limit} tokens.",
        "Shorten the last question or the system text, or drop the record.",
    )


def as_written(value: Any, record: Record) -> dict[str, Any]:
    """The record unchanged if it is in our format, otherwise the fields that were parsed from it."""
    if kind_of(value) is not None and any(isinstance(value.get(key), list) for key in ("prompt", "messages")):
        return dict(value)
    if isinstance(record, Dialog):
        return {"messages": as_dicts(record.messages), **_known({"is_safe": record.is_safe})}
    if isinstance(record, Preference):
        labels = {name: getattr(record, name) for name in ("rating", "chosen_is_safe", "rejected_is_safe")}
        answers = {"chosen": as_dicts([record.chosen]), "rejected": as_dicts([record.rejected])}
        return {"prompt": as_dicts(record.prompt), **answers, **_known(labels)}
    return {"prompt": as_dicts(record.messages)}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@contextmanager
def progress(total: int, done_word: str, things: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error in a terminal, otherwise a log line for every tenth."""
    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            tenths = 10 * done // total
            done += more
            if 10 * done // total > tenths:
                log.info("%s %d of %d %s", done_word, done, total, things)

        yield count
        return
    columns = (
        TextColumn(f"{things} {done_word}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(things, total=total)
        yield lambda more: bar.advance(task, more)
