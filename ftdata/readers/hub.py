"""The hub: which files a data set there has, for which split, and how they get here.

owner/name ──its card, or the names of its files──> files of splits, pinned to one commit ──> the local cache
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
_ID = re.compile(r"(?:datasets/)?([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.+))?")
_SUFFIX = re.compile(r"\.\w+(\.(gz|gzip|bz2|xz|zst|zstd))?$")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a data set on the hub, at one commit."""

    repo: str
    revision: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}datasets/{self.repo}@{self.revision}/{self.name}"

    @classmethod
    def at(cls, url: str) -> HubFile:
        """Return the file that `str` names so."""
        found = _ID.fullmatch(url.removeprefix(SCHEME))
        if found is None or not found[2] or not found[3]:
            raise UsageError("hub_path", f"{url} names no file of a data set", hint="hf://owner/name, or owner/name")
        return cls(found[1], found[2], found[3])

    def local(self) -> Path:
        """Return where the file lies in the local cache, downloaded if need be.

        Raises:
            HubError: it cannot be had.
        """
        from huggingface_hub import hf_hub_download

        repo, name, commit = self.repo, self.name, self.revision
        return Path(call_hub(lambda: hf_hub_download(repo, name, repo_type="dataset", revision=commit), str(self)))


def is_hub(place: str) -> bool:
    """Whether this is a place on the hub: `hf://...`, or `owner/name` that is nothing here."""
    if place.startswith(SCHEME):
        return True
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) is not None
    return named and not Path(place).exists() and not Path(place).parent.is_dir()


