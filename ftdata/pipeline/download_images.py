"""Download images at URLs while earlier rows are processed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from ftdata.images.references import MAX_BYTES, find_url
from ftdata.readers.remote_files import open_remote
from ftdata.types import RowImage

_DOWNLOADS, _MAX_FINISHED = 16, 256
"""Number of simultaneous downloads, and of pending and finished downloads that are kept in memory."""


def start_downloads(images: tuple[RowImage, ...]) -> None:
    """Start to download the images of a row that are at URLs."""
    for image in images:
        if url := find_url(image.value):
            _start(url)


def download(url: str) -> bytes:
    """Return the content of a URL, at most `MAX_BYTES` + 1 bytes, so that `read_image` can reject larger files.

    Raises:
        FtdataError: as for `open_remote`.
    """
    return _start(url).result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="ftdata-images")


@lru_cache(maxsize=_MAX_FINISHED)
def _start(url: str) -> Future[bytes]:
    return _pool().submit(_read, url)


def _read(url: str) -> bytes:
    with open_remote(url) as file:
        return file.read(MAX_BYTES + 1)
