"""LitGPT: documents for a data module."""

from __future__ import annotations

from collections.abc import Mapping

from ftdata.exporters.columns import convert_labels
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = '''\
"""The data module for LitGPT, with this folder on PYTHONPATH:

litgpt finetune_lora MODEL --data ftdata_tokens.TokenData --train.max_seq_length {max_length}
"""

import pathlib
from dataclasses import dataclass, field

import torch
from datasets import load_from_disk
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default


class TokenRows(torch.utils.data.Dataset):
    """The documents of a split as tensors of shape [tokens]."""

    # At each evaluation, LitGPT prints an answer to this instruction.
    data = [{{"instruction": "Hello"}}]

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        ids, labels = (torch.tensor(row[name], dtype=torch.int64) for name in ("input_ids", "labels"))
        counts = {{"raw": len(ids), "raw_plus_prompt_template": len(ids)}}
        return {{"input_ids": ids, "labels": labels, "token_counts": counts}}


@dataclass
class TokenData(DataModule):
    """Documents with labels. LitGPT shifts the labels, and pads a batch with 0 and -100."""

    prompt_style: Default = field(default_factory=Default)
    num_workers: int = 0
    batch_size: int = field(init=False, repr=False, default=1)

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        if max_seq_length is not None and 0 < max_seq_length < {longest}:
            raise ValueError(f"max_seq_length is {{max_seq_length}}, expected at least {longest}")
        self.batch_size = batch_size

    def setup(self, stage=""):
        splits = load_from_disk(pathlib.Path(__file__).parent)
        self.train_dataset = TokenRows(splits["train"])
        # Without a test split, LitGPT evaluates on the training data.
        self.test_dataset = TokenRows(splits[{validation!r}])

    def _loader(self, dataset, shuffle):
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=get_sft_collate_fn(max_seq_length={longest}, pad_id=0, ignore_index=-100),
            num_workers=self.num_workers,
        )

    def train_dataloader(self):
        return self._loader(self.train_dataset, True)

    def val_dataloader(self):
        return self._loader(self.test_dataset, False)
'''


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    validation = facts.test_split or "train"
    text = _SCRIPT.format(longest=facts.longest_document, max_length=facts.max_length, validation=validation)
    return {"ftdata_tokens.py": text}


FORMAT = ExportFormat(
    trainer="LitGPT 0.5.13",
    rows="documents",
    labels="not shifted",
    boundaries="one document per row",
    padding="by the collator of LitGPT: label -100",
    source="`litgpt/finetune/lora.py`, `chunked_cross_entropy`",
    files=ArrowFiles(),
    convert=convert_labels,
    configure=_configure,
)
