"""Reads the raw files of the origins: JSON lists, JSON Lines, CSV and YAML, gzipped or not."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import yaml


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, a JSON Lines file or a CSV file with a header."""
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
