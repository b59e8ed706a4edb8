"""`transformers.Trainer`: documents with an attention mask, for `DataCollatorForSeq2Seq`."""

from __future__ import annotations

from collections.abc import Mapping

from ftdata.exporters.columns import convert_documents
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = """\
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

data = load_from_disk({folder!r})
tokenizer = AutoTokenizer.from_pretrained("MODEL")
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained("MODEL"),
    TrainingArguments("run"),
    train_dataset=data["train"],{evaluation}
    data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
)
trainer.train()
"""


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    evaluation = f'\n    eval_dataset=data["{facts.test_split}"],' if facts.test_split else ""
    return {"train.py": _SCRIPT.format(folder=str(facts.folder), evaluation=evaluation)}


FORMAT = ExportFormat(
    trainer="transformers 5.23",
    rows="documents",
    labels="not shifted",
    boundaries="one document per row",
    padding="by `DataCollatorForSeq2Seq`: label -100",
    source="`transformers/data/data_collator.py`, `DataCollatorForSeq2Seq`",
    files=ArrowFiles(),
    convert=convert_documents,
    configure=_configure,
)
