"""Replace the placeholders of images in a rendered text by the text of their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ftdata.errors import BadRow, count_noun
from ftdata.types import Part, Rendered, Span


def expand_images(rendered: Rendered, placeholder: str, texts: Sequence[str]) -> Rendered:
    """Replace each placeholder that the template printed for an image by the text of the image.

    The new text has spans with the part `Part.MEDIA`, which the model does not generate. The same characters in the
    text of a message are text, not a placeholder, and are not replaced.

    Args:
        rendered: the rendered conversation.
        placeholder: the text that the template prints for each image.
        texts: the text of each image, in the order of the images in the conversation.

    Raises:
        BadRow: `image_count`, if the template did not print one placeholder per image.

    >>> spans = (Span(0, 6, Part.SCAFFOLD, -1, False), Span(6, 8, Part.CONTENT, 0, False))
    >>> expanded = expand_images(Rendered("[<im>]hi", spans), "<im>", ["xxx"])
    >>> expanded.text, [(span.start, span.end, str(span.part)) for span in expanded.spans]
    ('[xxx]hi', [(0, 1, 'scaffold'), (1, 4, 'media'), (4, 5, 'scaffold'), (5, 7, 'content')])
    """
    pieces = list[tuple[str, Span]]()
    images = iter(texts)
    count = 0
    for span in rendered.spans:
        text = rendered.text[span.start : span.end]
        if span.part is not Part.SCAFFOLD or placeholder not in text:
            pieces.append((text, span))
            continue
        for part in re.split(f"({re.escape(placeholder)})", text):
            if part == placeholder:
                count += 1
                pieces.append((next(images, ""), span._replace(part=Part.MEDIA, generated=False)))
            elif part:
                pieces.append((part, span))
    if count != len(texts):
        placeholders, images_of_row = count_noun(count, "image placeholder"), count_noun(len(texts), "image")
        problem = f"the template prints {placeholders} ({placeholder}) for {images_of_row}"
        hint = "correct the images of the row, or use the chat template of the model"
        raise BadRow("image_count", problem, hint=hint)
    return rendered._replace(text="".join(text for text, _ in pieces), spans=_place_spans(pieces))


def _place_spans(pieces: Sequence[tuple[str, Span]]) -> tuple[Span, ...]:
    """Return the spans of consecutive pieces of text."""
    ends = [*accumulate((len(text) for text, _ in pieces), initial=0)]
    return tuple(
        span._replace(start=start, end=end) for (_, span), (start, end) in zip(pieces, pairwise(ends), strict=True)
    )
