"""Upload an exported folder to a repository of the Hugging Face Hub.

Only listed files of the exported and checked folder are uploaded; its README.md is the model card. Name, token and
network are checked before the export, not after an hour of work.
"""

import logging
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

from llamachat.errors import LlamachatError, UsageError, first_line
from llamachat.models.hub import LICENCE_FILES

log = logging.getLogger(__name__)

# The files of an export; nothing else in the folder is uploaded.
SHIPPED = (
    "*.safetensors",
    "*.gguf",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "export.json",
    "README.md",
    "Modelfile",
    *LICENCE_FILES,
)


class HubError(LlamachatError):
    """The upload to the hub failed."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository that this machine's token can write to, as far as can be checked without writing."""

    name: str
    is_private: bool

    @classmethod
    def checked(cls, name: str, *, is_private: bool) -> "Destination":
        """The repository with this name, USER/NAME; asks the hub for the owner of this machine's token."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
            is_name = name.count("/") == 1
        except HFValidationError:
            is_name = False
        if not is_name:
            raise UsageError(
                f"--push-to-hub: '{name}' is no name of a repository. The hub's are USER/NAME, in letters, digits, "
                "'-', '_' and '.'. Give one like me/my-chat-model."
            )
        if get_token() is None:
            raise UsageError(
                "--push-to-hub: no token is on this machine. The hub takes files from whom it knows. Log in with `hf "
                "auth login`, or set HF_TOKEN; the token must be allowed to write."
            )
        if is_private and _is_public(name):
            raise UsageError(
                f"--push-to-hub {name}: this repository is there, and public. What is uploaded is private unless you say "
                "otherwise. Give another name, or --no-private."
            )
        return cls(name, is_private)

    def push(self, folder: Path) -> str:
        """Upload the exported folder and return its URL."""
        files = _files(folder)
        self._check_licence(folder, files)
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            api.create_repo(self.name, private=self.is_private, exist_ok=True)
            log.info("uploading to %s: %s", self.name, ", ".join(files))
            api.upload_folder(
                repo_id=self.name, folder_path=folder, allow_patterns=files, commit_message="Upload with llamachat"
            )
        except Exception as error:  # as above
            raise HubError(
                f"{self.name}: the upload failed ({first_line(error)}). The export in {folder} is complete. Run "
                f"`hf upload {self.name} {folder}{' --private' if self.is_private else ''}` once the cause is fixed."
            ) from error
        return f"https://huggingface.co/{self.name}"

    def _check_licence(self, folder: Path, files: list[str]) -> None:
        """Raise if a public copy of a model derived from Llama 2 lacks the licence agreement."""
        card = (folder / "README.md").read_text(encoding="utf-8")
        licence = yaml.safe_load(card.split("---\n")[1]).get("license")
        has_text = any(fnmatch(file, pattern) for file in files for pattern in LICENCE_FILES)
        if self.is_private or licence in ("apache-2.0", "mit"):
            return
        if licence == "llama2" and not has_text:
            raise UsageError(
                f"--no-private: {folder} has no licence file. A derived Llama 2 may only be passed on with a copy of "
                f"its licence. Put the base's LICENSE.txt and USE_POLICY.md there and give `hf upload {self.name} "
                f"{folder}`, or push it as a private one."
            )
        words = "read in its README.md under what licences base and data are, and what they ask for"
        log.warning("%s becomes public: %s", self.name, words)


def _is_public(name: str) -> bool:
    """Whether an existing repository is public; needs this machine's token to be valid."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    try:
        api.whoami()
        return not api.repo_info(name).private
    except RepositoryNotFoundError:
        return False
    except Exception as error:  # the library does not wrap errors of its network layers
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            words = (
                f"--push-to-hub: the hub refuses this machine's token (HTTP {status}). It has to know who writes. Log "
            )
            words += "in again with `hf auth login`, with a token that may write."
        else:
            words = (
                f"--push-to-hub {name}: the hub cannot be reached ({first_line(error)}). Nothing was exported. Connect "
            )
            words += "to the network (and unset HF_HUB_OFFLINE), or export without --push-to-hub."
        raise HubError(words) from error


def _files(folder: Path) -> list[str]:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    foreign = [file for file in files if not any(fnmatch(file, pattern) for pattern in SHIPPED)]
    if foreign:
        raise HubError(
            f"{folder / foreign[0]}: no export writes such a file. Only files of an export are uploaded, to keep "
            "your texts private. Remove the file."
        )
    return files
