"""Show each image in the text of an example as a caption, `[image 640×480 → 391 tokens]`, and as a thumbnail."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import FtdataError, count_noun
from ftdata.images.references import load_image
from ftdata.types import Example, ImageReference, Part

_THUMBNAIL_SIDE = 128
"""Maximum width and height of a thumbnail in pixels."""


_Captioned = tuple[str, NDArray[np.int64], dict[int, ImageReference]]
"""A text, the ends of its tokens, and its images by the number of their first token."""


def caption_images(example: Example, text: str, ends: NDArray[np.int64], shift: int) -> _Captioned:
    """Replace the text of each image with a caption.

    The caption belongs to the first token of the image, and the text of the other tokens is empty.

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
    captioned = dict[int, ImageReference]()
    # The last image comes first, so that the positions of the other images stay valid.
    for span, image in zip(media[::-1], images[::-1], strict=True):
        start, end = span.start + shift, span.end + shift
        count = int(np.count_nonzero((ends > start) & (ends <= end)))
        if image:
            captioned[int(np.searchsorted(ends, start, side="right"))] = image
        caption = f"[image{f' {image.width}×{image.height}' if image else ''} → {count_noun(count, 'token')}]"
        text = text[:start] + caption + text[end:]
        ends = np.where(ends <= start, ends, np.where(ends <= end, start, ends - end + start) + len(caption))
    return text, ends, captioned


def make_thumbnail(image: ImageReference) -> str | None:
    """Return a small copy of an image as a data URI, or `None` if the image cannot be read."""
    try:
        picture = load_image(image, least_side=_THUMBNAIL_SIDE)
    except FtdataError:
        return None
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
