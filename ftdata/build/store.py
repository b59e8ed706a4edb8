"""Write: the finished build, out of shards.

    DIR/manifest.json           what this is, how it was made, a hash of every file and of itself; written last
    DIR/report.json             the ledger: what was read, built, rejected, cut
    DIR/rejects.jsonl           one line per rejected row: place, code, reason, fix, raw
    DIR/README.md               the same for people; it names the files, so `datasets.load_dataset(DIR)` finds them
    DIR/dataset_dict.json       with the folders below: what `datasets.load_from_disk` reads
    DIR/train/data-*.arrow      input_ids, labels, seq_lengths; one row per pack (or per example)
    DIR/train/provenance.parquet    one row per example: pack, source, row, line, tokens, trained, cut, flags

The folders of the splits are those that `datasets.save_to_disk` would write.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ftdata.build.pack import PackPlan
from ftdata.build.shard_files import ExampleTable, MappedArray
from ftdata.errors import InputRefused, UsageError
from ftdata.redaction import redact_for_storage
from ftdata.storage import build_records, disk
from ftdata.storage.arrow_arrays import int32_array, int64_array
from ftdata.types import IGNORE_INDEX, Reject

FORMAT, _SEAL = 4, "sha256"
_TOKENS_PER_FILE, _TOKENS_PER_BATCH, _ROWS_PER_GROUP = 1 << 27, 1 << 20, 1 << 16
_MAX_OPEN_SHARDS = 64
"""Shards that stay open: each takes two of the files that a process may open, of which there may be 256."""

_PACKS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class PackFile:
    """One file of packs, to be written out of shards; what is written depends on this alone.

    Attributes:
        path: the file.
        shards: the folders in which its examples stand.
        shard: int32 `[examples]`, the number of the folder, in the order of the packs.
        start: int64 `[examples]`, from which token of the shard on each stands.
        lengths: int32 `[examples]`.
        bounds: int64 `[packs + 1]`, where the examples of each pack begin.
        batches: the first pack of each batch, and the last one's end.
    """

    path: Path
    shards: Sequence[Path]
    shard: NDArray[np.int32] = field(repr=False)
    start: NDArray[np.int64] = field(repr=False)
    lengths: NDArray[np.int32] = field(repr=False)
    bounds: NDArray[np.int64] = field(repr=False)
    batches: Sequence[int] = field(repr=False)

    def __str__(self) -> str:
        return str(self.path)


class WrittenFile(NamedTuple):
    """A file that was written: its bytes and its hash, as the manifest has them."""

    path: Path
    bytes: int
    sha256: str


def plan_pack_files(
    folder: Path, split: str, examples: ExampleTable, members: NDArray[np.int64], plan: PackPlan
) -> Iterator[PackFile]:
    """Yield the files of one split, which can be written in any order, anywhere.

    Args:
        folder: the build's folder.
        split: the split's name, which is its folder's.
        examples: all examples.
        members: int64, the examples of this split; `plan` counts within them.
        plan: which of them share a row.
    """
    order, bounds = members[plan.order], plan.bounds
    sizes = np.diff(np.concatenate(([0], np.cumsum(examples.lengths[order])))[bounds])
    before = np.cumsum(sizes) - sizes
    batches = np.flatnonzero(np.diff(before // _TOKENS_PER_BATCH, prepend=-1, append=-1))
    file_of = before[batches[:-1]] // _TOKENS_PER_FILE
    for number in range(int(file_of[-1]) + 1 if len(file_of) else 1):
        own = np.flatnonzero(file_of == number)
        packs = batches[own[0] : own[-1] + 2] if len(own) else np.zeros(1, np.int64)
        chosen = order[bounds[packs[0]] : bounds[packs[-1]]]
        used, shard = np.unique(examples.shard[chosen], return_inverse=True)
        yield PackFile(
            folder / split / f"data-{number:05d}.arrow",
            [examples.folders[one] for one in used.tolist()],
            shard.astype(np.int32),
            examples.start[chosen],
            examples.lengths[chosen].astype(np.int32),
            bounds[packs[0] : packs[-1] + 1] - bounds[packs[0]],
            (packs - packs[0]).tolist(),
        )


def write_packs(_: None, file: PackFile) -> WrittenFile:
    """Write one file of packs: labels are the ids where they are trained, else -100."""
    with disk.create(file.path) as sink, pa.ipc.new_stream(sink, _PACKS) as writer:
        for first, last in zip(file.batches[:-1], file.batches[1:], strict=True):
            writer.write_batch(_pack_batch(file, first, last))
    # Another build may have shards of these names.
    _tokens.cache_clear()
    return WrittenFile(file.path, file.path.stat().st_size, disk.sha256_of_file(file.path))


def _pack_batch(file: PackFile, first: int, last: int) -> pa.RecordBatch:
    bounds = file.bounds[first : last + 1]
    own = slice(int(bounds[0]), int(bounds[-1]))
    lengths = file.lengths[own]
    ids, trained = _gathered(file.shards, file.shard[own], file.start[own], lengths)
    in_pack = int32_array(bounds - bounds[0])
    in_tokens = int32_array(np.concatenate(([0], np.cumsum(lengths)))[bounds - bounds[0]])
    columns = [
        pa.ListArray.from_arrays(in_tokens, int32_array(ids)),
        pa.ListArray.from_arrays(in_tokens, int32_array(np.where(trained, ids, np.int32(IGNORE_INDEX)))),
        pa.ListArray.from_arrays(in_pack, int32_array(lengths)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_PACKS)


def _gathered(
    folders: Sequence[Path], shard: NDArray[np.int32], start: NDArray[np.int64], lengths: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the tokens of examples, and which are trained: int32 and bool `[tokens]`. One shard is open at a time."""
    runs = list(_runs(shard, start, lengths))
    sizes = [last - first for _, first, last in runs]
    places = np.cumsum([0, *sizes]).tolist()
    ids, trained = np.empty(places[-1], np.int32), np.empty(places[-1], np.bool_)
    by_shard = sorted(range(len(runs)), key=lambda run: runs[run][0])
    for number, some in groupby(by_shard, key=lambda run: runs[run][0]):
        tokens = _tokens(folders[number])
        for run in some:
            own = slice(places[run], places[run + 1])
            ids[own], trained[own] = (
                tokens.ids.values[slice(*runs[run][1:])],
                tokens.trained.values[slice(*runs[run][1:])],
            )
        tokens.ids.forget()
        tokens.trained.forget()
    return ids, trained


