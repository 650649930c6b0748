"""Which code made a step: the files and their digests, so that results of a different version can be reported.

No result is invalidated by this: a fingerprint covers what a step is made from, these digests the code. Comments,
docstrings and formatting do not count. A recorded file has two digests, of its bytes and of its syntax tree: equal
bytes need no parsing, so a plan compares a hundred files in a few milliseconds.
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
# Curves, estimates, messages and run files: the result of a step does not depend on them.
_LEFT_OUT = (
    "llamachat/tracking/",
    "llamachat/memory/",
    "llamachat/runs/",
    "llamachat/tables.py",
    "llamachat/errors.py",
)
_DIGITS = 16


def code_of(packages: Sequence[str]) -> dict[str, str]:
    """The files of these packages and of the library modules that they import, directly or indirectly, with their
    digests.

    `packages` are dotted names such as "reward"; modules that their `__init__` does not import are not counted.
    """
    allowed = sorted({_LIBRARY, *(package.partition(".")[0] for package in packages)})
    # Parsing takes some tenths of a second; equal bytes are parsed only once.
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
    """A digest of the bytes of all Python files below folders of this repository."""
    files = sorted(file for folder in folders for file in (_ROOT / folder).rglob("*.py"))
    return fingerprint({file.relative_to(_ROOT).as_posix(): _bytes_digest(file, _changed_ns(file)) for file in files})


def changed_code(recorded: Mapping[str, str]) -> list[str]:
    """The files of a record whose behaviour has changed, or that are gone."""
    return [name for name, digests in recorded.items() if not _is_same(_ROOT / name, digests)]


def _is_same(file: Path, digests: str) -> bool:
    if not file.is_file():
        return False
    of_bytes, _, of_tree = digests.partition(" ")
    return _bytes_digest(file, _changed_ns(file)) == of_bytes or _tree_digest(file) == of_tree


def _files_of(parts: tuple[str, ...]) -> Iterator[Path]:
    """The module of a dotted name, with its parent packages; of `package.name` the package if name is not a module."""
    for count in range(1, len(parts) + 1):
        place = _ROOT.joinpath(*parts[:count])
        yield from (file for file in (place / "__init__.py", place.with_name(f"{place.name}.py")) if file.is_file())


def _changed_ns(file: Path) -> int:
    return file.stat().st_mtime_ns


def _imports(file: Path) -> list[tuple[str, ...]]:
    """All imports of a file, as dotted names in parts."""
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
        return ast.parse("")  # an unfinished edit; it fails when it runs


@lru_cache(maxsize=1024)  # the stages share most of the library
def _bytes_digest(file: Path, changed_ns: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]


def _tree_digest(file: Path) -> str:
    """The digest of a file's syntax tree without docstrings."""
    tree = _tree(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_documented = node.body and isinstance(node.body[0], ast.Expr) and ast.get_docstring(node, clean=False)
            node.body = node.body[1:] if is_documented else node.body
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:_DIGITS]
