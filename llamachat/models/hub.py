"""The files of a base that is a hub name: those of its tokenizer, fetched alone, and those that hold its weights."""

from pathlib import Path

from llamachat.errors import ConfigError
from llamachat.models.reach import require_llama, unreached

TOKENIZER_FILES = ("config.json", "tokenizer*", "special_tokens_map.json")

LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def tokenizer_folder(location: str) -> Path:
    """The folder with the tokenizer of a model folder or hub name (then its small files are fetched or cached).

    Refuses what is no Llama model by its config.json, which comes along.
    """
    if Path(location).is_dir():
        require_llama(Path(location), location)
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(location, allow_patterns=list(TOKENIZER_FILES)))
        require_llama(folder, location)
        return folder
    except ConfigError:
        raise
    except Exception as error:  # the library lets its network layers' own errors through
        found = unreached(location, error)
        raise ConfigError(
            f"base.model: the tokenizer of '{location}' cannot be fetched: {found.reason}. It is proved before any "
            f"weights are loaded. {found.way_out}"
        ) from error


def weights_folder(location: str) -> Path:
    """The folder with the weights, config and licence of a model folder or hub name (then fetched or cached)."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    files = ["model*.safetensors", "model.safetensors.index.json", "config.json", "README.md", *LICENCE_FILES]
    return Path(snapshot_download(location, allow_patterns=files))
