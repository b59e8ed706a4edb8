"""Show each image in the text of an example as a label with its size and its number of tokens, and as a thumbnail."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import count_noun
from ftdata.types import Example, ImageReference, Part

_THUMBNAIL_SIDE = 128
"""Maximum width and height of a thumbnail in pixels."""


_Labeled = tuple[str, NDArray[np.int64], dict[int, ImageReference]]
"""A text, the ends of its tokens, and its images by the number of their first token."""


def label_images(example: Example, text: str, ends: NDArray[np.int64], shift: int) -> _Labeled:
    """Replace the text of each image by a label. The first token of the image has the label, and the others are empty.

    Args:
        example: the example.
        text: its visible text.
        ends: int64 `[n]`, the end of each token in the text.
        shift: number of characters before the text of the example.

    Returns:
        The new text, the new ends, and the images by the number of their first token.
    """
    media = [span for span in example.spans if span.part is Part.MEDIA]
    # In a build, an image can have several runs of tokens, because the separators between them are not marked.
    images: list[ImageReference | None] = (
        [*example.images] if len(media) == len(example.images) else [None] * len(media)
    )
    shown = dict[int, ImageReference]()
    # The last image comes first, so that the positions of the other images stay valid.
    for span, image in zip(media[::-1], images[::-1], strict=True):
        start, end = span.start + shift, span.end + shift
        count = int(np.count_nonzero((ends > start) & (ends <= end)))
        if image:
            shown[int(np.searchsorted(ends, start, side="right"))] = image
        label = f"[image{f' {image.width}×{image.height}' if image else ''} → {count_noun(count, 'token')}]"
        text = text[:start] + label + text[end:]
        ends = np.where(ends <= start, ends, np.where(ends <= end, start, ends - end + start) + len(label))
    return text, ends, shown


def make_thumbnail(image: ImageReference) -> str | None:
    """Return a small copy of an image as a data URI, or `None` if the image cannot be read."""
    from PIL import Image, ImageOps

    with suppress(Exception):  # Pillow raises many types for damaged images.
        content = image.content
        if content is None:
            with Path(image.path).open("rb") as source:
                source.seek(image.start)
                content = source.read(image.size)
        file = Image.open(io.BytesIO(content))
        file.draft("RGB", (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        picture = ImageOps.exif_transpose(file).convert("RGB")
        picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=70)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return None
