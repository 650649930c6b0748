"""What YAML may hold in a recipe: plain values. Whatever else is there ends in words with its place, and soon."""

import time
from pathlib import Path

import pytest

from llamachat.config.loading import parse_mapping, parse_value
from pipelines.cli.main import main

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
BAD = {
    "a: \x1b[0m": "control character (U+001B) in line 1",
    "a: 1\nb: \x0c": "control character (U+000C) in line 2",
    "a: \x00": "control character (U+0000)",
    "a: &x [*x]": "an alias is inside the value that it refers to",
    "a: &x {b: {c: *x}}": "an alias is inside the value that it refers to",
    "a: " + "[" * 60 + "]" * 60: "nested deeper than 50 levels",
    "a: " + "[" * 5000 + "]" * 5000: "nested deeper than 50 levels",
    "a: " + "{b: " * 900 + "1" + "}" * 900: "nested deeper than 50 levels",
    BOMB: "more than 100000 values",
    "a:\n  b: !!timestamp 2001-01-01": "found the tag 'timestamp'",
    "a: !!set {b}": "found the tag 'set'",
    "a: !!binary aGk=": "found the tag 'binary'",
    "a: !!python/name:os.system x": "found the tag",
    "a: !own x": "found the tag '!own'",
    "? [a, b]\n: c": "unhashable key",
    "a: " + "9" * 5000: "digits",
    "a: !!int x": "invalid literal",
    "a: !!int [1]": "found sequence in line 1",
    "a: 1\nb: !!float {c: 1}": "found mapping in line 2",
    "a: !!bool maybe": "found 'maybe', which is neither true nor false in line 1",
    'a: "x\\0y"': "U+0000, which is not a valid character, in line 1",
    'a: 1\nb: ["x", "\\ud83d"]': "U+D83D, which is not a valid character, in line 2",
    'a: {"\\0": 1}': "U+0000, which is not a valid character, in line 1",
    "a: *nowhere": "undefined alias",
    "---\na: 1\n---\nb: 2": "another document",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text[:20]))
def test_what_is_no_plain_value_is_refused_in_words(text: str) -> None:
    began = time.process_time()
    values, (problem,) = parse_mapping(text, "a.yaml")
    assert values == {} and BAD[text] in problem.text and "invalid YAML" in problem.text
    with pytest.raises(ValueError, match=r".") as error:
        parse_value(text)
    assert BAD[text] in str(error.value)
    assert time.process_time() - began < 20


def test_aliases_of_plain_values_stay() -> None:
    assert parse_mapping("a: &x {b: [1, 2.5, true, null, text]}\nc: *x\nd: [*x, *x]", "a.yaml") == (
        {"a": (x := {"b": [1, 2.5, True, None, "text"]}), "c": x, "d": [x, x]},
        [],
    )


@pytest.mark.parametrize("text", ["run: {dir: \x1b}", "a: &x [*x]", BOMB])
def test_a_command_names_the_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert main(["plan", "--config", str(path)]) == 2
    assert f"{path}: invalid YAML" in capsys.readouterr().err
