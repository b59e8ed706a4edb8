"""Upload, download and verify builds in object stores such as S3.

Object stores have neither locks nor renames. A build is made on this machine and uploaded file by file. The manifest is
uploaded last; without it, the URL contains no build. An existing build is never overwritten, because an object store
cannot replace several files atomically. To read a build, it is downloaded, and every file is checked against the
manifest.

    DIR/builds/KEY      DIR is the cache, or a temporary folder without a cache. KEY is a hash of the URL for a build
                        that is being uploaded, and a hash of the manifest for a downloaded build.
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

_BUILD_FILES = ("manifest.json", "dataset_dict.json")
_CLAIM = "ftdata-upload"
"""A file that exists during an upload and contains a hash of the manifest."""

_PARALLEL_TRANSFERS = 8
"""Number of files to transfer in parallel; a single transfer rarely uses the full bandwidth."""


def check_output_url(url: str) -> str:
    """Check that builds can be written to a URL, and return the URL without trailing slashes.

    Raises:
        UsageError: builds cannot be written to the URL.
    """
    if not is_object_store(url) or url.startswith(("file:", "local:", "data:")):
        push = "use `ftdata push` to upload builds to the Hub"
        hint = push if url.startswith("hf://") else "use a path, or a URL such as s3://bucket/name"
        raise UsageError("output_url", f"builds cannot be written to {url}", hint=hint)
    if "@" in url.split("://", 1)[1].split("/", 1)[0]:
        problem = "the URL contains a user name or a key"
        raise UsageError("output_url", problem, hint="set credentials in environment variables")
    return url.rstrip("/")


def staging_folder(url: str) -> Path:
    """Return the local folder in which a build is made before it is uploaded to a URL."""
    return _builds_folder() / disk.hash_bytes(url.encode("utf-8", "backslashreplace"))


def _builds_folder() -> Path:
    if (root := disk.cache_root()) is not None:
        return root.resolve() / "builds"
    folder = Path(tempfile.gettempdir()).resolve() / f"ftdata-{os.getuid()}"
    # Other users can write to the parent folder.
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
        problem = f"the folder {folder} belongs to another user, or other users can write to it"
        hint = "remove the folder, or set FTDATA_CACHE to another folder"
        raise StorageError("not_a_build_folder", problem, hint=hint)
    return folder / "builds"


def read_remote_manifest(url: str) -> dict[str, Any] | None:
    """Return the manifest of the build at a URL, or `None` if the URL contains no build.

    Raises:
        InputRefused: the manifest is damaged, or has an unsupported format.
        HubError: the URL cannot be read after several attempts.
    """
    text = _read_manifest_bytes(url)
    return None if text is None else store.parse_manifest(text, f"{url}/manifest.json")


def _read_manifest_bytes(url: str) -> bytes | None:
    try:
        return read_remote_file(url, "manifest.json")
    except UsageError as error:
        if error.code == "file_not_found":
            return None
        raise


def read_remote_file(url: str, name: str) -> bytes:
    """Return the contents of a small file in the build at a URL."""
    with open_remote(f"{url}/{name}") as file:
        return file.read()


def missing_files(url: str, files: Mapping[str, Any]) -> list[str]:
    """Return the names of those manifest files that are missing at a URL or have the wrong size there."""
    sizes = list_sizes(url)
    return [name for name, expected in files.items() if sizes.get(name) != expected["bytes"]]


def upload_build(folder: Path, url: str) -> None:
    """Upload a finished build to a URL. Skip files that an earlier attempt has already uploaded correctly.

    Raises:
        UsageError: `target_exists`: the URL contains other files, or another build is being uploaded.
        HubError: the server rejects the upload, or fails repeatedly.
    """
    files = store.read_manifest(folder)["files"]
    claim = disk.sha256_of_file(folder / "manifest.json").encode()
    _write_claim(url, claim)
    sizes = list_sizes(url)

    def upload(name: str) -> None:
        expected = files[name]
        if sizes.get(name) != expected["bytes"] or _hash_remote_file(f"{url}/{name}") != expected["sha256"]:
            upload_file(folder / name, f"{url}/{name}")

    with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
        list(pool.map(upload, files))
    if missing := missing_files(url, files):
        problem = f"files are missing after the upload: {', '.join(missing[:3])}"
        raise HubError("network", problem, where=url, hint="run the command again to upload the missing files")
    if (
        not upload_file(folder / "manifest.json", f"{url}/manifest.json", anew=True)
        and _read_manifest_bytes(url) != (folder / "manifest.json").read_bytes()
    ):
        raise _target_exists_error(url, "the URL contains another build")
    remove_remote_file(f"{url}/{_CLAIM}")


def check_free(url: str) -> None:
    """Check that a URL is empty or contains only an incomplete upload.

    Raises:
        UsageError: the URL contains a build or other files.
    """
    sizes = list_sizes(url)
    if "manifest.json" in sizes:
        raise _target_exists_error(url, "the URL contains another build")
    # Files without a claim are not an incomplete upload, whatever their names.
    if sizes and _CLAIM not in sizes:
        raise _target_exists_error(url, f"the URL contains files that are not a build: {', '.join(sorted(sizes)[:3])}")


def _write_claim(url: str, claim: bytes) -> None:
    """Reserve a URL with a claim file, so that only one build can be uploaded there at a time."""
    check_free(url)
    with tempfile.NamedTemporaryFile() as file:
        file.write(claim)
        file.flush()
        if not upload_file(Path(file.name), f"{url}/{_CLAIM}", anew=True) and read_remote_file(url, _CLAIM) != claim:
            raise _target_exists_error(url, "the URL contains the unfinished upload of another build")


def _target_exists_error(url: str, problem: str) -> UsageError:
    hint = "choose another URL, or remove the files; builds in object stores are never overwritten"
    return UsageError("target_exists", problem, where=url, hint=hint)


def _no_build_error(url: str) -> InputRefused:
    return InputRefused("not_a_build", f"{url} is not a data set that ftdata built: it has no manifest.json")


def find_build(place: object) -> Path | None:
    """Return the local folder of a build, or `None` if `place` is not a build. If `place` is a URL, download it first.

    Raises:
        InputRefused: the build is damaged.
        HubError: the URL cannot be read after several attempts.
    """
    if isinstance(place, str) and is_object_store(place) and Input(place).suffix not in readers:
        return local_build(place) if "manifest.json" in list_sizes(place.rstrip("/")) else None
    if isinstance(place, str | Path) and all((Path(place) / name).is_file() for name in _BUILD_FILES):
        return Path(place)
    return None


def local_build(place: str | Path) -> Path:
    """Return the local folder of a build. If `place` is a URL, download the build to the cache.

    Raises:
        InputRefused: the URL contains no build, or the build is damaged.
        HubError: the URL cannot be read after several attempts.
    """
    if not (isinstance(place, str) and is_url(place)):
        return Path(place)
    url = check_output_url(place)
    text = _read_manifest_bytes(url)
    if text is None:
        raise _no_build_error(url)
    files = store.parse_manifest(text, f"{url}/manifest.json")["files"]
    target = _builds_folder() / disk.hash_bytes(text)
    if not target.is_dir() or store.verify_files(target):
        disk.remove(target)
        with atomic.publish_folder(target) as scratch:
            for folder in {(scratch / name).parent for name in files}:
                disk.mkdir(folder, parents=True, exist_ok=True)
            with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
                list(pool.map(lambda name: _download(f"{url}/{name}", scratch / name), files))
            disk.write(scratch / "manifest.json", text)
            if damaged := store.verify_files(scratch):
                problem = f"the build at {url} has missing or damaged files: {', '.join(damaged[:3])}"
                raise InputRefused("damaged_build", problem, hint="build the data set again")
    return target


def _download(url: str, file: Path) -> None:
    with open_remote(url) as source, disk.create(file) as target:
        for chunk in read_chunks(source):
            target.write(chunk)


def verify(place: str | Path) -> list[str]:
    """Check the files of a build against the hashes in its manifest.

    Args:
        place: the folder or the URL of the build.

    Returns:
        The paths of damaged or missing files, relative to the build. The list is empty if the build is intact.

    Raises:
        UsageError: the argument is neither a path nor a URL.
        InputRefused: the folder or URL contains no build.
        HubError: the URL cannot be read after several attempts.

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
        raise UsageError("build_type", f"the argument is {place!r:.60}, expected the folder or URL of a build")
    if not (isinstance(place, str) and is_url(place)):
        return store.verify_files(Path(place))
    url = check_output_url(place)
    try:
        manifest = read_remote_manifest(url)
    except InputRefused as error:
        if error.code != "damaged_build":
            raise
        return ["manifest.json"]
    if manifest is None:
        raise _no_build_error(url)
    files = manifest["files"]
    missing = set(missing_files(url, files))
    with ThreadPoolExecutor(_PARALLEL_TRANSFERS) as pool:
        digests = pool.map(lambda name: None if name in missing else _hash_remote_file(f"{url}/{name}"), files)
        return [name for name, digest in zip(files, digests, strict=True) if digest != files[name]["sha256"]]


def _hash_remote_file(url: str) -> str:
    digest = hashlib.sha256()
    with open_remote(url) as file:
        for chunk in read_chunks(file):
            digest.update(chunk)
    return digest.hexdigest()
