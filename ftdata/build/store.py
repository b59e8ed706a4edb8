"""Write the files of a build from its shards, and verify builds.

    DIR/manifest.json           format, options, and a hash of every file and of the manifest itself; written last
    DIR/report.json             the report
    DIR/rejects.jsonl           one line per rejected row: source, code, reason, fix, raw
    DIR/README.md               dataset card; it lists the files, so that `datasets.load_dataset(DIR)` finds them
    DIR/dataset_dict.json       names of the splits, for `datasets.load_from_disk`
    DIR/train/data-*.arrow      input_ids, labels, seq_lengths; one row per pack (or per example)
    DIR/train/provenance.parquet    one row per example: pack, source, row, line, tokens, trained, cut, flags, and the
                                    columns of `FEEDBACK` that have values

The folder of a split has the layout of `datasets.save_to_disk`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from ftdata.errors import InputRefused, UsageError, suggest_path
from ftdata.redaction import redact_for_storage
from ftdata.storage import build_records, disk
from ftdata.storage.arrow_arrays import bool_array, float32_array, int32_array, int64_array, list_offsets
from ftdata.types import FEEDBACK, IGNORE_INDEX, Reject

FORMAT, _SEAL = 4, "sha256"
_TOKENS_PER_FILE, _TOKENS_PER_BATCH, _ROWS_PER_GROUP = 1 << 27, 1 << 20, 1 << 16
_MAX_OPEN_SHARDS = 64
"""Maximum number of open shards. Each has two open files, and many processes can open only 256 files."""

_BUILD_FILE = re.compile(
    r"(manifest|report|dataset_dict)\.json|rejects\.jsonl|README\.md"
    r"|[^/]+/(data-\d+\.arrow|state\.json|dataset_info\.json|provenance\.parquet)"
)
"""Matches the relative paths of the files of a build."""

REFERENCE_FOLDER = "reference"
"""The folder of a build with log-probabilities of reference models, which trainings add to it."""

_REJECT_KEYS = {"file", "code", "reason", "fix", "raw"}

_PACKS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
    ]
)


_PAIRS = pa.schema(
    [
        (name, pa.list_(pa.int32()))
        for name in ("prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")
    ]
)


_RATINGS = {"label": pa.bool_(), "margin": pa.float32()}
"""Name of a rating that the rows of a build have, if the data has it -> its type."""


@dataclass(frozen=True)
class PackFile:
    """The plan for one Arrow file of packed sequences: which examples it contains, and in which order.

    Attributes:
        path: the path of the file.
        shards: the folders of the shards that contain the examples.
        shard: int32 `[examples]`, the index into `shards` of each example, in the order of the packs.
        start: int64 `[examples]`, the index of the first token of each example in its shard.
        lengths: int32 `[examples]`, the number of tokens of each example.
        bounds: int64 `[packs + 1]`, the index of the first example of each pack, and the number of examples.
        batches: the index of the first pack of each record batch, and the number of packs.
        has_pairs: whether each pack contains the two sides of a preference pair, which are written as one row.
        ratings: float32 `[packs]`, the label or the margin of each pack, by name.
    """

    path: Path
    shards: Sequence[Path]
    shard: NDArray[np.int32] = field(repr=False)
    start: NDArray[np.int64] = field(repr=False)
    lengths: NDArray[np.int32] = field(repr=False)
    bounds: NDArray[np.int64] = field(repr=False)
    batches: Sequence[int] = field(repr=False)
    has_pairs: bool = False
    ratings: Mapping[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        columns = _PAIRS if self.has_pairs else _PACKS
        return pa.schema([*columns, *((name, _RATINGS[name]) for name in self.ratings)])

    def __str__(self) -> str:
        return str(self.path)


class WrittenFile(NamedTuple):
    """A file of a build, with its size in bytes and its SHA-256 hash for the manifest."""

    path: Path
    bytes: int
    sha256: str


def plan_pack_files(
    folder: Path,
    split: str,
    examples: ExampleTable,
    members: NDArray[np.int64],
    plan: PackPlan,
    *,
    has_pairs: bool = False,
) -> Iterator[PackFile]:
    """Yield a plan for each pack file of a split. The files can be written in any order and by any process.

    Args:
        folder: the folder of the build.
        split: the name of the split and of its folder.
        examples: all examples.
        members: int64, the examples of this split; `plan` contains indices into it.
        plan: the packs.
        has_pairs: whether each pack is a preference pair.
    """
    order, bounds = members[plan.order], plan.bounds
    ratings = examples.ratings(_RATINGS)
    sizes = np.diff(np.concatenate(([0], np.cumsum(examples.lengths[order])))[bounds])
    before = np.cumsum(sizes) - sizes
    batches = np.flatnonzero(np.diff(before // _TOKENS_PER_BATCH, prepend=-1, append=-1))
    file_of = before[batches[:-1]] // _TOKENS_PER_FILE
    for number in range(int(file_of[-1]) + 1 if len(file_of) else 1):
        file_batches = np.flatnonzero(file_of == number)
        packs = batches[file_batches[0] : file_batches[-1] + 2] if len(file_batches) else np.zeros(1, np.int64)
        file_examples = order[bounds[packs[0]] : bounds[packs[-1]]]
        first_examples = order[bounds[packs[0] : packs[-1]]]
        shard_numbers, shard = np.unique(examples.shard[file_examples], return_inverse=True)
        yield PackFile(
            folder / split / f"data-{number:05d}.arrow",
            [examples.folders[shard_number] for shard_number in shard_numbers.tolist()],
            shard.astype(np.int32),
            examples.start[file_examples],
            examples.lengths[file_examples].astype(np.int32),
            bounds[packs[0] : packs[-1] + 1] - bounds[packs[0]],
            (packs - packs[0]).tolist(),
            has_pairs,
            {name: values[first_examples] for name, values in ratings.items()},
        )


def write_packs(_: None, file: PackFile) -> WrittenFile:
    """Write one pack file. The label of a trained token is its id. The label of an untrained token is -100."""
    with disk.create(file.path) as sink, pa.ipc.new_stream(sink, file.schema) as writer:
        for first, last in zip(file.batches[:-1], file.batches[1:], strict=True):
            writer.write_batch(_pack_batch(file, first, last))
    # The next build may have other shards with the same paths.
    _open_tokens.cache_clear()
    return WrittenFile(file.path, file.path.stat().st_size, disk.sha256_of_file(file.path))


def _pack_batch(file: PackFile, first: int, last: int) -> pa.RecordBatch:
    bounds = file.bounds[first : last + 1]
    batch = slice(int(bounds[0]), int(bounds[-1]))
    lengths = file.lengths[batch]
    ids, trained = _gather_tokens(file.shards, file.shard[batch], file.start[batch], lengths)
    ratings = [
        bool_array(values[first:last] != 0) if name == "label" else float32_array(values[first:last].tolist())
        for name, values in file.ratings.items()
    ]
    if file.has_pairs:
        return pa.RecordBatch.from_arrays([*_pair_columns(ids, trained, lengths), *ratings], schema=file.schema)
    example_bounds = int32_array(bounds - bounds[0])
    token_bounds = int32_array(np.concatenate(([0], np.cumsum(lengths)))[bounds - bounds[0]])
    columns = [
        pa.ListArray.from_arrays(token_bounds, int32_array(ids)),
        pa.ListArray.from_arrays(token_bounds, int32_array(np.where(trained, ids, np.int32(IGNORE_INDEX)))),
        pa.ListArray.from_arrays(example_bounds, int32_array(lengths)),
    ]
    return pa.RecordBatch.from_arrays([*columns, *ratings], schema=file.schema)


def _pair_columns(
    ids: NDArray[np.int32], trained: NDArray[np.bool_], lengths: NDArray[np.int32]
) -> Iterator[pa.ListArray]:
    """Yield the columns of preference pairs. `lengths` contains the lengths of the chosen and rejected sides in turn.

    The prompt consists of the untrained tokens with which both sides begin.
    """
    labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
    bounds = np.concatenate(([0], np.cumsum(lengths))).tolist()
    columns: list[list[NDArray[np.int32]]] = [[] for _ in _PAIRS]
    for start, middle, end in zip(bounds[:-2:2], bounds[1:-1:2], bounds[2::2], strict=True):
        shorter = min(middle - start, end - middle)
        differs = ids[start : start + shorter] != ids[middle : middle + shorter]
        differs |= trained[start : start + shorter] | trained[middle : middle + shorter]
        prompt = int(differs.argmax()) if differs.any() else shorter
        chosen, rejected = slice(start + prompt, middle), slice(middle + prompt, end)
        row = (ids[start : start + prompt], ids[chosen], labels[chosen], ids[rejected], labels[rejected])
        for column, values in zip(columns, row, strict=True):
            column.append(values)
    for lists in columns:
        yield pa.ListArray.from_arrays(list_offsets(map(len, lists)), int32_array(np.concatenate(lists)))


def _gather_tokens(
    folders: Sequence[Path], shard: NDArray[np.int32], start: NDArray[np.int64], lengths: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Read the token ids and the trained-token mask of examples from their shards, one shard after another.

    Returns:
        The ids (int32 `[tokens]`) and the mask (bool `[tokens]`), in the order of the examples.
    """
    runs = list(_contiguous_runs(shard, start, lengths))
    sizes = [end - first for _, first, end in runs]
    offsets = np.cumsum([0, *sizes]).tolist()
    ids, trained = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.bool_)
    by_shard = sorted(range(len(runs)), key=lambda run: runs[run][0])
    for number, shard_runs in groupby(by_shard, key=lambda run: runs[run][0]):
        tokens = _open_tokens(folders[number])
        for run in shard_runs:
            target = slice(offsets[run], offsets[run + 1])
            ids[target], trained[target] = (
                tokens.ids.values[slice(*runs[run][1:])],
                tokens.trained.values[slice(*runs[run][1:])],
            )
        tokens.ids.release()
        tokens.trained.release()
    return ids, trained


