"""Read an export with `datasets` and `DataCollatorForSeq2Seq`, and compute losses with `transformers.Trainer`."""

import common
import torch
import transformers
from datasets import load_from_disk

BATCH_SIZE, LOSS_BATCHES = 4, 2


def main() -> None:
    """Read all batches of the trainer's data loader."""
    export, model, output = common.arguments()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    trainer = transformers.Trainer(
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        transformers.TrainingArguments(
            str(output.with_suffix("")), per_device_train_batch_size=BATCH_SIZE, use_cpu=True, report_to="none"
        ),
        train_dataset=load_from_disk(export)["train"],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    documents, losses = [], []
    for batch in trainer.get_train_dataloader():
        rows = []
        for ids, mask, labels in zip(
            *(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            length = sum(mask)
            assert set(labels[length:]) <= {-100}
            rows.append(ids[:length])
            documents.append((ids[:length], common.shift(labels[:length])[:-1]))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                losses.append((rows, float(trainer.compute_loss(trainer.model, batch))))
    common.save(output, documents, f"transformers {transformers.__version__}", losses)


main()
