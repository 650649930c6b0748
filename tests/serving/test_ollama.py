"""The Modelfile: its Go template, put into the words of Jinja, against texts written out and the tokenizer's own template."""

import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from transformers import AutoTokenizer

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.proof import proof_prompts
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.errors import UsageError
from serving.gguf import modelfile

# Every statement of the template, in Jinja's words; one that is not here is a KeyError.
IN_JINJA = {
    "$first := true": "set state = namespace(first=true)",
    "range .Messages": "for message in messages",
    'if eq .Role "user"': 'if message.role == "user"',
    "if $first": "if state.first",
    "if $.System": "if system",
    "$.System": "system",
    "$first = false": "set state.first = false",
    "else": "else",
    'else if and (eq .Role "assistant") (not $first)': 'elif message.role == "assistant" and not state.first',
    'if ne (printf "%.1s" .Content) " "': 'if message.content[:1] != " "',
    ".Content": "message.content",
}


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama sends for these messages; its collecting of system texts included."""
    opened: list[str] = []

    def in_jinja(match: re.Match[str]) -> str:
        left, go, right = match.groups()
        words = f"end{opened.pop()}" if go == "end" else IN_JINJA[go]
        if go.startswith(("range ", "if ")):
            opened.append(words.split()[0])
        marks = ("{{", "}}") if words in ("system", "message.content") else ("{%", "%}")
        return f"{marks[0]}{left} {words} {right}{marks[1]}"

    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    jinja = re.sub(r"\{\{(-?) ?(.*?) ?(-?)\}\}", in_jinja, template)
    return Environment().from_string(jinja).render(messages=messages, system=system)


def read(text: str) -> dict[str, list[str]]:
    """The commands of a Modelfile with their values, quoted over lines or not."""
    commands: dict[str, list[str]] = {}
    for name, long, short in re.findall(r'^([A-Z]+) (?:"""(.*?)"""|([^\n]*))$', text, flags=re.MULTILINE | re.DOTALL):
        commands.setdefault(name, []).append(long or short)
    return commands


@pytest.fixture
def template(tiny_format: ChatFormat) -> str:
    return read(modelfile("x.gguf", tiny_format, system=None, max_tokens=64))["TEMPLATE"][0]


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))]


def test_prompts_are_those_of_llama_2_without_the_first_bos(template: str):
    one = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST]"
    assert render(template, turns("Hi!", system="Be brief.")) == one
    three = "[INST] a [/INST] b </s><s>[INST] c [/INST] d </s><s>[INST] e [/INST]"
    assert render(template, turns("a", "b", "c", "d", "e")) == three
    assert render(template, turns("a", " b", "c", " d", "e")) == three  # as Ollama gives answers back
    # Where Ollama cuts a long conversation, an answer may come first.
    assert render(template, turns("a", "b", "c")[1:]) == "[INST] c [/INST]"


def test_every_dialog_of_the_proof_reads_as_in_the_tokenizers_own_template(
    template: str, tiny_format: ChatFormat, tmp_path: Path
):
    write_tokenizer(tiny_format.tokenizer, tmp_path, tiny_format.chat_template)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    compared = 0
    for messages in proof_prompts(tiny_format):
        dialog = [{"role": message.role, "content": message.content} for message in messages]
        if dialog[0] == {"role": "system", "content": ""}:  # Ollama knows no empty system text
            continue
        assert "<s>" + render(template, dialog) == tokenizer.apply_chat_template(dialog, tokenize=False)
        compared += 1
    assert compared > 30


def test_the_modelfile_samples_as_chat_does_and_stops_at_the_formats_tags(tiny_format: ChatFormat):
    commands = read(modelfile("x.gguf", tiny_format, system='Say "yes"\nor "no"', max_tokens=64))
    assert commands["FROM"] == ["./x.gguf"]
    assert commands["SYSTEM"] == ['Say "yes"\nor "no"']
    values = {"num_ctx 64", "temperature 0.7", "top_p 0.9", "top_k 0", "min_p 0", "repeat_penalty 1"}
    assert set(commands["PARAMETER"]) == values | {
        f'stop "{tag}"' for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    }


@pytest.mark.parametrize(("system", "reason"), [('a """ b', "three quotes in a row"), ("a\u00a0b", r"'\\xa0'")])
def test_a_system_text_that_a_modelfile_would_change_is_refused(system: str, reason: str, tiny_format: ChatFormat):
    with pytest.raises(UsageError, match=rf"--format ollama: .* holds .*{reason}.*--format gguf"):
        modelfile("x.gguf", tiny_format, system=system, max_tokens=64)