class _Tokens(NamedTuple):
    ids: MappedArray
    trained: MappedArray


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_tokens(shard: Path) -> _Tokens:
    return _Tokens(MappedArray.open(shard / "ids.i32", np.int32), MappedArray.open(shard / "trained.b8", np.bool_))


def _contiguous_runs(
    shard: NDArray[np.int32], start: NDArray[np.int64], lengths: NDArray[np.int32]
) -> Iterator[tuple[int, int, int]]:
    """Join examples whose tokens are adjacent in a shard. Yield the shard and token range of each joined group."""
    end = start + lengths
    is_boundary = np.ones(len(shard) + 1, dtype=np.bool_)
    is_boundary[1:-1] = (shard[1:] != shard[:-1]) | (start[1:] != end[:-1])
    bounds = np.flatnonzero(is_boundary)
    yield from zip(shard[bounds[:-1]].tolist(), start[bounds[:-1]].tolist(), end[bounds[1:] - 1].tolist(), strict=True)


def write_split(
    folder: Path, split: str, examples: ExampleTable, members: NDArray[np.int64], plan: PackPlan, files: Iterable[Path]
) -> None:
    """Write the source of each example in a split, and the metadata files that `datasets.load_from_disk` reads."""
    target = folder / split
    write_dataset_files(target, [file.name for file in files])
    order = members[plan.order]
    unrated = [name for name in FEEDBACK if examples.table[name].null_count == len(examples.table)]
    table = examples.table.drop_columns(["content", "group_hash", *unrated])
    packs = np.repeat(np.arange(len(plan), dtype=np.int32), np.diff(plan.bounds))
    # `Table.take` imports modules that take longer to load than a small build.
    is_identity = np.array_equal(order, np.arange(len(table)))
    schema = table.schema.append(pa.field("pack", pa.int32()))
    with disk.create(target / "provenance.parquet") as sink, pq.ParquetWriter(sink, schema) as writer:
        for start in range(0, len(order), _ROWS_PER_GROUP):
            numbers = order[start : start + _ROWS_PER_GROUP]
            rows = table.slice(start, len(numbers)) if is_identity else table.take(int64_array(numbers))
            rows = examples.add_offsets(rows, examples.shard[numbers])
            writer.write_table(rows.append_column("pack", int32_array(packs[start : start + len(numbers)])))


