"""Build shards. A shard is a folder with the examples and counts of one source, or of one part of a large source.

The contents of a shard depend only on its task and the recipe, so a shard that was built before comes from the cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftdata.build import cache
from ftdata.build.ledger import Ledger
from ftdata.build.near_duplicates import minhash_signatures
from ftdata.build.shard_files import write_shard
from ftdata.errors import InputRefused
from ftdata.pipeline.batch import Batch
from ftdata.pipeline.examples import build_batches
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
from ftdata.types import Reject, Row

ShardProgress = Callable[[int, int, float | None], None]
"""Called with the numbers of processed rows and tokens of a shard, and their share of the shard (`None` if unknown)."""

_CLOCK_TICK = 5_000_000_000
"""Nanoseconds that are longer than a tick of the clock of any file system."""

_PARSERS = ("jinja2", "orjson", "pyarrow", "tokenizers")
"""Packages whose version may affect the result."""


@dataclass(frozen=True)
class Task:
    """The task of building one shard. Tasks depend only on the data, not on the number of workers.

    Attributes:
        source: the source, or a part of a file.
        home: the folder that contains the folders of the shards.
        number: the number of the shard.
        where: the filter expression.
        limit: the maximum number of rows.
        needs_minhashes: whether to compute MinHash signatures.
        trusted: whether the fast encoder may be used.
    """

    source: FileSource | MemorySource
    home: Path
    number: int
    where: str | None = None
    limit: int | None = None
    needs_minhashes: bool = False
    trusted: bool = True

    def __str__(self) -> str:
        span = getattr(self.source, "span", None)
        return f"{self.source.path} {'{}-{}'.format(*span) if span else ''}".rstrip()


@dataclass(frozen=True)
class ShardResult:
    """The result of building one shard. It does not contain the examples, which are stored in the shard's folder.

    Attributes:
        task: the task.
        folder: the folder of the shard.
        ledger: the counts of rows and tokens.
        lines: the number of physical lines, if known.
        encoder: name and version of the encoder.
        key: the cache key; `None` if the shard cannot be cached.
        origin: `"built"`, `"resumed"` (finished by an interrupted build) or `"cached"`.
        is_reusable: whether the shard depends only on what its cache key contains. Files of images can change without
            a change of the data file.
    """

    task: Task
    folder: Path
    ledger: Ledger
    lines: int | None
    encoder: str
    key: str | None = None
    origin: str = "built"
    is_reusable: bool = True


def build_shard(recipe: Recipe, task: Task, progress: ShardProgress | None = None) -> ShardResult:
    """Build one shard, or restore it from the cache.

    Raises:
        EncodersDiffer: the fast encoder and the reference encoder produce different tokens. All shards must be built
            again with the reference encoder.
        InputRefused: a source cannot be read, or changed while it was read.
    """
    status, key = _file_status(task.source), shard_key(recipe, task)
    folder = task.home / ((key or f"{task.number:06d}") + ("" if task.trusted else "-reference"))
    resumed = atomic.read_sealed(folder) if key is not None else None
    resumed = resumed if resumed and resumed["is_reusable"] else None
    stored = resumed or (key is not None and cache.restore_entry("shards", key, folder))
    if stored:
        result = _read_result(stored, task, folder, key)
        result = replace(result, origin="resumed" if resumed else "cached")
        if progress:
            progress(result.ledger.read, result.ledger.tokens_kept, 1.0)
        return result
    disk.remove(folder)
    with atomic.publish_folder(folder) as scratch:
        with cache.open_text_cache(_texts_key(recipe, task)) if key and disk.cache_root() else nullcontext() as texts:
            recipe.tokenizer.encoders.cache = texts
            try:
                result = _build(recipe, task, scratch, progress)
                result = replace(result, folder=folder, key=key if result.is_reusable else None)
            finally:
                recipe.tokenizer.encoders.cache = None
        is_unchanged = status is not None and status == _file_status(task.source)
        if not is_unchanged and key != shard_key(recipe, task):
            path = task.source.path
            problem = "the file changed while it was read"
            raise InputRefused("file_changed", problem, where=path, hint="run the build again")
        atomic.seal_folder(scratch, _describe_result(result))
    if key and result.key:
        cache.store_entry("shards", key, folder)
    return result


def shard_key(recipe: Recipe, task: Task) -> str | None:
    """Return the cache key of a shard: a hash of its data and options. Return `None` if the shard cannot be cached.

    A shard cannot be cached if its source is not a file, or if custom functions are used, because their code may
    change.
    """
    source = task.source
    if not isinstance(source, FileSource) or not (is_object_store(source.path) or _is_regular(source.path)):
        return None
    policy = masks.registered().get(recipe.train_on) if isinstance(recipe.train_on, str) else None
    registered = schemas.registered()
    used_schemas = registered.values() if recipe.schema == "auto" else [registered.get(recipe.schema)]
    expand = [recipe.image_processor.family.expand] if recipe.image_processor else []
    if not all(map(is_built_in, (policy, readers.get(source.reader), *used_schemas, *expand))):
        return None
    if recipe.template.is_user_code or (content := _hash_content(source)) is None:
        return None
    # The split and the share of a source are applied after its shards are built.
    read_options = {**asdict(source), "item_index": None, "share": None, "split": None, "version": None}
    selection = task.where, task.limit, task.needs_minhashes
    return cache.hash_key([cache.package_hash(), *_versions(), content, read_options, selection, recipe.describe()])


@lru_cache(maxsize=1)
def _versions() -> list[str]:
    return list(map(version, _PARSERS))


def _hash_content(source: FileSource) -> Any:
    """Return a hash of the bytes of a source file. For a file in an object store, return its version instead."""
    if is_object_store(source.path):
        return remote_version(source.path)
    # The byte before a part determines whether the part starts with a complete line, so it is hashed as well.
    has_lines = source.span is not None and source.reader != "parquet"
    start, end = (max(source.span[0] - 1, 0), source.span[1]) if source.span and has_lines else (0, None)
    try:
        return disk.sha256_of_file(source.path, start, end)
    except OSError:
        return None


def _file_status(source: FileSource | MemorySource) -> tuple[int, ...] | None:
    """Return numbers that change with every change of a local file, or `None` if they might not.

    If a file was changed in the last seconds, a second change could give it the same times, because clocks of file
    systems are coarse.
    """
    if not isinstance(source, FileSource) or is_object_store(source.path) or not _is_regular(source.path):
        return None
    status = Path(source.path).stat()
    is_old = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _CLOCK_TICK
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) if is_old else None


def _is_regular(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _texts_key(recipe: Recipe, task: Task) -> str:
    source = task.source
    span = source.span if isinstance(source, FileSource) else None
    encoding = recipe.tokenizer.fingerprint, task.trusted
    return cache.hash_key([_versions()[_PARSERS.index("tokenizers")], source.path, span, *encoding])


def _describe_result(result: ShardResult) -> dict[str, Any]:
    return {
        "ledger": result.ledger.as_dict(),
        "lines": result.lines,
        "encoder": result.encoder,
        "is_reusable": result.is_reusable,
    }


def _read_result(stored: dict[str, Any], task: Task, folder: Path, key: str | None) -> ShardResult:
    ledger = Ledger.from_dict(stored["ledger"])
    return ShardResult(task, folder, ledger, stored["lines"], stored["encoder"], key)


class _LineCounter:
    """Iterates over the rows of a reader. After the last row, `lines` is the number of physical lines."""

    lines: int | None = None

    def __init__(self, rows: Iterator[Row | Reject]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row | Reject]:
        if isinstance(self._rows, Generator):
            self.lines = yield from self._rows
        else:
            yield from self._rows


def _build(recipe: Recipe, task: Task, folder: Path, progress: ShardProgress | None) -> ShardResult:
    ledger = Ledger(redact_for_storage(task.source.path))
    encoders = recipe.tokenizer.encoders
    encoders.is_fast_trusted, encoders.raises_on_difference = encoders.is_fast_trusted and task.trusted, True
    encoders.expect_input(0 if encoders.cache is not None and encoders.cache.has_entries else task.source.size)
    row_filter, rows = RowFilter(task.where, task.limit), _LineCounter(task.source.rows())

    is_reusable = True

    def batches() -> Iterator[Batch]:
        nonlocal is_reusable
        for batch in build_batches(recipe, row_filter.filter_rows(iter(rows))):
            ledger.add(batch)
            is_reusable = is_reusable and not any(image.path for text in batch.texts for image in text.images)
            yield batch
            if progress:
                progress(ledger.read, ledger.tokens_kept, task.source.share_before(batch.last_source))

    with _rare_garbage_collection():
        write_shard(folder, batches(), minhash_signatures if task.needs_minhashes else None)
    ledger.add_filtered(row_filter.filtered, row_filter.missing_columns)
    return ShardResult(task, folder, ledger, rows.lines, encoders.name, is_reusable=is_reusable)


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Run the garbage collector less often inside a `with` block, because batches create no reference cycles."""
    thresholds = gc.get_threshold()
    gc.set_threshold(max(thresholds[0], 100_000) if thresholds[0] else 0, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
