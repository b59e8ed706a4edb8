"""Upload a finished build and its dataset card to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftdata.build import remote, store
from ftdata.errors import InputRefused, UsageError
from ftdata.readers.hub import call_hub
from ftdata.redaction import map_texts, redact

_METADATA_FILES = ("README.md", "manifest.json", "report.json")
"""Files that describe a build; they contain the addresses of its data, which may include credentials."""


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a build to the Hub as a data set.

    Args:
        folder: the folder or URL of the build.
        repo: the repository, `owner/name`; created if it does not exist.
        private: whether a new repository is private.

    Returns:
        The URL of the commit.

    Raises:
        UsageError: `repo` is not a valid repository name.
        InputRefused: the folder is not a build, the build is damaged, or its metadata contains a secret.
        HubError: the Hub rejects the upload, or fails repeatedly.
    """
    folder = remote.local_build(folder)
    store.check_intact(folder)
    _check_secrets(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        message = f"the repository name {repo!r} is invalid: {error}"
        raise UsageError("hub_name", message, hint="use owner/name") from None
    api, kind = HfApi(), "dataset"
    call_hub(lambda: api.create_repo(repo, repo_type=kind, private=private, exist_ok=True), repo)
    message = f"Build {store.read_manifest(folder)['fingerprint']}"
    old_files = list(_list_old_files(api, repo))
    commit = call_hub(
        lambda: api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type=kind, commit_message=message, delete_patterns=old_files
        ),
        repo,
    )
    return str(commit.commit_url)


def _check_secrets(folder: Path) -> None:
    """Check that a build's metadata files contain no secrets. Earlier versions of ftdata could store secrets there."""
    for path in (folder / name for name in _METADATA_FILES):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        values: list[str] = []
        map_texts(json.loads(text) if path.suffix == ".json" and text else text, values.append)
        if redact(values) != values:
            message = f"{path} contains a secret, such as a token or a password in a URL, which must not be uploaded"
            hint = "remove the secret from the address of the data, and build the data set again"
            raise InputRefused("secret", message, hint=hint)


def _list_old_files(api: Any, repo: str) -> Iterator[str]:
    """Yield the files of an earlier build in a repository. An upload deletes them, so that two builds do not mix."""
    from huggingface_hub.errors import EntryNotFoundError

    def download_manifest() -> str | None:
        try:
            return str(api.hf_hub_download(repo, "manifest.json", repo_type="dataset"))
        except EntryNotFoundError:
            return None

    path = call_hub(download_manifest, repo)
    # The manifest may be damaged, or come from another version of ftdata.
    with suppress(ValueError, LookupError, TypeError):
        names = json.loads(Path(path).read_bytes())["files"] if path else ()
        yield from [re.sub(r"([*?[])", r"[\1]", name) for name in names]