def write_dataset_files(folder: Path, names: Iterable[str]) -> None:
    """Write the metadata files that `datasets.load_from_disk` reads next to the Arrow files of a split."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    disk.write_json(folder / "state.json", state)
    disk.write_json(folder / "dataset_info.json", {})


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write the rejected rows to a file, one JSON object per line."""
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
    """Check that a build can be written to a folder: it does not exist, is empty, or contains only a build.

    Raises:
        UsageError: the folder contains other files; the message lists the first three.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    hint = "choose another output folder"
    try:
        build_files = {*read_manifest(target)["files"], "manifest.json"}
    except (InputRefused, KeyError, TypeError) as error:
        problem = f"{target} exists and is not a data set that ftdata built"
        names = [name for name, _ in list_files(target)] if target.is_dir() else []
        if "report.json" in names and all(map(_BUILD_FILE.fullmatch, names)):
            problem, hint = f"{target} contains a damaged build: {error}", f"remove {target}, then build again"
        raise UsageError("target_exists", problem, hint=hint) from None
    belongs = {name for name in build_files if _BUILD_FILE.fullmatch(name)}
    names = [name for name, is_link in list_files(target) if is_link or name not in belongs]
    unknown = [name for name in names if not name.startswith(f"{REFERENCE_FOLDER}/")]
    if unknown:
        problem = f"{target} contains files that are not part of the build: {', '.join(unknown[:3])}"
        raise UsageError("target_exists", problem, hint=hint)


def check_rejects_file(path: Path) -> None:
    """Check that a path has no file or a file of rejected rows, because a build replaces or deletes the file.

    Raises:
        UsageError: the file contains anything else.
    """
    if not path.exists():
        return
    try:
        line = disk.read_regular_file(path).partition(b"\n")[0]
        record = json.loads(line) if line else dict.fromkeys(_REJECT_KEYS)
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not record.keys() >= _REJECT_KEYS:
        problem = f"{path} exists and does not contain rejected rows; it would be replaced"
        raise UsageError("target_exists", problem, hint="choose another output file, or move this file")


def list_files(folder: Path) -> list[tuple[str, bool]]:
    """List the files and symbolic links in a folder. Return each relative path, and whether it is a symbolic link."""
    entries = list[tuple[str, bool]]()
    for parent, folders, files in os.walk(folder):
        paths = [Path(parent) / name for name in (*folders, *files)]
        entries += [
            (str(path.relative_to(folder)), path.is_symlink())
            for path in paths
            if not path.is_dir() or path.is_symlink()
        ]
    return sorted(entries)


def record_build(manifest: Mapping[str, Any]) -> None:
    """Record that this user made the build that `manifest` describes, so that a later run can reuse the build."""
    build_records.add_record("build", _encode_manifest(manifest))


def is_recorded(manifest: Mapping[str, Any]) -> bool:
    """Return whether this user made the build, according to the user's records. The manifest alone cannot prove it."""
    return build_records.has_record("build", _encode_manifest(manifest))


