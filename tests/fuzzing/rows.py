"""Random rows and data files for `tests/fuzzing/cases.py`: every form that is read, as it is and mutated."""

import copy
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# "@" becomes the number of the row, so that each record differs from all others.
Q, A = turn("user", "What is @?"), turn("assistant", "It is @.")
B = turn("assistant", "It is not @.")
# fmt: off
# By pool: rows of one form. Rows of the pools in GATHERED become one record out of several.
POOLS: dict[str, list[dict[str, Any]]] = {
    "dialogs": [
        {"messages": [Q, A]},
        {"messages": [turn("system", "Be short."), Q, A, turn("user", "And?"), A], "is_safe": True},
        {"messages": [Q, {**A, "train": False}, turn("user", "Why @?"), A]},
    ],
    "pairs": [
        {"prompt": [Q], "chosen": [A], "rejected": [B], "rating": "better", "chosen_is_safe": True},
        {"chosen": [Q, A], "rejected": [Q, B], "score_chosen": 5.0, "score_rejected": 2.0, "prompt": "What is @?"},
        {"chosen": "\n\nHuman: q @\n\nAssistant: r @", "rejected": "\n\nHuman: q @\n\nAssistant: s @"},
        {"prompt": "q @", "response_1": "a @", "response_2": "b @", "preference_strength": 2},
        {"context": [Q], "response1": "a @", "response2": "b @", "overall_preference": -2},
    ],
    "prompts": [{"prompt": [Q], "is_safety": True, "id": "n@"}, {"prompt": "What is @?"}, {"prompt": [Q]}],
    "labels": [{"prompt": "q @", "response": "r @", "category": {"a": True}, "is_safe": False}],
    "rated": [{"prompt": [Q], "answer_a": "x @", "answer_b": "y @", "choice": "a", "rating": None, "a_is_safe": None}],
    "kto": [{"prompt": "q @", "completion": "r @", "label": True}, {"prompt": [Q], "completion": [B], "label": False}],
    "tutorials": [
        {"text": "<s>[INST] q @ [/INST] r @ </s>"},
        {"text": "<s>[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nq @ [/INST] r @ </s><s>[INST] and [/INST] s </s>"},
        {"text": "### Human: q @ ### Assistant: r @"},
        {"messages": json.dumps([Q, A])},
        {"messages": {"role": ["user", "assistant"], "content": ["q @", "r @"]}},
        {"conversations": [{"from": "human", "value": "q @"}, {"from": "gpt", "value": "r @"}], "system": "s"},
        {"instruction": "i @", "input": "in", "output": "o @", "history": [["a", "b"]]},
        {"prompt": "q @", "completion": "r @"},
        {"instruction": "i @", "instances": [{"input": "", "output": "o @"}]},
        {"instruction": "i @", "context": "", "response": "r @", "category": "open_qa"},
    ],
    "sets": [
        {"prompt": "q @", "response_0": "a @", "response_1": "b @", "is_response_0_safe": True,
         "is_response_1_safe": False, "better_response_id": 0, "safer_response_id": 1},
        {"conversations": [{"from": "human", "value": "q @"}], "chosen": {"from": "gpt", "value": "a @"},
         "rejected": {"from": "gpt", "value": "b @"}},
        {"instruction": "q @", "completions": [
            {"response": "a @", "fine-grained_score": 3.2, "overall_score": 5},
            {"response": "b @", "fine-grained_score": 1.0, "overall_score": 2}], "models": ["a", "b"], "source": "x"},
        {"message_tree_id": "t@", "prompt": {"text": "q @", "role": "prompter", "replies": [
            {"text": "r @", "role": "assistant", "rank": 0, "replies": []},
            {"text": "s @", "role": "assistant", "rank": 1, "replies": []}]}},
    ],
    "helpsteer": [{"prompt": "q", "response": "r @", "helpfulness": 3, "correctness": 2, "coherence": 3,
                   "complexity": 1, "verbosity": 1},
                  {"prompt": "q", "response": "r @", "helpfulness": 1, "correctness": 2, "coherence": 3,
                   "complexity": 1, "verbosity": 1}],
    "oasst": [
        {"message_id": "m@", "parent_id": None, "message_tree_id": "t", "text": "q @", "role": "prompter", "rank": None},
        {"message_id": "a@", "parent_id": "mn1#", "message_tree_id": "t", "text": "r @", "role": "assistant", "rank": 0},
    ],
}
# fmt: on
GATHERED = ("kto", "helpsteer", "oasst")
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        3.5,
        1e308,
        10**30,
        "",
        " ",
        "\0",
        "\ud83d",
        "[INST]",
        "</s>",
        "a" * 300,
        "true",
        "NaN",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"a": 1},
        {"": ""},
        "{}",
        "[]",
        "[{}]",
        "\u202e\u2581",
        [1, "a"],
        {"role": "user"},
        [Q],
        [Q, A],
    ),
    *(
        "Human: a\n\nAssistant: b",
        "\n\nHuman: q\n\nAssistant: r",
        '[{"role": "user"}]',
        {"role": ["user"], "content": []},
    ),
    *({"from": ["human"], "value": [None]}, "<s>[INST] q [/INST]", "### Human: ### Assistant:", "2020-01-01", "a", "b"),
    *(float("nan"), float("inf"), "<b>x</b>&#99999;", "{" * 200, "k" * 5000),
]
KEYS = sorted(
    {name for rows in POOLS.values() for row in rows for name in row} | {"role", "content", "from", "value", "train"}
    | {"weight", "question", "answer", "query", "turns", "tools", "parts", "type", "id", "message", "mesages", "\x1b", ""}
)  # fmt: skip
FORMATS = [
    *(
        "native",
        "alpaca",
        "sharegpt",
        "oasst",
        "oasst_preference",
        "hh_rlhf",
        "helpsteer2",
        "helpsteer3",
        "ultrafeedback",
    ),
    *("ultrafeedback_binarized", "pku_saferlhf_safety", "pku_saferlhf_helpfulness", "rated_pairs", "self_instruct"),
    *("llamafactory_preference", "beavertails", "dolly", "gpteacher", "helpsteer2_preference", "zzz"),
]