class _Tokens(NamedTuple):
    ids: MappedArray
    trained: MappedArray


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _tokens(shard: Path) -> _Tokens:
    return _Tokens(MappedArray.of(shard / "ids.i32", np.int32), MappedArray.of(shard / "trained.b8", np.bool_))


def _runs(
    shard: NDArray[np.int32], first: NDArray[np.int64], lengths: NDArray[np.int32]
) -> Iterator[tuple[int, int, int]]:
    """Yield where examples stand, as shard and tokens `[first, last)`; those that adjoin are one run."""
    last = first + lengths
    apart = np.ones(len(shard) + 1, dtype=np.bool_)
    apart[1:-1] = (shard[1:] != shard[:-1]) | (first[1:] != last[:-1])
    begins = np.flatnonzero(apart)
    yield from zip(shard[begins[:-1]].tolist(), first[begins[:-1]].tolist(), last[begins[1:] - 1].tolist(), strict=True)


def write_split(
    folder: Path, split: str, examples: ExampleTable, members: NDArray[np.int64], plan: PackPlan, files: Iterable[Path]
) -> None:
    """Write what goes with the files of a split, in the layout of `datasets.save_to_disk`, and its provenance."""
    target = folder / split
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": "",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    disk.write_json(target / "state.json", state)
    disk.write_json(target / "dataset_info.json", {})
    order = members[plan.order]
    table = examples.table.drop_columns(["content"])
    packs = np.repeat(np.arange(len(plan), dtype=np.int32), np.diff(plan.bounds))
    # To take rows imports what costs more than a small build.
    as_given = np.array_equal(order, np.arange(len(table)))
    schema = table.schema.append(pa.field("pack", pa.int32()))
    with disk.create(target / "provenance.parquet") as sink, pq.ParquetWriter(sink, schema) as writer:
        for at in range(0, len(order), _ROWS_PER_GROUP):
            some = order[at : at + _ROWS_PER_GROUP]
            taken = table.slice(at, len(some)) if as_given else table.take(int64_array(some))
            taken = examples.placed(taken, examples.shard[some])
            writer.write_table(taken.append_column("pack", int32_array(packs[at : at + len(some)])))


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write one JSON line per rejected row."""
    with disk.create(path) as file:
        for reject in rejects:
            record = {
                "file": redact_for_storage(reject.source.path),
                "line": reject.source.line,
                "byte_offset": reject.source.offset,
                "row": reject.source.row,
                **{name: value for name, value in asdict(reject).items() if name != "source"},
                "tokens": reject.tokens,
            }
            text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
            file.write(text + b"\n")


def check_target(target: Path) -> None:
    """Refuse a target that holds anything but a build: it is about to be replaced.

    Raises:
        UsageError: it does; the message names what.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    hint = "choose another output folder"
    try:
        own = {*read_manifest(target)["files"], "manifest.json"}
    except (InputRefused, KeyError, TypeError):
        raise UsageError("target_exists", f"{target} exists and is no build of ftdata", hint=hint) from None
    others = [name for name, is_link in _files(target) if is_link or name not in own]
    if others:
        raise UsageError(
            "target_exists", f"{target} holds files that are not of the build: {', '.join(others[:3])}", hint=hint
        )


