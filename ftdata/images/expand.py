"""Replace the image placeholders of a rendered text with the text of the image tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from ftdata.errors import BadRow, count_noun
from ftdata.images.processor import ImageText
from ftdata.types import Part, Rendered, SpanKinds, Spans


def expand_images(rendered: Rendered, placeholder: str, images: Sequence[ImageText]) -> Rendered:
    """Replace each placeholder that the template printed for an image with the text of the image.

    The new text has spans with the part `Part.MEDIA`, which the model does not generate. The same characters in the
    text of a message are text, not a placeholder, and are not replaced.

    Args:
        rendered: the rendered conversation.
        placeholder: the text that the template prints for each image.
        images: the text of each image, in the order of the images in the conversation.

    Raises:
        BadRow: `image_count`, if the template did not print one placeholder per image.

    >>> from ftdata.types import Span
    >>> spans = (Span(0, 6, Part.SCAFFOLD, -1, False), Span(6, 8, Part.CONTENT, 0, False))
    >>> expanded = expand_images(Rendered("[<im>]hi", spans), "<im>", [ImageText("axb", (3,))])
    >>> expanded.text, [(span.start, span.end, str(span.part)) for span in expanded.spans], expanded.repeats
    ('[axb]hi', [(0, 1, 'scaffold'), (1, 4, 'media'), (4, 5, 'scaffold'), (5, 7, 'content')], (3,))
    """
    pieces = list[tuple[str, Part, int, bool]]()
    texts, count = iter(image.text for image in images), 0
    for start, end, part, message, generated in rendered.spans:
        text = rendered.text[start:end]
        if part is not Part.SCAFFOLD or placeholder not in text:
            pieces.append((text, part, message, generated))
            continue
        for piece in re.split(f"({re.escape(placeholder)})", text):
            if piece == placeholder:
                count += 1
                pieces.append((next(texts, ""), Part.MEDIA, message, False))
            elif piece:
                pieces.append((piece, part, message, generated))
    if count != len(images):
        placeholders, images_of_row = count_noun(count, "image placeholder"), count_noun(len(images), "image")
        problem = f"the template prints {placeholders} ({placeholder}) for {images_of_row}"
        hint = "use the model's own chat template, or give the row one image per image part"
        raise BadRow("image_count", problem, hint=hint)
    repeats = tuple([repeat for image in images for repeat in image.repeats])
    new_texts, *kinds = zip(*pieces, strict=True) if pieces else ((),) * 4
    spans = Spans([*map(len, new_texts)], _share_kinds(*kinds))
    return rendered._replace(text="".join(new_texts), spans=spans, repeats=repeats)


@lru_cache(maxsize=1024)
def _share_kinds(parts: tuple[Part, ...], messages: tuple[int, ...], generated: tuple[bool, ...]) -> SpanKinds:
    """Return the same object for equal kinds, because it caches values that are computed from the kinds."""
    return SpanKinds(parts, messages, generated)
