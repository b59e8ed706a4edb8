"""List and download the files of data sets on the Hugging Face Hub.

owner/name ──data set card, or file names──> files by split, pinned to a commit ──> local cache
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ftdata.errors import HubError, InputRefused, UsageError, suggest_names
from ftdata.readers.file_names import matches_pattern, split_from_name
from ftdata.readers.remote_files import TRIES, http_status, with_retries

Result = TypeVar("Result")

SCHEME = "hf://"
_HUB_PATH = re.compile(r"(?:datasets/)?([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.+))?")
_SUFFIX = re.compile(r"\.\w+(\.(gz|gzip|bz2|xz|zst|zstd))?$")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A data set file on the Hugging Face Hub, at a specific commit.

    Attributes:
        repo: `owner/name` of the data set.
        revision: the commit.
        name: path of the file in the data set.
    """

    repo: str
    revision: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}datasets/{self.repo}@{self.revision}/{self.name}"

    @classmethod
    def from_url(cls, url: str) -> HubFile:
        """Parse a URL of the form `hf://datasets/owner/name@commit/file`."""
        match = _HUB_PATH.fullmatch(url.removeprefix(SCHEME))
        if match is None or not match[2] or not match[3]:
            hint = "use hf://owner/name@revision/file"
            raise UsageError("hub_path", f"{url} is not the URL of a file on the Hub", hint=hint)
        return cls(match[1], match[2], match[3])

    def download(self) -> Path:
        """Return the local path of the file. If the file is not in the local cache, download it first.

        Raises:
            HubError: The download failed.
        """
        from huggingface_hub import hf_hub_download

        repo, name, commit = self.repo, self.name, self.revision
        return Path(call_hub(lambda: hf_hub_download(repo, name, repo_type="dataset", revision=commit), str(self)))


def is_hub(location: str) -> bool:
    """Return whether a location is on the Hub: an `hf://` URL, or `owner/name` if no local path has this name."""
    if location.startswith(SCHEME):
        return True
    is_repo_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", location) is not None
    return is_repo_name and not Path(location).exists() and not Path(location).parent.is_dir()


