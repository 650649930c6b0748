"""The code that made a step: which files, and what they hold, so that a result of other code is named.

Nothing is invalidated by it: a fingerprint says what a step is made from, the digests here with which code. Comments,
docstrings and layout do not count. A recorded file has two digests, of its bytes and of its syntax tree: equal bytes need
no parsing, so a plan compares a hundred files in some milliseconds.
"""

import ast
import hashlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from llamachat.runs.fingerprints import fingerprint
from llamachat.runs.user_cache import cached

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARY = "llamachat"
# Curves, estimates, messages and the files of a run: what a step makes does not depend on them.
_LEFT_OUT = (
    "llamachat/tracking/",
    "llamachat/memory/",
    "llamachat/runs/",
    "llamachat/tables.py",
    "llamachat/errors.py",
)
_DIGITS = 16


def code_of(packages: Sequence[str]) -> dict[str, str]:
    """The files of these packages and of the library that they import, directly or through others, with their digests.

    `packages` are dotted names such as "reward"; what their `__init__` does not lead to is not counted.
    """
    allowed = sorted({_LIBRARY, *(package.partition(".")[0] for package in packages)})
    # Parsing takes some tenths of a second; the same bytes need it once.
    follows_from = {"packages": list(packages), "code": digest_of_code(*allowed), "python": sys.version}
    return cached("code", follows_from, lambda: _code_of(packages, allowed))


def _code_of(packages: Sequence[str], allowed: Collection[str]) -> dict[str, str]:
    files: dict[str, Path] = {}
    unread = [place for package in packages for place in _files_of(tuple(package.split(".")))]
    while unread:
        file = unread.pop()
        name = file.relative_to(_ROOT).as_posix()
        if name in files or name.startswith(_LEFT_OUT):
            continue
        files[name] = file
        for parts in _imports(file):
            if parts[0] in allowed:
                unread += _files_of(parts)
    return {
        name: f"{_bytes_digest(file, _changed_ns(file))} {_tree_digest(file)}" for name, file in sorted(files.items())
    }


def digest_of_code(*folders: str) -> str:
    """A digest of the bytes of all Python files below folders of this code."""
    files = sorted(file for folder in folders for file in (_ROOT / folder).rglob("*.py"))
    return fingerprint({file.relative_to(_ROOT).as_posix(): _bytes_digest(file, _changed_ns(file)) for file in files})


def changed_code(recorded: Mapping[str, str]) -> list[str]:
    """The files of a record that now do something else, or are gone."""
    return [name for name, digests in recorded.items() if not _is_same(_ROOT / name, digests)]


def _is_same(file: Path, digests: str) -> bool:
    if not file.is_file():
        return False
    of_bytes, _, of_tree = digests.partition(" ")
    return _bytes_digest(file, _changed_ns(file)) == of_bytes or _tree_digest(file) == of_tree


def _files_of(parts: tuple[str, ...]) -> Iterator[Path]:
    """The module of a dotted name, with the packages that it is in; of `package.name` the package where name is no module."""
    for count in range(1, len(parts) + 1):
        place = _ROOT.joinpath(*parts[:count])
        yield from (file for file in (place / "__init__.py", place.with_name(f"{place.name}.py")) if file.is_file())


def _changed_ns(file: Path) -> int:
    return file.stat().st_mtime_ns


def _imports(file: Path) -> list[tuple[str, ...]]:
    """What a file imports, anywhere in it, as dotted names in parts."""
    names: list[tuple[str, ...]] = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names += (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += ((*node.module.split("."), alias.name) for alias in node.names)
    return names


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ast.parse("")  # an edit that is not finished; it fails where it runs


@lru_cache(maxsize=1024)  # the stages share most of the library
def _bytes_digest(file: Path, changed_ns: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]


def _tree_digest(file: Path) -> str:
    """Of what a file does: its syntax tree without docstrings."""
    tree = _tree(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_documented = node.body and isinstance(node.body[0], ast.Expr) and ast.get_docstring(node, clean=False)
            node.body = node.body[1:] if is_documented else node.body
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:_DIGITS]
