"""Every command that the documentation and `--help` show is one that the program takes: its name, options and values, the
keys of its recipe, the targets and variables of the Makefile, the modules and files of Python.
"""

import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from llamachat import __version__
from llamachat.config.section import all_keys
from pipelines.cli.help import EXAMPLES, PROGRAM_EXAMPLES, commands_of
from pipelines.cli.main import app, main
from pipelines.recipe.recipe import RecipeSections, is_study, load
from pipelines.recipe.stages import STAGES
from pipelines.studies.definition import load_study

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")] + sorted((ROOT / "docs").rglob("*.md"))
OURS = re.compile(
    r"(?:\.venv/bin/)?(?:llamachat|make|python|torchrun|accelerate)\b|cd \S+ && make\b|[A-Z_]+=\S+ +make\b"
)
IN_PROSE = re.compile(r"`((?:\.venv/bin/)?(?:llamachat|make) [a-z][^`]*)`")
OPERATORS = {"&&", "||", "|", ";", "<", ">"}
VARIABLES = {"CONFIG", "ARGS", "VENV", "LAUNCH", "PYTHON"}
PROGRAM = cast(TyperGroup, get_command(app))
RECIPE_TARGETS = {*STAGES, "all", "plan", "doctor", "chat", "dashboard", "base"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def code_lines(page: Path) -> Iterator[str]:
    """The lines of a page's fenced and indented blocks, those that end in a backslash joined with the next."""
    is_fenced, begun = False, ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            begun += line.strip()
            if not begun.endswith("\\"):
                yield begun
                begun = ""
            begun = begun.removesuffix("\\")


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a shell line, without assignments before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in OPERATORS:
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
            words.append(word)


def resolved(arguments: list[str]) -> tuple[str, Any, list[str]]:
    """The name of the command that these begin with, the command, and the arguments after it."""
    for name, command in commands_of(PROGRAM):
        words = name.split()
        if arguments[: len(words)] == words:
            return name, command, arguments[len(words) :]
    raise LookupError(f"there is no command {arguments[:1]}")


def check_llamachat(arguments: list[str]) -> None:
    """Parse the arguments as the program does, and load the recipe or study with its overrides."""
    if arguments[:1] in (["--help"], ["--version"], ["--install-completion"]):
        return
    name, command, rest = resolved(arguments)
    if rest == ["--help"]:
        return
    values = command.make_context(name, list(rest)).params
    if values.get("overrides") and "config" in values:
        load_once(values["config"], *values["overrides"])


@cache
def load_once(path: Path, *overrides: str) -> None:
    """Load a recipe or study with these values over it; as it is, each is loaded elsewhere (tests/test_architecture.py)."""
    own = [value for value in overrides if not value.startswith("run.parent=")]
    if path.stem.startswith("smollm2-"):  # its base is fetched by a command
        own.append("base.model=assets/base")
    if own:
        load_study(path, own) if is_study(path) else load(path, own)


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {*STAGES, "all", *re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)}
    assert set(targets) <= known, f"no such target: {targets}"
    assert set(variables) <= VARIABLES, f"no such variable: {list(variables)}"
    if "CONFIG" in variables:
        assert Path(variables["CONFIG"]).is_file() or variables["CONFIG"].startswith("my/")
    for target in RECIPE_TARGETS & set(targets):
        config = ["--config", variables["CONFIG"]] if "CONFIG" in variables else []
        fixed = ["smollm2-135m"] if target == "base" else config
        check_llamachat([target, *fixed, *shlex.split(variables.get("ARGS", ""))])
    if "LAUNCH" in variables:
        check(shlex.split(variables["LAUNCH"]))


