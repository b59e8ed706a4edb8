"""Show each image in the text of an example as a label with its size and its number of tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftdata.errors import count_noun
from ftdata.types import Example, Part


def label_images(example: Example, text: str, ends: NDArray[np.int64], shift: int) -> tuple[str, NDArray[np.int64]]:
    """Replace the text of each image by a label. The first token of the image has the label, and the others are empty.

    Args:
        example: the example.
        text: its visible text.
        ends: int64 `[n]`, the end of each token in the text.
        shift: number of characters before the text of the example.

    Returns:
        The new text and the new ends.
    """
    media = [span for span in example.spans if span.part is Part.MEDIA][: len(example.images)]
    # The last image comes first, so that the positions of the other images stay valid.
    for span, image in zip(media[::-1], example.images[::-1], strict=True):
        start, end = span.start + shift, span.end + shift
        count = int(np.count_nonzero((ends > start) & (ends <= end)))
        label = f"[image {image.width}×{image.height} → {count_noun(count, 'token')}]"
        text = text[:start] + label + text[end:]
        ends = np.where(ends <= start, ends, np.where(ends <= end, start, ends - end + start) + len(label))
    return text, ends
