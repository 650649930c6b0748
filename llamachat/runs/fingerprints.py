"""Digests of files and weights, and the fingerprint that tells whether a step would be made the same way again."""

import ast
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamachat.errors import DataError
from llamachat.runs.atomic import storage_errors

ABSENT = "absent"  # stands for the value of a key that one of two identities lacks

_CHUNK = 1 << 20
# Above this size the digest of a weight file covers its header, its size and evenly spread blocks: reading 70B weights
# would take minutes at every command. An edit that leaves every sampled block unchanged is not noticed.
WHOLE_UP_TO_BYTES = 256 << 20
_SAMPLED_BLOCKS = 64
_WEIGHT_FOLDER_SUFFIXES = {".safetensors", ".json", ".model"}


def digest_of_file(path: Path) -> str:
    """SHA-256 of the content, as hexadecimal text."""
    with _readable(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of_program(path: Path) -> str:
    """SHA-256 of a Python file and of the files next to it that it imports, directly or indirectly; of the
    file alone if there are none."""
    files = _imported_beside(path)
    if not files:
        return digest_of_file(path)
    return fingerprint({file.relative_to(path.parent).as_posix(): digest_of_file(file) for file in [path, *files]})


def _imported_beside(path: Path) -> list[Path]:
    imported, unread = list[Path](), [path]
    while unread:
        file = unread.pop()
        for parts in _imports(file, path.parent):
            stems = [path.parent.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
            for one in (place for stem in stems for place in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")):
                if one.is_file() and one != path and one not in imported:
                    imported.append(one)
                    unread.append(one)
    return sorted(imported)


def _imports(file: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """The imports of a file, as dotted names in parts; those within a package relative to `folder`."""
    try:
        with _readable(file):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the error is reported when the file runs
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.relative_to(folder).parts if node.level else ()
            start = (*package[: len(package) - node.level + 1], *(node.module or "").split(".")) if node.level else ()
            module = tuple(part for part in start or tuple((node.module or "").split(".")) if part)
            yield from ((*module, alias.name) for alias in node.names)


def digest_of_folder(path: Path) -> str:
    """SHA-256 of the names and contents of all files below `path`; hidden files are ignored."""
    return _digest_of_files(path, [(name, digest_of_file(path / name)) for name in _names(path)])


def digest_of_weights(folder: Path) -> str:
    """SHA-256 of a model folder's configuration, vocabulary and weights; files over 256 MiB are sampled."""
    names = [name for name in _names(folder) if Path(name).suffix in _WEIGHT_FOLDER_SUFFIXES]
    return _digest_of_files(folder, [(name, _digest_of_weight_file(folder / name)) for name in names])


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the identity as JSON with sorted keys: equal for equal content, whatever the order of the keys."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Each key that differs, as `sft.learning_rate: 0.001 -> 0.002`, dotted and sorted."""
    return [f"{key}: {_shorten(then)} -> {_shorten(now)}" for key, then, now in changed_values(old, new)]


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Each key that differs, with its old and new value as JSON text, ABSENT if there is none; dotted and sorted."""
    # By their whole place: "a.b" may be one key, or a key within another. Compared as text: in Python 1, 1.0 and true are
    # equal, in a fingerprint they are not.
    before, after = dict(_leaves(_as_json(old))), dict(_leaves(_as_json(new)))
    places = sorted(before.keys() | after.keys(), key=lambda place: (_dotted(place), place))
    pairs = ((_dotted(place), before.get(place, ABSENT), after.get(place, ABSENT)) for place in places)
    return [(key, then, now) for key, then, now in pairs if then != now]


def leaves(identity: Mapping[str, Any]) -> dict[str, str]:
    """Every leaf value as JSON text, by its dotted key."""
    return {_dotted(place): text for place, text in _leaves(_as_json(identity))}


def is_digest(text: str) -> bool:
    """Whether a value is a SHA-256 digest."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(identity, allow_nan=False))


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*place, f".{key}"))
    elif isinstance(value, list) and value:
        for index, child in enumerate(value):
            yield from _leaves(child, (*place, f"[{index}]"))
    else:
        yield place, json.dumps(value)


def _dotted(place: tuple[str, ...]) -> str:
    return "".join(place).removeprefix(".")


def _shorten(text: str) -> str:
    bare = text.strip('"')
    return f"{bare[:12]}..." if is_digest(bare) else text


def _readable(path: Path) -> Any:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file. Its content is part of the step's fingerprint. Correct the path in the recipe."
        )
    return storage_errors(path)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder. Its content is part of the step's fingerprint. Correct the path in the recipe."
        )
    with storage_errors(folder):
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))


def _digest_of_files(folder: Path, digests: list[tuple[str, str]]) -> str:
    if not digests:
        raise DataError(
            f"{folder}: contains no files. Its content is part of the step's fingerprint. Correct the path."
        )
    return fingerprint(dict(digests))


def _digest_of_weight_file(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE_UP_TO_BYTES:
        return digest_of_file(path)
    digest = hashlib.sha256(str(size).encode())
    with storage_errors(path), path.open("rb") as stream:
        # A safetensors file starts with the length of its JSON header, which lists every tensor, type and offset.
        start = stream.read(8)
        digest.update(start)
        digest.update(stream.read(min(struct.unpack("<Q", start)[0], _CHUNK * 64)))
        for block in range(_SAMPLED_BLOCKS):
            stream.seek((size - _CHUNK) * block // (_SAMPLED_BLOCKS - 1))
            digest.update(stream.read(_CHUNK))
    return digest.hexdigest()
