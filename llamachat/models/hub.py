"""The files of a base that is a hub name: those of its tokenizer, fetched alone, and those that hold its weights."""

from pathlib import Path

from llamachat.errors import ConfigError

LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def tokenizer_folder(location: str) -> Path:
    """The folder with the tokenizer of a model folder or hub name (then its small files are fetched or cached)."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(location, allow_patterns=["tokenizer*", "special_tokens_map.json", "config.json"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"base.model: the tokenizer of '{location}' cannot be fetched ({reason}). It is proved before any weights "
            "are loaded. For a gated model such as Llama 2, accept its licence on its page and log in with "
            "`hf auth login`; without a network, copy the model here and give its folder."
        ) from error


def weights_folder(location: str) -> Path:
    """The folder with the weights, config and licence of a model folder or hub name (then fetched or cached)."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    files = ["model*.safetensors", "model.safetensors.index.json", "config.json", "README.md", *LICENCE_FILES]
    return Path(snapshot_download(location, allow_patterns=files))
