"""Read raw files of the origins (JSON, JSON Lines, CSV, YAML, gzipped or not) and write records as gzipped JSON Lines.

The output is byte for byte reproducible; records that break the rules are dropped.
"""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llamachat.chat_format.llama2 import SPECIAL_TAGS


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list, a JSON Lines file or a CSV file with a header."""
    text = read_text(path)
    if ".csv" in path.suffixes:
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_json(path: Path) -> Any:
    return json.loads(read_text(path))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(read_text(path))


def fault(record: dict[str, Any]) -> str | None:
    """Why a record is dropped, or None."""
    if "messages" in record:
        return _fault_of_turns(record["messages"], ends_with="assistant")
    reason = _fault_of_turns(record["prompt"], ends_with="user")
    if reason or "chosen" not in record:
        return reason
    answers = [record["chosen"], record["rejected"]]
    if any(len(answer) != 1 or answer[0]["role"] != "assistant" for answer in answers):
        return "an answer that is not one message of the assistant"
    reason = _fault_of_text(answers[0][0]["content"]) or _fault_of_text(answers[1][0]["content"])
    return reason or ("equal answers" if answers[0][0]["content"] == answers[1][0]["content"] else None)


def _fault_of_turns(messages: list[dict[str, Any]], *, ends_with: str) -> str | None:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] != ends_with:
        return f"last turn not of the {ends_with}"
    if any(turn["role"] != ("assistant" if index % 2 else "user") for index, turn in enumerate(turns)):
        return "turns that do not alternate"
    return next((reason for turn in messages if (reason := _fault_of_text(turn["content"]))), None)


def _fault_of_text(text: str) -> str | None:
    if not text.strip():
        return "empty text"
    return "control tag" if any(tag in text for tag in SPECIAL_TAGS) else None


def kept(records: Iterable[dict[str, Any]], dropped: Counter[str]) -> list[dict[str, Any]]:
    """The distinct valid records; the others are counted by reason."""
    sound: dict[str, dict[str, Any]] = {}
    for record in records:
        reason = fault(record)
        line = json.dumps(record, ensure_ascii=False)
        if reason is None and line in sound:
            reason = "repeated record"
        if reason is None:
            sound[line] = record
        else:
            dropped[reason] += 1
    return list(sound.values())


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    # No time or file name in the header, so that the same data gives the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as stream:
        for record in records:
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
