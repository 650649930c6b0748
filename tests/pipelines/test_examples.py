"""The interface for programs, and the examples: what their texts show is what they do."""

import doctest
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import llamachat

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_interface_shows_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert doctest.testmod(llamachat).attempted > 5
    assert doctest.testmod(llamachat).failed == 0


def test_ppo_by_hand_raises_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert doctest.testmod(example("ppo_by_hand.py"), raise_on_error=True).attempted == 4


def test_the_interface_loads_a_recipe_without_torch_and_lacks_what_is_not_there() -> None:
    code = "import sys, llamachat; llamachat.load_recipe, llamachat.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("llamachat").nothing  # noqa: B018
