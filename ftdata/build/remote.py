"""Remote builds: builds in object stores, which have neither locks nor renames.

A build is made on this machine and sent there file by file, the manifest last: without one, there is no build. One that
is there is never written over, since nothing could exchange all of it at once. To be used, it is fetched, and every
file held against the manifest.

    DIR/builds/KEY      DIR is the cache, or a folder for temporary files where there is none; KEY is a hash of the URL
                        for a build on its way there, of the manifest for one that was fetched
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftdata.build import store
from ftdata.errors import HubError, InputRefused, StorageError, UsageError
from ftdata.readers.formats import readers
from ftdata.readers.remote_files import list_sizes, open_remote, remove_remote_file, upload_file
from ftdata.readers.streams import Input, is_object_store, is_url, read_chunks
from ftdata.storage import atomic, disk

_TELLING = ("manifest.json", "dataset_dict.json")
_CLAIM = "ftdata-upload"
"""The file that stands at a place until the manifest does: a hash of the manifest."""

_AT_ONCE = 8
"""Files on their way: one alone does not fill a line."""


def check_output_url(url: str) -> str:
    """Return the URL of an output folder, without slashes at its end.

    Raises:
        UsageError: nothing can be put there.
    """
    if not is_object_store(url) or url.startswith(("file:", "local:", "data:")):
        hint = (
            "`ftdata push` sends builds to the hub" if url.startswith("hf://") else "a path, or e.g. s3://bucket/name"
        )
        raise UsageError("output_url", f"{url} is no place for a build", hint=hint)
    if "@" in url.split("://", 1)[1].split("/", 1)[0]:
        raise UsageError("output_url", "the URL holds a user name or a key", hint="set it in the environment")
    return url.rstrip("/")


def staging_folder(url: str) -> Path:
    """Return the folder of this machine in which a build is made that is to go to a URL."""
    return _home() / disk.hash_bytes(url.encode("utf-8", "backslashreplace"))


def _home() -> Path:
    if (own := disk.cache_root()) is not None:
        return own.resolve() / "builds"
    folder = Path(tempfile.gettempdir()).resolve() / f"ftdata-{os.getuid()}"
    # Others may write beside it.
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or not stat.S_ISDIR(state.st_mode) or state.st_mode & 0o022:
        raise StorageError(
            "not_a_build_folder", f"{folder} is not this user's alone", hint="remove it, or set FTDATA_CACHE"
        )
    return folder / "builds"


def read_remote_manifest(url: str) -> dict[str, Any] | None:
    """Return the manifest of the build at a URL, or `None` where there is none.

    Raises:
        InputRefused: it is damaged, or of another format.
        HubError: the place cannot be read, asked again and again.
    """
    text = _manifest(url)
    return None if text is None else store.parse_manifest(text, f"{url}/manifest.json")


def _manifest(url: str) -> bytes | None:
    try:
        return read_remote_file(url, "manifest.json")
    except UsageError as error:
        if error.code == "file_not_found":
            return None
        raise


def read_remote_file(url: str, name: str) -> bytes:
    """Return one small file of a build at a URL."""
    with open_remote(f"{url}/{name}") as file:
        return file.read()


def missing_files(url: str, files: Mapping[str, Any]) -> list[str]:
    """Return those of a build's files that are not at a URL, or have not as many bytes there."""
    there = list_sizes(url)
    return [name for name, known in files.items() if there.get(name) != known["bytes"]]


def upload_build(folder: Path, url: str) -> None:
    """Send a finished build to a URL; what an earlier try has put there, and is as it shall be, stays.

    Raises:
        UsageError: `target_exists`: there is something else, or another build on its way.
        HubError: the place refuses, or fails again and again.
    """
    files = store.read_manifest(folder)["files"]
    claim = disk.sha256_of_file(folder / "manifest.json").encode()
    _claim(url, claim)
    there = list_sizes(url)

    def put(name: str) -> None:
        known = files[name]
        if there.get(name) != known["bytes"] or _digest(f"{url}/{name}") != known["sha256"]:
            upload_file(folder / name, f"{url}/{name}")

    with ThreadPoolExecutor(_AT_ONCE) as senders:
        list(senders.map(put, files))
    if lost := missing_files(url, files):
        found = f"has not what was sent: {', '.join(lost[:3])}"
        raise HubError("network", found, where=url, hint="run it again: it goes on with what is missing")
    if (
        not upload_file(folder / "manifest.json", f"{url}/manifest.json", anew=True)
        and _manifest(url) != (folder / "manifest.json").read_bytes()
    ):
        raise _taken(url, "holds another build")
    remove_remote_file(f"{url}/{_CLAIM}")


