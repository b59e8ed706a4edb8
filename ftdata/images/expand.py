"""Replace the placeholders of images in a rendered text by the text of their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ftdata.errors import BadRow, count_noun
from ftdata.types import Part, Rendered, Span


def expand_images(rendered: Rendered, placeholder: str, feature: str, texts: Sequence[str]) -> Rendered:
    """Replace each placeholder that the template printed for an image by the text of the image.

    The new text has spans with the part `Part.MEDIA`, which the model does not generate. The same characters in the
    text of a message are text, not a placeholder, and are not replaced. A token for a feature that is repeated occurs
    once in the new text, because a text with all repetitions takes long to tokenize.

    Args:
        rendered: the rendered conversation.
        placeholder: the text that the template prints for each image.
        feature: the token that stands for a feature of an image.
        texts: the text of each image, in the order of the images in the conversation.

    Raises:
        BadRow: `image_count`, if the template did not print one placeholder per image.

    >>> spans = (Span(0, 6, Part.SCAFFOLD, -1, False), Span(6, 8, Part.CONTENT, 0, False))
    >>> expanded = expand_images(Rendered("[<im>]hi", spans), "<im>", "x", ["axxxb"])
    >>> expanded.text, [(span.start, span.end, str(span.part)) for span in expanded.spans], expanded.repeats
    ('[axb]hi', [(0, 1, 'scaffold'), (1, 4, 'media'), (4, 5, 'scaffold'), (5, 7, 'content')], (3,))
    """
    pieces = list[tuple[str, Span]]()
    shortened, repeats = _join_repetitions(texts, feature)
    images = iter(shortened)
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
    text = "".join(text for text, _ in pieces)
    return rendered._replace(text=text, spans=_place_spans(pieces), repeats=repeats)


def _join_repetitions(texts: Sequence[str], feature: str) -> tuple[list[str], tuple[int, ...]]:
    """Replace repetitions of the token for a feature by one token. Return the new texts and the numbers of tokens."""
    pattern, repeats = re.compile(f"(?:{re.escape(feature)})+"), list[int]()

    def join(match: re.Match[str]) -> str:
        repeats.append(len(match.group()) // len(feature))
        return feature

    return [pattern.sub(join, text) for text in texts], tuple(repeats)


def _place_spans(pieces: Sequence[tuple[str, Span]]) -> tuple[Span, ...]:
    """Return the spans of consecutive pieces of text."""
    ends = [*accumulate((len(text) for text, _ in pieces), initial=0)]
    return tuple(
        span._replace(start=start, end=end) for (_, span), (start, end) in zip(pieces, pairwise(ends), strict=True)
    )
