"""Read an export with the data loader of TRL's `SFTTrainer`, and compute losses with it."""

import common
import torch
import transformers
import trl
from datasets import load_from_disk

LOSS_BATCHES = 2


def main() -> None:
    """Read all batches of the trainer's data loader."""
    export, model, output = common.arguments()
    data = load_from_disk(export)["train"]
    is_packed = max(map(len, data["seq_lengths"])) > 1
    config = trl.SFTConfig(
        str(output.with_suffix("")),
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        padding_free=is_packed,
        max_length=None,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = trl.SFTTrainer(loaded, args=config, train_dataset=data)
    documents, losses = [], []
    for batch in trainer.get_train_dataloader():
        first = len(documents)
        for row in range(len(batch["input_ids"])):
            ids, labels = (batch[name][row].tolist() for name in ("input_ids", "labels"))
            if is_packed:
                positions = batch["position_ids"][row].tolist()
                # The collator of TRL sets the label of the first token of each document to -100.
                documents += common.split_by_positions(ids, common.shift(labels), positions)
            else:
                length = int(batch["attention_mask"][row].sum())
                assert set(labels[length:]) <= {-100}
                documents.append((ids[:length], common.shift(labels[:length])[:-1]))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                losses.append(([ids for ids, _ in documents[first:]], float(trainer.compute_loss(loaded, dict(batch)))))
    common.save(output, documents, f"TRL {trl.__version__}", losses)


main()