def check_free(url: str) -> None:
    """Refuse a place in which there is anything but a part of a build that did not arrive whole.

    Raises:
        UsageError: there is.
    """
    there = list_sizes(url)
    if "manifest.json" in there:
        raise _taken(url, "holds another build")
    # What nobody has claimed is none of ours, whatever it is called.
    if there and _CLAIM not in there:
        raise _taken(url, f"holds what is no build: {', '.join(sorted(there)[:3])}")


def _claim(url: str, claim: bytes) -> None:
    """Say at a place which build is on its way there; one at a time is."""
    check_free(url)
    with tempfile.NamedTemporaryFile() as file:
        file.write(claim)
        file.flush()
        if not upload_file(Path(file.name), f"{url}/{_CLAIM}", anew=True) and read_remote_file(url, _CLAIM) != claim:
            raise _taken(url, "waits for another build that is on its way there, or was")


def _taken(url: str, found: str) -> UsageError:
    hint = "it is not written over: choose another place, or remove what is there"
    return UsageError("target_exists", found, where=url, hint=hint)


def _no_build(url: str) -> InputRefused:
    return InputRefused("not_a_build", f"{url} is no build of ftdata: it has no manifest.json")


def find_build(place: object) -> Path | None:
    """Return the folder of a build if that is what a place is; one that is elsewhere is fetched.

    Raises:
        InputRefused: it is damaged.
        HubError: it cannot be read, asked again and again.
    """
    if isinstance(place, str) and is_object_store(place) and Input(place).suffix not in readers:
        return local_build(place) if "manifest.json" in list_sizes(place.rstrip("/")) else None
    if isinstance(place, str | Path) and all((Path(place) / name).is_file() for name in _TELLING):
        return Path(place)
    return None


def local_build(place: str | Path) -> Path:
    """Return the folder of a build: where it is in an object store, one on this machine that is the same.

    Raises:
        InputRefused: there is no build, or it is damaged.
        HubError: it cannot be read, asked again and again.
    """
    if not (isinstance(place, str) and is_url(place)):
        return Path(place)
    url = check_output_url(place)
    text = _manifest(url)
    if text is None:
        raise _no_build(url)
    files = store.parse_manifest(text, f"{url}/manifest.json")["files"]
    target = _home() / disk.hash_bytes(text)
    if not target.is_dir() or store.verify_files(target):
        disk.remove(target)
        with atomic.publish_folder(target) as scratch:
            for folder in {(scratch / name).parent for name in files}:
                disk.mkdir(folder, parents=True, exist_ok=True)
            with ThreadPoolExecutor(_AT_ONCE) as fetchers:
                list(fetchers.map(lambda name: _fetch(f"{url}/{name}", scratch / name), files))
            disk.write(scratch / "manifest.json", text)
            if damaged := store.verify_files(scratch):
                found = f"{url} is damaged: {', '.join(damaged[:3])}"
                raise InputRefused("damaged_build", found, hint="build again")
    return target


def _fetch(url: str, file: Path) -> None:
    with open_remote(url) as source, disk.create(file) as target:
        for chunk in read_chunks(source):
            target.write(chunk)


def verify(place: str | Path) -> list[str]:
    """Return the files of a build that are not as they were written: changed by a bit, cut off, or missing.

    Args:
        place: the build's folder, or its URL.

    Returns:
        Their names, relative to the build; none: it is whole, to the bit.

    Raises:
        UsageError: it is neither.
        InputRefused: there is no build.
        HubError: it cannot be read, asked again and again.

    >>> import tempfile
    >>> from ftdata.build.dataset import write_build
    >>> from ftdata.testing import byte_tokenizer
    >>> folder = f"{tempfile.mkdtemp()}/built"
    >>> _ = write_build([{"question": "2+2?", "answer": "4"}], byte_tokenizer(), folder, template="chatml")
    >>> with open(f"{folder}/report.json", "a", encoding="utf-8") as file:
    ...     _ = file.write(" ")
    >>> verify(folder)
    ['report.json']
    """
    if not isinstance(place, str | Path):
        raise UsageError("build_type", f"it is {place!r:.60}, expected the folder of a build, or its URL")
    if not (isinstance(place, str) and is_url(place)):
        return store.verify_files(Path(place))
    url = check_output_url(place)
    try:
        found = read_remote_manifest(url)
    except InputRefused as error:
        if error.code != "damaged_build":
            raise
        return ["manifest.json"]
    if found is None:
        raise _no_build(url)
    files = found["files"]
    lost = set(missing_files(url, files))
    with ThreadPoolExecutor(_AT_ONCE) as fetchers:
        digests = fetchers.map(lambda name: None if name in lost else _digest(f"{url}/{name}"), files)
        return [name for name, digest in zip(files, digests, strict=True) if digest != files[name]["sha256"]]


def _digest(url: str) -> str:
    found = hashlib.sha256()
    with open_remote(url) as file:
        for chunk in read_chunks(file):
            found.update(chunk)
    return found.hexdigest()
