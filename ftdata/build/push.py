"""Push: a finished build to the hub, whole, with the card that was written with it."""

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
from ftdata.redaction import redact

_ABOUT = ("README.md", "manifest.json", "report.json")
"""Files of a build that describe it, and so may name the place of its data with credentials."""


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a build as a data set, and return its address.

    Args:
        folder: the build.
        repo: `owner/name`; made if it is not there.
        private: whether a new one is seen by its owners only.

    Raises:
        UsageError: the hub has no such names.
        InputRefused: the folder is no build, is damaged, or describes itself with a secret in it.
        HubError: the hub refuses, or fails again and again.
    """
    folder = remote.local_build(folder)
    if broken := store.verify_files(folder):
        raise InputRefused("damaged_build", f"{folder} is damaged: {', '.join(broken[:3])}", hint="build again")
    _check_secrets(folder)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError("hub_name", f"{repo!r} is no name for the hub: {error}", hint="owner/name") from None
    api, kind = HfApi(), "dataset"
    call_hub(lambda: api.create_repo(repo, repo_type=kind, private=private, exist_ok=True), repo)
    message = f"Build {store.read_manifest(folder)['fingerprint']}"
    earlier = list(_files_there(api, repo))
    done = call_hub(
        lambda: api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type=kind, commit_message=message, delete_patterns=earlier
        ),
        repo,
    )
    return str(done.commit_url)


def _check_secrets(folder: Path) -> None:
    """Refuse to upload a build whose description holds a secret, such as one that an earlier version wrote."""
    for path in (folder / name for name in _ABOUT):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        values: list[Any] = list(_texts(json.loads(text))) if path.suffix == ".json" and text else [text]
        if redact(values) != values:
            raise InputRefused(
                "secret",
                f"{path} holds a secret, such as a token or the password of a URL: it would be uploaded",
                hint="build again without it, or take it out of the address of the data",
            )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a JSON value; names of columns say nothing about secrets."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def _files_there(api: Any, repo: str) -> Iterator[str]:
    """Yield the files of an earlier build there, which this one may not have: readers would take them for its own."""
    from huggingface_hub.errors import EntryNotFoundError

    def manifest() -> str | None:
        try:
            return str(api.hf_hub_download(repo, "manifest.json", repo_type="dataset"))
        except EntryNotFoundError:
            return None

    path = call_hub(manifest, repo)
    # Of whatever version of ftdata it is, and be it damaged: what it names is replaced.
    with suppress(ValueError, LookupError, TypeError):
        known = json.loads(Path(path).read_bytes())["files"] if path else ()
        yield from [re.sub(r"([*?[])", r"[\1]", name) for name in known]
