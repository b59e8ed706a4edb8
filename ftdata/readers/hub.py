"""The hub: which files a data set there has, for which split, and how they get here.

owner/name ──its card, or the names of its files──> files of splits, pinned to one commit ──> the local cache
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ftdata.errors import HubError, InputRefused, UsageError, nearest
from ftdata.readers.remote import TRIES, persist, status_of

Result = TypeVar("Result")

SCHEME = "hf://"
_ID = re.compile(r"(?:datasets/)?([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
"""Words in names of files -> the split that they say."""


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
        return Path(asked(lambda: hf_hub_download(repo, name, repo_type="dataset", revision=commit), str(self)))


def is_hub(place: str) -> bool:
    """Whether this is a place on the hub: `hf://...`, or `owner/name` that is nothing here."""
    if place.startswith(SCHEME):
        return True
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place) is not None
    return named and not Path(place).exists() and not Path(place).parent.is_dir()


def hub_files(
    place: str,
    readable: Callable[[str], bool],
    config: str | None = None,
    revision: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
) -> Iterator[tuple[HubFile, str]]:
    """Yield the data files of a data set on the hub, each with its split.

    Args:
        place: `hf://owner/name`, with `@revision` and a path or glob after it, if need be; or `owner/name`.
        readable: whether a file of this name is data.
        config: the name of a configuration in the data set's card.
        revision: a branch, tag or commit; what is found is pinned to the commit.
        data_files: globs of files, or split -> globs.

    Raises:
        UsageError: nothing there has this name.
        HubError: the hub does not answer, or has no such data set.
    """
    found = _ID.fullmatch(place.removeprefix(SCHEME))
    if found is None:
        raise UsageError("hub_path", f"{place} is no data set", hint="hf://owner/name, or owner/name")
    from fsspec.utils import glob_translate
    from huggingface_hub import HfApi

    repo, at, path = found[1], found[2] or revision, found[3]
    info = asked(lambda: HfApi().dataset_info(repo, revision=at, timeout=30), f"{SCHEME}{repo}")
    names = [one.rfilename for one in info.siblings or ()]
    commit = str(info.sha)
    given = path or data_files
    chosen = _by_split(given) if given else _of_card(info.card_data, config, f"{SCHEME}{repo}")
    if chosen is None:
        yield from ((HubFile(repo, commit, name), split) for name, split in _named(names, readable, repo))
        return
    for split, globs in chosen.items():
        for pattern in globs:
            matches = re.compile(glob_translate(pattern.removeprefix("./"))).match
            matching = list(filter(matches, names))
            if not matching:
                hint = nearest(pattern, names) if names else "the data set holds no files"
                raise UsageError("file_not_found", f"{SCHEME}{repo} has no file {pattern!r}", hint=hint)
            yield from ((HubFile(repo, commit, name), split) for name in matching)


def asked(ask: Callable[[], Result], what: str) -> Result:
    """Return what the hub answers; it is asked again after failures that pass.

    Raises:
        HubError: it refuses, or fails again and again.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    # Its bases are those of its HTTP client, which differs from version to version, and lets its own errors through.
    client_errors = cast("tuple[type[Exception], ...]", (OSError, *HfHubHTTPError.__bases__))
    try:
        return persist(ask, client_errors, (OfflineModeIsEnabled,))
    except OfflineModeIsEnabled as error:
        found = f"is not in the cache: {_first_line(error)}"
        raise HubError("hub_offline", found, where=what, hint="unset HF_HUB_OFFLINE") from None
    except GatedRepoError as error:
        hint = "accept its terms on the hub, and set HF_TOKEN"
        raise HubError("hub_gated", f"is gated: {_first_line(error)}", where=what, hint=hint) from None
    except client_errors as error:
        status = status_of(error)
        if status is None:
            found, hint = f"cannot be reached, {TRIES} times", "is it a file? none here has this name"
        elif status < 500 and status != 429:
            found, hint = f"answers {status}", "check the name, HF_TOKEN and HF_ENDPOINT"
        else:
            found, hint = f"answers {status}, {TRIES} times", "try again later"
        raise HubError("hub", f"the hub {found}: {_first_line(error)}", where=what, hint=hint) from None


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _by_split(data_files: Any) -> dict[str, list[str]]:
    given = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    return {str(split): [globs] if isinstance(globs, str) else list(globs) for split, globs in given.items()}


def _of_card(card: Any, config: str | None, what: str) -> dict[str, list[str]] | None:
    """Return the files that the card names for each split, or `None` where it names none."""
    configs = [one for one in (card.to_dict().get("configs") or ()) if isinstance(one, dict)] if card else []
    names = [str(one.get("config_name", "default")) for one in configs]
    if not configs and config is None:
        return None
    default = [name for name, one in zip(names, configs, strict=True) if one.get("default") or name == "default"]
    wanted = config or (default[0] if default else names[0] if len(names) == 1 else None)
    if wanted not in names:
        hint = f"say which with name: {', '.join(names)}" if config is None else nearest(config, names)
        raise UsageError("hub_config", f"has several configurations, or not {config!r}", where=what, hint=hint)
    data_files = configs[names.index(str(wanted))].get("data_files")
    if data_files is None:
        return None
    if isinstance(data_files, list) and all(isinstance(one, dict) for one in data_files):
        return {str(one["split"]): _by_split(one["path"])["train"] for one in data_files}
    return _by_split(data_files)


def _named(names: Sequence[str], readable: Callable[[str], bool], repo: str) -> Iterator[tuple[str, str]]:
    """Yield the data files among all, with the split that their names, or those of their folders, say."""
    found = []
    for name in filter(readable, sorted(names)):
        words = re.split(r"[^a-z]+", name.lower())
        found.append((name, next((_SPLITS[word] for word in words if word in _SPLITS), "train")))
    if not found:
        script = f"{repo.partition('/')[2]}.py"
        needs_code = f"needs code to be read ({script}), which is never run"
        reason = needs_code if script in names else "holds no file that is read"
        raise InputRefused("hub_no_data", reason, where=f"{SCHEME}{repo}", hint="name files with data_files")
    return iter(found)