def check(words: list[str]) -> None:
    """Raise where the command is none of ours; other programs' commands pass."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "llamachat":
        check_llamachat(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "python" and arguments[:1] == ["-m"]:
        assert find_spec(arguments[1]) is not None
    elif program == "python" and arguments:
        assert Path(arguments[0]).is_file() or arguments[0] == "-c"
    elif program in ("accelerate", "torchrun"):
        for option, value in itertools.pairwise(arguments):
            assert option != "--config_file" or Path(value).is_file()
        if "pipelines" in arguments:
            check_llamachat(arguments[arguments.index("pipelines") + 1 :])


def check_in_prose(words: list[str]) -> None:
    """A command inside a sentence may lack arguments: its name and its options exist."""
    if words[0] == "make":
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)]
        check_make(targets)
        return
    _, command, rest = resolved(words[1:])
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert used <= {*options, "--help"}, f"no such option: {used - options}"


def fault(words: list[str], checked: Any) -> str | None:
    try:
        checked(words)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_every_command_in_a_block_of_the_documentation_is_taken() -> None:
    faults, count = [], 0
    for page in PAGES:
        for line in code_lines(page):
            if OURS.match(line) and not re.search(r"\s\[(?!\d)", line.partition(" #")[0]):  # not a synopsis
                for words in simple_commands(line):
                    count += 1
                    if text := fault(words, check):
                        faults.append(f"{page.relative_to(ROOT)}: {line}\n    {text}")
    assert not faults, "\n".join(faults)
    assert count > 80, "the blocks were read"


def test_every_command_in_a_sentence_of_the_documentation_exists() -> None:
    faults, count = [], 0
    for page in PAGES:
        text = re.sub(r"^```(?s:.*?)^```$|^    .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for shown in IN_PROSE.findall(" ".join(text.split())):
            count += 1
            words = [word.strip("[]") for word in shlex.split(shown.removeprefix(".venv/bin/"))]
            if text_of_fault := fault(words, check_in_prose):
                faults.append(f"{page.relative_to(ROOT)}: {shown}\n    {text_of_fault}")
    assert not faults, "\n".join(faults)
    assert count > 60, "the sentences were read"


def test_every_key_that_the_documentation_names_exists() -> None:
    keys = set(all_keys(RecipeSections))
    sections = "|".join(RecipeSections.model_fields)
    named = re.compile(rf"`((?:{sections})\.[a-z][a-z0-9_.]*)(?:[=:][^`]*)?`")
    files = re.compile(r"\.(?:py|md|json|jsonl|yaml|html|png|txt|gz)$")
    unknown = []
    for page in PAGES:
        for key in named.findall(page.read_text(encoding="utf-8")):
            parts = key.split(".")
            prefixes = {".".join(parts[:end]) for end in range(2, len(parts) + 1)}
            if not (prefixes & keys or any(known.startswith(f"{key}.") for known in keys) or files.search(key)):
                unknown.append(f"{page.relative_to(ROOT)}: {key}")
    assert not unknown


def test_every_example_of_help_is_taken_and_every_command_has_one() -> None:
    shown = {name: lines for commands in EXAMPLES.values() for name, lines in commands.items()}
    assert set(shown) == {name for name, _ in commands_of(PROGRAM)}
    for line in (*PROGRAM_EXAMPLES, *(line for lines in shown.values() for line in lines)):
        (words,) = simple_commands(line)
        assert fault(words, check) is None, line
    for name, lines in shown.items():
        assert all(line.startswith(f"llamachat {name}") for line in lines)


# -- what `--help` shows


def test_help_lists_every_command_in_its_group_and_shortens_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    places = [page.index(f"\n{title}:\n") for title in EXAMPLES]
    assert places == sorted(places)
    words = " ".join(page.split())
    for name, command in commands_of(PROGRAM):
        summary = " ".join(command.help.partition("\n\n")[0].split())
        assert f"{name} {summary}" in words
    assert all(line in words for line in PROGRAM_EXAMPLES)


def test_a_commands_help_ends_with_its_examples_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("init", "data convert", "ppo"):
        assert main([*name.split(), "--help"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.strip().splitlines()]
        (shown,) = [commands[name] for commands in EXAMPLES.values() if name in commands]
        assert lines[-len(shown) - 1 :] == ["Examples:", *shown]


def test_version_is_that_of_the_package_and_of_the_citation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llamachat {__version__}\n"
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("llamachat di", ["distill", "diagnose"]),
        ("llamachat ppo --over", ["--overwrite"]),
        ("llamachat data ch", ["check"]),
    ],
)
def test_a_shell_completes_commands_and_options(
    words: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_LLAMACHAT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert main([]) == 0
    assert capsys.readouterr().out.split() == expected
