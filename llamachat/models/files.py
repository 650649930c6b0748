"""Checks of a model folder's files before anything is loaded; needs no torch.

An incomplete download, a Git LFS pointer in place of a file and an adapter that transformers would load automatically
are rejected with a clear message, already by `doctor`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from llamachat.errors import ConfigError, first_line
from llamachat.runs.atomic import storage_errors

log = logging.getLogger(__name__)

LARGE_BYTES = 1 << 30  # of a file from which reading it whole takes more than a second or two
_PART = 1 << 22  # values that are looked at together
# By the name in the header: the unsigned integer of the same width, and the bits of the exponent.
_EXPONENTS = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
_LFS = b"version https://git-lfs"
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, which lists every tensor's bytes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, from its index if there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        with storage_errors(index):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: cannot be read ({first_line(error)}). It lists the files with the weights. Download it again."
        ) from error


def check_model_folder(folder: Path) -> None:
    """Reject a folder with truncated weights, no weights at all, or an adapter on top."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ConfigError(
            f"{folder}: an adapter ({adapter.name}) is next to the weights. It would silently be applied and frozen, or"
            " ignored. Merge it into them first (PEFT's merge_and_unload), or move its files away."
        )
    for file in weight_files(folder):
        if file.is_file():  # a missing file is reported when the model is loaded
            check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Reject a weights file whose header and size do not match; the values are not read."""
    _checked_tensors(file)


def nonfinite_tensors(file: Path) -> list[str]:
    """Names of the tensors of a weights file that contain NaN or infinity; reads the whole file."""
    import numpy as np

    tensors, start = _checked_tensors(file)
    if file.stat().st_size > LARGE_BYTES:
        log.info("%s: reading its %.1f GiB once to look for NaN", file, file.stat().st_size / 2**30)
    faults = []
    with storage_errors(file):
        for name, entry in tensors.items():
            first, last = entry["data_offsets"]
            if entry["dtype"] not in _EXPONENTS or first == last:
                continue
            word, exponent = _EXPONENTS[entry["dtype"]]
            count = (last - first) // np.dtype(word).itemsize
            values = np.memmap(file, dtype=word, mode="r", offset=start + first, shape=(count,))
            # NaN and infinity are the numbers whose exponent has all bits set.
            parts = (values[place : place + _PART] & exponent for place in range(0, count, _PART))
            if any((part == exponent).any() for part in parts):
                faults.append(name)
    return faults


def _checked_tensors(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of the file's header, and the byte offset of the values."""
    with storage_errors(file), file.open("rb") as stream:
        size, start = file.stat().st_size, stream.read(len(_LFS))
        if start == _LFS:
            raise ConfigError(
                f"{file}: is a Git LFS pointer, not the weights, which were not fetched. Run `git lfs pull` in its folder, or"
                " fetch the model with `hf download`."
            )
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        header = b""
        if len(start) > _LENGTH_BYTES and length <= size - _LENGTH_BYTES:
            stream.seek(_LENGTH_BYTES)
            header = stream.read(length)
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _broken(file, f"holds {size} bytes, and no whole header of a safetensors file") from None
    if end != size:
        raise _broken(file, f"holds {size} bytes of {end}")
    return tensors, _LENGTH_BYTES + length


def _broken(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"{file}: {problem}. An interrupted download or copy leaves such a file. Fetch it again.")
