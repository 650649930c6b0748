"""Messages, records and lines of files, as the tests of the data door write them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def user(text: object, **more: object) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: object, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: object) -> dict[str, Any]:
    return {"role": "system", "content": text}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [answer(text) if index % 2 else user(text) for index, text in enumerate(texts)]


def dialog(*messages: object, **more: object) -> str:
    return json.dumps({"messages": messages, **more})


def pair(**fields: object) -> str:
    sound = {"prompt": [user("Hi")], "chosen": [answer("Hello!")], "rejected": [answer("No.")]}
    return json.dumps({key: value for key, value in (sound | fields).items() if value is not ...})


def prompt(messages: object, **more: object) -> str:
    return json.dumps({"prompt": messages, **more})


def shared(*turns: tuple[str, object], **more: object) -> str:
    return json.dumps({"conversations": [{"from": sender, "value": text} for sender, text in turns], **more})


def write(path: Path, rows: Iterable[object]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


GOOD = dialog(user("Hi"), answer("Hello!"))
