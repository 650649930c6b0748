"""Thousands of messy logs through `data check` and `data convert`: each record is kept, mended or refused, and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.data.check import check_path
from llamachat.data.convert.turns import Repair
from tests.llamachat.data.converting import Bench
from tests.llamachat.data.messy_logs import messy_logs, records_of

EACH = 2500  # records; four such files make ten thousand


@pytest.mark.parametrize(("kind", "seed"), [(None, 0), ("dialog", 1), ("preference", 2), ("prompt", 3)])
def test_every_record_is_kept_mended_or_refused(kind: Any, seed: int, tmp_path: Path, tiny_format: ChatFormat):
    logs = messy_logs(EACH, seed)
    report, written = Bench(tmp_path, tiny_format).convert(logs.text(), kind=kind)
    assert report.kind == (kind or "dialog")
    assert len(written) == report.written
    told = report.written + report.repeated + report.without + len(report.problems)
    assert told == logs.num_records
    assert report.times[Repair.BLANK_LINE] == logs.num_blank
    assert {found.line for found in report.problems} <= set(range(1, len(logs.lines) + 1))
    assert all(found.field and found.reason and found.fix for found in report.problems)
    lines = report.dropped().splitlines()
    assert len(lines) == len(report.problems), "each refusal is told on a line of its own"
    # What it was made for: some of each, and sound records stay as they are.
    assert min(report.untouched, report.written - report.untouched, report.repeated, len(report.problems)) > 0
    values = {json.dumps(value, sort_keys=True) for line in logs.lines for value in records_of(line)}
    assert sum(json.dumps(record, sort_keys=True) in values for record in written) >= report.untouched


@pytest.mark.parametrize("kind", [None, "dialog", "preference", "prompt"])
def test_the_check_names_every_line_that_holds_no_record(kind: Any, tmp_path: Path, tiny_format: ChatFormat):
    logs = messy_logs(EACH, 4)
    path = tmp_path / "a.jsonl"
    path.write_bytes(logs.text())
    report = check_path(str(path), kind, "auto", tiny_format.forbidden)
    bad = {found.line for found in report.problems if found.field != "record"}
    assert report.num_records + len(bad) == len(logs.lines)
    assert all(found.reason and found.fix for found in report.problems)
    assert report.text().isprintable() or report.text().replace("\n", "").isprintable()


def test_a_seed_makes_the_same_logs():
    assert messy_logs(300, 5).text() == messy_logs(300, 5).text() != messy_logs(300, 6).text()
