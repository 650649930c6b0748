"""A conversation, and the rules that it must satisfy before it is tokenized.

The rules are those of Meta's reference chat code (facebookresearch/llama, llama/generation.py): optional system text,
then alternating user and assistant turns, starting with the user. `train` is ours: an answer with `train: false` is
context, not a target. As in the reference code, an empty system text is valid and tokenized differently from none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from llamachat.errors import kind_word

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
EndsWith = Literal["user", "assistant", "either"]

# Names of the three roles in other tools; the error message suggests ours.
ROLE_ALIASES: dict[str, Role] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train: False` excludes an answer from the loss; None and True leave the choice to the stage."""

    role: Role
    content: str
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Dialog:
    """A conversation, with a safety label of its last answer if it has one."""

    messages: tuple[Message, ...]
    is_safe: bool | None = None


class DialogError(ValueError):
    """A record violates a rule: the field, what is wrong and why it matters, and how to fix it.

    The file reader prefixes `file:line`.
    """

    def __init__(self, field: str, reason: str, fix: str) -> None:
        super().__init__(f"{field}: {reason} {fix}")
        self.field = field
        self.reason = reason
        self.fix = fix

    def __reduce__(self) -> tuple[type["DialogError"], tuple[str, str, str]]:
        # Exceptions are pickled by `args`, here one text instead of three arguments; worker processes pickle this one.
        return type(self), (self.field, self.reason, self.fix)


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Prepend the system text, if there is one and the messages have none."""
    if system is None or messages[0].role == "system":
        return tuple(messages)
    return (Message("system", system), *messages)


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Role and content of each message, as used by chat templates and JSON files."""
    return [{"role": message.role, "content": message.content} for message in messages]


def parse_messages(value: object, *, field: str = "messages") -> tuple[Message, ...]:
    """Parse messages from decoded JSON and check their types and roles; `check_messages` checks their order."""
    if not isinstance(value, list):
        raise DialogError(
            field,
            f"is {kind_word(value)}, but a conversation is a list of messages.",
            'Write [{"role": "user", "content": "..."}, ...].',
        )
    return tuple(parse_message(item, f"{field}[{index}]") for index, item in enumerate(value))


def check_messages(messages: Sequence[Message], *, ends_with: EndsWith, field: str = "messages") -> None:
    """Raise `DialogError` for the first rule that the conversation violates."""
    if not messages:
        raise DialogError(field, "is empty, but a conversation needs at least one user turn.", "Drop the record.")
    first_turn = 1 if messages[0].role == "system" else 0
    if len(messages) == first_turn:
        raise DialogError(
            field,
            "contains only a system text, but that is sent with the first user turn.",
            "Add the user turn, or drop the record.",
        )
    for index, message in enumerate(messages):
        check_message(message, f"{field}[{index}]")
        if index >= first_turn:
            _check_order(messages, index, first_turn, field)
    _check_end(messages, ends_with, field)


def check_texts(messages: Sequence[Message], forbidden: Sequence[str], *, field: str = "messages") -> None:
    """Raise `DialogError` for the first message that contains a tag of the chat format (`ChatFormat.forbidden`)."""
    for index, message in enumerate(messages):
        for tag in forbidden:
            position = message.content.find(tag)
            if position >= 0:
                raise DialogError(
                    f"{field}[{index}].content",
                    f"holds '{tag}' at character {position}, a tag of the chat format: the model would read what "
                    "follows as another turn.",
                    "Take the tag out or write it otherwise, or drop the record.",
                )


def parse_message(item: object, field: str) -> Message:
    """Parse one message from decoded JSON and check its types and role."""
    if not isinstance(item, (dict, Mapping)):
        raise DialogError(
            field, f"is {kind_word(item)}, but a message is an object.", 'Write {"role": ..., "content": ...}.'
        )
    message = cast(Mapping[object, object], item)
    for key in ("role", "content"):
        if key not in message:
            keys = ", ".join(repr(name) for name in message) or "nothing"
            raise DialogError(f"{field}.{key}", f"is missing; the message holds {keys}.", f"Name the {key} '{key}'.")
    role, content, train = message["role"], message["content"], message.get("train")
    if role not in ROLES:
        alias = ROLE_ALIASES.get(role.lower()) if isinstance(role, str) else None
        fix = f"Write '{alias}'" if alias else "Rename it, or drop the record"
        raise DialogError(
            f"{field}.role",
            f"is {role!r}, but the roles are 'system', 'user' and 'assistant'.",
            f"{fix} (`llamachat data convert` maps the usual names).",
        )
    if not isinstance(content, str):
        raise DialogError(
            f"{field}.content",
            f"is {kind_word(content)}, but only text becomes tokens.",
            "Write one string, the parts joined.",
        )
    if train is not None and not isinstance(train, bool):
        raise DialogError(f"{field}.train", f"is {train!r}, but it is true, false or absent.", "Write true or false.")
    return Message(cast(Role, role), content, train)


def check_message(message: Message, field: str) -> None:
    """Raise `DialogError` for empty or unencodable text, and for `train` on a turn that is not an answer."""
    if message.role != "system" and not message.content.strip():
        what = (
            "A model trained on it learns to say nothing"
            if message.role == "assistant"
            else "There is nothing to answer"
        )
        raise DialogError(f"{field}.content", f"is empty. {what}.", "Write the text, or drop the turn or the record.")
    try:
        if not message.content.isascii():
            message.content.encode()
    except UnicodeEncodeError as error:
        character = ascii(message.content[error.start])
        raise DialogError(
            f"{field}.content",
            f"holds {character} at character {error.start}, half of a character, which no tokenizer can encode.",
            "Write the whole character, or take the half out.",
        ) from error
    if message.train and message.role != "assistant":
        raise DialogError(
            f"{field}.train",
            f"is true on a {message.role} turn, but only answers are trained on.",
            "Take 'train' out of this turn.",
        )


def _check_order(messages: Sequence[Message], index: int, first_turn: int, field: str) -> None:
    role = messages[index].role
    due: Role = "user" if (index - first_turn) % 2 == 0 else "assistant"
    if role == due:
        return
    where = f"{field}[{index}].role"
    if role == "system":
        raise DialogError(
            where, "is 'system', which is allowed only as the first message.", "Move its text into the first message."
        )
    if index == first_turn:
        raise DialogError(
            where,
            "is 'assistant', but the user speaks first.",
            "Drop the leading answer (`llamachat data convert` does it), or add the question.",
        )
    raise DialogError(
        where,
        f"is '{role}' twice in a row, but user and assistant take turns.",
        "Merge the two turns (`llamachat data convert` does it), or add the missing one.",
    )


def _check_end(messages: Sequence[Message], ends_with: EndsWith, field: str) -> None:
    last = messages[-1].role
    if ends_with == "either" or last == ends_with:
        return
    where = f"{field}[{len(messages) - 1}].role"
    if ends_with == "assistant":
        raise DialogError(
            where,
            "is 'user' at the end, but training needs the answer.",
            "Add the answer, or drop the question (`llamachat data convert` does it).",
        )
    raise DialogError(
        where,
        "is 'assistant' at the end, but a prompt ends with what is to be answered.",
        "Drop the last answer from the prompt.",
    )