def write_manifest(folder: Path, about: Mapping[str, Any], written: Iterable[WrittenFile]) -> None:
    """Write `manifest.json` with the entries of `about`, and the size and SHA-256 of every file in the folder.

    The manifest also contains its own hash. Sizes and hashes of the files in `written` are not computed again.
    """
    file_records = {file.path: {"bytes": file.bytes, "sha256": file.sha256} for file in written}
    files = {
        str(path.relative_to(folder)): file_records.get(path)
        or {"bytes": path.stat().st_size, "sha256": disk.sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    disk.write(folder / "manifest.json", _encode_manifest({"format": FORMAT, **about, "files": files}))


def _encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    return disk.encode_json({**manifest, _SEAL: disk.hash_bytes(disk.encode_json(manifest))})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a build, and check its format and hash.

    Raises:
        InputRefused: the folder is not a build, or its manifest is damaged.
    """
    manifest = read_any_manifest(folder)
    if export := manifest.get("export"):
        problem = f"{folder} is not a build, but an export for {export['trainer']}"
        raise InputRefused("not_a_build", problem, hint=f"pass the build that was exported: {export['source']}")
    return manifest


def read_any_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a build or of an export, and check its format and hash.

    Raises:
        InputRefused: the folder is neither, or its manifest is damaged.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        reason = "it has no manifest.json" if folder.exists() else "it does not exist"
        problem = f"{folder} is not a data set that ftdata built: {reason}"
        raise InputRefused("not_a_build", problem, hint=suggest_path(folder) or "create a build with `ftdata build`")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, path: str) -> dict[str, Any]:
    """Parse a manifest, and check its format and hash.

    Args:
        text: the contents of `manifest.json`.
        path: the path or URL of the manifest, for error messages.

    Raises:
        InputRefused: the manifest is damaged, or has an unsupported format.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"the manifest {path} is damaged: {error}"
        raise InputRefused("damaged_build", problem, hint="remove the folder, then build the data set again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        problem = f"{path} does not have format {FORMAT}, the only format that this version of ftdata reads"
        raise InputRefused("build_format", problem, hint="remove the folder, then build the data set again")
    manifest.pop(_SEAL, None)
    files = manifest.get("files")
    names = list(files) if isinstance(files, dict) else [".."]
    # An attacker can compute a valid hash, so the file names must not lead out of the build's folder.
    outside = any(PurePosixPath(name).is_absolute() or {"", ".", ".."} & {*name.split("/")} for name in names)
    if outside or _encode_manifest(manifest) != text:
        problem = f"the manifest {path} is damaged: its hash does not match"
        raise InputRefused("damaged_build", problem, hint="remove the folder, then build the data set again")
    return manifest


def verify_files(folder: Path, names: Collection[str] | None = None) -> list[str]:
    """Compare the files of a build with its manifest. Return the names of missing and changed files.

    Args:
        folder: the build.
        names: the files to compare; `None` for all files.

    Raises:
        InputRefused: the folder is not a build.
    """
    try:
        files = read_any_manifest(folder)["files"]
    except InputRefused as error:
        if error.code != "damaged_build":
            raise
        return ["manifest.json"]
    compared = files if names is None else [name for name in files if name in names]
    return [name for name in compared if not _is_unchanged(folder / name, files[name])]


def check_intact(folder: Path, names: Collection[str] | None = None) -> None:
    """Check that all files of a build, or the files with the given names, match its manifest.

    Raises:
        InputRefused: `damaged_build`, with the names of up to three damaged files; or the folder is not a build.
    """
    if damaged := verify_files(folder, names):
        problem = f"the build {folder} has missing or damaged files: {', '.join(damaged[:3])}"
        is_manifest = damaged[0] == "manifest.json"
        hint = "remove the folder, then build the data set again" if is_manifest else "build the data set again"
        raise InputRefused("damaged_build", problem, hint=hint)


def _is_unchanged(path: Path, expected: Mapping[str, Any]) -> bool:
    try:
        # Symbolic links and devices are never part of a build.
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        return (path.stat().st_size, disk.sha256_of_file(path)) == (expected["bytes"], expected["sha256"])
    except OSError:
        return False
