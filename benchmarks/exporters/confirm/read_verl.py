"""Read an export with verl's collator, through the data set class that the export contains."""

import sys
from importlib.metadata import version

import common
import torch
from torch.utils.data import DataLoader

BATCH_SIZE = 4


def main() -> None:
    """Read all batches. verl's loss masks are shifted by `torch.roll` in the loss."""
    export, _, output = common.arguments()
    sys.path.insert(0, str(export))
    from dataset import TokenDataset
    from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator

    data = TokenDataset(str(export / "train-*.parquet"), tokenizer=None, config=None)
    documents = []
    for batch in DataLoader(data, BATCH_SIZE, collate_fn=SFTTensorCollator(DatasetPadMode.NO_PADDING)):
        rows = [batch[name].unbind() for name in ("input_ids", "loss_mask", "position_ids")]
        # The loss concatenates the rows, and rolls the tokens and the masks by one.
        masks = torch.roll(batch["loss_mask"].values(), -1).split([len(ids) for ids in rows[0]])
        for ids, mask, positions in zip(rows[0], masks, rows[2], strict=True):
            assert positions.tolist() == list(range(len(ids)))
            assert not mask[-1], "the first token of the next document is trained"
            targets = torch.where(mask.bool(), ids.roll(-1), common.IGNORE_INDEX)
            documents.append((ids.tolist(), targets[:-1].tolist()))
    common.save(output, documents, f"verl {version('verl')}")


if __name__ == "__main__":
    main()
