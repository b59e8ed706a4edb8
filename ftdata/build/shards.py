"""Shards: one source, or a part of it, becomes a folder of examples, and an account of all that was in it.

What a shard becomes depends on its task and the recipe alone, so one that was built before is taken from the cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ftdata.build import cache, near_duplicates
from ftdata.build.ledger import Ledger
from ftdata.build.shard_files import ShardContent, write_shard
from ftdata.errors import InputRefused
from ftdata.pipeline.examples import Batch, build_batches
from ftdata.pipeline.mask import masks
from ftdata.pipeline.recipe import Recipe
from ftdata.readers import FileSource, MemorySource, readers
from ftdata.readers.remote_files import remote_version
from ftdata.readers.row_filter import RowFilter
from ftdata.readers.streams import is_object_store
from ftdata.redaction import redact_for_storage
from ftdata.registry import is_built_in
from ftdata.schemas import schemas
from ftdata.storage import atomic, disk
from ftdata.tokenizing.batches import end_offsets
from ftdata.types import Reject, Row

Progress = Callable[[int, int, float | None], None]
"""Called as the build goes on with the rows and the tokens done so far, and which share that is, where it is known."""

_PARSERS = ("jinja2", "orjson", "pyarrow", "tokenizers")
"""Packages of which another version may make something else of the same data."""


@dataclass(frozen=True)
class Task:
    """One shard: a source, and the folder where those of shards are. Planned from the data alone.

    `trusted`: whether the fast encoder may encode it.
    """

    source: FileSource | MemorySource
    home: Path
    number: int
    where: str | None = None
    limit: int | None = None
    near: bool = False
    trusted: bool = True

    def __str__(self) -> str:
        span = getattr(self.source, "span", None)
        return f"{self.source.path} {'{}-{}'.format(*span) if span else ''}".rstrip()


@dataclass(frozen=True)
class ShardResult:
    """What a shard task reports back; the examples themselves are in its folder.

    Attributes:
        task: the task.
        folder: where its examples are.
        ledger: what became of the rows.
        lines: in how many they stood, where that is known.
        encoder: what made the tokens.
        key: the hash of all that decides it, where that can be said.
    """

    task: Task
    folder: Path
    ledger: Ledger
    lines: int | None
    encoder: str
    key: str | None = None


def build_shard(recipe: Recipe, task: Task, progress: Progress | None = None) -> ShardResult:
    """Build one shard: read its source, write its examples, count everything; or take it as it was built before.

    Raises:
        EncodersDiffer: the fast encoder gave other tokens than the reference; all is to be done again without.
        InputRefused: a source cannot be read, or has changed while it was.
    """
    key = shard_key(recipe, task)
    folder = task.home / ((key or f"{task.number:06d}") + ("" if task.trusted else "-reference"))
    known = key is not None and (atomic.read_sealed(folder) or cache.restore_entry("shards", key, folder))
    if known:
        result = _read(known, task, folder, key)
        if progress:
            progress(result.ledger.read, result.ledger.tokens_kept, 1.0)
        return result
    disk.remove(folder)
    with atomic.publish_folder(folder) as scratch:
        with cache.open_text_cache(_texts_key(recipe, task)) if key and disk.cache_root() else nullcontext() as texts:
            recipe.tokenizer.encoders.cache = texts
            try:
                result = replace(_built(recipe, task, scratch, progress), folder=folder, key=key)
            finally:
                recipe.tokenizer.encoders.cache = None
        if key != shard_key(recipe, task):
            path = task.source.path
            raise InputRefused("file_changed", "has changed while it was read", where=path, hint="read it again")
        atomic.seal_folder(scratch, _written(result))
    if key:
        cache.store_entry("shards", key, folder)
    return result


def shard_key(recipe: Recipe, task: Task) -> str | None:
    """Return the hash of all that decides what becomes of a file; `None` where that cannot be said.

    It cannot of what is no file here, and where functions of the user's own decide, which may change.
    """
    source = task.source
    if not isinstance(source, FileSource) or not (is_object_store(source.path) or _is_regular(source.path)):
        return None
    policy = masks.registered().get(recipe.train_on) if isinstance(recipe.train_on, str) else None
    shapes = schemas.registered()
    read = shapes.values() if recipe.schema == "auto" else [shapes.get(recipe.schema)]
    if not all(map(is_built_in, (policy, readers.registered().get(source.reader), *read))):
        return None
    if (content := _content(source)) is None:
        return None
    # To which split it belongs, and how much of it is taken, is decided afterwards.
    read_as = {**asdict(source), "place": None, "share": None, "split": None, "version": None}
    chosen = task.where, task.limit, task.near
    return cache.hash_key([cache.package_hash(), *_versions(), content, read_as, chosen, recipe.describe()])


@lru_cache(maxsize=1)
def _versions() -> list[str]:
    return list(map(version, _PARSERS))


def _content(source: FileSource) -> Any:
    """Return a hash of what is read of a file; of one elsewhere, what the place calls its version."""
    if is_object_store(source.path):
        return remote_version(source.path)
    # Whether a line begins with a part, the byte before it says.
    in_lines = source.span is not None and source.reader != "parquet"
    first, last = (max(source.span[0] - 1, 0), source.span[1]) if source.span and in_lines else (0, None)
    try:
        return disk.sha256_of_file(source.path, first, last)
    except OSError:
        return None


def _is_regular(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _texts_key(recipe: Recipe, task: Task) -> str:
    source = task.source
    span = source.span if isinstance(source, FileSource) else None
    ours = recipe.tokenizer.fingerprint, task.trusted
    return cache.hash_key([_versions()[_PARSERS.index("tokenizers")], source.path, span, *ours])


def _written(result: ShardResult) -> dict[str, Any]:
    return {
        "ledger": result.ledger.as_dict(),
        "lines": result.lines,
        "encoder": result.encoder,
    }


def _read(known: dict[str, Any], task: Task, folder: Path, key: str | None) -> ShardResult:
    ledger = Ledger.of(known["ledger"])
    return ShardResult(task, folder, ledger, known["lines"], known["encoder"], key)


class _Counted:
    """Rows, and then in how many lines they stood."""

    lines: int | None = None

    def __init__(self, rows: Iterator[Row | Reject]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row | Reject]:
        if isinstance(self._rows, Generator):
            self.lines = yield from self._rows
        else:
            yield from self._rows


def _built(recipe: Recipe, task: Task, folder: Path, progress: Progress | None) -> ShardResult:
    ledger = Ledger(redact_for_storage(task.source.path))
    encoders = recipe.tokenizer.encoders
    encoders.trusted, encoders.retried = encoders.trusted and task.trusted, True
    encoders.expect(0 if encoders.cache is not None and encoders.cache.has_entries else task.source.size)
    selection, rows = RowFilter(task.where, task.limit), _Counted(task.source.rows())

    def batches() -> Iterator[ShardContent]:
        for batch in build_batches(recipe, selection.of(iter(rows))):
            ledger.add(batch)
            hashes = _hashes(batch)
            near = (
                np.repeat(near_duplicates.minhash_signatures(batch.conversations), batch.counts, axis=0)
                if task.near
                else None
            )
            yield ShardContent(batch.columns, hashes, batch.rejects, near)
            if progress:
                progress(ledger.read, ledger.tokens_kept, task.source.share_before(batch.last))

    with _rarely_collecting():
        write_shard(folder, batches())
    ledger.add_filtered(selection.filtered)
    return ShardResult(task, folder, ledger, rows.lines, encoders.name)


@contextmanager
def _rarely_collecting() -> Iterator[None]:
    """Have cycles looked for less often: a batch makes many small objects, none of which is in one."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 100_000) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _hashes(batch: Batch) -> list[bytes]:
    """Return, for each example, the hash of all examples of its row: 16 bytes of the tokens, 8 of the labels."""
    columns, found = batch.columns, list[bytes]()
    examples = accumulate(batch.counts, initial=0)
    bounds = end_offsets(columns.lengths.tolist())[list(examples)].tolist()
    ids, trained = columns.ids.data, columns.trained.data
    for count, (first, last) in zip(batch.counts, pairwise(bounds), strict=True):
        found += [sha256(ids[first:last]).digest()[:16] + sha256(trained[first:last]).digest()[:8]] * count
    return found
