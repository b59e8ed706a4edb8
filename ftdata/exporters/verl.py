"""verl: documents with a loss mask, and a data set class that reads them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import token_columns
from ftdata.exporters.files import ParquetFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = '''\
"""A data set for `python -m verl.trainer.sft_trainer`. Add these options to the command:

    data.custom_cls.path={folder}/dataset.py data.custom_cls.name=TokenDataset
    {options}
    data.pad_mode=no_padding data.max_token_len_per_gpu={budget}

max_token_len_per_gpu must not be less than the longest document, which has {longest} tokens.
"""

import glob

import datasets
import torch


class TokenDataset(torch.utils.data.Dataset):
    """Documents with the tensors `input_ids`, `position_ids` and `loss_mask` of shape [tokens].

    Element i of `loss_mask` belongs to token i; the trainer shifts the mask.
    """

    def __init__(self, parquet_files, max_samples=-1, **_):
        paths = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        rows = datasets.Dataset.from_parquet(sorted(file for path in paths for file in glob.glob(path)))
        self.rows = rows.select(range(max_samples)) if 0 < max_samples < len(rows) else rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        ids = torch.tensor(row["input_ids"])
        return {{"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": torch.tensor(row["loss_mask"])}}
'''
_DEFAULT_BUDGET = 8192


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    return token_columns(packs, input_ids=packs.ids, loss_mask=packs.trained.astype(np.int8))


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    splits = {"train": "train", "val": facts.test_split}
    # The quotation marks prevent the shell from expanding the asterisk.
    options = " ".join(f"'data.{key}_files={facts.folder}/{split}-*.parquet'" for key, split in splits.items() if split)
    longest = facts.longest_document
    text = _SCRIPT.format(folder=facts.folder, options=options, longest=longest, budget=max(longest, _DEFAULT_BUDGET))
    return {"dataset.py": text}


FORMAT = ExportFormat(
    trainer="verl 0.9.1",
    rows="documents",
    labels="`loss_mask` of the tokens, not shifted",
    boundaries="one document per row",
    padding="none: variable lengths",
    source="`verl/utils/dataset/dataset_utils.py:32`; the loss rolls the mask",
    files=ParquetFiles(),
    convert=_convert,
    configure=_configure,
)
