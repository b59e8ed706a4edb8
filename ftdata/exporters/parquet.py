"""Parquet files for any other tool: tokens, labels, positions and document numbers."""

from __future__ import annotations

import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import token_columns
from ftdata.exporters.files import ParquetFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    return token_columns(
        packs,
        input_ids=packs.ids,
        labels=packs.labels,
        position_ids=packs.positions,
        document_ids=packs.document_numbers,
    )


FORMAT = ExportFormat(
    trainer="datasets 5.2",
    rows="packs",
    labels="not shifted",
    boundaries="columns `position_ids` and `document_ids`",
    padding="none",
    source="the trainer must read `labels`",
    files=ParquetFiles(),
    convert=_convert,
)
