"""Export a finished build to the input format of a trainer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ftdata._version import __version__
from ftdata.build import cache, remote, store
from ftdata.build.image_files import build_has_images
from ftdata.build.read_packs import Packs, list_pack_files, read_pack_file
from ftdata.errors import InputRefused, MissingDependency, UsageError, check_choice, count_noun, describe_exception
from ftdata.exporters.formats import BuildFacts, ExportFormat, exporters
from ftdata.progress import Progress, ProgressUpdate
from ftdata.storage import atomic, disk

_log = logging.getLogger(__name__)
_HINT = "build the data set again"


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        format: the name of the format.
        trainer: the trainer, with the version whose loader was tested.
        output_dir: the folder of the export.
        splits: the numbers of `rows`, `documents`, `tokens` and `trained` tokens of each split.
        limitations: the number of affected documents for each limitation that the user accepted.
        files: text files of the export that configure the trainer.
    """

    format: str
    trainer: str
    output_dir: str
    splits: Mapping[str, Mapping[str, int]]
    limitations: Mapping[str, int]
    files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "files": list(self.files)}

    def __str__(self) -> str:
        lines = [
            f"{name:8} {count_noun(split['rows'], 'row')}, {count_noun(split['documents'], 'document')}, "
            f"{count_noun(split['tokens'], 'token')}, {split['trained'] / max(split['tokens'], 1):.1%} trained"
            for name, split in self.splits.items()
        ]
        lines += [f"limited  {name}: {count_noun(count, 'document')}" for name, count in self.limitations.items()]
        lines += [f"exported {self.output_dir} for {self.trainer}"]
        return "\n".join([*lines, *(f"see      {self.output_dir}/{name}" for name in self.files)])


def describe_formats() -> dict[str, dict[str, str]]:
    """Return the properties of all export formats: trainer, rows, labels, document boundaries, padding and limitations.

    >>> describe_formats()["axolotl"]["rows"]
    'documents'
    """
    formats = dict[str, dict[str, str]]()
    for name in exporters.names():
        export_format = exporters.get(name)
        formats[name] = {
            key: getattr(export_format, key) for key in ("trainer", "rows", "labels", "boundaries", "padding")
        }
        if limits := export_format.limitations:
            formats[name]["limitations"] = "; ".join(f"{limitation}: {text}" for limitation, text in limits.items())
    return formats


class _Part(NamedTuple):
    """A pack file of a build, and the folder for its exported files."""

    split: str
    source: Path
    folder: Path


