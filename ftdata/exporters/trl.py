"""TRL's `SFTTrainer`: the columns of a build, which TRL accepts without its own preparation."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage.arrow_arrays import int32_array

_SCRIPT = """\
from datasets import load_from_disk
from trl import SFTConfig, SFTTrainer

data = load_from_disk({folder!r})
config = SFTConfig(
    output_dir="run",
    dataset_kwargs={{"skip_prepare_dataset": True}},
    packing=False,
    padding_free={is_packed},
    max_length=None,
)
trainer = SFTTrainer("MODEL", args=config, train_dataset=data["train"]{evaluation})
trainer.train()
"""


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    bounds = packs.pack_bounds
    lengths = pa.ListArray.from_arrays(int32_array(packs.document_bounds), int32_array(packs.lengths))
    columns = {"input_ids": packs.ids, "labels": packs.labels}
    return make_batch(
        {**{name: list_column(values, bounds) for name, values in columns.items()}, "seq_lengths": lengths}
    )


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    evaluation = f', eval_dataset=data["{facts.test_split}"]' if facts.test_split else ""
    return {"train.py": _SCRIPT.format(folder=str(facts.folder), is_packed=facts.is_packed, evaluation=evaluation)}


FORMAT = ExportFormat(
    trainer="TRL 1.16",
    rows="packs",
    labels="not shifted",
    boundaries="column `seq_lengths`; TRL computes positions from it with `padding_free=True`",
    padding="by the collator of TRL: label -100; none if packed",
    source="`trl/trainer/sft_trainer.py`, `DataCollatorForLanguageModeling`",
    files=ArrowFiles(),
    convert=_convert,
    configure=_configure,
)
