"""Which edits of the code count as other code, on a small tree of a library and a stage."""

from pathlib import Path

import pytest

from llamachat.runs import code

FILES = {
    "stage/__init__.py": "def run():\n    from stage.train import train\n    return train()\n",
    "stage/train.py": "import llamachat.maths.kl\nfrom llamachat.data import files\nfrom stage.loss import loss\n",
    "stage/loss.py": '"""The loss."""\n\ndef loss(x):\n    """Of x."""\n    return x + 1\n',
    "stage/unread.py": "x = 1\n",
    "other/__init__.py": "x = 1\n",
    "llamachat/__init__.py": "",
    "llamachat/maths/__init__.py": "",
    "llamachat/maths/kl.py": "from llamachat.maths.more import y\nimport other\n",
    "llamachat/maths/more.py": "y = 1\n",
    "llamachat/data/__init__.py": "",
    "llamachat/data/files.py": "from llamachat.tracking.curves import draw\n",
    "llamachat/tracking/curves.py": "draw = 1\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(code, "_ROOT", tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_stage_and_what_it_imports_of_the_library_count(root: Path) -> None:
    not_counted = {"stage/unread.py", "other/__init__.py", "llamachat/tracking/curves.py"}
    recorded = code.code_of(["stage"])
    assert recorded.keys() == FILES.keys() - not_counted
    assert code.changed_code(recorded) == [] and code.changed_code({}) == []


@pytest.mark.parametrize(
    ("name", "text", "is_other"),
    [
        ("stage/loss.py", '"""Another text."""\n\n\ndef loss(x):  # a comment\n    return (x + 1)\n', False),
        ("stage/loss.py", '"""The loss."""\n\ndef loss(x):\n    """Of x."""\n    return x + 2\n', True),
        ("stage/loss.py", "def loss(x:\n", True),
        ("stage/loss.py", None, True),
        ("llamachat/maths/more.py", "y = 2\n", True),
        ("llamachat/tracking/curves.py", "draw = 2\n", False),
        ("stage/unread.py", "x = 2\n", False),
    ],
)
def test_what_a_file_does_counts_and_not_how_it_is_written(
    name: str, text: str | None, is_other: bool, root: Path
) -> None:
    recorded = code.code_of(["stage"])
    (root / name).unlink() if text is None else (root / name).write_text(text)
    assert code.changed_code(recorded) == ([name] if is_other else [])
