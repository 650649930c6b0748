"""Chat with a policy: one answer, or a conversation with history, streamed while sampling.

Reads and writes through two functions, so that terminals, pipes and tests work the same way. Only the answer is shown:
no stop token, and no control character that could affect the terminal.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import category

from llamachat.chat_format.dialog import DialogError, Message, as_dicts, check_messages, with_system
from llamachat.chat_format.format import fit
from llamachat.errors import UsageError
from llamachat.models.loading import Policy
from llamachat.rollout.engine import Completion, LocalEngine, Sampling
from llamachat.tables import plural
from serving.context import longest_dialog, open_engine

log = logging.getLogger(__name__)

Write = Callable[[str], object]

HELP = (
    "/retry        answer the last message again\n"
    "/save FILE    append the conversation to a JSON lines file that data.sft reads\n"
    "/system TEXT  start a new conversation with this system text (without TEXT: with none)\n"
    "/reset        start a new conversation\n"
    "/quit         end\n"
)
HALF_A_CHARACTER = "\ufffd"


def chat_once(policy: Policy, text: str, *, system: str | None, sampling: Sampling, write: Write) -> str:
    """Sample the policy's answer to one message and write it piece by piece.

    `system` None is the text that the policy was trained with, "" is no text. Truncation is logged, so that only the
    answer is written.
    """
    conversation = Conversation(policy, system=_system(policy, system))
    return conversation.ask(text, sampling=sampling, write=write, note=lambda text: log.warning("%s", text))


def chat_loop(
    policies: Sequence[Policy], *, system: str | None, sampling: Sampling, read: Callable[[str], str], write: Write
) -> None:
    """Hold a conversation with one or several policies until `/quit` or the end of the input.

    `read` shows its argument and returns a line or raises EOFError. Ctrl-C stops an answer, which is then discarded.
    """
    conversations = [
        Conversation(policy, system=_system(policy, system), label=label)
        for policy, label in zip(policies, labels(policies), strict=True)
    ]
    write(f"{', '.join(conversation.label for conversation in conversations)}. /help names the commands.\n")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            write("\n")
            return
        if line == "/quit":
            return
        if line == "/retry":
            if question := conversations[0].question:
                for conversation in conversations:
                    conversation.retract()
                _ask_all(question, conversations, sampling=sampling, write=write)
            else:
                write("(nothing was asked yet)\n")
        elif line.startswith("/"):
            write(_obey(line, conversations))
        elif line:
            _ask_all(line, conversations, sampling=sampling, write=write)


def labels(policies: Sequence[Policy]) -> list[str]:
    """A unique name for each policy, even for two copies of one run."""
    names = [policy.name for policy in policies]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]


@dataclass(slots=True)
class Conversation:
    """The conversation with one policy."""

    policy: Policy
    system: str | None
    label: str = ""
    turns: list[Message] = field(default_factory=list)
    num_questions: int = 0
    question: str = ""  # the last one
    is_answered: bool = False  # whether it and its answer are the last turns
    engine: LocalEngine = field(init=False)

    def __post_init__(self) -> None:
        self.engine = open_engine(self.policy)

    def ask(self, text: str, *, sampling: Sampling, write: Write, note: Write) -> str:
        """Sample and write the answer to the next message; both join the history if the answer is valid there."""
        prompt = self._prompt(text, max_new_tokens=sampling.max_new_tokens)
        self.question, self.is_answered = text, False
        printer = _Printer(self.policy, write)
        # The same random numbers in every turn would repeat one unlikely draw in every answer.
        completion = self.engine.stream(
            self.policy.chat_format.encode_prompt(prompt),
            sampling=replace(sampling, seed=sampling.seed + self.num_questions),
            on_token=printer.add,
        )
        answer = printer.finish(completion)
        self.num_questions += 1
        if not completion.is_finished:
            note(f"(cut after {len(completion.token_ids)} tokens)")
        pair = [Message("user", text), Message("assistant", answer)]
        try:
            check_messages(pair, ends_with="assistant")
            self.policy.chat_format.check_text(pair)
        except DialogError as error:
            # The rest of the reason only concerns training.
            reason = error.reason.partition(". ")[0].rstrip(".")
            note(f"(left out of the conversation: the answer {reason})")
        else:
            self.turns += pair
            self.is_answered = True
        return answer

    def retract(self) -> None:
        """Forget the last question and its answer."""
        if self.is_answered:
            del self.turns[-2:]
            self.is_answered = False

    def reset(self, system: str | None) -> None:
        """Clear the history and start with this system text."""
        self.turns.clear()
        self.question, self.is_answered = "", False
        self.system = system

    def _prompt(self, text: str, *, max_new_tokens: int) -> tuple[Message, ...]:
        messages = with_system([*self.turns, Message("user", text)], self.system)
        limit = longest_dialog(self.policy, self.engine)
        try:
            fitting = fit(self.policy.chat_format, messages, limit=limit, max_new_tokens=max_new_tokens)
        except DialogError as error:
            raise UsageError(f"The message cannot be sent: its text {error.reason} {error.fix}") from error
        if fitting is None:
            raise UsageError(
                f"The message is too long: with its system text it has more than the {limit - 1} tokens that "
                f"{self.policy.name} can read and still answer. Shorten it."
            )
        return fitting


class _Printer:
    """Writes the new part of an answer as its tokens arrive."""

    def __init__(self, policy: Policy, write: Write) -> None:
        self._policy = policy
        self._write = write
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        # A multi-byte character may be incomplete, so it is held back until it is complete.
        self._show(self._text().rstrip(HALF_A_CHARACTER))

    def finish(self, completion: Completion) -> str:
        """Write the held-back rest and a line break; return the answer."""
        self._ids = list(completion.token_ids)
        self._show(self._text())
        self._write("\n")
        return self._policy.chat_format.decode_answer(completion.token_ids)

    def _text(self) -> str:
        answer = self._policy.chat_format.decode_answer(self._ids)
        return "".join(character for character in answer if character in "\n\t" or category(character) != "Cc")

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self._write(text[len(self._shown) :])
            self._shown = text


def _system(policy: Policy, override: str | None) -> str | None:
    return policy.system if override is None else override or None


def _ask_all(text: str, conversations: Sequence[Conversation], *, sampling: Sampling, write: Write) -> None:
    for conversation in conversations:
        if len(conversations) > 1:
            write(f"[{conversation.label}]\n")
        try:
            conversation.ask(text, sampling=sampling, write=write, note=lambda text: write(f"{text}\n"))
        except UsageError as error:
            write(f"{error}\n")
        except KeyboardInterrupt:
            write("\n(stopped, and forgotten)\n")
            return


def _obey(line: str, conversations: Sequence[Conversation]) -> str:
    """Run a chat command and return its message."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/reset":
        for conversation in conversations:
            conversation.reset(conversation.system)
        return "(a new conversation)\n"
    if command == "/system":
        messages = with_system([Message("user", "?")], argument or None)
        for conversation in conversations:
            try:
                conversation.policy.chat_format.check_text(messages)
            except DialogError as error:
                return f"(unchanged: the system text {error.reason} {error.fix})\n"
        for conversation in conversations:
            conversation.reset(argument or None)
        return f"(a new conversation with {'this' if argument else 'no'} system text)\n"
    if command == "/save" and argument:
        return _save(argument, conversations)
    return HELP


def _save(file: str, conversations: Sequence[Conversation]) -> str:
    """Append each conversation that has an answer to a file of dialogs; the line to show."""
    dialogs = [with_system(one.turns, one.system) for one in conversations if one.turns]
    rows = [json.dumps({"messages": as_dicts(dialog)}, ensure_ascii=False) for dialog in dialogs]
    try:
        with Path(file).open("a", encoding="utf-8") as out:
            out.writelines(f"{row}\n" for row in rows)
    except OSError as error:
        return f"(not saved: {file}: {error.strerror})\n"
    return f"({file}: {plural(len(rows), 'conversation')} appended)\n"
