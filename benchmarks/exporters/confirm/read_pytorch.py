"""Read an export with the module `data.py` that the export contains, and compute losses with transformers."""

import sys

import common
import torch
import transformers

LOSS_BATCHES = 2


def main() -> None:
    """Read all batches of the data loader."""
    export, model, output = common.arguments()
    sys.path.insert(0, str(export))
    import data

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    documents, losses = [], []
    for batch in data.load("train"):
        ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        row = common.split_by_positions(ids, common.shift(labels), positions)
        documents += row
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                losses.append(([ids for ids, _ in row], float(loaded(**batch, use_cache=False).loss)))
    common.save(output, documents, f"PyTorch {torch.__version__}", losses)


main()
