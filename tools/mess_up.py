"""Build data/own_logs from the bundled data: `python -m tools.mess_up [--to DIR]`.

The same bundled data gives the same bytes, since every choice depends on a hash of the text. Needs an environment with
llamachat installed.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from tools.cutting.own_logs import Logs, own_chats, own_pairs

DATA = Path(__file__).resolve().parents[1] / "data"
TALK = ("self-dialogue", "taskmaster")  # origins in the ids of data/prompts/general.jsonl.gz
ABOUT = """\
# data/own_logs

Chat logs and pairs as a company's own may be, for the tutorial `docs/your-own-data.md`: messy on purpose. No recipe of
`configs/` reads them.

Written by `tools/mess_up.py` out of the bundled data; edit that, not this page.

| file | lines | bytes |
|---|---|---|
{files}

## What is wrong with them

A dialog has one kind of mess at most; a line that is repeated or cut off repeats the line before it.

{mess}
- "Sound but for its names": turns of `conversations` with `from` and `value`, by `human` and `gpt` (ShareGPT's form); pairs as
  plain texts, with a key that nothing reads. `llamachat data convert` brings both into our form.

## Where the content comes from

- `chats.jsonl`: conversations of `data/prompts/general.jsonl.gz` with the ids `self-dialogue-*` (BSD-3-Clause) and `taskmaster-*`
  (CC BY 4.0, Bill Byrne and Saravanan Ganesh, Google LLC), and 150 questions with their answers of `data/sft/short_answers.jsonl.gz`
  (chatterbot-english, BSD-3-Clause). Changed by the mess; the tool turns, greetings and the system text are ours (Apache-2.0).
- `preferences.jsonl`: pairs of `data/helpfulness/pandalm.jsonl.gz` and `data/helpfulness/oasst.jsonl.gz` (both Apache-2.0) of up to
  500 characters, four of a prompt at most, their ratings left out.

Origins and commits: `data/prompts/SOURCE.md`, `data/sft/SOURCE.md`, `data/helpfulness/SOURCE.md`. Licence texts:
`data/licences/self-dialogue.txt`, `data/licences/chatterbot-english.txt`, `data/licences/pandalm-testset.txt`,
`data/licences/oasst-en-100.txt`.
"""


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress((DATA / name).read_bytes()).decode().splitlines()]


def _page(files: dict[str, Logs]) -> str:
    sizes = [f"| `{name}` | {len(logs.lines)} | {len(logs.text())} |" for name, logs in files.items()]
    mess = [
        f"- `{name}`: " + ", ".join(f"{count} {kind}" for kind, count in logs.mess.most_common()) + "."
        for name, logs in files.items()
    ]
    return ABOUT.format(files="\n".join(sizes), mess="\n".join(mess))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=DATA / "own_logs", help="the folder to write")
    to = parser.parse_args().to
    talks = [row["prompt"] for row in _records("prompts/general.jsonl.gz") if row["id"].startswith(TALK)]
    questions = [row["messages"] for row in _records("sft/short_answers.jsonl.gz")]
    pairs = [pair for name in ("pandalm", "oasst") for pair in _records(f"helpfulness/{name}.jsonl.gz")]
    files = {"chats.jsonl": own_chats(talks, questions), "preferences.jsonl": own_pairs(pairs)}
    to.mkdir(parents=True, exist_ok=True)
    for name, logs in files.items():
        (to / name).write_bytes(logs.text())
    (to / "SOURCE.md").write_text(_page(files), encoding="utf-8")


if __name__ == "__main__":
    main()