def _files(folder: Path) -> list[tuple[str, bool]]:
    """Return the path of each file and each link in a folder, relative to it, and whether it is a link."""
    found = list[tuple[str, bool]]()
    for at, folders, files in os.walk(folder):
        paths = [Path(at) / name for name in (*folders, *files)]
        found += [
            (str(path.relative_to(folder)), path.is_symlink())
            for path in paths
            if not path.is_dir() or path.is_symlink()
        ]
    return sorted(found)


def record_build(manifest: Mapping[str, Any]) -> None:
    """Record that this user made the build with this manifest, so that it may be reused."""
    build_records.add_record("build", _sealed(manifest))


def is_recorded(manifest: Mapping[str, Any]) -> bool:
    """Return whether this user made the build with this manifest: its hashes do not tell who did."""
    return build_records.has_record("build", _sealed(manifest))


def write_manifest(folder: Path, about: Mapping[str, Any], written: Iterable[WrittenFile]) -> None:
    """Write `manifest.json`: `about`, and size and hash (XXH3, 128 bits) of every file in the folder, and of itself.

    Of the files that are `written` both are known.
    """
    known = {one.path: {"bytes": one.bytes, "sha256": one.sha256} for one in written}
    files = {
        str(path.relative_to(folder)): known.get(path)
        or {"bytes": path.stat().st_size, "sha256": disk.sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    disk.write(folder / "manifest.json", _sealed({"format": FORMAT, **about, "files": files}))


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    return disk.encode_json({**manifest, _SEAL: disk.hash_bytes(disk.encode_json(manifest))})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a build.

    Raises:
        InputRefused: the folder is no build, or its manifest is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputRefused(
            "not_a_build",
            f"{folder} is no build of ftdata: it has no manifest.json",
            hint="make one with `ftdata build`",
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, path: str) -> dict[str, Any]:
    """Return the manifest that a text is, `path` being where it was read.

    Raises:
        InputRefused: it is damaged, or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputRefused("damaged_build", f"{path} is damaged: {error}", hint="build again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputRefused(
            "build_format",
            f"{path} is not of format {FORMAT}, which this ftdata reads",
            hint="build again",
        )
    manifest.pop(_SEAL, None)
    files = manifest.get("files")
    names = list(files) if isinstance(files, dict) else [".."]
    # Whoever made it may have made its hash, too: what is fetched by it stays in its folder.
    outside = any(PurePosixPath(name).is_absolute() or {"", ".", ".."} & {*name.split("/")} for name in names)
    if outside or _sealed(manifest) != text:
        raise InputRefused("damaged_build", f"{path} is damaged: its hash is another", hint="build again")
    return manifest


def verify_files(folder: Path) -> list[str]:
    """Return the files of a build that are not as they were written: changed by a bit, cut off, or missing.

    Raises:
        InputRefused: the folder is no build.
    """
    try:
        files = read_manifest(folder)["files"]
    except InputRefused as error:
        if error.code != "damaged_build":
            raise
        return ["manifest.json"]
    return [name for name, known in files.items() if not _is_as_known(folder / name, known)]


def _is_as_known(path: Path, known: Mapping[str, Any]) -> bool:
    try:
        # A link, or a device, is not what was written.
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return (path.stat().st_size, disk.sha256_of_file(path)) == (known["bytes"], known["sha256"])
    except OSError:
        return False
