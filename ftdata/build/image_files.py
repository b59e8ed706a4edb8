"""Store which images the examples of a build have, and the bytes of images that the rows contain.

Images in files are stored as references. The bytes of other images are written to one file per shard, because training
reads the images in random order, and the data may be compressed or in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import BufferedWriter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.errors import UsageError
from ftdata.storage import disk
from ftdata.storage.arrow_arrays import int32_array, int64_array, list_offsets, string_array
from ftdata.types import ImageReference

IMAGES_FOLDER = "images"
"""The folder of a build with the bytes of images that the rows contain."""

_SHARD_FILE = "images.bin"

_FIELDS = {
    "path": pa.string(),
    "start": pa.int64(),
    "size": pa.int64(),
    "hash": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "document": pa.int32(),
}

IMAGE_LISTS = pa.list_(pa.struct(_FIELDS))
"""The type of a column with the images of each example, or of each packed sequence. `document` is the index of the
example in the packed sequence."""


class ImageWriter:
    """Writes the bytes of the images of a shard. The file is created for the first image that a row contains."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._path, self._stack = folder / _SHARD_FILE, stack
        self._file: BufferedWriter | None = None
        self._end = 0
        self._starts = dict[str, int]()
        """The hash of each written image -> index of its first byte."""

    def write(self, image: ImageReference) -> ImageReference:
        """Write the bytes of an image that the row contains. Return a reference to them."""
        if image.content is None:
            return image
        if image.hash not in self._starts:
            self._file = self._file or self._stack.enter_context(disk.create(self._path))
            self._file.write(image.content)
            self._starts[image.hash] = self._end
            self._end += image.size
        return image._replace(start=self._starts[image.hash], content=None)


def to_image_lists(lists: Sequence[Sequence[ImageReference | dict[str, Any]]]) -> pa.ListArray:
    """Return a column with a list of images for each example or packed sequence."""
    images = [image if isinstance(image, dict) else _describe_image(image) for images in lists for image in images]
    columns = [_ARRAYS[kind]([image[name] for image in images]) for name, kind in _FIELDS.items()]
    fields = [pa.field(*field) for field in _FIELDS.items()]
    return pa.ListArray.from_arrays(list_offsets(map(len, lists)), pa.StructArray.from_arrays(columns, fields=fields))


_ARRAYS: dict[pa.DataType, Callable[[list[Any]], pa.Array]] = {
    pa.string(): string_array,
    pa.int64(): int64_array,
    pa.int32(): lambda values: int32_array(np.array(values, np.int32)),
}


def _describe_image(image: ImageReference) -> dict[str, Any]:
    return {"document": 0, **{name: getattr(image, name) for name in _FIELDS if name != "document"}}


def has_images(column: pa.ChunkedArray) -> bool:
    """Return whether a column of a table contains an image."""
    return any(len(chunk.flatten()) for chunk in column.chunks)


def locate_images(
    column: pa.ChunkedArray, numbers: NDArray[np.int64], shards: NDArray[np.int64]
) -> list[list[dict[str, Any]]]:
    """Return the images of some examples, with the paths that they have in the build.

    Args:
        column: the images of all examples.
        numbers: int64 `[selected examples]`, the numbers of the examples.
        shards: int64 `[selected examples]`, the number of the shard of each example.
    """
    lists: list[list[dict[str, Any]]] = column.take(pa.array(numbers)).to_pylist()
    for images, shard in zip(lists, shards.tolist(), strict=True):
        for image in images:
            image["path"] = image["path"] or f"{IMAGES_FOLDER}/{shard:05d}.bin"
    return lists


def publish_image_files(folder: Path, shards: Sequence[Path]) -> None:
    """Add the files with the bytes of images from the folders of the shards to the folder of a build."""
    for number, shard in enumerate(shards):
        if (shard / _SHARD_FILE).exists():
            disk.mkdir(folder / IMAGES_FOLDER, exist_ok=True)
            disk.link(shard / _SHARD_FILE, folder / IMAGES_FOLDER / f"{number:05d}.bin")


def build_has_images(folder: Path) -> bool:
    """Return whether the examples of a finished build have images."""
    paths = sorted(folder.glob("*/data-*.arrow"))[:1]
    return any("images" in pa.ipc.open_stream(pa.OSFile(os.fsencode(path))).schema.names for path in paths)


def check_images_in_memory(folder: Path) -> None:
    """Check that the examples of a build do not need the files in its folder, because the folder is temporary.

    Raises:
        UsageError: `output_dir`.
    """
    if (folder / IMAGES_FOLDER).exists():
        problem = "the rows contain the bytes of images, which must be written to a folder"
        raise UsageError("output_dir", problem, hint="set output_dir")


def merge_row_images(lists: Sequence[list[dict[str, Any]]], bounds: Sequence[int]) -> list[list[dict[str, Any]]]:
    """Return the images of each packed sequence. `bounds` contains the numbers of its first example and of the next."""
    return [
        [{**image, "document": document} for document, images in enumerate(lists[first:end]) for image in images]
        for first, end in pairwise(bounds)
    ]
