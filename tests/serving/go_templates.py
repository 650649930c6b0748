"""As much of Go's text/template as chat templates use, and the values that Ollama hands to one.

Actions with trim marks, variables, `range` over messages, `if`/`else if`/`else`, fields, and the functions `eq`, `ne`,
`not`, `and`, `printf "%.1s"`. Held once against Go itself on the dialogs of the tokenizer proof.
"""

import re
from typing import Any

WORD = re.compile(r'"[^"]*"|[()]|:=|=|[^\s()]+')


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama sends for these messages; its collecting of system texts included."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    data = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    nodes, rest = block(pieces(template))
    assert not rest, "an `end` too many"
    return run(nodes, data, {"$": data})


def pieces(template: str) -> list[tuple[bool, str]]:
    """(is action, text) in turn, white space trimmed where a mark asks for it."""
    found: list[tuple[bool, str]] = []
    for part in re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL):
        if not part.startswith("{{"):
            is_trimmed = bool(found) and found[-1][1].endswith(" -")
            found.append((False, part.lstrip() if is_trimmed else part))
            continue
        action = part[2:-2]
        if action.startswith("- "):
            found[-1] = (False, found[-1][1].rstrip())
        found.append((True, action.removeprefix("-").rstrip() if action.endswith(" -") else action.removeprefix("-")))
    return [(is_action, text.removesuffix(" -").strip() if is_action else text) for is_action, text in found]


def block(rest: list[tuple[bool, str]]) -> tuple[list[Any], list[tuple[bool, str]]]:
    """Nodes up to the `end` or `else` that closes this block, and what begins with that."""
    nodes: list[Any] = []
    while rest:
        (is_action, text), after = rest[0], rest[1:]
        if is_action and text.split(" ")[0] in ("end", "else"):
            return nodes, rest
        if is_action and text.startswith(("range ", "if ")):
            node, rest = branch(text, after)
            nodes.append(node)
            continue
        nodes.append(("do" if is_action else "text", text))
        rest = after
    return nodes, rest


def branch(text: str, rest: list[tuple[bool, str]]) -> tuple[Any, list[tuple[bool, str]]]:
    kind, _, condition = text.partition(" ")
    body, rest = block(rest)
    close = rest[0][1]
    if close == "end":
        return (kind, condition, body, []), rest[1:]
    if close == "else":
        other, rest = block(rest[1:])
        return (kind, condition, body, other), rest[1:]
    node, rest = branch(close.removeprefix("else "), rest[1:])  # `else if` shares the `end`
    return (kind, condition, body, [node]), rest


def run(nodes: list[Any], dot: Any, variables: dict[str, Any]) -> str:
    out = ""
    for kind, text, *blocks in nodes:
        if kind == "text":
            out += text
        elif kind == "do":
            words = WORD.findall(text)
            if len(words) > 1 and words[1] in (":=", "="):
                assert words[1] == ":=" or words[0] in variables
                variables[words[0]] = value(words[2:], dot, variables)
            else:
                out += str(value(words, dot, variables))
        elif kind == "if":
            out += run(blocks[0] if value(WORD.findall(text), dot, variables) else blocks[1], dot, variables)
        else:
            out += "".join(run(blocks[0], item, variables) for item in value([text], dot, variables))
    return out


def value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    arguments: list[Any] = []
    while words:
        word, words = words[0], words[1:]
        if word == "(":
            depth = end = 1
            while depth:
                depth += {"(": 1, ")": -1}.get(words[end - 1], 0)
                end += 1
            arguments.append(value(words[: end - 2], dot, variables))
            words = words[end - 1 :]
        else:
            arguments.append(operand(word, dot, variables))
    if not callable(arguments[0]):
        assert len(arguments) == 1
        return arguments[0]
    return arguments[0](*arguments[1:])


def operand(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    functions: dict[str, Any] = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "not": lambda a: not a,
        "and": lambda a, b: a and b,
        "printf": lambda form, text: form % text,
    }
    if word in functions:
        return functions[word]
    if word.startswith('"'):
        return word[1:-1]
    if word in ("true", "false"):
        return word == "true"
    name, _, field = word.partition(".")
    found = variables[name] if name else dot
    return found[field] if field else found