def export(
    build: str | Path,
    to: str,
    output_dir: str | Path,
    *,
    allow: Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the tokens and labels of a build in the input format of a trainer.

    The tokens and labels of the build are copied. No row is rendered or tokenized. An interrupted export can be
    resumed with the same arguments, and never leaves a partial export. Memory does not depend on the size of the build.

    Args:
        build: the folder or URL of a build.
        to: the name of a format, see `ftdata export --list`.
        output_dir: a folder for the export.
        allow: the names of limitations of the format to accept. Without this, an export that would change labels is
            refused.
        overwrite: replace an existing export of another build or format.
        progress: called with a `ProgressUpdate` after each batch.

    Returns:
        The report.

    Raises:
        UsageError: an option is invalid, or the output folder contains other files.
        InputRefused: the build is damaged, or the format cannot represent all labels (`export_limitation`).
        MissingDependency: the package that writes the format is not installed.
        StorageError: the export cannot be written.

    >>> import tempfile
    >>> from ftdata.build.dataset import write_build
    >>> from ftdata.testing import byte_tokenizer
    >>> folder = tempfile.mkdtemp()
    >>> rows = [{"question": "2+2?", "answer": "4"}]
    >>> _ = write_build(rows, byte_tokenizer(), f"{folder}/built", template="chatml")
    >>> report = export(f"{folder}/built", "axolotl", f"{folder}/exported")
    >>> report.splits["train"]["documents"], report.files
    (1, ('axolotl.yaml',))
    """
    export_format = exporters.get(to)
    allowed = frozenset([allow] if isinstance(allow, str) else allow)
    if allowed and not export_format.limitations:
        raise UsageError("unknown_limitation", f"the format {to} has no limitations to allow", hint="remove allow")
    for limitation in allowed:
        check_choice("limitation", limitation, export_format.limitations)
    if not str(output_dir).strip():
        raise UsageError("output_name", "output_dir is empty, expected a folder", hint="check for an unset variable")
    folder = remote.local_build(build)
    manifest = store.read_manifest(folder)
    if (task := manifest["options"].get("task", "sft")) != "sft":
        problem = f"{folder} was built with task: {task}, and export formats contain only conversations without ratings"
        raise InputRefused("export_task", problem, hint="use the columns of the build directly")
    store.check_intact(folder)
    if build_has_images(folder):
        problem = f"the examples of {folder} have images, and export formats contain only tokens and labels"
        raise InputRefused("export_images", problem, hint="use the columns of the build directly")
    target = Path(output_dir).resolve()
    facts = _read_facts(folder, manifest, target)
    request = {"to": to, "allow": sorted(allowed), "build": facts.fingerprint}
    # The code of ftdata is part of the hash, so that a new version does not reuse the files of an old version.
    key = cache.hash_key([request, export_format.trainer, cache.package_hash()])
    about = {"ftdata": __version__, "export": {**request, "trainer": export_format.trainer, "source": str(folder)}}
    with atomic.open_workspace(target, lambda path: _check_target(path, request, overwrite=overwrite)) as workspace:
        if target.exists() and (report := _read_current_report(target, key)):
            return report
        parts = list(_list_parts(folder, facts, workspace.shards / key[:32]))
        report = _export(parts, export_format, facts, to, allowed, workspace.new, progress)
        store.write_manifest(workspace.new, {**about, "key": key, "report": report.as_dict()}, ())
        workspace.publish()
    return report


def _read_facts(folder: Path, manifest: Mapping[str, Any], target: Path) -> BuildFacts:
    """Read the facts about a build from its report and from the sources of its examples."""
    report = orjson.loads((folder / "report.json").read_bytes())
    splits = {name: split["examples"] for name, split in report["splits"].items()}
    is_packed = any(split["examples"] > split["rows"] for split in report["splits"].values())
    tokenizer = manifest["options"]["tokenizer"]["name"]
    content = disk.hash_bytes(disk.encode_json({"files": manifest["files"]}))
    longest = [_find_longest(folder / split / "provenance.parquet") for split, count in splits.items() if count]
    longest_pack, longest_document = (max(lengths) for lengths in zip(*longest, strict=True))
    max_length = manifest["options"].get("max_length") or longest_document
    return BuildFacts(target, tokenizer, splits, is_packed, longest_pack, longest_document, max_length, content[:16])


def _find_longest(provenance: Path) -> tuple[int, int]:
    """Return the number of tokens of the longest pack and of the longest document in a split."""
    longest_pack, longest_document, last_pack, last_tokens = 0, 0, -1, 0
    for batch in pq.ParquetFile(provenance).iter_batches(columns=["pack", "tokens"]):
        packs, tokens = batch["pack"].to_numpy(), batch["tokens"].to_numpy()
        starts = np.flatnonzero(np.diff(packs, prepend=-1))
        sums = np.add.reduceat(tokens, starts)
        # The first pack of a batch may continue a pack of the previous batch.
        sums[0] += last_tokens if packs[0] == last_pack else 0
        last_pack, last_tokens = packs[-1], sums[-1]
        longest_pack = max(longest_pack, int(sums.max()))
        longest_document = max(longest_document, int(tokens.max()))
    return longest_pack, longest_document


def _read(path: Path) -> Iterator[Packs]:
    try:
        yield from read_pack_file(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        problem = f"{path} cannot be read: {describe_exception(error, 2_000)}"
        raise InputRefused("damaged_build", problem, hint=_HINT) from None


def _check_target(target: Path, request: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that the output folder is new or empty, or contains an export that may be replaced.

    Raises:
        UsageError: the folder contains other files, or another export without `overwrite`.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    hint = "choose another output folder"
    try:
        manifest = store.read_any_manifest(target)
        files = {*manifest["files"], "manifest.json"}
        present = manifest["export"]
    except (InputRefused, KeyError, TypeError):
        raise UsageError("target_exists", f"{target} exists and is not an export of ftdata", hint=hint) from None
    if unknown := [name for name, is_link in store.list_files(target) if is_link or name not in files]:
        problem = f"{target} contains files that are not part of the export: {', '.join(unknown[:3])}"
        raise UsageError("target_exists", problem, hint=hint)
    if not overwrite and any(present.get(key) != value for key, value in request.items()):
        problem = f"{target} contains an export with a different build, format or options"
        raise UsageError("target_exists", problem, hint=f"{hint}, or set overwrite=True to replace it")


def _read_current_report(target: Path, key: str) -> ExportReport | None:
    """Return the report of the existing export if it is intact and has the same key."""
    manifest = store.read_any_manifest(target)
    if manifest.get("key") != key or store.verify_files(target):
        return None
    report = manifest["report"]
    return ExportReport(**{**report, "files": tuple(report["files"])})


def _export(
    parts: Sequence[_Part],
    export_format: ExportFormat,
    facts: BuildFacts,
    name: str,
    allowed: frozenset[str],
    target: Path,
    progress: Progress | None,
) -> ExportReport:
    """Write all files of an export, except the manifest, to a folder."""
    totals = {split: Counter(rows=0, documents=0, tokens=0, trained=0) for split in facts.splits}
    affected, resumed, done = Counter[str](), 0, Counter[str]()
    for part in parts:
        result = atomic.read_sealed(part.folder)
        resumed += result is not None
        if result is None:
            disk.remove(part.folder)
            result = _write_part(part, export_format, facts, allowed, progress, done)
        totals[part.split].update(result["counts"])
        affected.update(result["affected"])
        done.update(result["counts"])
    if resumed:
        _log.info("resumed: %d of %d parts of the build were already exported", resumed, len(parts))
    disk.mkdir(target)
    for split in facts.splits:
        if folders := [part.folder for part in parts if part.split == split]:
            export_format.files.collect(target, split, folders)
    texts = export_format.configure(facts)
    for file, text in texts.items():
        disk.write(target / file, text.encode())
    return ExportReport(
        name, export_format.trainer, str(facts.folder), {key: dict(value) for key, value in totals.items()},
        dict(affected), tuple(texts),
    )  # fmt: skip


def _list_parts(folder: Path, facts: BuildFacts, home: Path) -> Iterator[_Part]:
    for split, documents in facts.splits.items():
        for number, path in enumerate(list_pack_files(folder, split) if documents else ()):
            yield _Part(split, path, home.with_name(f"{home.name}-{split}-{number:05d}"))


def _write_part(
    part: _Part,
    export_format: ExportFormat,
    facts: BuildFacts,
    allowed: frozenset[str],
    progress: Progress | None,
    done: Mapping[str, int],
) -> dict[str, Any]:
    """Write the files of a part, seal their folder, and return its counts.

    Raises:
        InputRefused: `export_limitation`: the format cannot represent all labels, and the user did not accept this.
        MissingDependency: the package that writes the files is not installed.
    """
    counts, affected = Counter[str](rows=0, documents=0, tokens=0, trained=0), Counter[str]()

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in _read(part.source):
            packs = batch.without_first_labels()
            packs = packs.split_documents() if export_format.rows == "documents" else packs
            converted = export_format.convert(packs, facts)
            affected.update(export_format.count_affected(packs, converted, facts))
            _check_limitations(export_format, affected, allowed, part.source)
            yield converted
            numbers = {"documents": len(packs.lengths), "tokens": len(packs.ids), "trained": int(packs.trained.sum())}
            counts.update(rows=len(packs), **numbers)
            if progress:
                documents, tokens = (done.get(name, 0) + counts[name] for name in ("documents", "tokens"))
                progress(ProgressUpdate("export", documents, tokens, documents / sum(facts.splits.values())))

    with atomic.publish_folder(part.folder) as scratch:
        try:
            export_format.files.write(scratch, batches())
        except ImportError as error:
            if not export_format.package:
                raise
            problem = f"this format needs the package {export_format.package}: {error}"
            raise MissingDependency("missing_package", problem, hint=f"pip install {export_format.package}") from None
        result = {"counts": dict(counts), "affected": {name: count for name, count in affected.items() if count}}
        atomic.seal_folder(scratch, result)
    return result


def _check_limitations(
    export_format: ExportFormat, affected: Mapping[str, int], allowed: frozenset[str], source: Path
) -> None:
    """Check that the user accepts all limitations that affect documents."""
    for name, count in affected.items():
        if count and name not in allowed:
            documents = count_noun(count, "document")
            problem = f"the format cannot represent all labels of {documents}: {export_format.limitations[name]}"
            hint = f"to export anyway, pass allow={name!r}"
            raise InputRefused("export_limitation", problem, where=str(source), hint=hint)
