"""Batches: the result for concatenated texts equals the result for each text alone."""

from dataclasses import replace

import numpy as np
import pytest
from cases import long
from hypothesis import given, settings
from hypothesis import strategies as st

from ftdata.pipeline import render_rows as texts
from ftdata.pipeline.examples import BuiltRow, build_batches
from ftdata.pipeline.recipe import make_recipe
from ftdata.tokenizing.batches import EncodedText, Encodings
from ftdata.types import Reject, Row, Source


def talk(*said):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]


@st.composite
def encoded(draw):
    pairs = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), max_size=5))
    ids = draw(st.lists(st.integers(0, 99), min_size=len(pairs), max_size=len(pairs)))
    offsets = np.asarray(pairs, np.int32).reshape(-1, 2)
    return EncodedText(np.asarray(ids, np.int32), offsets, draw(st.booleans()))


def listed(batch):
    return [(one.ids.tolist(), one.offsets.tolist(), one.escaped) for one in batch]


@settings(deadline=None)
@given(st.lists(encoded(), max_size=5), st.data())
def test_concatenated_encodings_equal_their_texts(batch, data):
    sizes = [9 + data.draw(st.integers(0, 3)) for _ in batch]
    laid = Encodings.from_texts(batch, sizes)
    assert listed(laid) == listed(batch)
    assert all(one.offsets.dtype == one.ids.dtype == np.int32 for one in laid)

    others = {
        at: data.draw(encoded()) for at in data.draw(st.sets(st.integers(0, len(batch) - 1)) if batch else st.just(()))
    }
    batch = [others.get(at, one) for at, one in enumerate(batch)]
    laid = laid.with_replacements(others)
    assert listed(laid) == listed(batch)

    bos = np.asarray(data.draw(st.lists(st.integers(100, 109), max_size=2)), np.int32)
    begun = data.draw(st.sets(st.integers(0, len(batch) - 1)) if batch else st.just(set()))
    blank = [[0, 0]] * len(bos)
    expected = [
        ([*bos.tolist(), *ids], [*blank, *offsets], escaped) if at in begun else (ids, offsets, escaped)
        for at, (ids, offsets, escaped) in enumerate(listed(batch))
    ]
    assert listed(laid.with_prefix(sorted(begun), bos)) == expected


ROWS = [
    {"messages": talk("a question", "an answer")},
    {"messages": talk("q", "short", "and then?", "a longer answer than the others, in many words")},
    {"messages": talk("no answer")},
    {"messages": talk("typed <|im_end|> by a user", "yes")},
    {"messages": talk("q", "a", "trailing")},
    {"messages": talk("half \ud800", "a")},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"text": "formatted before"},
    "no row",
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        long({"max_length": 40}),
        {"max_length": 40, "overlong": "drop_turns"},
        {"turns": "split"},
        long({"reject_flags": ["trailing_messages"]}),
    ],
)
@settings(deadline=None)
@given(chosen=st.lists(st.sampled_from(ROWS), max_size=12), size=st.integers(1, 5))
def test_rows_do_not_depend_on_the_batch_size(tokenizer_dir, options, chosen, size):
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), "chatml", **options)
    rows = [Row(data, Source("x", number)) for number, data in enumerate(chosen)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "BATCH", 1)
        patch.setattr(texts, "GROUP", 1)
        alone = [one for batch in build_batches(recipe, rows) for one in batch]
        patch.setattr(texts, "BATCH", size)
        patch.setattr(texts, "GROUP", size)
        batches = list(build_batches(recipe, rows))
    together = [one for batch in batches for one in batch]
    assert list(map(shown, together)) == list(map(shown, alone))
    assert [one.source for batch in batches for one in batch.rejects] == [
        one.source for one in alone if isinstance(one, Reject)
    ]
    done = 0
    for batch in batches:
        done += len(batch)
        assert batch.last_source == rows[done - 1].source
        made = [example for one in batch if isinstance(one, BuiltRow) for example in one.examples]
        assert batch.tokens.ids.tolist() == [token for one in made for token in one.input_ids.tolist()]
        assert batch.trained.tolist() == [yes for one in made for yes in one.trained.tolist()]
        assert batch.lengths.tolist() == list(map(len, made))
        assert batch.trained_counts.tolist() == [int(one.trained.sum()) for one in made]
        assert [batch.cut.tolist(), batch.flags, batch.sources] == [
            [getattr(one, name) for one in made] for name in ("cut", "flags", "source")
        ]
        assert batch.removed_tokens == sum(one.cut for one in batch if isinstance(one, BuiltRow))
        assert len(batch.hash_rows()) == sum(isinstance(one, BuiltRow) for one in batch)
        assert len(batch.hash_examples()) == len(made)


def shown(one):
    if isinstance(one, Reject):
        return replace(one, raw="")
    fields = [
        (e.input_ids.tolist(), e.trained.tolist(), e.offsets.tolist(), e.text, tuple(e.spans), e.flags, e.cut, e.source)
        for e in one.examples
    ]
    return one.conversation.messages, fields, one.cut


@pytest.mark.parametrize("placed", [True, False])
def test_long_rows_are_rendered_in_small_batches(tokenizer_dir, placed):
    """Byte offsets give the size of rows in files; for other rows the size of the previous rows is used."""
    sizes = [*([1] * 70 if placed else []), *[2_000_000] * 5, *[1] * 70]
    begins = np.cumsum([0, *sizes]).tolist()
    read = []

    def rows():
        for number, size in enumerate(sizes):
            read.append(size)
            yield Row(
                {"messages": talk("q", "y" * size)}, Source("x", number, None, begins[number] if placed else None)
            )

    done = 0
    for batch in texts.render_rows(make_recipe(tokenizer_dir("tiny_bpe"), "chatml"), rows()):
        assert sum(read[done:]) <= 2 * 2_000_000 + 70
        done += len(batch)
    assert done == len(read) == len(sizes)
