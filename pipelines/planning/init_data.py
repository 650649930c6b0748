"""The files that `init` is given, read once before anything is chosen: their kind, their faults, their sizes.

A file is taken only as it would be learnt from: every line keeps the rules, or the error names it with the command that
mends it. Nothing is left out here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.config.paths import hub_set, missing
from llamachat.data.check import CheckReport, check_path
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.problems import convert_command, converted_path, report
from llamachat.data.records import Kind, Preference, Record
from llamachat.errors import DataError, UsageError

# The options of the command: what each takes, and the key of `data` that its files go under.
OPTIONS: dict[str, tuple[Kind, str]] = {
    "--sft": ("dialog", "sft"),
    "--preferences": ("preference", "helpfulness"),
    "--safety": ("preference", "safety"),
    "--prompts": ("prompt", "prompts"),
    "--adversarial": ("prompt", "adversarial"),
}
FEW_TOKENS = 16  # of the chat format itself, a dialog; ours, rough

CountTokens = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lengths in tokens, in ascending order."""

    records: tuple[float, ...]  # a whole dialog, or a prompt with the longer of its answers
    answers: tuple[float, ...]

    def holding(self, share: float) -> float:
        """The length that this share of the records is not above."""
        return self.records[min(len(self.records) - 1, int(share * len(self.records)))] if self.records else 0.0

    def answer_holding(self, share: float) -> float:
        """The length that this share of the answers is not above."""
        return self.answers[min(len(self.answers) - 1, int(share * len(self.answers)))] if self.answers else 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """What the files hold: by key of `data`, the files in order and their records counted."""

    files: dict[str, tuple[str, ...]]
    records: dict[str, int]
    rated: int  # pairs with a rating
    labelled: int  # answers of data.safety with a label
    sizes: Sizes

    def has(self, key: str) -> bool:
        return self.records.get(key, 0) > 0

    def longer_than(self, tokens: int) -> int:
        """Dialogs and pairs that are longer."""
        return sum(length > tokens for length in self.sizes.records)


def look_at(given: Mapping[str, Sequence[Path]], forbidden: Sequence[str], count: CountTokens) -> Found:
    """The files of each option, read whole; UsageError or DataError for the first that cannot be learnt from."""
    _require_different(given)
    files: dict[str, tuple[str, ...]] = {}
    records: dict[str, int] = {}
    rated = labelled = 0
    lengths: list[float] = []
    answers: list[float] = []
    for option, paths in given.items():
        kind, key = OPTIONS[option]
        for path in map(str, paths):
            found = _checked(path, option, kind, forbidden)
            files[key] = (*files.get(key, ()), path)
            records[key] = records.get(key, 0) + found.num_records
            rated += sum(times for name, times in found.labels.items() if name.startswith("rating "))
            labels = ("chosen_is_safe", "rejected_is_safe")
            labelled += sum(
                times for name, times in found.labels.items() if key == "safety" and name.startswith(labels)
            )
            if kind != "prompt":
                _measure(path, kind, forbidden, count, lengths, answers)
    return Found(files, records, rated, labelled, Sizes(tuple(sorted(lengths)), tuple(sorted(answers))))


def _require_different(given: Mapping[str, Sequence[Path]]) -> None:
    """UsageError for a file that stands twice where its records would count twice, or teach two models the same."""
    places = {option: [path.expanduser().resolve() for path in paths] for option, paths in given.items()}
    for option, paths in given.items():
        for number, path in enumerate(paths):
            if places[option][number] in places[option][:number]:
                raise UsageError(
                    f"{option}: '{path}' is given twice. Each of its records would be counted and learnt twice. Name it once; a"
                    " source that should count for more gets a `weight` in the recipe."
                )
            if option == "--safety" and places[option][number] in places.get("--preferences", ()):
                raise UsageError(
                    f"--safety: '{path}' is given with --preferences too. The model of safety would learn the same choices as"
                    " that of helpfulness. Name with --safety pairs whose safer answer is chosen, or leave it out."
                )


def _checked(path: str, option: str, kind: Kind, forbidden: Sequence[str]) -> CheckReport:
    """The report on a file that may be learnt from."""
    if hub_set(path) is not None and not Path(path).exists():
        raise UsageError(
            f"{option}: '{path}' is no file here. `init` reads every record before it chooses, and a set of the hub is not "
            f"here. Fetch it and convert it (`llamachat data convert {path} FILE.jsonl`), or begin with a preset of configs/."
        )
    if not Path(path).expanduser().exists():
        raise UsageError(f"{option}: {missing(path, what='the data file')}")
    found = check_path(path, None, "auto", forbidden)
    _require_readable(found, option)
    other = next((name for name, (taken, _) in OPTIONS.items() if taken == found.kind), None)
    # Prompts may be read out of dialogs and preferences too; dialogs and preferences only out of themselves.
    if found.num_records and found.kind != kind and kind != "prompt":
        raise UsageError(
            f"{option}: '{path}' holds {found.kind}s ({found.num_records} of them), and {kind}s are taken here. A record of "
            f"another kind has nothing to learn from. Give it with {other}, or name a file of {kind}s."
        )
    if found.problems:
        command = "" if convert_command(found.problems, path) else f"\n{_convert(path)}"
        raise DataError(
            f"{option}: {path}: {found.num_bad_lines} of {found.num_bad_lines + found.num_records} records break the rules, "
            f"and none is left out unasked. Bring the file into our form, which counts each mend and names each loss, and "
            f"give that one.\n{report(found.problems, path)}{command}"
        )
    if not found.num_records:
        raise DataError(
            f"{option}: '{path}' holds no {kind} at all. A step learns from at least one. Name another file."
        )
    return found


def _require_readable(found: CheckReport, option: str) -> None:
    """DataError for a file of which no record can be read, which no command of ours mends."""
    whole = next((problem for problem in found.problems if not problem.line), None)
    if whole is not None:  # a folder, an empty file, a table: what it is and what to do, in the reader's words
        raise DataError(f"{option}: '{found.path}' {whole.reason} {whole.fix}")
    if found.problems and all(problem.field.startswith("column ") for problem in found.problems) and not found.kind:
        raise DataError(
            f"{option}: '{found.path}' holds no record in a form that can be read: none of its lines is whole JSON, as those of"
            f" JSON Lines (.jsonl, .jsonl.gz) are. Write one record a line, or name another file.\n"
            f"{report(found.problems[:1], found.path)}"
        )


def _convert(path: str) -> str:
    return f"The command that mends what can be mended: llamachat data convert {path} {converted_path(path)}"


def _measure(
    path: str, kind: Kind, forbidden: Sequence[str], count: CountTokens, lengths: list[float], answers: list[float]
) -> None:
    rows = parse_rows(read_rows(path), path=path, kind=kind, forbidden=forbidden)
    for record in (parsed.record for parsed in rows):
        if record is None:
            continue
        asked, said = _parts(record)
        own = [count(message.content) for message in said]
        answers += own
        together = max(own) if isinstance(record, Preference) else sum(own)
        lengths.append(FEW_TOKENS + sum(count(message.content) for message in asked) + together)


def _parts(record: Record) -> tuple[list[Message], list[Message]]:
    """What is read, and what is said in answer."""
    if isinstance(record, Preference):
        return list(record.prompt), [record.chosen, record.rejected]
    if isinstance(record, Dialog):
        said = [message for message in record.messages if message.role == "assistant"]
        return [message for message in record.messages if message.role != "assistant"], said
    return list(record.messages), []