def hub_files(
    place: str,
    readable: Callable[[str], bool],
    name: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> Iterator[tuple[HubFile, str]]:
    """Yield the data files of a data set on the hub, each with its split.

    Args:
        place: `hf://owner/name`, with `@revision` and a path or glob after it, if need be; or `owner/name`.
        readable: whether a file of this name is data.
        name: that of a configuration in the data set's card.
        revision: a branch, tag or commit; what is found is pinned to the commit.
        data_files: globs of files, or split -> globs.

    Raises:
        UsageError: nothing there has this name.
        HubError: the hub does not answer, or has no such data set.
    """
    found = _ID.fullmatch(place.removeprefix(SCHEME))
    if found is None:
        raise UsageError("hub_path", f"{place} is no data set", hint="hf://owner/name, or owner/name")
    from huggingface_hub import HfApi

    repo, at, path = found[1], found[2] or revision, found[3]
    where = f"{SCHEME}{repo}"
    info = call_hub(lambda: HfApi().dataset_info(repo, revision=at, timeout=30), where)
    names = [one.rfilename for one in info.siblings or ()]
    commit = str(info.sha)
    config = _config(info.card_data, name, where) if name or not (path or data_files) else {}
    given = path or data_files or config.get("data_files")
    if given is None:
        inside = f"{str(config['data_dir']).strip('/')}/" if config.get("data_dir") else ""
        own = [one for one in names if one.startswith(inside) and readable(one)]
        yield from ((HubFile(repo, commit, one), split) for one, split in _named(own, names, repo))
        return
    for split, globs in _by_split(given, where).items():
        matching = [one for pattern in globs for one in _matching(pattern.removeprefix("./"), names, readable, where)]
        yield from ((HubFile(repo, commit, one), split) for one in dict.fromkeys(matching))


def _matching(pattern: str, names: Sequence[str], readable: Callable[[str], bool], where: str) -> list[str]:
    """Return the files that a pattern, a name, or that of a folder stands for."""
    if pattern in names:
        return [pattern]
    found = [one for one in names if matches_pattern(one, pattern)]
    found = found or [one for one in names if one.startswith(f"{pattern.rstrip('/')}/")]
    if not found:
        hint = suggest_names(pattern, names) if names else "the data set holds no files"
        raise UsageError("file_not_found", f"has no file {pattern!r}", where=where, hint=hint)
    return [one for one in found if readable(one)] or found


def call_hub(ask: Callable[[], Result], what: str) -> Result:
    """Return what the hub answers; it is asked again after failures that pass.

    Raises:
        HubError: it refuses, or fails again and again.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    # Its bases are those of its HTTP client, which differs from version to version, and lets its own errors through.
    client_errors = cast("tuple[type[Exception], ...]", (OSError, *HfHubHTTPError.__bases__))
    try:
        return with_retries(ask, client_errors, (OfflineModeIsEnabled,))
    except OfflineModeIsEnabled as error:
        found = f"is not in the cache: {_first_line(error)}"
        raise HubError("hub_offline", found, where=what, hint="unset HF_HUB_OFFLINE") from None
    except GatedRepoError as error:
        hint = "accept its terms on the hub, and set HF_TOKEN"
        raise HubError("hub_gated", f"is gated: {_first_line(error)}", where=what, hint=hint) from None
    except client_errors as error:
        status = http_status(error)
        if status is None:
            found, hint = f"cannot be reached, {TRIES} times", "is it a file? none here has this name"
        elif status < 500 and status != 429:
            found, hint = f"answers {status}", "check the name, HF_TOKEN and HF_ENDPOINT"
        else:
            found, hint = f"answers {status}, {TRIES} times", "try again later"
        raise HubError("hub", f"the hub {found}: {_first_line(error)}", where=what, hint=hint) from None


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _by_split(data_files: Any, where: str) -> dict[str, list[str]]:
    """Return split -> globs of a `data_files`, as users and cards write it."""
    if isinstance(data_files, list) and data_files and all(isinstance(one, Mapping) for one in data_files):
        found = [(str(one.get("split", "train")), one.get("path")) for one in data_files]
    else:
        found = list(data_files.items()) if isinstance(data_files, Mapping) else [("train", data_files)]
    chosen: dict[str, list[str]] = {}
    for split, globs in found:
        listed = [globs] if isinstance(globs, str) else globs
        if not isinstance(listed, list | tuple) or not listed or not all(isinstance(one, str) for one in listed):
            hint = "a glob, a list of globs, or split -> globs"
            raise UsageError("data_files", f"data_files of {split} is {globs!r:.60}", where=where, hint=hint)
        chosen.setdefault(str(split), []).extend(listed)
    return chosen


def _config(card: Any, name: str | None, where: str) -> Mapping[str, Any]:
    """Return the configuration of a card that has the name, or is the default."""
    listed = card.to_dict().get("configs") if card else None
    configs = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    known = {str(one.get("config_name", "default")): one for one in configs}
    if name is None and not known:
        return {}
    default = [one for one, config in known.items() if config.get("default") or one == "default"]
    wanted = name or (default[0] if default else next(iter(known)) if len(known) == 1 else "")
    if wanted not in known:
        found = f"has no configuration {name!r}" if name else "has several configurations"
        hint = suggest_names(name or "", known) if known else "leave name out: its card names none"
        raise UsageError("hub_config", found, where=where, hint=hint)
    return known[wanted]


def _named(files: Sequence[str], all_files: Sequence[str], repo: str) -> Iterator[tuple[str, str]]:
    """Yield data files, each with the split that it is named for; beside those, others are no data."""
    where = f"{SCHEME}{repo}"
    if not files:
        script = f"{repo.partition('/')[2]}.py"
        needs_code = f"needs code to be read ({script}), which is never run"
        reason = needs_code if script in all_files else "holds no file that is read"
        raise InputRefused("hub_no_data", reason, where=where, hint="name files with data_files")
    named = [(name, split) for name in sorted(files) if (split := split_from_name(name))]
    chosen = named or [(name, "train") for name in sorted(files)]
    stems = Counter(_SUFFIX.sub("", name) for name, _ in chosen)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        hint = "name those that are wanted with data_files"
        raise UsageError("hub_formats", f"holds {twice[0]} in several formats", where=where, hint=hint)
    yield from chosen
