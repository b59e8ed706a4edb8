"""Shards: one source becomes a folder of examples, and an account of all that was in it.

What a shard becomes hangs on its task and the recipe alone, so one that was built before is taken from the cache.
"""

from __future__ import annotations

import gc
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ftdata import cache, similar, store
from ftdata.batches import Columns, ends_of
from ftdata.examples import Batch, build_batches
from ftdata.ledger import Ledger
from ftdata.mask import masks
from ftdata.readers import FileSource, MemorySource, readers
from ftdata.readers.select import Selection
from ftdata.recipe import Recipe
from ftdata.registry import is_ours
from ftdata.schemas import schemas
from ftdata.types import Reject, Source

Progress = Callable[[int, int, float | None], None]
"""Called as the build goes on with the rows and the tokens done so far, and which share that is, where it is known."""

_PARSERS = ("jinja2", "orjson", "pyarrow", "tokenizers")
"""Packages of which another version may make something else of the same data."""


@dataclass(frozen=True)
class Task:
    """One shard: a source, and the folder for its examples. Planned from the data alone.

    `trusted`: whether the fast engine may encode it.
    """

    source: FileSource | MemorySource
    folder: Path
    where: str | None = None
    limit: int | None = None
    near: bool = False
    trusted: bool = True


@dataclass(frozen=True)
class ShardResult:
    """What a shard task reports back; the examples themselves are in its folder."""

    task: Task
    ledger: Ledger
    rejects: list[Reject]
    content: str
    engine: str


def build_shard(recipe: Recipe, task: Task, progress: Progress | None = None) -> ShardResult:
    """Build one shard: read its source, write its examples, count everything; or take it as it was built before.

    Raises:
        EngineDiffers: the fast engine gave other tokens than the reference; all is to be done again without.
    """
    stamp = _stamp(task)
    key = _key(recipe, task) if stamp else None
    known = cache.find("shards", key, task.folder) if key else None
    if known is not None:
        result = _read(known, task)
        if progress:
            progress(result.ledger.read, result.ledger.tokens_kept, 1.0)
        return result
    with cache.texts(_texts_key(recipe, task)) if key else _nothing() as texts:
        recipe.tokenizer.engines.known = texts
        try:
            result = _built(recipe, task, progress)
        finally:
            recipe.tokenizer.engines.known = None
    if key and stamp == _stamp(task):
        cache.keep("shards", key, task.folder, _written(result))
    return result


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _stamp(task: Task) -> tuple[int, int] | None:
    """Return what tells versions of a file here apart; `None` where there is none, or nothing shall be remembered."""
    if not isinstance(task.source, FileSource) or cache.root() is None:
        return None
    try:
        found = Path(task.source.path).stat()
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _key(recipe: Recipe, task: Task) -> str | None:
    """Return the hash of all that decides what becomes of a file; `None` where functions do that may change."""
    source = task.source
    assert isinstance(source, FileSource)
    policy = masks.own().get(recipe.train_on) if isinstance(recipe.train_on, str) else None
    shapes = schemas.own()
    read = shapes.values() if recipe.schema == "auto" else [shapes.get(recipe.schema)]
    if not all(map(is_ours, (policy, readers.own().get(source.reader), *read))):
        return None
    try:
        content = cache.content_of(source.path)
    except OSError:
        return None
    # To which split it belongs, and how much of it is taken, is decided afterwards.
    read_as = {**asdict(source), "place": None, "share": None, "split": None}
    chosen = task.where, task.limit, task.near
    return cache.key_of([cache.code(), *map(version, _PARSERS), content, read_as, chosen, recipe.describe()])


def _texts_key(recipe: Recipe, task: Task) -> str:
    return cache.key_of([version("tokenizers"), task.source.path, recipe.tokenizer.fingerprint, task.trusted])


def _written(result: ShardResult) -> dict[str, Any]:
    return {
        "ledger": result.ledger.as_dict(),
        "rejects": [asdict(reject) for reject in result.rejects],
        "content": result.content,
        "engine": result.engine,
    }


def _read(known: dict[str, Any], task: Task) -> ShardResult:
    counts = {each.name for each in fields(Ledger) if each.default_factory is Counter}
    values: dict[str, Any] = {
        name: Counter(value) if name in counts else value for name, value in known["ledger"].items()
    }
    ledger = Ledger(**values)
    rejects = [
        Reject(**{**reject, "source": Source(*reject["source"]), "lengths": tuple(reject["lengths"])})
        for reject in known["rejects"]
    ]
    return ShardResult(task, ledger, rejects, known["content"], known["engine"])


def _built(recipe: Recipe, task: Task, progress: Progress | None) -> ShardResult:
    ledger = Ledger(task.source.path)
    rejects: list[Reject] = []
    engines = recipe.tokenizer.engines
    engines.trusted, engines.retried = engines.trusted and task.trusted, True
    engines.expect(0 if engines.known is not None and engines.known.filled else task.source.size)
    content = xxhash.xxh3_128()
    selection = Selection(task.where, task.limit)

    def batches() -> Iterator[tuple[Columns, list[bytes]]]:
        for batch in build_batches(recipe, selection.of(task.source.rows())):
            ledger.add(batch)
            rejects.extend(batch.rejects)
            hashes = _hashes(batch)
            content.update(b"".join(hashes))
            yield batch.columns, hashes
            if task.near:
                minhashes = similar.signatures(batch.conversations)
                store.add_minhashes(task.folder, np.repeat(minhashes, batch.counts, axis=0))
            if progress:
                progress(ledger.read, ledger.tokens_kept, task.source.share_before(batch.last))

    with _rarely_collecting():
        store.write_shard(task.folder, batches())
    ledger.pass_over(selection.passed)
    return ShardResult(task, ledger, rejects, content.hexdigest(), engines.name)


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
    bounds = ends_of(columns.lengths.tolist())[list(examples)].tolist()
    ids, trained = columns.ids.data, columns.trained.data
    for count, (first, last) in zip(batch.counts, pairwise(bounds), strict=True):
        found += [xxhash.xxh3_128_digest(ids[first:last]) + xxhash.xxh3_64_digest(trained[first:last])] * count
    return found
