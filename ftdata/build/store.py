"""Write the files of a build from its shards, and verify builds.

    DIR/manifest.json           format, options, and a hash of every file and of the manifest itself; written last
    DIR/report.json             the report
    DIR/rejects.jsonl           one line per rejected row: source, code, reason, fix, raw
    DIR/README.md               dataset card; it lists the files, so that `datasets.load_dataset(DIR)` finds them
    DIR/dataset_dict.json       names of the splits, for `datasets.load_from_disk`
    DIR/train/data-*.arrow      input_ids, labels, seq_lengths; one row per pack (or per example)
    DIR/train/provenance.parquet    one row per example: pack, source, row, line, tokens, trained, cut, flags, and the
                                    columns of `FEEDBACK` that have values
    DIR/images/*.bin            bytes of images that the rows contain

If the rows have images, the Arrow files and `provenance.parquet` have the column `images`.

The folder of a split has the layout of `datasets.save_to_disk`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ftdata.build.image_files import IMAGE_LISTS, has_images, locate_images, to_image_lists
from ftdata.build.pack import PackPlan
from ftdata.build.pack_files import WrittenFile
from ftdata.build.shard_files import ExampleTable
from ftdata.errors import InputRefused, UsageError, suggest_path
from ftdata.redaction import redact_for_storage
from ftdata.storage import build_records, disk
from ftdata.storage.arrow_arrays import int32_array, int64_array
from ftdata.types import FEEDBACK, Reject

FORMAT, _SEAL = 4, "sha256"
_ROWS_PER_GROUP = 1 << 16

_BUILD_FILE = re.compile(
    r"(manifest|report|dataset_dict)\.json|rejects\.jsonl|README\.md"
    r"|[^/]+/(data-\d+\.arrow|state\.json|dataset_info\.json|provenance\.parquet)"
    r"|images/\d+\.bin"
)
"""Matches the relative paths of the files of a build."""

REFERENCE_FOLDER = "reference"
"""The folder of a build with log-probabilities of reference models, which trainings add to it."""

_REJECT_KEYS = {"file", "code", "reason", "fix", "raw"}


def write_split(
    folder: Path, split: str, examples: ExampleTable, members: NDArray[np.int64], plan: PackPlan, files: Iterable[Path]
) -> None:
    """Write the source of each example in a split, and the metadata files that `datasets.load_from_disk` reads."""
    target = folder / split
    write_dataset_files(target, [file.name for file in files])
    order = members[plan.order]
    unrated = [name for name in FEEDBACK if examples.table[name].null_count == len(examples.table)]
    table = examples.table.drop_columns(["content", "group_hash", *unrated, "images"])
    images = examples.table["images"] if has_images(examples.table["images"]) else None
    packs = np.repeat(np.arange(len(plan), dtype=np.int32), np.diff(plan.bounds))
    # `Table.take` imports modules that take longer to load than a small build.
    is_identity = np.array_equal(order, np.arange(len(table)))
    schema = table.schema.append(pa.field("pack", pa.int32()))
    schema = schema if images is None else schema.append(pa.field("images", IMAGE_LISTS))
    with disk.create(target / "provenance.parquet") as sink, pq.ParquetWriter(sink, schema) as writer:
        for start in range(0, len(order), _ROWS_PER_GROUP):
            numbers = order[start : start + _ROWS_PER_GROUP]
            rows = table.slice(start, len(numbers)) if is_identity else table.take(int64_array(numbers))
            rows = examples.add_offsets(rows, examples.shard[numbers])
            rows = rows.append_column("pack", int32_array(packs[start : start + len(numbers)]))
            if images is not None:
                lists = locate_images(images, numbers, examples.shard[numbers])
                rows = rows.append_column("images", to_image_lists(lists))
            writer.write_table(rows)


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
