"""Build the bundled data from the folders of its origins: `python -m tools.cut_data --from DIR`.

The same origins give the same bytes, since every choice depends on a hash of the text. Prints the rows of the tables in
SOURCE.md, which lists the origin of each file. Needs an environment with llamachat installed.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from tools.cutting import choosing, files, helpfulness, lists, prompts, safety, sft

DATA = Path(__file__).resolve().parents[1] / "data"
CUTS = {
    "sft": sft.sft,
    "helpfulness": helpfulness.helpfulness,
    "safety": safety.safety,
    "labels": safety.labels,
    "refusals": safety.refusals,
    "prompts": prompts.prompts,
    "adversarial": prompts.adversarial,
    "borderline": prompts.borderline,
    "benchmarks": prompts.benchmarks,
    "gatt": lists.gatt,
}


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """Write the valid records of one file and return its row of the table in SOURCE.md."""
    dropped: Counter[str] = Counter()
    sound = files.kept(records, dropped)
    files.write_jsonl(path, sound)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    mean = sum(map(_characters, sound)) / len(sound)
    return f"| `{path.name}` | {len(sound)} | {mean:.0f} | {path.stat().st_size} | {reasons} |"


def _characters(record: dict[str, Any]) -> int:
    """Number of characters of a record; for a pair, of the prompt and the mean of its answers."""
    if "messages" in record:
        return choosing.length(record["messages"])
    answers = [choosing.length(record[side]) for side in ("chosen", "rejected") if side in record]
    return choosing.length(record["prompt"]) + sum(answers) // max(len(answers), 1)


def write_list(path: Path, entries: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(entries) + "\n", encoding="utf-8")
    mean = sum(map(len, entries)) / len(entries)
    return f"| `{path.name}` | {len(entries)} | {mean:.0f} | {path.stat().st_size} | none |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="origins", type=Path, required=True, help="folder with one folder an origin")
    origins = parser.parse_args().origins
    for folder, cut in CUTS.items():
        for name, entries in cut(origins).items():
            if folder == "gatt":
                row = write_list(DATA / folder / f"{name}.txt", entries)
            else:
                row = write_records(DATA / folder / f"{name}.jsonl.gz", entries)
            print(folder, row)


if __name__ == "__main__":
    main()
