"""Cuts the bundled data from the folders of its origins: `python data/cut.py --from DIR`.

Everything under data/ but this script is its result: the same origins give the same bytes, since every choice is made
by a hash of the text. Needs an environment with llamachat in it.
"""

import argparse
from collections import Counter
from pathlib import Path

from cutting import sft, writing

HERE = Path(__file__).resolve().parent
FOLDERS = {"sft": sft.sft}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="origins", type=Path, required=True, help="folder with one folder an origin")
    parser.add_argument("--only", choices=FOLDERS, help="cut this folder alone")
    arguments = parser.parse_args()
    for folder, cut in FOLDERS.items():
        if arguments.only not in (None, folder):
            continue
        for name, records in cut(arguments.origins).items():
            dropped: Counter[str] = Counter()
            path = HERE / folder / f"{name}.jsonl.gz"
            sound = writing.kept(records, dropped)
            writing.write_jsonl(path, sound)
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
            print(f"{folder}/{name}: {len(sound)} records, {path.stat().st_size} bytes; dropped: {reasons}")


if __name__ == "__main__":
    main()
