"""Marks for fields that name a file or folder: what is named must be there before anything is loaded.

A name of the form `owner/name` that is no local path is a hub name and is looked up when it is loaded, not here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamachat.config.problems import nearest

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zip")
_REPOSITORY = Path(__file__).resolve().parents[2]

COMBINERS = ("llama2_gate", "single", "weighted")


def bundled(path: str) -> Path:
    """A file that comes with this code, such as data/gatt/hobbies.txt, wherever the command runs."""
    return _REPOSITORY / path


def here_or_bundled(path: str) -> Path:
    """A file relative to the working directory, or else the one of that name that comes with this code."""
    return bundled(path) if not Path(path).exists() and bundled(path).exists() else Path(path)


def is_hub_name(text: str) -> bool:
    """Whether a name that is no local path can be one of the hub: `owner/name`, and no local folder `owner`."""
    if Path(text).exists() or text.lower().endswith(_DATA_SUFFIXES):
        return False
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).parent.is_dir()


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set on the Hugging Face hub, as a path names it: `owner/name[/configuration][:split]`."""

    name: str
    configuration: str | None
    split: str


def hub_set(path: str) -> HubSet | None:
    """The data set that this names, or None where it is a path."""
    whole, _, split = path.partition(":")
    owner, name, configuration, *rest = [*whole.split("/"), "", ""]
    # Three parts may be a path too: a file's last part has a dot, a configuration's rarely.
    if any(rest) or "." in configuration or Path(whole).exists() or not is_hub_name(f"{owner}/{name}"):
        return None
    return HubSet(f"{owner}/{name}", configuration or None, split or "train")


def near_path(text: str) -> str | None:
    """An existing path most like a missing one: a name in the same folder, or in the nearest folder that exists."""
    path = Path(text)
    folder = path.parent
    if folder.is_dir():
        name = nearest(path.name, (entry.name for entry in folder.iterdir()))
        return str(folder / name) if name else None
    if folder == folder.parent:
        return None
    near_folder = near_path(str(folder))
    if near_folder is None or not Path(near_folder).is_dir():  # a file of a like name
        return near_folder
    return near_path(str(Path(near_folder) / path.name)) or near_folder


def missing(text: str, *, what: str) -> str:
    """The words for a path that does not exist."""
    hint = near_path(text)
    if not Path(text).is_absolute() and (_REPOSITORY / text).exists():
        advice = f"It exists in {_REPOSITORY}: run the command there, or give the whole path."
    elif hint:
        advice = f"Did you mean '{hint}'?"
    else:
        advice = "Give the path of one that exists, seen from where the command runs."
    return f"{what} '{text}' does not exist. {advice}"


@dataclass(frozen=True, slots=True)
class DataPath:
    """The field names a file or folder of records, or a data set of the hub."""

    def problems(self, value: object) -> Iterator[tuple[tuple[()], str]]:
        if isinstance(value, str) and value and not Path(value).exists() and hub_set(value) is None:
            yield (), missing(value, what="the data file")


@dataclass(frozen=True, slots=True)
class ModelPath:
    """The field names a model folder, or a model of the hub."""

    def problems(self, value: object) -> Iterator[tuple[tuple[()], str]]:
        if not isinstance(value, str) or not value:
            return
        path = Path(value)
        if path.is_file():
            yield (), f"'{value}' is a file, but a model is a folder with config.json. Give its folder '{path.parent}'."
        elif path.is_dir() and not (path / "config.json").is_file():
            yield (), f"the folder '{value}' holds no config.json, so it is no model. Give the folder of a model."
        elif not path.exists() and (not is_hub_name(value) or (_REPOSITORY / value).exists()):
            yield (), missing(value, what="the model folder")


@dataclass(frozen=True, slots=True)
class RewardModelPath:
    """The field names a reward model: a step, artifact or model folder, or a model of the hub."""

    def problems(self, value: object) -> Iterator[tuple[tuple[()], str]]:
        if not isinstance(value, str) or not value or Path(value).is_dir():
            return
        if Path(value).is_file():
            yield (), f"'{value}' is a file, but a reward model is a folder. Give its folder '{Path(value).parent}'."
        elif not is_hub_name(value):
            yield (), missing(value, what="the reward model")


@dataclass(frozen=True, slots=True)
class PolicyPath:
    """The field names a local policy: a run, step or artifact folder."""

    def problems(self, value: object) -> Iterator[tuple[tuple[()], str]]:
        if isinstance(value, str) and value and not Path(value).is_dir():
            yield (), missing(value, what="the policy folder")


# -- combiners of scores, and functions of the user's: `path.py:function`


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A function in a Python file."""

    path: Path
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


def function_name(text: str) -> FunctionName | None:
    """The function that `path.py:function` names, or None where the text has another form."""
    path, colon, function = text.rpartition(":")
    return FunctionName(Path(path), function) if colon and path.endswith(".py") and function.isidentifier() else None


@dataclass(frozen=True, slots=True)
class CombinerName:
    """The field names a combiner, or a function in a file that exists."""

    def problems(self, value: object) -> Iterator[tuple[tuple[()], str]]:
        if not isinstance(value, str) or value in COMBINERS:
            return
        name = function_name(value)
        if name is None:
            near = nearest(value, COMBINERS)
            hint = f" Did you mean '{near}'?" if near else ""
            known = f"{', '.join(COMBINERS)}, or a function of yours as path.py:function, such as rewards.py:score"
            yield (), f"there is no combiner '{value}'.{hint} Known: {known}."
        elif not name.path.is_file():
            yield (), missing(str(name.path), what="the file of the reward function")
