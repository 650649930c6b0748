"""The files of a model folder, looked into before anything is loaded: torch is not needed for it.

A download that broke off, a Git LFS pointer in place of a file and an adapter that transformers would load by itself
are refused with a clear message, already by `doctor`.
"""

import json
from pathlib import Path

from llamachat.errors import ConfigError, first_line
from llamachat.runs.atomic import storage_errors

_LFS = b"version https://git-lfs"
_LENGTH_BYTES = 8  # a safetensors file opens with the length of its JSON header, which names every tensor and its bytes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index names them where it has one."""
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
    """Refuse a folder whose weights would not be what they seem: cut short, no weights at all, or under an adapter."""
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
    """Refuse a file of weights whose header and size do not go together; its values are not read."""
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
        ends = (entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__")
        end = _LENGTH_BYTES + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _broken(file, f"holds {size} bytes, and no whole header of a safetensors file") from None
    if end != size:
        raise _broken(file, f"holds {size} bytes of {end}")


def _broken(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"{file}: {problem}. An interrupted download or copy leaves such a file. Fetch it again.")
