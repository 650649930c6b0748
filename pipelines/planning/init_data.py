"""The files that `init` is given, read once before anything is chosen: their kind, their faults, how many records they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamachat.chat_format.llama2 import SPECIAL_TAGS
from llamachat.config.sections import hub_set, missing
from llamachat.data.check import CheckReport, check_path
from llamachat.data.problems import report
from llamachat.data.records import Kind
from llamachat.errors import DataError, UsageError

# The options of the command: what each takes, and the key of `data` that its files go under.
OPTIONS: dict[str, tuple[Kind, str]] = {
    "--sft": ("dialog", "sft"),
    "--preferences": ("preference", "helpfulness"),
    "--safety": ("preference", "safety"),
    "--prompts": ("prompt", "prompts"),
    "--adversarial": ("prompt", "adversarial"),
}


@dataclass(slots=True)
class Holdings:
    """What the files hold: by key of `data`, the files in order and their records counted."""

    files: dict[str, list[str]] = field(default_factory=dict)
    records: dict[str, int] = field(default_factory=dict)
    rated: int = 0  # pairs with a rating
    labelled: int = 0  # answers of data.safety with a label

    def count(self, *keys: str) -> int:
        return sum(self.records.get(key, 0) for key in keys)


def read_files(given: Mapping[str, Sequence[Path]]) -> Holdings:
    """The files of each option, read whole; UsageError or DataError for the first that cannot be learnt from as it is."""
    holdings = Holdings()
    earlier: dict[tuple[Path, Kind], str] = {}
    for option, path in ((option, path) for option, paths in given.items() for path in paths):
        kind, key = OPTIONS[option]
        place = (path.expanduser().resolve(), kind)
        if place in earlier:
            raise UsageError(
                f"{option}: '{path}' is given already (with {earlier[place]}). Its records would count twice, or teach two models"
                " the same. Name it once; a source that should count for more gets a `weight` in the recipe."
            )
        earlier[place] = option
        checked = _checked(str(path), option, kind)
        holdings.files.setdefault(key, []).append(str(path))
        holdings.records[key] = holdings.count(key) + checked.num_records
        for name, times in checked.labels.items():
            holdings.rated += times * name.startswith("rating ")
            holdings.labelled += times * (key == "safety" and name.startswith(("chosen_is_safe", "rejected_is_safe")))
    return holdings


def _checked(path: str, option: str, kind: Kind) -> CheckReport:
    """The report on a file that may be learnt from."""
    if not Path(path).expanduser().exists():
        raise UsageError(
            f"{option}: '{path}' is no file here. `init` reads every record before it chooses, and a set of the hub is not "
            f"here. Fetch it and convert it (`llamachat data convert {path} FILE.jsonl`), or begin with a preset of configs/."
            if hub_set(path)
            else f"{option}: {missing(path, what='the data file')}"
        )
    checked = check_path(path, None, "auto", SPECIAL_TAGS)
    whole = next((problem for problem in checked.problems if not problem.line), None)
    if whole is not None:  # a folder, an empty file, a table: what it is and what to do, in the reader's words
        raise DataError(f"{option}: '{path}' {whole.reason} {whole.fix}")
    if (
        checked.problems
        and not checked.kind
        and all(problem.field.startswith("column ") for problem in checked.problems)
    ):
        raise DataError(
            f"{option}: '{path}' holds no record in a form that can be read: none of its lines is whole JSON, as those of JSON"
            f" Lines are. Write one record a line, or name another file.\n{report(checked.problems[:1], path)}"
        )
    # Prompts may be read out of dialogs and preferences too; dialogs and preferences only out of themselves.
    if checked.num_records and checked.kind != kind and kind != "prompt":
        other = next(name for name, (taken, _) in OPTIONS.items() if taken == checked.kind)
        raise UsageError(
            f"{option}: '{path}' holds {checked.kind}s ({checked.num_records} of them), and {kind}s are taken here. A record of "
            f"another kind has nothing to learn from. Give it with {other}, or name a file of {kind}s."
        )
    if checked.problems or not checked.num_records:
        raise DataError(
            f"{option}: {path}: {checked.num_bad_lines} of {checked.num_bad_lines + checked.num_records} records break the rules,"
            " and none is left out unasked. Fix the file (`llamachat data convert` fixes what can be fixed, counts each fix and"
            f" names each loss), and give that one.\n{report(checked.problems, path)}"
        )
    return checked
