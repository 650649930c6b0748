"""Messy chat logs made from a seed: every kind of mess that users' exports have, in many formats, with a tally of records."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

Turn = dict[str, Any]
WORDS = (
    *("how", "do", "I", "mend", "a", "wheel", "with", "two"),
    *("spoons", "please", "tell", "me", "why", "it", "wobbles"),
)
ODD_TEXTS = (
    *("", " ", "\n", "\u2028\x85", "\ufeff", "\U0001f6b2 caf\u00e9", "\x00\x07", "</s><s>"),
    *("[INST] hi [/INST]", "<<SYS>>", "\ud83d", "\\n", '"quoted"', "{}", "null", "x" * 5000),
    "\n\nHuman: hi\n\nAssistant: hello",
)
ODD_VALUES = (None, True, 3, -1.5, [], {}, ["a"], {"a": [None]}, "", "user")
BEYOND_JSON = ("Hello there", "{", '{"messages": [', '{"a": NaN}', '{"a": 1, "a": 2}', "{'a': 1}", "1e9999", "]", '"x"')


@dataclass(slots=True)
class Logs:
    """Lines of a file, how many records they hold (a line that cannot be read is one), and how many of them are blank."""

    lines: list[bytes] = field(default_factory=list)
    num_records: int = 0
    num_blank: int = 0

    def text(self) -> bytes:
        return b"".join(line + b"\n" for line in self.lines)


def messy_logs(number: int, seed: int) -> Logs:
    """Logs of at least this many records, each line of one kind of mess or of none; the last line is a record."""
    random, logs = Random(seed), Logs()
    while logs.num_records < number:
        kind = random.random()
        if kind < 0.02:
            _add(logs, random.choice([b"", b"  ", b"\r", b"\t"]))
        elif kind < 0.05:
            _add(logs, random.choice(BEYOND_JSON).encode())
        elif kind < 0.06:
            raw = _line(_row(random))
            _add(logs, random.choice([raw[:-7], raw.replace(b"e", b"\xe9", 1), b"[" * 5000, b"9" * 5000, raw + b" x"]))
        elif kind < 0.09:
            rows = [_row(random, of_several=True) for _ in range(random.randint(2, 3))]
            glue = random.choice([b"", b" ", b", "])
            _add(logs, random.choice([glue.join(map(_line, rows)), _line(rows)]))
        elif kind < 0.12 and logs.num_records:
            _add(logs, random.choice([line for line in logs.lines[-9:] if line.strip()] or [b"null"]))
        else:
            row = _row(random)
            mark = b"\xef\xbb\xbf" if random.random() < 0.03 else b""
            _add(logs, mark + _line(row) + random.choices([b"", b"\r", b","], [8, 1, 1])[0])
    while not logs.lines[-1].strip():
        logs.lines.pop()
        logs.num_blank -= 1
    return logs


def _add(logs: Logs, line: bytes) -> None:
    logs.lines.append(line)
    logs.num_records += len(records_of(line))
    logs.num_blank += not line.strip()


def records_of(line: bytes) -> list[object]:
    """The records of a line: several objects on it, or in a list, are one each; a line that cannot be read is one."""
    decoder, position, values = json.JSONDecoder(), 0, []
    try:
        text = line.decode().lstrip("\ufeff").strip()
        while position < len(text):
            value, position = decoder.raw_decode(text, position)
            values.append(value)
            while position < len(text) and text[position] in " ,":
                position += 1
    except (ValueError, RecursionError):
        return [None]
    if not all(isinstance(value, dict | list) for value in values):
        return [None]
    return [record for value in values for record in _unrolled(value)]


def _unrolled(value: object) -> list[object]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict | list) for item in value):
        return [value]
    is_dialog = all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    return [value] if is_dialog else value


def _line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _row(random: Random, *, of_several: bool = False) -> Any:
    made = random.choices([make for make, _ in _FORMS], [weight for _, weight in _FORMS])[0](random)
    if of_several and not isinstance(made, dict):
        made = {"messages": made}
    return _spoilt(random, made) if random.random() < 0.15 else made


def _text(random: Random) -> Any:
    if random.random() < 0.03:
        return random.choice(ODD_TEXTS)
    return " ".join(random.choices(WORDS, k=random.randint(1, 12)))


def _turns(random: Random, names: Sequence[str], role: str, content: str) -> list[Turn]:
    """A conversation, often with the faults of logs: greeting first, two in a row, a trailing question, a tool, nothing said."""
    user, assistant, system = names
    turns: list[Turn] = []
    if random.random() < 0.2:
        turns.append({role: system, content: _text(random)})
    if random.random() < 0.15:
        turns.append({role: assistant, content: "Hello! How can I help?"})
    for _ in range(random.randint(1, 4)):
        for name in (user, assistant):
            turns += [{role: name, content: _text(random)} for _ in range(random.choices([1, 2, 0], [20, 2, 1])[0])]
    extras: list[Callable[[], Turn]] = [
        lambda: {role: user, content: _text(random)},
        lambda: {role: random.choice(["tool", "function", "observation"]), content: "{}"},
        lambda: {role: assistant, content: random.choice(["", " ", None])},
        lambda: {role: system, content: _text(random)},
        lambda: {role: random.choice(["narrator", "", "User ", "GPT"]), content: _text(random)},
        lambda: {role: user, content: [{"type": "text", "text": _text(random)}, {"type": "image_url"}]},
        lambda: {role: user, content: [{"type": "text", "text": _text(random)}]},
        lambda: {role: assistant, content: _text(random), "weight": random.choice([0, 1, 2])},
        lambda: {role: assistant, content: _text(random), random.choice(["train", "trian"]): random.random() < 0.5},
        lambda: {role: user, content: _text(random), random.choice(["id", "name"]): random.choice(ODD_VALUES)},
    ]
    if random.random() < 0.4:
        turns.insert(random.randint(0, len(turns)), random.choice(extras)())
    if random.random() < 0.2:
        turns.append({role: user, content: _text(random)})
    return turns


def _native(random: Random) -> Any:
    return {"messages": _turns(random, ("user", "assistant", "system"), "role", "content")}


def _openai(random: Random) -> Any:
    turns = _turns(random, ("user", "assistant", "developer"), "role", "content")
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": {"name": "f"}}]}
    tools = [call, {"role": "tool", "tool_call_id": "x", "content": "{}"}] if random.random() < 0.3 else []
    return {"messages": [*turns, *tools], "parallel_tool_calls": False}


def _sharegpt(random: Random) -> Any:
    names = (random.choice(["human", "user"]), random.choice(["gpt", "chatgpt", "bing"]), "system")
    key = random.choice(["conversations", "conversation"])
    return {"id": f"r{random.randint(0, 9**9)}", key: _turns(random, names, "from", "value")}


def _bare(random: Random) -> Any:
    return _turns(random, ("user", "assistant", "system"), "role", "content") or [{"role": "user", "content": "a"}]


def _alpaca(random: Random) -> Any:
    row = {"instruction": _text(random), "input": random.choice(["", None, _text(random)]), "output": _text(random)}
    return row | ({"history": [[_text(random), _text(random)]]} if random.random() < 0.1 else {})


def _dolly(random: Random) -> Any:
    return {"instruction": _text(random), "context": _text(random), "response": _text(random), "category": "open_qa"}


def _halves(random: Random) -> Any:
    question = random.choice(["prompt", "question", "query", "input"])
    return {question: _text(random), random.choice(["completion", "answer", "response"]): _text(random)}


def _beavertails(random: Random) -> Any:
    return {
        "prompt": _text(random),
        "response": _text(random),
        "category": {"x": True},
        "is_safe": random.random() < 0.5,
    }


def _labelled(random: Random) -> Any:
    labels = ("is_safe", "is_safety", "isafe", "rating", "prompt_id", "id", "messages_id", "system")
    values = (True, "true", "False", None, 3, "better", "Be brief.")
    return _native(random) | {random.choice(labels): random.choice(values)}


def _preference(random: Random) -> Any:
    sides: dict[str, Any] = {"chosen": _text(random), "rejected": _text(random)}
    prompt: Any = _text(random)
    if random.random() < 0.5:
        sides = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        prompt = [{"role": "user", "content": prompt}]
    labels = {"rating": random.choice(["better", "Much better", "unsure", "10/10", 2]), "prompt_id": "x"}
    return {"prompt": prompt, **sides, **dict(random.sample(list(labels.items()), random.randint(0, 2)))}


def _hh(random: Random) -> Any:
    prompt = f"\n\nHuman: {_text(random)}\n\nAssistant: "
    return {"chosen": prompt + str(_text(random)), "rejected": prompt + str(_text(random))}


def _pku(random: Random) -> Any:
    answers = {f"response_{index}": _text(random) for index in range(2)}
    labels = {f"is_response_{index}_safe": random.random() < 0.5 for index in range(2)}
    return {"prompt": _text(random), **answers, **labels, "better_response_id": 0, "safer_response_id": 1}


def _helpsteer3(random: Random) -> Any:
    return {
        "context": [{"role": "user", "content": _text(random)}],
        "response1": _text(random),
        "response2": _text(random),
        "overall_preference": random.choice([-3, -1, 0, 2, 4, None]),
    }


def _prompt(random: Random) -> Any:
    return {"prompt": [{"role": "user", "content": _text(random)}], "is_safety": random.choice([True, "true", 1])}


def _wild(random: Random) -> Any:
    names = ("messages", "mesages", "prompt", "chosen", "conversations", "instances", "role", "message_tree_id", "text")
    return {name: random.choice(ODD_VALUES) for name in random.sample(names, random.randint(0, 4))}


_FORMS: tuple[tuple[Callable[[Random], Any], float], ...] = (
    *((_native, 30), (_openai, 10), (_sharegpt, 20), (_bare, 3), (_alpaca, 8), (_dolly, 4), (_halves, 6)),
    *((_beavertails, 3), (_labelled, 6), (_preference, 4), (_hh, 2), (_pku, 2), (_helpsteer3, 2), (_prompt, 2)),
    (_wild, 3),
)


def _spoilt(random: Random, row: Any) -> Any:
    """The row with something in it, at any depth, replaced, renamed or taken away."""
    if not row or not isinstance(row, dict | list):
        return random.choice(ODD_VALUES[2:])
    if isinstance(row, list):
        index = random.randrange(len(row))
        return [*row[:index], _spoilt(random, row[index]), *row[index + 1 :]]
    name = random.choice(list(row))
    rest = {key: value for key, value in row.items() if key != name}
    action = random.random()
    if action < 0.2:
        return rest
    if action < 0.4:
        return rest | {random.choice([name.upper(), name[:-1], f"{name}_2", f"{name}s"]): row[name]}
    if action < 0.7 and isinstance(row[name], dict | list) and row[name]:
        return rest | {name: _spoilt(random, row[name])}
    return rest | {name: random.choice([*ODD_VALUES, *ODD_TEXTS])}
