"""Placeholders that the template prints become the text of the images; the same text in a message stays text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often

from ftdata.errors import BadRow
from ftdata.images.expand import expand_images
from ftdata.images.processor import ImageText
from ftdata.types import Part, Rendered, Span, Spans

PLACEHOLDER = "<|img|>"
TEXTS = st.lists(st.sampled_from(["a", "<|im", "g|>", PLACEHOLDER, ""]), max_size=4).map("".join)
PIECES = st.lists(st.tuples(TEXTS, st.sampled_from([Part.SCAFFOLD, Part.CONTENT]), st.booleans()), max_size=8)


def rendered_from(pieces):
    spans, end = [], 0
    for number, (text, part, generated) in enumerate(pieces):
        spans.append(Span(end, end + len(text), part, number, generated))
        end += len(text)
    return Rendered("".join(text for text, _, _ in pieces), tuple(spans), frozenset({"x"}), 2)


@often(300)
@given(pieces=PIECES)
def test_only_placeholders_of_the_template_are_replaced(pieces):
    count = sum(text.count(PLACEHOLDER) for text, part, _ in pieces if part is Part.SCAFFOLD)
    images = [ImageText(f"[{number}i]", (number,)) for number in range(count)]
    expanded = expand_images(rendered_from(pieces), PLACEHOLDER, images)
    assert expanded.repeats == tuple(range(count))
    remaining = iter([image.text for image in images])
    expected = []
    for text, part, generated in pieces:
        if part is Part.CONTENT:
            expected.append((text, part, generated))
            continue
        first, *others = text.split(PLACEHOLDER)
        expected.append((first, part, generated))
        for other in others:
            expected += (next(remaining), Part.MEDIA, False), (other, part, generated)
    assert expanded.text == "".join(text for text, _, _ in expected)
    Spans.from_spans(expanded.spans)  # They tile the text.
    shown = [(expanded.text[span.start : span.end], span.part, span.generated) for span in expanded.spans]
    assert [one for one in shown if one[0]] == [one for one in expected if one[0]]
    assert (expanded.flags, expanded.messages) == (frozenset({"x"}), 2)


@pytest.mark.parametrize("images", [[], ["one"], ["one", "two", "three"]])
def test_other_number_of_placeholders_is_rejected(images):
    rendered = rendered_from([(PLACEHOLDER * 2, Part.SCAFFOLD, False), (PLACEHOLDER, Part.CONTENT, False)])
    with pytest.raises(BadRow, match=rf"prints 2 image placeholders .* for {len(images)} image"):
        expand_images(rendered, PLACEHOLDER, [ImageText(text, ()) for text in images])
