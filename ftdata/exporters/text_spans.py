"""Parquet files with the text of each document, and the character spans of the trained text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import make_batch
from ftdata.exporters.files import ParquetFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat, load_build_tokenizer
from ftdata.storage.arrow_arrays import int32_array, list_offsets, string_array
from ftdata.tokenizing.token_text import token_texts

_LIMITATION = "tokens-differ"

_LINES = """\
Each row contains the column `text`, and the column `trained_spans` with lists [start, end]: the model is trained on
text[start:end]. Indices count characters (Unicode code points), and the end is exclusive.

Tokenize the text without adding special tokens: the text contains the control tokens of the template. A token is
trained if it ends inside a span. Do not test the start offset, because some tokenizers exclude leading spaces from it:

    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(first < end <= last for first, last in trained_spans) else -100
        for token, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"])
    ]
"""


class _MarkedText(NamedTuple):
    """The text of a document, and the spans of its trained text."""

    text: str
    spans: list[tuple[int, int]]


def _mark_text(pieces: Sequence[str], trained: NDArray[np.bool_]) -> _MarkedText:
    """Join the texts of the tokens of a document, and find the spans of the trained text.

    >>> _mark_text(["a", "bc", "d", "e"], np.array([False, True, True, False]))
    _MarkedText(text='abcde', spans=[(1, 4)])
    """
    characters = np.append(0, np.cumsum([len(piece) for piece in pieces]))
    # The mask changes at the start and after the end of each run of trained tokens.
    changes = np.flatnonzero(np.diff(trained, prepend=False, append=False))
    spans = characters[changes].reshape(-1, 2).tolist()
    return _MarkedText("".join(pieces), [(start, end) for start, end in spans if start < end])


def _convert(packs: Packs, facts: BuildFacts) -> pa.RecordBatch:
    tokenizer = load_build_tokenizer(facts.tokenizer)
    documents = [
        _mark_text(token_texts(tokenizer, packs.ids[start:end].tolist()), packs.trained[start:end])
        for start, end in pairwise(packs.token_bounds.tolist())
    ]
    counts = [len(document.spans) for document in documents]
    indices = int32_array(np.array([span for document in documents for span in document.spans], np.int32).reshape(-1))
    pairs = pa.ListArray.from_arrays(int32_array(np.arange(0, len(indices) + 1, 2)), indices)
    return make_batch(
        {
            "text": string_array([document.text for document in documents]),
            "trained_spans": pa.ListArray.from_arrays(list_offsets(counts), pairs),
        }
    )


def _count_affected(packs: Packs, batch: pa.RecordBatch, facts: BuildFacts) -> Mapping[str, int]:
    """Count the documents whose text and spans do not produce the tokens and labels of the build."""
    texts, spans = batch["text"].to_pylist(), batch["trained_spans"].to_pylist()
    tokens = load_build_tokenizer(facts.tokenizer).encode(texts)
    bounds = pairwise(tokens.token_bounds.tolist())
    expected_bounds = pairwise(packs.token_bounds.tolist())
    different = 0
    for number, ((start, end), (expected_start, expected_end)) in enumerate(zip(bounds, expected_bounds, strict=True)):
        ids, labels = packs.ids[expected_start:expected_end], packs.trained[expected_start:expected_end]
        first = tokens.text_bounds[number]
        trained = _end_inside(tokens.ends[start:end] - first, spans[number])
        different += not (np.array_equal(tokens.ids[start:end], ids) and np.array_equal(trained, labels))
    return {_LIMITATION: different}


def _end_inside(ends: NDArray[np.int32], spans: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """Return whether each token ends inside a span.

    >>> _end_inside(np.array([1, 3, 4, 5]), [[1, 4]]).tolist()
    [False, True, True, False]
    """
    if not spans:
        return np.zeros(len(ends), np.bool_)
    firsts, lasts = np.array(spans).T
    number = np.searchsorted(firsts, ends, side="left") - 1
    is_inside: NDArray[np.bool_] = (number >= 0) & (ends <= lasts[number])
    return is_inside


def _configure(_: BuildFacts) -> Mapping[str, str]:
    return {"README.txt": _LINES}


FORMAT = ExportFormat(
    trainer="tokenizers of transformers 5.24",
    rows="documents",
    labels="`trained_spans`: character spans of the trained text",
    boundaries="one document per row",
    padding="none",
    source="the trainer must tokenize the text and convert the spans to labels",
    files=ParquetFiles(),
    convert=_convert,
    configure=_configure,
    limitations={_LIMITATION: "the tokenizer produces different tokens for the text, for example if the text of a row "
                 "contains the text of a control token"},
    count_affected=_count_affected,
)  # fmt: skip