def numbered(value: Any, number: int) -> Any:
    if isinstance(value, str):
        return value.replace("@", f"n{number}#")
    if isinstance(value, dict):
        return {name: numbered(item, number) for name, item in value.items()}
    return [numbered(item, number) for item in value] if isinstance(value, list) else value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


def mutated(r: Random, value: Any, values: Sequence[Any], keys: Sequence[Any]) -> Any:
    """A copy with one to three parts replaced, taken out, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(r.choice([1, 1, 2, 3])):
        paths = list(places(value))
        if not paths:
            break
        *parents, last = r.choice(paths)
        holder = value
        for name in parents:
            holder = holder[name]
        new, kind = copy.deepcopy(r.choice(values)), r.randrange(6)
        if kind < 3:
            holder[last] = new
        elif kind == 3:
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(r.randrange(len(holder) + 1), new)
        else:
            holder[r.choice(keys)] = holder.pop(last) if kind == 4 else new
    return value


def scrambled(r: Random, raw: bytes) -> bytes:
    """A few other bytes, or the beginning alone."""
    if r.random() < 0.25 or not raw:
        return raw[: r.randrange(len(raw) + 1)]
    changed = bytearray(raw)
    for _ in range(r.choice([1, 2, 5])):
        changed[r.randrange(len(changed))] = r.choice([*b'\0\n\r"{}[]\\,\xff\xc3', r.randrange(256)])
    return bytes(changed)


# -- data files


@dataclass
class Data:
    """A file of rows. `lines` of it hold a record each; None where the number of records is not known."""

    path: Path
    lines: int | None
    pool: str
    is_document: bool  # all rows on a line, or in one array, which is one bad line where it is not read
    whole: Mapping[int, str]  # of rows as they are in their form: by line, the mark that all their texts hold


def write_data(r: Random, folder: Path, pool: str | None = None) -> Data:
    pool = pool or r.choice(list(POOLS))
    rows: list[Any] = []
    whole: dict[int, str] = {}
    share = r.choice([0.0, 0.3, 0.7])
    for line in range(1, 1 + r.choice([1, 3, 6, 12, 40])):
        row = numbered(r.choice(POOLS[pool]), line)
        if r.random() < 0.02:
            row = copy.deepcopy(r.choice(VALUES))
        elif r.random() < share:
            row = mutated(r, row, VALUES, KEYS)
        else:
            whole[line] = f"n{line}#"
        rows.append(row)
    form = r.choice(["jsonl"] * 6 + ["jsonl.gz", "array", "json", "parquet", "parquet", "other"])
    path = folder / f"rows.{form if form not in ('array', 'other') else r.choice(['jsonl', 'json'])}"
    if form == "parquet" and _is_parquet_written(path, rows):
        if r.random() < 0.8:
            return Data(path, len(rows), pool, False, whole)
        path.write_bytes(scrambled(r, path.read_bytes()))
        return Data(path, None, pool, False, {})
    texts = [json.dumps(row, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass") for row in rows]
    if form in ("array", "json"):
        mark = b""
        raw, lines = b"[" + r.choice([b",", b",\n"]).join(texts) + b"]", len(rows)
    else:
        mark = r.choice([b"\n"] * 8 + [b"\r\n", b"\n\n", b",\n", b""]) if form == "other" else b"\n"
        raw, lines = mark.join(texts) + r.choice([b"", b"\n"]), len(rows)
    if r.random() < 0.05:
        raw = b"\xef\xbb\xbf" + raw
    if r.random() < 0.2:
        raw, whole = scrambled(r, raw), {}
        lines = sum(bool(line.strip()) for line in raw.split(b"\n")) if form == "jsonl" else None
    if path.suffix == ".gz" or r.random() < 0.02:
        raw = gzip.compress(raw)
        if r.random() < 0.2:
            raw, lines, whole = raw[: r.randrange(len(raw))], None, {}
    path = path.with_suffix(".jsonl") if path.suffix == ".parquet" else path
    path.write_bytes(raw)
    return Data(path, lines, pool, not mark or path.suffix == ".json", whole)


def _is_parquet_written(path: Path, rows: Sequence[Any]) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
        return False
    return True
