"""Models on the Hub: whether they can be read from here, and downloads of all files or only the tokenizer's.

Gated models without access and other architectures are thus rejected in seconds, not after downloading gigabytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamachat.chat_format.tokenizer import BASES_THAT_WORK
from llamachat.config.sections import split_revision
from llamachat.errors import ConfigError
from llamachat.memory.estimates import KNOWN_BASES
from llamachat.runs.hub_commits import note_commit

TOKENIZER_FILES = ("config.json", "tokenizer*", "special_tokens_map.json")
LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
TIMEOUT_S = 5.0
UNGATED = next(name for name, base in KNOWN_BASES.items() if not base.is_gated)


def tokenizer_folder(location: str) -> Path:
    """The folder with the tokenizer of a model folder or Hub name (its small files are then downloaded or cached).

    Rejects anything that is not a Llama model according to its config.json, which is included.
    """
    folder = Path(location)
    if folder.is_dir():
        require_llama(folder, location)
        return folder
    from huggingface_hub import snapshot_download

    name, revision = split_revision(location)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # the library does not wrap its network layers' errors
        reach = unreached(name, error)
        raise ConfigError(
            f"base.model: the tokenizer of '{location}' cannot be downloaded: {reach.reason}. It is checked before any "
            f"weights are loaded. {reach.fix}"
        ) from error
    if folder.parent.name == "snapshots":  # in the Hub cache, where folders are named after commits
        note_commit(location, folder.name)
    require_llama(folder, location)
    return folder


def weights_folder(location: str) -> Path:
    """The folder with the weights, config and licence of a model folder or Hub name (downloaded or cached)."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    files = ["model*.safetensors", "model.safetensors.index.json", "config.json", "README.md", *LICENCE_FILES]
    name, revision = split_revision(location)
    return Path(snapshot_download(name, revision=revision, allow_patterns=files))


@dataclass(frozen=True, slots=True)
class Reach:
    """Whether a Hub model or data set is accessible from here; if not, why, and how to fix it."""

    state: Literal["open", "gated", "missing", "offline"]
    reason: str = ""
    fix: str = ""


def require_llama(folder: Path, name: str) -> None:
    """Reject other architectures by config.json; an adapter's folder has none and passes."""
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return  # transformers reports it when loading, with the reason
    if model_type is not None and model_type != "llama":
        raise ConfigError(
            f"base.model: '{name}' has the architecture '{model_type}', but chat format and adapters are those of Llama "
            f"models. Use another base. {BASES_THAT_WORK}"
        )


def reach_model(name: str) -> Reach:
    """Request the headers of a model's config.json from the Hub: nothing is downloaded and it takes seconds."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    try:
        plain, revision = split_revision(name)
        url = hf_hub_url(plain, "config.json", revision=revision)
        get_hf_file_metadata(url, token=get_token(), timeout=TIMEOUT_S)
    except Exception as error:  # the library does not wrap its network layers' errors
        return unreached(name, error)
    return Reach("open")


def reach_data(name: str) -> Reach:
    """Ask the Hub whether a data set exists and may be read."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    try:
        info = HfApi().dataset_info(name, timeout=TIMEOUT_S, token=token)
    except Exception as error:  # as above
        return unreached(name, error, kind="datasets/")
    return _gated(name, "datasets/") if info.gated and not token else Reach("open")


def unreached(name: str, error: Exception, *, kind: str = "") -> Reach:
    """Interpret a Hub error; `kind` is "datasets/" for a data set."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    first = (str(error).splitlines() or [type(error).__name__])[0]
    page = f"https://huggingface.co/{kind}{split_revision(name)[0]}"
    if isinstance(error, GatedRepoError):
        return _gated(name, kind)
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        way = f"Correct the name ({page} must open in a browser); for a private one log in with `hf auth login`."
        return Reach("missing", f"the hub knows no '{name}', or shows it only to others ({first})", way)
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return Reach("missing", f"'{name}' has no config.json ({first})", "Name a model in the format of transformers.")
    status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        way = "Log in again with `hf auth login`, with a token that may read it."
        return Reach("gated", f"the hub refuses this machine's token for '{name}' ({first})", way)
    way = "Connect to the network, or copy it here and give its path."
    return Reach("offline", f"the hub cannot be reached ({first})", way)


def is_cached(name: str, patterns: Sequence[str] = ("*.safetensors",)) -> bool:
    """Whether files of the model that match the patterns are in the Hub cache."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{split_revision(name)[0].replace('/', '--')}" / "snapshots"
    return any(any(snapshots.glob(f"*/{pattern}")) for pattern in patterns)


def _gated(name: str, kind: str) -> Reach:
    from huggingface_hub import get_token

    page = f"https://huggingface.co/{kind}{name}"
    ungated = "" if kind else f" Or use a base that is not gated: {UNGATED}."
    if get_token() is None:
        reason = f"'{name}' is gated and no token is on this machine"
        way = f"Accept its licence on {page}, then log in with `hf auth login`."
    else:
        reason = f"'{name}' is gated and this machine's token has no access"
        way = (
            f"Accept its licence on {page} and wait until it is granted; the token must be allowed to read gated ones."
        )
    return Reach("gated", reason, f"{way}{ungated}")