def hub_files(
    location: str,
    is_readable: Callable[[str], bool],
    name: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> Iterator[tuple[HubFile, str]]:
    """Yield each data file of a Hub data set with the name of its split.

    Args:
        location: `hf://owner/name` or `owner/name`, optionally followed by `@revision` and by a path or glob.
        is_readable: whether a reader is registered for a file name.
        name: name of a configuration in the data set card.
        revision: a branch, tag or commit. The files are pinned to its commit.
        data_files: a glob, a list of globs, or a mapping of split to globs.

    Raises:
        UsageError: The data set does not have the requested configuration or file.
        HubError: The Hub does not respond, or does not have the data set.
    """
    match = _HUB_PATH.fullmatch(location.removeprefix(SCHEME))
    if match is None:
        hint = "use hf://owner/name or owner/name"
        raise UsageError("hub_path", f"{location} is not the name of a data set on the Hub", hint=hint)
    from huggingface_hub import HfApi

    repo, repo_revision, path = match[1], match[2] or revision, match[3]
    where = f"{SCHEME}{repo}"
    info = call_hub(lambda: HfApi().dataset_info(repo, revision=repo_revision, timeout=30), where)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    commit = str(info.sha)
    config = _select_config(info.card_data, name, where) if name or not (path or data_files) else {}
    selection = path or data_files or config.get("data_files")
    if selection is None:
        prefix = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
        readable = [file for file in names if file.startswith(prefix) and is_readable(file)]
        yield from ((HubFile(repo, commit, file), split) for file, split in _split_files(readable, names, repo))
        return
    for split, globs in _globs_by_split(selection, where).items():
        matching = [
            file for pattern in globs for file in _match_files(pattern.removeprefix("./"), names, is_readable, where)
        ]
        yield from ((HubFile(repo, commit, file), split) for file in dict.fromkeys(matching))


def _match_files(pattern: str, names: Sequence[str], is_readable: Callable[[str], bool], where: str) -> list[str]:
    """Return the files that match `pattern`, which is a file name, a glob or a folder name."""
    if pattern in names:
        return [pattern]
    matching = [file for file in names if matches_pattern(file, pattern)]
    matching = matching or [file for file in names if file.startswith(f"{pattern.rstrip('/')}/")]
    if not matching:
        hint = suggest_names(pattern, names) if names else "upload files first: the data set is empty"
        raise UsageError("file_not_found", f"the data set has no file {pattern!r}", where=where, hint=hint)
    return [file for file in matching if is_readable(file)] or matching


def call_hub(request: Callable[[], Result], where: str) -> Result:
    """Send a request to the Hub, and return its result. Repeat the request after transient failures.

    Args:
        request: the function that sends the request.
        where: name of the data set or file for errors.

    Raises:
        HubError: The Hub rejects the request, or fails repeatedly.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    # The base classes belong to the HTTP client, which depends on the version of huggingface_hub. Its errors are not
    # always wrapped.
    client_errors = cast("tuple[type[Exception], ...]", (OSError, *HfHubHTTPError.__bases__))
    try:
        return with_retries(request, client_errors, (OfflineModeIsEnabled,))
    except OfflineModeIsEnabled as error:
        message = f"Hub access is disabled, and the data set is not in the local cache: {_first_line(error)}"
        raise HubError("hub_offline", message, where=where, hint="unset HF_HUB_OFFLINE") from None
    except GatedRepoError as error:
        hint = "accept its terms on the Hub, and set HF_TOKEN"
        raise HubError("hub_gated", f"the data set is gated: {_first_line(error)}", where=where, hint=hint) from None
    except client_errors as error:
        status = http_status(error)
        if status is None:
            message = f"the Hub could not be reached in {TRIES} attempts"
            hint = "check the network; for a local file, check the path, because no local file has this name"
        elif status < 500 and status != 429:
            message, hint = f"the Hub answered with status {status}", "check the name, HF_TOKEN and HF_ENDPOINT"
        else:
            message, hint = f"the Hub answered with status {status} in {TRIES} attempts", "try again later"
        raise HubError("hub", f"{message}: {_first_line(error)}", where=where, hint=hint) from None


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _globs_by_split(data_files: Any, where: str) -> dict[str, list[str]]:
    """Convert `data_files` (a glob, a list or a mapping) to a mapping from each split to its list of globs."""
    if isinstance(data_files, list) and data_files and all(isinstance(entry, Mapping) for entry in data_files):
        entries = [(str(entry.get("split", "train")), entry.get("path")) for entry in data_files]
    else:
        entries = list(data_files.items()) if isinstance(data_files, Mapping) else [("train", data_files)]
    globs_by_split: dict[str, list[str]] = {}
    for split, globs in entries:
        patterns = [globs] if isinstance(globs, str) else globs
        is_list = isinstance(patterns, list | tuple) and len(patterns) > 0
        if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
            message = f"data_files of split {split} is {globs!r:.60}, expected a glob or a list of globs"
            hint = "pass a glob, a list of globs, or a mapping from each split to its globs"
            raise UsageError("data_files", message, where=where, hint=hint)
        globs_by_split.setdefault(str(split), []).extend(patterns)
    return globs_by_split


def _select_config(card: Any, name: str | None, where: str) -> Mapping[str, Any]:
    """Return the configuration `name` of a data set card. If `name` is `None`, return the default configuration."""
    entries = card.to_dict().get("configs") if card else None
    configs = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if name is None and not by_name:
        return {}
    defaults = [key for key, config in by_name.items() if config.get("default") or key == "default"]
    selected = name or (defaults[0] if defaults else next(iter(by_name)) if len(by_name) == 1 else "")
    if selected not in by_name:
        unknown = f"the data set has no configuration {name!r}"
        message = unknown if name else "the data set has several configurations, but no default"
        no_configs = "remove name= (the data set card has no configurations)"
        hint = suggest_names(name or "", by_name) if by_name else no_configs
        raise UsageError("hub_config", message, where=where, hint=hint)
    return by_name[selected]


def _split_files(files: Sequence[str], all_files: Sequence[str], repo: str) -> Iterator[tuple[str, str]]:
    """Yield each data file, together with the split (such as `test`) that the file name contains.

    If no file name contains a split, all files belong to `train`. Otherwise, files without a split are ignored.
    """
    where = f"{SCHEME}{repo}"
    if not files:
        script = f"{repo.partition('/')[2]}.py"
        needs_script = f"the data set requires its loading script {script}, which ftdata never runs"
        reason = needs_script if script in all_files else "the data set has no file with a supported suffix"
        raise InputRefused("hub_no_data", reason, where=where, hint="pass the file names as data_files")
    files_with_split = [(name, split) for name in sorted(files) if (split := split_from_name(name))]
    selected = files_with_split or [(name, "train") for name in sorted(files)]
    stems = Counter(_SUFFIX.sub("", name) for name, _ in selected)
    if repeated := [stem for stem, count in stems.items() if count > 1]:
        hint = "select the files with data_files"
        message = f"the data set contains {repeated[0]} in several formats"
        raise UsageError("hub_formats", message, where=where, hint=hint)
    yield from selected
