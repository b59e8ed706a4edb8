"""Axolotl: a tokenized data set, and the lines of the configuration that load it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ftdata.exporters.columns import convert_documents
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat

_LINES = """\
# Copy these lines to your configuration. Axolotl recognizes tokenized data by its columns, so `type` is empty.
datasets:
  - path: {train}
    type:
{test_datasets}# Axolotl caches prepared data by path, even if the data has changed.
dataset_prepared_path: last_run_prepared/{fingerprint}
shuffle_merged_datasets: false
sequence_len: {max_length}
excess_length_strategy: raise
# Documents are packed by Axolotl. Without packing, set sample_packing: false.
sample_packing: true
# With this setting, packed documents do not attend to each other. flash_attention_2 has the same effect.
attn_implementation: sdpa
eval_sample_packing: false
"""


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    # A JSON string is a valid YAML string, whatever characters the path contains.
    test = json.dumps(f"{facts.folder}/{facts.test_split}")
    lines = f"test_datasets:\n  - path: {test}\n    split: train\n    type:\n"
    return {
        "axolotl.yaml": _LINES.format(
            train=json.dumps(f"{facts.folder}/train"),
            test_datasets=lines if facts.test_split else "",
            fingerprint=facts.fingerprint,
            max_length=facts.max_length,
        )
    }


FORMAT = ExportFormat(
    trainer="Axolotl 0.19.0",
    rows="documents",
    labels="not shifted",
    boundaries="one document per row; `sample_packing` packs them, `attn_implementation` isolates them",
    padding="by the collator of Axolotl: label -100",
    source="`axolotl/utils/data/wrappers.py:93`",
    files=ArrowFiles(),
    convert=convert_documents,
    configure=_configure,
)
