"""The record of a step as JSON lines: `metrics.jsonl` and `samples.jsonl`, truncated to the checkpoint on resuming.

A line is `{"step": int, "time": float, ...}`. If two loops write into one step folder (rejection sampling, then the
tuning on its winners), each has its own axis, `<prefix>/step`, and truncating one leaves the other's lines.
Every reader drops a line that a killed command left incomplete, and a number that is not finite is written as null.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from llamachat.runs.atomic import storage_errors, write_text

STEP = "step"
TIME = "time"


class _Lines:
    """Append-only JSON lines on one axis."""

    def __init__(self, path: Path, *, axis: str = STEP) -> None:
        self.path = path
        self.axis = axis
        self._stream: TextIO | None = None

    def cut_back(self, step: int) -> None:
        """Drop this axis' lines after `step` and any incomplete line, atomically."""
        self.close()
        text = self._text()
        kept = "".join(
            line + "\n"
            for line in text.split("\n")
            if (row := _parse(line)) is not None and (self.axis not in row or row[self.axis] <= step)
        )
        if kept != text:
            write_text(self.path, kept)

    def is_damaged(self) -> bool:
        """Whether lines are lost: the file is missing or empty, or a line other than the last, which a kill may
        truncate, is invalid."""
        *lines, _ = self._text().split("\n")
        return not lines or any(_parse(line) is None for line in lines)

    def sync(self) -> None:
        """Flush to the disk, so that after a power failure the metrics of a checkpoint are there too."""
        if self._stream is not None:
            with storage_errors(self.path):
                os.fsync(self._stream.fileno())

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _append(self, step: int, rows: list[dict[str, Any]]) -> None:
        now = round(time.time(), 3)
        axis = {} if self.axis == STEP else {self.axis: step}
        text = "".join(
            json.dumps({STEP: step, TIME: now, **axis, **row}, ensure_ascii=False, allow_nan=False) + "\n"
            for row in rows
        )
        with storage_errors(self.path):
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._repair_last_line()
                # Half a character from a byte tokenizer becomes its JSON escape.
                self._stream = self.path.open("a", encoding="utf-8", errors="backslashreplace")
            try:
                # One write per call: after a kill, only the last line may be incomplete.
                self._stream.write(text)
                self._stream.flush()
            except OSError:
                # What does not fit must not be written again when the file is closed.
                stream, self._stream = self._stream, None
                with suppress(OSError):
                    stream.close()
                raise

    def _repair_last_line(self) -> None:
        text = self._text()
        if text and not text.endswith("\n"):
            whole, _, last = text.rpartition("\n")
            kept = [line for line in (whole, last if _parse(last) else "") if line]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def _rows(self) -> Iterator[dict[str, Any]]:
        for line in self._text().split("\n"):
            if (row := _parse(line)) is not None:
                yield row

    def _text(self) -> str:
        with storage_errors(self.path):
            try:
                # The break may be inside a character: the broken line is dropped whole.
                return self.path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                return ""


class MetricsRecord(_Lines):
    """`metrics.jsonl`: one line of numbers per call."""

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line; it is in the file when this returns."""
        self._append(step, [{name: _finite(value) for name, value in metrics.items()}])

    def read(self) -> list[dict[str, float]]:
        """All complete lines; null, and values that are not numbers, read as nan."""
        return [{name: _number(value) for name, value in row.items()} for row in self._rows()]


class SamplesRecord(_Lines):
    """`samples.jsonl`: one line per sampled answer."""

    def append(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write one line per row; they are in the file when this returns."""
        self._append(step, rows)

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        return list(self._rows())


def _finite(value: float) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else math.nan


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get(STEP), int) else None
