"""Read an export with LitGPT's collator, through the data module that the export contains."""

import sys
from importlib.metadata import version

import common
import torch
from litgpt.utils import chunked_cross_entropy
from transformers import AutoModelForCausalLM

BATCH_SIZE, LOSS_BATCHES = 4, 2


def main() -> None:
    """Read all batches of the data module. LitGPT's training loop shifts the labels of a batch."""
    export, model, output = common.arguments()
    sys.path.insert(0, str(export))
    import ftdata_tokens

    module = ftdata_tokens.TokenData()
    module.connect(batch_size=BATCH_SIZE)
    module.prepare_data()
    module.setup()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    documents, losses = [], []
    for batch in module.train_dataloader():
        rows = []
        for ids, labels, count in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), batch["token_counts"]["raw"].flatten().tolist(),
            strict=True,
        ):  # fmt: skip
            assert set(labels[count:]) <= {common.IGNORE_INDEX}
            rows.append(ids[:count])
            documents.append((ids[:count], labels[1:count]))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                logits = loaded(batch["input_ids"], use_cache=False).logits
                # The call of `litgpt/finetune/lora.py`.
                losses.append((rows, float(chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:], 0))))
    common.save(output, documents, f"LitGPT {version('litgpt')}", losses)


main()
