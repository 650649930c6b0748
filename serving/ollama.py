"""The Modelfile with which Ollama serves a GGUF file as the policy was trained.

Written from Ollama's documents (https://docs.ollama.com/modelfile) and the source of its parser. One thing surprises:
that parser drops every character of a quoted text that Go does not call printable, so such a system text is refused.
"""

import unicodedata

from llamachat.chat_format import ChatFormat
from llamachat.errors import UsageError

# What `llamachat chat` samples with; Ollama's own defaults have a top-k, a min-p and penalties.
PARAMETERS = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0, "repeat_penalty": 1}
QUOTE = '"""'


def modelfile(file: str, chat_format: ChatFormat, *, system: str | None, max_tokens: int) -> str:
    """The Modelfile beside the GGUF file of this name."""
    lines = [f"FROM ./{file}", "", f"TEMPLATE {QUOTE}{chat_format.go_template}{QUOTE}", ""]
    if system:
        check_system(system)
        lines += [f"SYSTEM {QUOTE}{system}{QUOTE}", ""]
    lines.append(f"PARAMETER num_ctx {max_tokens}")
    lines += [f"PARAMETER {name} {value}" for name, value in PARAMETERS.items()]
    # The stop token ends an answer by itself; a tag of the format in it would be read as the next turn.
    lines += [f'PARAMETER stop "{tag}"' for tag in chat_format.forbidden]
    return "\n".join(lines) + "\n"


def check_system(system: str) -> None:
    """Refuse a system text that a Modelfile cannot hold as it is."""
    lost = sorted({character for character in system if not _is_kept(character)})
    if QUOTE in system or lost:
        found = "three quotes in a row" if QUOTE in system else f"the character {lost[0]!a}"
        raise UsageError(
            f"--format ollama: the policy's system text holds {found}, which a Modelfile cannot quote. The policy was "
            "trained with that text as it is. Export with --format gguf, and send the system text yourself."
        )


def _is_kept(character: str) -> bool:
    """Whether it is white space of ASCII or what Go's strconv.IsPrint calls printable."""
    return character in " \t\n\r" or unicodedata.category(character)[0] not in "CZ"
