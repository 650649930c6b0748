"""Libraries are loaded without garbage collections, and the collector is left as it was."""

import gc
from collections.abc import Iterator

import pytest

from llamachat import imports
from llamachat.imports import quick_imports


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    yield
    gc.unfreeze()
    (gc.enable if was_enabled else gc.disable)()


def test_nothing_is_collected_while_libraries_load_and_later_collections_leave_them_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imports, "_MARKER", "a module that is not loaded")
    gc.enable()
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > frozen


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_collector_that_is_off_stays_off_and_loaded_libraries_change_nothing(
    is_loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imports, "_MARKER", "gc" if is_loaded else "a module that is not loaded")
    (gc.enable if is_loaded else gc.disable)()
    frozen = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled() == is_loaded
    assert gc.isenabled() == is_loaded and gc.get_freeze_count() == frozen
